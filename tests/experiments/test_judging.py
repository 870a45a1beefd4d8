"""Pictures are judged against their prompts, by themselves where that is wanted, and compared with device-only ones."""

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from experiments.judging import Judge, with_difference
from semct.quality import ClipScorer, ScorerError, load_scorer
from semct.runs import RequestRow


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {name: png(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for name in ("one", "two")}


def test_without_an_objective_scorer_there_is_no_fidelity() -> None:
    shown, asked = pictures(), {"one": "a cat at night", "two": "a bus", "three": "never drawn"}
    found = Judge.load("embedded", None).judge(shown, asked)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(p))) for p in shown.values()])
    scores = load_scorer().score(pixels, ["a cat at night", "a bus"])
    assert [found[name].quality for name in shown] == pytest.approx(scores.tolist())
    assert all(judgement.fidelity is None for judgement in found.values())
    assert Judge.load("embedded", None).judge({}, asked) == {}


def test_a_clip_model_beside_the_scorer_gives_fidelity(clip_folder: Path) -> None:
    shown, asked = pictures(), {"one": "a b", "two": "c"}
    both = Judge.load("embedded", str(clip_folder)).judge(shown, asked)
    alone = Judge.load("embedded", None).judge(shown, asked)
    clip = Judge.load(str(clip_folder), str(clip_folder)).judge(shown, asked)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(p))) for p in shown.values()])
    assessed = ClipScorer(clip_folder).assess(pixels, ["a b", "c"])
    for i, name in enumerate(shown):
        assert both[name].quality == alone[name].quality
        assert both[name].fidelity == pytest.approx(float(assessed.fidelity[i]), abs=1e-5)
        assert clip[name] == pytest.approx((float(assessed.score[i]), float(assessed.fidelity[i])), abs=1e-5)


def test_what_cannot_judge_a_picture_by_itself_is_refused() -> None:
    with pytest.raises(ScorerError, match="'embedded' cannot judge a picture by itself; name a CLIP model"):
        Judge.load("embedded", "embedded")


def row(framework: str, image: str | None, device: str = "d1", seed: int = 1) -> RequestRow:
    return RequestRow(
        round=framework,
        framework=framework,
        repetition=0,
        request=framework,
        device=device,
        prompt="a cat",
        seed=seed,
        steps=28,
        outcome="answered",
        image=image,
    )


def test_pictures_are_compared_with_the_same_users_device_only_one(tmp_path: Path) -> None:
    flat = np.full((8, 8, 3), 100, np.uint8)
    brighter = flat.copy()
    brighter[:4] += 10
    for name, content in {"alone": flat, "brighter": brighter, "large": np.zeros((9, 9, 3), np.uint8)}.items():
        (tmp_path / f"{name}.png").write_bytes(png(content))
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    rows = [
        row("semct", "brighter.png"),  # before the reference: the order of frameworks does not matter
        row("device-only", "alone.png"),
        row("edge-only", "alone.png"),
        row("other-user", "brighter.png", device="d2"),
        row("other-noise", "brighter.png", seed=2),
        row("other-size", "large.png"),
        row("torn", "torn.png"),
        row("lost", None),
    ]
    found = {r.framework: r.pixel_difference for r in with_difference(rows, tmp_path)}
    assert found.pop("semct") == pytest.approx(5.0)
    assert found.pop("edge-only") == 0.0
    assert set(found.values()) == {None}
    assert with_difference(rows[:1], tmp_path) == rows[:1]
