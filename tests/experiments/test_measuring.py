"""Measuring quality: prompts take their turns at the cuts, and what was measured is not measured again."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from experiments.measuring import Journal, JournalError, Row, Setting, measure, noise_seed, pictures_of, read_journal
from semct.diffusion import Denoiser
from semct.quality import load_scorer

STEPS = 4
SETTING = Setting(
    model="embedded", scorer="embedded", steps=STEPS, guidance=4.0, dtype="float32", cuts=((0,), (2,), (4,))
)
ROWS = [Row(("a cat", "a dog"), 0, (0.9, 0.5, 0.1)), Row(("a bus", "a dog"), 1, (0.8, 0.4, 0.2))]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser.load("embedded")


def test_pictures_are_those_of_the_prompts_in_turn(denoiser: Denoiser) -> None:
    courses = [("a bus", "a cat at night", "a dog in the snow"), ("a cat", "a bus", "a sunflower")]
    cuts = [(0, 0), (0, 2), (1, 1), (1, 3), (4, 4), (0, 4)]
    found = dict(pictures_of(denoiser, courses, [1, 2], cuts, STEPS))
    assert sorted(found) == list(range(len(cuts)))
    for i, (a, b) in enumerate(cuts):
        latents = [denoiser.noise(1), denoiser.noise(2)]
        for level, (start, stop) in enumerate([(0, a), (a, b), (b, STEPS)]):
            latents = denoiser.run(latents, start, stop, STEPS, [course[level] for course in courses])
        np.testing.assert_array_equal(found[i], denoiser.decode(latents))


def test_every_common_beginning_is_run_once(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    run = []
    step = Denoiser.step

    def counting(self, latents, at, of, conditionings):  # type: ignore[no-untyped-def]
        run.append(at[0])
        return step(self, latents, at, of, conditionings)

    monkeypatch.setattr(Denoiser, "step", counting)
    assert len(list(pictures_of(denoiser, [("a bus", "a cat")], [0], [(0,), (2,), (4,), (2,)], STEPS))) == 4
    assert sorted(run) == sorted([0, 1, 2, 3] * 2 + [2, 3])  # the public prompt's four once, and two ends


def test_rows_hold_the_score_of_each_cut(denoiser: Denoiser) -> None:
    scorer = load_scorer("embedded")
    rows = measure(denoiser, scorer, [(("a bus", "a cat"), 3), (("a dog", "a cat"), 3)], SETTING)
    assert [row.prompts for row in rows] == [("a bus", "a cat"), ("a dog", "a cat")]
    assert all(row.seed == 3 and row.fidelity == () for row in rows)
    # Without shared steps both are the personal prompt's own picture.
    assert rows[0].scores[0] == pytest.approx(rows[1].scores[0], abs=1e-3)
    latents = denoiser.run([denoiser.noise(noise_seed("a cat", 3))], 0, STEPS, STEPS, ["a bus"])
    alone = scorer.score(denoiser.decode(latents), ["a cat"])[0]
    assert rows[0].scores[2] == pytest.approx(alone, abs=1e-2)


def test_a_clip_scorer_adds_fidelity(denoiser: Denoiser, clip_folder: Path) -> None:
    (row,) = measure(denoiser, load_scorer(str(clip_folder)), [(("a bus", "a cat"), 0)], SETTING)
    assert len(row.fidelity) == len(row.scores) == 3
    assert all(0 < value < 1 for value in row.fidelity)


def test_noise_is_a_prompts_own() -> None:
    assert noise_seed("a cat", 0) == noise_seed("a cat", 0)
    assert len({noise_seed(prompt, seed) for prompt in ("a cat", "a dog") for seed in range(50)}) == 100


def test_a_journal_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "measurements.jsonl"
    with Journal(path, SETTING) as journal:
        journal.add(ROWS[:1])
        journal.add(ROWS[1:])
    assert read_journal(path) == (SETTING, ROWS)
    with Journal(path, SETTING) as journal:
        assert journal.rows == ROWS


def test_a_journal_goes_on_behind_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    with Journal(path, SETTING) as journal:
        journal.add(ROWS)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with Journal(path, SETTING) as journal:
            missing = [row for row in ROWS if row not in journal.rows]
            journal.add(missing)
        assert path.read_bytes() == whole


def test_a_journal_of_another_measurement_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    with Journal(path, SETTING) as journal:
        journal.add(ROWS)
    before = path.read_bytes()
    other = msgspec.structs.replace(SETTING, scorer="clip", steps=8)
    with pytest.raises(JournalError, match=r"scorer embedded, not clip; steps 4, not 8"), Journal(path, other):
        pass
    assert path.read_bytes() == before


def test_what_is_no_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    path.write_text("public,personal\na,b\n")
    with pytest.raises(JournalError, match="is no journal of a quality measurement"):
        read_journal(path)
    with pytest.raises(JournalError, match="cannot be read: No such file"):
        read_journal(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be written"), Journal(tmp_path / "file" / "journal", SETTING):
        pass
