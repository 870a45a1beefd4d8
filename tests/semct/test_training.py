"""Scenes and captions are what they claim, the recipe runs, and what it shipped loads without our code."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from semct.diffusion import Denoiser
from semct.prompts import load_sentence_encoder
from semct.quality import load_scorer
from semct.training import scenes
from semct.training.__main__ import app
from semct.training.autoencoder import fit_patch_code
from semct.training.measurement import BANDS, PUBLIC_BANDS, ROOT_BANDS, draw_pairs, draw_triples
from semct.training.scenes import (
    BACKGROUNDS,
    HELD_OUT,
    PLACEMENTS,
    THINGS,
    VARIANTS,
    FontNotFound,
    Scene,
    caption,
    held_out_captions,
    render,
    training_examples,
)
from semct.training.schedule import Budget, load_checkpoint, save_checkpoint

ASSETS = Path(scenes.__file__).parents[1] / "assets"

SCENES = st.builds(
    Scene,
    thing=st.one_of(st.none(), st.integers(0, len(THINGS) - 1)),
    background=st.integers(0, len(BACKGROUNDS) - 1),
    placement=st.integers(0, len(PLACEMENTS) - 1),
    variant=st.integers(0, VARIANTS - 1),
)


@given(SCENES)
def test_a_scene_is_always_drawn_alike(scene: Scene) -> None:
    picture = render(scene)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, render(scene))


@given(SCENES)
def test_a_thing_covers_a_tenth_of_its_picture_or_more(scene: Scene) -> None:
    empty = render(Scene(None, scene.background, 0, scene.variant)).astype(int)
    changed = np.abs(render(scene).astype(int) - empty).max(-1) > 20
    assert changed.mean() == 0 if scene.thing is None else changed.mean() > 0.05


@given(SCENES, st.integers())
def test_a_caption_names_thing_and_place(scene: Scene, seed: int) -> None:
    text = caption(scene, random.Random(seed))
    background = BACKGROUNDS[scene.background]
    if scene.thing is None:
        assert text in background.alone
    else:
        assert any(noun in text for noun in THINGS[scene.thing].nouns)
        assert any(place in text for place in background.places)
    assert " a a" not in text
    assert " a e" not in text


def test_no_training_example_shows_a_held_out_combination() -> None:
    examples = training_examples(20_000)
    seen = {(e.scene.thing, e.scene.background) for e in examples if e.scene.thing is not None}
    assert not seen & HELD_OUT
    assert len(seen) == len(THINGS) * len(BACKGROUNDS) - len(HELD_OUT)
    assert examples == training_examples(20_000)


def test_every_thing_and_background_has_held_out_combinations() -> None:
    assert len(HELD_OUT) == 40
    assert {thing for thing, _ in HELD_OUT} == set(range(len(THINGS)))
    assert {background for _, background in HELD_OUT} == set(range(len(BACKGROUNDS)))
    drawn = held_out_captions(32)
    assert len({e.caption for e in drawn}) == 32
    assert all((e.scene.thing, e.scene.background) in HELD_OUT for e in drawn)
    with pytest.raises(ValueError, match="40 held-out"):
        held_out_captions(41)


def test_captions_spread_from_unrelated_to_nearly_equal() -> None:
    vectors = load_sentence_encoder().embed(sorted({e.caption for e in training_examples(120)}))
    likeness = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
    counts, _ = np.histogram(likeness, bins=np.arange(0.1, 0.91, 0.1))
    assert np.all(counts >= 5), counts


def test_a_missing_font_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scenes, "_FONT", tmp_path / "nothing.ttf")
    scenes._font.cache_clear()
    scenes._glyph.cache_clear()
    with pytest.raises(FontNotFound, match=r"fonts-noto-color-emoji\.$"):
        render(Scene(0, 0))


def test_the_patch_code_is_linear_and_of_unit_variance() -> None:
    pictures = torch.from_numpy(
        np.stack([render(Scene(i % 32, i % 10, i % 4, i % 3)) for i in range(120)]).transpose(0, 3, 1, 2)
    )
    code = fit_patch_code(pictures)
    real = pictures.float() / 127.5 - 1
    latents = code.encode(real)
    assert latents.shape == (120, 24, 8, 8)
    assert latents.square().mean().item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(code.encode(code.invert(latents)), latents, atol=1e-3, rtol=1e-3)
    assert (code.invert(latents) - real).square().mean() < 0.05 * real.var()


def test_a_budget_ends_and_decays() -> None:
    budget = Budget(steps=200)
    rates = []
    while budget.progress < 1:
        rates.append(budget.rate(warmup=10))
        budget.step += 1
    assert len(rates) == 200
    assert rates[0] < rates[9] == max(rates) == 1
    assert rates[-1] < 0.05
    assert Budget(minutes=1, spent=60).progress == 1
    with pytest.raises(ValueError, match="either in steps or in minutes"):
        Budget()


def test_a_checkpoint_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.pt"
    assert load_checkpoint(path) is None
    for value in (1, 2):
        save_checkpoint({"step": value, "weights": torch.ones(3)}, path)
    assert [p.name for p in path.parent.iterdir()] == ["state.pt"]
    saved = load_checkpoint(path)
    assert saved is not None
    assert saved["step"] == 2


def test_the_recipe_makes_folders_that_load(tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path), "--steps", "2", "--pairs", "256", "--no-compiled"]
    for more in ([], ["--resume"]):
        result = CliRunner().invoke(app, arguments + more)
        assert result.exit_code == 0, result.output
    pipeline = load_pipeline(tmp_path / "embedded")
    assert draw(pipeline, steps=2).shape == (1, 64, 64, 3)
    pictures = np.zeros((1, 64, 64, 3), np.uint8)
    assert load_scorer(str(tmp_path / "scorer")).score(pictures, ["a cat"]).shape == (1,)
    expected = sorted(p.relative_to(tmp_path / "embedded") for p in (tmp_path / "embedded").rglob("*"))
    assert expected == sorted(p.relative_to(ASSETS / "embedded") for p in (ASSETS / "embedded").rglob("*")), (
        "the shipped model has another layout than the recipe's"
    )


def test_the_small_size_is_a_denoiser_beside_the_large_model(tmp_path: Path) -> None:
    arguments = ["--size", "small", "--output", str(tmp_path), "--pairs", "256", "--no-compiled"]
    for more in (["--steps", "1"], ["--steps", "2", "--resume"]):
        result = CliRunner().invoke(app, arguments + more)
        assert result.exit_code == 0, result.output
    assert "256 examples seen" in result.output  # two batches, one of them before the resumption
    (tmp_path / "embedded").symlink_to(ASSETS / "embedded")
    small, large = Denoiser.load(str(tmp_path / "embedded-small")), Denoiser.load("embedded")
    assert small.latent_shape == large.latent_shape
    assert small.guidance == large.guidance
    assert torch.equal(small.sigmas(28), large.sigmas(28))
    latents = [large.noise(1)]
    assert np.array_equal(small.decode(latents), large.decode(latents))
    assert 0.1 < small.flops_per_step / large.flops_per_step < 0.5


def test_pairs_of_prompts_lie_in_their_bands() -> None:
    pairs = draw_pairs(load_sentence_encoder(), 48)
    assert tuple(pairs) == BANDS
    for band, drawn in pairs.items():
        assert len(drawn) == 48
        assert len({p.personal for p in drawn}) == len({p.public for p in drawn}) == 48
        assert all(abs(p.similarity - band) < 0.05 for p in drawn)


def test_triples_of_prompts_lie_in_two_bands() -> None:
    encoder = load_sentence_encoder()
    triples = draw_triples(encoder, 3)
    assert len(triples) >= 30
    assert len({public for _, public, _ in triples}) == len(triples)
    for root, public, personal in triples:
        far, near = encoder.similarity([root, public], [personal])[:, 0]
        assert min(abs(far - band) for band in ROOT_BANDS) < 0.06 + 1e-6
        assert min(abs(near - band) for band in PUBLIC_BANDS) < 0.06 + 1e-6


def test_all_shipped_weights_are_at_most_30_mb() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 30e6


def test_diffusers_alone_loads_the_shipped_model_and_draws_what_was_asked() -> None:
    pipeline = load_pipeline(ASSETS / "embedded")
    pictures = draw(pipeline, steps=12)
    scorer = load_scorer("embedded")
    right = scorer.score(pictures, ["a strawberry in the snow"])
    wrong = scorer.score(pictures, ["a bus at night"])
    assert right - wrong > 0.3


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    encoders = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True, **encoders)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusion3Pipeline, steps: int) -> np.ndarray:
    states, pooled = load_sentence_encoder().tokens(["a strawberry in the snow", ""], 16)
    states, pooled = states * 2.5, pooled * 19.6
    pictures = pipeline(
        prompt_embeds=states[:1],
        pooled_prompt_embeds=pooled[:1],
        negative_prompt_embeds=states[1:],
        negative_pooled_prompt_embeds=pooled[1:],
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    return np.asarray((pictures * 255).round(), np.uint8)
