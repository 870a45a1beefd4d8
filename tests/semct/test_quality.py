"""Scorers tell right captions from wrong ones; curves and quality models keep what they are fitted to."""

import itertools
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semct.quality import (
    ClipScorer,
    Coefficients,
    QualityModel,
    QualityModelError,
    Scorer,
    ScorerError,
    load_quality_model,
    load_scorer,
)
from semct.training.scenes import BACKGROUNDS, HELD_OUT, THINGS, Scene, caption, render_all

MODELS = st.builds(
    Coefficients,
    ceiling=st.floats(0.1, 1),
    fall=st.floats(0, 1.2),
    power=st.floats(0.3, 4),
    bend=st.floats(0, 20),
    middle=st.floats(4, 24),
    middle_slope=st.floats(-10, 10),
    steepness=st.floats(-2.5, 0),
    steepness_slope=st.floats(-1, 1),
).map(lambda coefficients: msgspec.structs.replace(load_quality_model("embedded"), coefficients=coefficients))


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return load_scorer("embedded")


def scenes(count: int) -> list[Scene]:
    rng = random.Random(5)
    return [Scene(rng.randrange(len(THINGS)), rng.randrange(len(BACKGROUNDS))) for _ in range(count)]


def captions(of: list[Scene]) -> list[str]:
    rng = random.Random(6)
    return [caption(scene, rng) for scene in of]


def test_the_embedded_scorer_prefers_the_right_caption(scorer: Scorer) -> None:
    drawn = scenes(60)
    texts, pictures = captions(drawn), render_all(drawn)
    right = scorer.score(pictures, texts)
    wrong = scorer.score(pictures, texts[1:] + texts[:1])
    assert right.dtype == np.float32
    assert right.shape == (60,)
    assert np.mean(right > wrong) >= 0.95
    assert right.mean() - wrong.mean() > 0.4


def test_the_embedded_scorer_knows_combinations_it_never_saw(scorer: Scorer) -> None:
    held_out = [Scene(*pair) for pair in sorted(HELD_OUT)]
    texts, pictures = captions(held_out), render_all(held_out)
    right = scorer.score(pictures, texts)
    wrong = scorer.score(pictures, texts[1:] + texts[:1])
    assert np.mean(right > wrong) >= 0.9


def test_a_blend_of_two_pictures_scores_less_than_either(scorer: Scorer) -> None:
    drawn = scenes(20)
    texts, pictures = captions(drawn), render_all(drawn)
    blends = ((pictures.astype(int) + np.roll(pictures, 1, axis=0)) // 2).astype(np.uint8)
    assert np.mean(scorer.score(blends, texts) < scorer.score(pictures, texts)) >= 0.95


def test_larger_pictures_are_scaled_down(scorer: Scorer) -> None:
    drawn = scenes(4)
    texts, pictures = captions(drawn), render_all(drawn)
    larger = pictures.repeat(4, axis=1).repeat(4, axis=2)
    np.testing.assert_allclose(scorer.score(larger, texts), scorer.score(pictures, texts), atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "dtype", "prompts"),
    [((2, 64, 64, 3), np.uint8, 1), ((1, 64, 64), np.uint8, 1), ((1, 64, 64, 3), np.float32, 1)],
)
def test_what_does_not_belong_together_is_refused(
    scorer: Scorer, shape: tuple[int, ...], dtype: type, prompts: int
) -> None:
    with pytest.raises(ScorerError):
        scorer.score(np.zeros(shape, dtype), ["a cat"] * prompts)


def test_nothing_to_score(scorer: Scorer) -> None:
    assert scorer.score(np.zeros((0, 64, 64, 3), np.uint8), []).shape == (0,)


def test_a_clip_model_scores_from_a_folder(clip_folder: Path) -> None:
    clip = load_scorer(str(clip_folder))
    assert isinstance(clip, ClipScorer)
    pictures = np.random.default_rng(0).integers(0, 256, (35, 48, 48, 3), dtype=np.uint8)
    prompts = [f"{a} {b} and much more than sixteen tokens" for a, b in itertools.product("abcde", "fghijkl")]
    scores = clip.score(pictures, prompts)
    assert scores.shape == (35,)
    assert scores.dtype == np.float32
    assert np.all(np.abs(scores) <= 1)
    np.testing.assert_allclose(clip.score(pictures[33:34], prompts[33:34]), scores[33:34], atol=1e-5)
    assert clip.score(pictures[:0], []).shape == (0,)


def test_a_clip_model_judges_pictures_by_themselves_in_the_same_pass(clip_folder: Path) -> None:
    clip = ClipScorer(clip_folder)
    pictures = np.random.default_rng(1).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    found = clip.assess(pictures, ["a", "b", "c"])
    np.testing.assert_array_equal(found.score, clip.score(pictures, ["a", "b", "c"]))
    assert found.fidelity.shape == (3,)
    assert np.all((found.fidelity > 0) & (found.fidelity < 1))
    # What was asked for does not matter to it, and neither do the neighbours.
    other = clip.assess(pictures[1:], ["x y z", "d"])
    np.testing.assert_allclose(other.fidelity, found.fidelity[1:], atol=1e-5)
    # It is the antonyms' softmax: their cosines, scored apart, times the model's temperature.
    good, bad = (clip.score(pictures, [text] * 3) for text in ("Good photo.", "Bad photo."))
    likelihood = 1 / (1 + np.exp((bad - good) / 0.07))  # CLIP starts at a temperature of 0.07
    np.testing.assert_allclose(found.fidelity, likelihood, atol=1e-4)


def test_a_missing_scorer_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ScorerError, match=r"^There is no CLIP model .*\.$"):
        load_scorer(str(tmp_path / "nothing"))


@pytest.mark.parametrize("name", ["sd3-medium", "embedded"])
def test_shipped_models_fall_with_shared_steps_and_less_for_similar_prompts(name: str) -> None:
    model = load_quality_model(name)
    assert model.steps == 28
    shared = np.arange(29)
    low, high = model.quality([[0.2], [0.7]], shared)
    assert np.all(np.diff(low) < 0)
    assert np.all(np.diff(high) < 0)
    assert low[0] - low[-1] > 1.5 * (high[0] - high[-1])


@pytest.mark.parametrize("name", ["sd3-medium", "embedded"])
def test_shipped_models_say_how_well_they_predict_unseen_pairs(name: str) -> None:
    model = load_quality_model(name)
    errors = model.errors
    assert model.pairs >= 100
    assert errors.unseen is not None
    assert errors.interpolated is not None
    assert errors.mean is not None
    assert errors.fitted < errors.unseen < errors.mean
    # Freely interpolated bands may follow what captions happen to share; the family may not, and loses next to nothing.
    assert errors.unseen < 1.01 * errors.interpolated


def test_the_embedded_model_knows_what_a_mean_costs() -> None:
    errors = load_quality_model("embedded").errors
    assert errors.means is not None
    assert errors.means_as_sentences is not None
    assert errors.means < errors.means_as_sentences


@pytest.mark.parametrize("name", ["sd3-medium", "embedded"])
@given(others=st.floats(-0.2, 0.98), n=st.integers(2, 16), k=st.integers(0, 28))
def test_a_mean_is_worth_less_than_a_sentence_of_its_similarity_in_the_end(
    name: str, others: float, n: int, k: int
) -> None:
    model = load_quality_model(name)
    phi = (1 + (n - 1) * others) / n
    assert model.quality(phi, 28, 1 / n) < model.quality(phi, 28)
    assert model.quality(phi, 28, 1 / n) > model.quality(others, 28)  # the personal prompt in it does count
    assert model.quality(phi, k, 0.0) == model.quality(phi, k)
    assert model.quality(1.0, k, 1.0) == model.quality(1.0, 0)
    segments = model.quality_of_segments([phi, 1.0], [k, 28], [1 / n, 0.0])
    assert float(segments) == pytest.approx(float(model.quality(phi, k, 1 / n)))


@pytest.mark.parametrize("name", ["sd3-medium", "embedded"])
def test_shipped_models_never_say_that_a_closer_prompt_is_worse(name: str) -> None:
    grid = load_quality_model(name).quality(np.linspace(-0.5, 1, 151)[:, None], np.linspace(0, 28, 57))
    assert np.diff(grid, axis=0).min() > -1e-9


@pytest.mark.parametrize("name", ["sd3-medium", "embedded"])
def test_nothing_is_lost_without_shared_steps_or_with_ones_own_prompt(name: str) -> None:
    model = load_quality_model(name)
    ceiling = model.coefficients.ceiling
    np.testing.assert_allclose(model.quality(np.linspace(-1, 1, 9), 0), ceiling, rtol=1e-12)
    np.testing.assert_allclose(model.quality(1.0, np.arange(29)), ceiling, rtol=1e-12)
    assert float(model.quality(1 + 1e-7, 28)) == ceiling


def test_the_sd3_model_keeps_to_the_published_curves() -> None:
    model = load_quality_model("sd3-medium")
    published = {
        0.2: (0.2762, 0.1984, 13.963, 0.0615),
        0.3: (0.2643, 0.1940, 14.072, 0.0730),
        0.4: (0.2217, 0.1980, 13.814, 0.1088),
        0.5: (0.1820, 0.2026, 12.541, 0.1496),
        0.6: (0.1353, 0.2338, 11.496, 0.1924),
        0.7: (0.1032, 0.2479, 10.798, 0.2245),
    }
    k = np.arange(28)
    for phi, (fall, slope, middle, floor) in published.items():
        means = fall / (1 + np.exp(slope * (k - middle))) + floor
        assert np.sqrt(np.mean((model.quality(phi, k) - means) ** 2)) < 0.014


@given(
    MODELS,
    st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 28)), min_size=1, max_size=6),
)
def test_segments_cost_what_their_curves_lose_between_their_ends(
    model: QualityModel, segments: list[tuple[float, float]]
) -> None:
    phi, stops = np.array([s[0] for s in segments]), np.sort([s[1] for s in segments])
    expected, start = model.coefficients.ceiling, 0.0
    for own, stop in zip(phi, stops, strict=True):
        expected -= float(model.quality(own, start) - model.quality(own, stop))
        start = stop
    assert float(model.quality_of_segments(phi, stops)) == pytest.approx(expected, abs=1e-9)
    # One segment is the curve itself; empty segments cost nothing; one cut in two is still the same.
    alone = float(model.quality(phi[0], stops[0]))
    assert float(model.quality_of_segments(phi[:1], stops[:1])) == pytest.approx(alone, abs=1e-12)
    with_empty = np.r_[phi, 0.5], np.r_[stops, stops[-1]]
    assert float(model.quality_of_segments(*with_empty)) == pytest.approx(expected, abs=1e-9)
    cut = np.r_[phi[0], phi], np.r_[stops[0] / 2, stops]
    assert float(model.quality_of_segments(*cut)) == pytest.approx(expected, abs=1e-9)


def test_segments_of_many_routes_at_once() -> None:
    model = load_quality_model("embedded")
    phi = np.random.default_rng(0).uniform(0, 1, (50, 1, 2))
    stops = np.array([[2, 9], [4, 4], [0, 28]])
    found = model.quality_of_segments(phi, stops)
    assert found.shape == (50, 3)
    np.testing.assert_allclose(found[7, 0], model.quality_of_segments(phi[7, 0], stops[0]))
    np.testing.assert_allclose(found[:, 1], model.quality(phi[:, 0, 0], 4))
    np.testing.assert_allclose(found[:, 2], model.quality(phi[:, 0, 1], 28))


def test_a_quality_model_is_read_from_a_file(tmp_path: Path) -> None:
    model = load_quality_model("embedded")
    path = tmp_path / "mine.json"
    path.write_bytes(msgspec.json.encode(model))
    assert load_quality_model(path) == model


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1, "model": "sdxl"}'])
def test_a_file_that_is_no_quality_model_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(QualityModelError, match=r"broken\.json is not a quality model"):
        load_quality_model(path)


def test_an_unknown_quality_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(QualityModelError, match=r"embedded, sd3-medium"):
        load_quality_model("sdxl")
