"""Scorers tell right captions from wrong ones; curves and quality models keep what they are fitted to."""

import itertools
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semct.quality import (
    Band,
    ClipScorer,
    Curve,
    QualityModel,
    QualityModelError,
    Scorer,
    ScorerError,
    fit_curve,
    load_quality_model,
    load_scorer,
)
from semct.training.scenes import BACKGROUNDS, HELD_OUT, THINGS, Scene, caption, render_all

CURVES = st.builds(
    Curve,
    L=st.floats(0.1, 1.2),
    K=st.floats(0.15, 1.0),
    B=st.floats(6, 20),
    D=st.floats(-0.2, 0.8),
)


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


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of random weights whose vocabulary is letters."""
    from transformers import (  # noqa: PLC0415 (slow import)
        CLIPConfig,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **size,
            "vocab_size": len(words),
            "max_position_embeddings": 16,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config={**size, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


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


def test_a_missing_scorer_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ScorerError, match=r"^There is no CLIP model .*\.$"):
        load_scorer(str(tmp_path / "nothing"))


@settings(max_examples=40, deadline=None)
@given(CURVES)
def test_a_fit_recovers_its_curve(curve: Curve) -> None:
    shared = np.arange(29)
    fitted = fit_curve(shared, curve(shared))
    np.testing.assert_allclose(fitted(shared), curve(shared), atol=2e-3 * curve.L)
    assert pytest.approx(curve.B, abs=0.3) == fitted.B
    assert pytest.approx(curve.L, rel=0.1) == fitted.L


def test_a_flat_curve_can_be_fitted() -> None:
    np.testing.assert_allclose(fit_curve(np.arange(10), np.full(10, 0.7))(np.arange(10)), 0.7, atol=1e-3)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(QualityModelError, match="four or more"):
        fit_curve([0, 1, 2], [1, 1, 1])


@pytest.mark.parametrize("name", ["sd3-medium", "embedded"])
def test_shipped_models_fall_with_shared_steps_and_less_for_similar_prompts(name: str) -> None:
    model = load_quality_model(name)
    assert model.steps == 28
    assert len(model.bands) >= 3
    shared = np.arange(29)
    low, high = model.quality([[0.2], [0.7]], shared)
    assert np.all(np.diff(low) < 0)
    assert np.all(np.diff(high) < 0)
    assert low[0] - low[-1] > 1.5 * (high[0] - high[-1])


def test_interpolation_passes_through_the_bands_and_stops_at_their_ends() -> None:
    model = load_quality_model("sd3-medium")
    shared = np.linspace(0, 28, 15)
    for band in model.bands:
        np.testing.assert_allclose(model.quality(band.similarity, shared), band.curve(shared))
    np.testing.assert_allclose(model.quality(-1.0, shared), model.bands[0].curve(shared))
    np.testing.assert_allclose(model.quality(1.0, shared), model.bands[-1].curve(shared))


def test_the_sd3_model_is_the_published_one() -> None:
    band = load_quality_model("sd3-medium").bands[3]
    assert band == Band(0.5, Curve(0.1820, 0.2026, 12.541, 0.1496))


def test_a_quality_model_is_read_from_a_file(tmp_path: Path) -> None:
    curve = Curve(0.5, 0.3, 14, 0.2)
    model = QualityModel("mine", "embedded", 28, "a test", 0.0, (Band(0.2, curve), Band(0.8, curve)))
    path = tmp_path / "mine.json"
    path.write_bytes(msgspec.json.encode(model))
    assert load_quality_model(path) == model


@pytest.mark.parametrize("text", ["", "{}", '{"model": 3}'])
def test_a_file_that_is_no_quality_model_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(QualityModelError, match=r"broken\.json is not a quality model"):
        load_quality_model(path)


def test_an_unknown_quality_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(QualityModelError, match=r"embedded, sd3-medium"):
        load_quality_model("sdxl")


def test_bands_out_of_order_are_refused() -> None:
    curve = Curve(0.5, 0.3, 14, 0.2)
    with pytest.raises(QualityModelError, match="rise in similarity"):
        QualityModel("mine", "embedded", 28, "a test", 0.0, (Band(0.8, curve), Band(0.2, curve)))
