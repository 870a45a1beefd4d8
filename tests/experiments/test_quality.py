"""`semct quality`: from prompts or a published file to curves, a plot, and a word about what went wrong."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from experiments import quality
from experiments.cli import app
from experiments.measuring import Row, Setting, read_journal
from experiments.quality import BadQualityOrder, Order, draw_pairs, parse_cuts, read_courses, read_published
from semct.prompts import load_sentence_encoder
from semct.quality import load_quality_model
from semct.quality_fit import Measurements, bands_of, fit

PROMPTS = ("a cat at night", "a dog in the snow", "a bus", "a sunflower by the sea", "a kitten at night")


def semct(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["quality", *map(str, arguments)])


def write_published(folder: Path, prompts: int = 8) -> tuple[Path, Path]:
    """Files in the form of the published ones: noisy scores of the shipped model, and similarities."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(prompts, 4)) + 1
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = vectors @ vectors.T
    scores = load_quality_model("sd3-medium").quality(likeness[..., None], np.arange(0, 28, 3))
    scores += rng.normal(0, 0.01, scores.shape)
    similarity, published = folder / "similarity.csv", folder / "published.csv"
    lines = [",".join(["prompt", *(f"p{i}" for i in range(prompts))])]
    similarity.write_text("\n".join(lines + [",".join(map(str, [i, *likeness[i]])) for i in range(prompts)]))
    header = ",".join(["public", "personal", *(f"k{k}" for k in range(0, 28, 3))])
    rows = [",".join(map(str, [i, j, *scores[i, j]])) for i in range(prompts) for j in range(prompts)]
    published.write_text("\n".join([header, *rows]))
    return published, similarity


def test_a_killed_measurement_goes_on_where_it_was(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    lines = [f'"{a}","{b}"' for a in PROMPTS for b in PROMPTS if a != b][:12]
    pairs.write_text("public,personal\n" + "\n".join(lines))
    wanted = ["--pairs", pairs, "--steps", 4, "--at", "0 1 2 4", "--batch", 1, "--out", tmp_path / "out"]
    journal = tmp_path / "out" / "measurements.jsonl"
    root = str(Path(quality.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", "quality", *map(str, wanted)],
        env={**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read_journal(journal)[1]
    assert 2 <= len(before) < 12

    found = semct(*wanted)
    assert found.exit_code == 0, found.output
    assert "of 12 are in the journal already" in found.stdout
    assert "12 of 12 measured" in found.stdout
    rows = read_journal(journal)[1]
    assert rows[: len(before)] == before
    assert len({row.prompts for row in rows}) == len(rows) == 12
    model = load_quality_model(tmp_path / "out" / "curves.json")
    assert (model.model, model.scorer, model.steps, model.pairs) == ("embedded", "embedded", 4, 12)
    assert model.coefficients.ceiling > model.quality(0.2, 4)
    assert "<svg" in (tmp_path / "out" / "curves.svg").read_text()
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_published_measurements_are_fitted(tmp_path: Path) -> None:
    published, similarity = write_published(tmp_path)
    arguments = [
        "--fit",
        published,
        "--similarity",
        similarity,
        "--model",
        "sd3",
        "--scorer",
        "clip",
        "--out",
        tmp_path / "sd3",
    ]
    found = semct(*arguments)
    assert found.exit_code == 0, found.output
    assert "on unseen pairs" in found.stdout
    model = load_quality_model(tmp_path / "sd3" / "curves.json")
    assert (model.model, model.scorer, model.pairs, model.measurements) == ("sd3", "clip", 56, 560)
    assert model.errors.unseen == pytest.approx(0.01, rel=0.2)


def test_published_prompts_may_stand_in_words(tmp_path: Path) -> None:
    path = tmp_path / "words.csv"
    path.write_text("public,personal,k0,k4\na cat,a dog,.3,.2\na dog,a cat,.3,.1\na cat,a cat,.3,.3\n")
    encoder = load_sentence_encoder()
    measured = read_published(path, None, lambda: encoder)
    expected = encoder.similarity(["a cat"], ["a dog"])[0, 0]
    np.testing.assert_allclose(measured.similarity, [expected, expected, 1], atol=1e-5)
    np.testing.assert_array_equal(measured.shared, [0, 4])
    np.testing.assert_array_equal(measured.scores[:, 1], [0.2, 0.1, 0.3])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "should have the columns public,personal,k0"),
        ("public,personal,k0,k4\n0,1,.3,\n", "should hold equally many numbers"),
        ("public,personal,k0,k4\n0,1,.3,nan\n", "should hold 2 numbers on every line"),
        ("public,personal,k0,k4\n0,99,.3,.2\n", "holds no similarity of every two prompts"),
        ("public,personal,k0,k4\n", "holds no lines below its header"),
    ],
)
def test_a_published_file_that_is_not_one_is_refused(tmp_path: Path, text: str, said: str) -> None:
    _, similarity = write_published(tmp_path, 3)
    path = tmp_path / "broken.csv"
    path.write_text(text)
    with pytest.raises(BadQualityOrder, match=said):
        read_published(path, similarity, load_sentence_encoder)


def test_a_wrong_order_is_one_sentence(tmp_path: Path) -> None:
    for arguments, said in (
        (["--pairs", tmp_path / "nothing.csv"], "nothing.csv cannot be read"),
        (["--prompts", "nothing"], "there is no prompt set 'nothing'"),
        (["--at", "0 40"], "'40' is no place to hand over"),
    ):
        found = semct(*arguments, "--out", tmp_path)
        assert found.exit_code == 1
        assert found.stderr.startswith("semct: ")
        assert found.stderr.count("\n") == 1
        assert said in found.stderr


def test_courses_are_pairs_or_triples(tmp_path: Path) -> None:
    path = tmp_path / "courses.csv"
    path.write_text('root,public,personal\n"something, outside",a cat,a kitten\na,b,c\na,b,c\n')
    assert read_courses(path) == (("something, outside", "a cat", "a kitten"), ("a", "b", "c"))
    path.write_text("public,personal\nb | a | b,c\na | a,c\n")
    assert read_courses(path) == ((("a", "b", "b"), "c"), ("a", "c"))
    path.write_text("personal,public\na,b\n")
    with pytest.raises(BadQualityOrder, match="has the columns personal,public"):
        read_courses(path)
    path.write_text("public,personal\na,b\nc,\n")
    with pytest.raises(BadQualityOrder, match=r"line 3: there should be 2 prompts"):
        read_courses(path)


def test_cuts_are_read_or_every_fourth() -> None:
    assert parse_cuts("0 8,12", 1, 28) == ((0,), (8,), (12,))
    assert parse_cuts("0-0 4-12", 2, 28) == ((0, 0), (4, 12))
    assert parse_cuts("", 1, 10) == ((0,), (4,), (8,), (10,))
    grid = parse_cuts("", 2, 28)
    assert (0, 0) in grid
    assert (12, 28) in grid
    assert all(a <= b and a <= 14 for a, b in grid)
    for text, levels in (("x", 1), ("4-2", 2), ("4", 2), ("4-8", 1), ("29", 1), ("-1", 1)):
        with pytest.raises(BadQualityOrder, match="is no place to hand over"):
            parse_cuts(text, levels, 28)


def test_pairs_are_drawn_from_every_band() -> None:
    encoder = load_sentence_encoder()
    pairs = draw_pairs([*PROMPTS, "a bus"], encoder, 2, seed=0)
    assert len(set(pairs)) == len(pairs)
    assert all(public != personal for public, personal in pairs)
    similarity = np.array([encoder.similarity([a], [b])[0, 0] for a, b in pairs])
    assert all(chosen.sum() <= 2 for _, chosen in bands_of(similarity))
    assert draw_pairs(["a bus", "a bus"], encoder, 2, seed=0) == ()


def test_means_are_drawn_measured_and_fitted(tmp_path: Path) -> None:
    encoder = load_sentence_encoder()
    blends = quality.draw_blends(PROMPTS, encoder, 6, seed=0)
    assert blends == quality.draw_blends([*PROMPTS, PROMPTS[0]], encoder, 6, seed=0)
    assert {len(public) for public, _ in blends} == {2, 3, 4}  # there are but five prompts
    assert any(personal in public for public, personal in blends)
    pairs = draw_pairs(PROMPTS, encoder, 3, seed=0)
    cuts = ((0,), (1,), (2,), (4,))
    order = Order(
        model="embedded", scorer="embedded", courses=(*pairs, *blends[:4]), seeds=(0,), cuts=cuts, steps=4, rows=24
    )
    console = Console(width=100, record=True, file=io.StringIO())
    quality.measure_and_fit(order, tmp_path, console, against="embedded")
    setting, rows = read_journal(tmp_path / "measurements.jsonl")
    assert [row.prompts for row in rows] == [*pairs, *blends[:4]]
    words, means = quality.tabulate(setting, rows, encoder)
    assert words.pairs == len(pairs)
    assert means is not None
    vectors = encoder.embed([str(blends[0][1]), *blends[0][0]])
    assert means.similarity[0] == pytest.approx(float((vectors[1:] @ vectors[0]).mean()), abs=1e-6)
    assert isinstance(means.own, np.ndarray)
    assert means.own[0] == (1 / len(blends[0][0]) if blends[0][1] in blends[0][0] else 0)
    assert "if they counted as sentences" in console.export_text()
    assert load_quality_model(tmp_path / "curves.json").pairs == len(pairs) + 4


def test_triples_are_compared_with_a_quality_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    courses = (("a bus", "a cat", "a kitten at night"), ("a dog", "a sunflower", "a bus"))
    cuts = ((0, 0), (0, 4), (1, 2))
    order = Order(model="embedded", scorer="embedded", courses=courses, seeds=(0,), cuts=cuts, steps=4)
    quality.measure_and_fit(order, tmp_path, Console(width=100), against="embedded")
    printed = capsys.readouterr().out
    assert "root until" in printed
    assert not (tmp_path / "curves.json").exists()
    setting, rows = read_journal(tmp_path / "measurements.jsonl")
    assert setting.cuts == cuts
    assert [row.prompts for row in rows] == list(courses)


def test_the_errors_of_levels_are_those_of_the_model() -> None:
    model, encoder = load_quality_model("embedded"), load_sentence_encoder()
    cuts = ((0, 0), (2, 7), (7, 7))
    setting = Setting(model="", scorer="", steps=14, guidance=4.0, dtype="float32", cuts=cuts)
    prompts = ("a bus", "a cat", "a kitten at night")
    phi = encoder.similarity(prompts[:2], prompts[2:])[:, 0]
    exact = model.quality_of_segments(phi, np.array(cuts) * 2)
    rows = [Row(prompts, 0, tuple(exact + 0.1)), Row(prompts, 1, tuple(exact - 0.1))]
    for i, error in enumerate(quality.check_levels(model, setting, rows, encoder)):
        assert error.measured == pytest.approx(exact[i])
        assert error.predicted == pytest.approx(exact[i], abs=1e-6)
        assert error.error == pytest.approx(0.1, abs=1e-6)
        assert error.unexplained == pytest.approx(0.1, abs=1e-6)


@pytest.mark.filterwarnings("error")
def test_few_pairs_are_drawn_and_their_errors_said_to_be_unknown(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids, similarity = np.arange(8), np.linspace(0, 0.9, 8)  # no two in a band
    scores = load_quality_model("embedded").quality(similarity[:, None], np.arange(0, 29, 4))
    scores += rng.normal(0, 0.01, scores.shape)
    measured = Measurements(ids % 4, (ids + 1) % 5, similarity, np.arange(0, 29, 4.0), scores)
    model = fit(measured, model="mine", scorer="mine", steps=28, source="a test")
    console = Console(width=100, record=True, file=io.StringIO())
    quality.deliver(model, measured, tmp_path, console)
    assert "unknown: too few prompts" in console.export_text()
    assert (tmp_path / "curves.svg").stat().st_size > 1000


def test_a_model_is_written_as_it_is_read(tmp_path: Path) -> None:
    model = msgspec.structs.replace(load_quality_model("embedded"), source="elsewhere")
    quality.write_model(model, tmp_path / "deep" / "curves.json")
    assert load_quality_model(tmp_path / "deep" / "curves.json") == model
