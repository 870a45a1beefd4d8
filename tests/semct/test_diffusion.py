"""The denoiser: splits are exact, rows are independent, and loading is one call."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from semct.diffusion import ASSETS, EMBEDDED, EMBEDDED_SMALL, Denoiser, ModelNotFound, weights_type

STEPS = 6
PROMPTS = ("a cat", "a red car at night", "", "two words")


@settings(max_examples=12, deadline=None)
@given(
    split=st.integers(0, STEPS),
    seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=4),
    prompts=st.lists(st.sampled_from(PROMPTS), min_size=4, max_size=4),
)
def test_a_split_run_gives_the_very_latents_of_the_unsplit_run(
    tiny: Denoiser, split: int, seeds: list[int], prompts: list[str]
) -> None:
    noise = [tiny.noise(seed) for seed in seeds]
    texts = prompts[: len(seeds)]
    whole = tiny.run(noise, 0, STEPS, STEPS, texts)
    early = tiny.run(noise, 0, split, STEPS, texts)
    late = tiny.run([row.clone() for row in early], split, STEPS, STEPS, texts)
    for a, b in zip(whole, late, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=8, deadline=None)
@given(at=st.lists(st.integers(0, STEPS - 1), min_size=2, max_size=5))
def test_rows_at_different_steps_and_lengths_share_a_call(tiny: Denoiser, at: list[int]) -> None:
    of = [STEPS + i for i in range(len(at))]
    noise = [tiny.noise(i) for i in range(len(at))]
    texts = [tiny.encode(PROMPTS[i % len(PROMPTS)]) for i in range(len(at))]
    together = tiny.step(noise, at, of, texts)
    for i, row in enumerate(together):
        (alone,) = tiny.step([noise[i]], [at[i]], [of[i]], [texts[i]])
        # Matrix kernels round differently for other batch sizes, so not bit for bit.
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


def test_a_run_equals_the_stock_pipeline(tiny: Denoiser, tiny_folder: Path) -> None:
    text_parts = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_folder, **dict.fromkeys(text_parts))
    stock.set_progress_bar_config(disable=True)
    text, null = tiny.encode("a cat"), tiny.encode("")
    expected = stock(
        prompt_embeds=text.tokens[None],
        pooled_prompt_embeds=text.pooled[None],
        negative_prompt_embeds=null.tokens[None],
        negative_pooled_prompt_embeds=null.pooled[None],
        guidance_scale=tiny.guidance,
        num_inference_steps=STEPS,
        height=32,
        width=32,
        latents=tiny.noise(3)[None],
        output_type="latent",
    ).images[0]
    (found,) = tiny.run([tiny.noise(3)], 0, STEPS, STEPS, ["a cat"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_noise_depends_on_the_seed_alone(tiny: Denoiser) -> None:
    assert torch.equal(tiny.noise(5), tiny.noise(5))
    assert not torch.equal(tiny.noise(5), tiny.noise(6))
    assert tiny.noise(5).shape == tiny.latent_shape


def test_pictures_are_bytes_of_the_right_size(tiny: Denoiser) -> None:
    pictures = tiny.decode([tiny.noise(1), tiny.noise(2)])
    assert pictures.shape == (2, 32, 32, 3)
    assert pictures.dtype == np.uint8


def test_flops_are_counted_and_double_with_guidance(tiny: Denoiser, tiny_folder: Path) -> None:
    free = Denoiser.load(str(tiny_folder))
    free.guidance = 1.0
    assert tiny.flops_per_step == 2 * free.flops_per_step > 1_000_000
    assert tiny.flops_per_decode > 0


def test_an_unknown_model_gets_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="'nobody/nothing' cannot be loaded") as raised:
        Denoiser.load("nobody/nothing")
    assert "\n" not in str(raised.value)
    with pytest.raises(ModelNotFound, match="cannot be loaded"):
        Denoiser.load(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_the_same_code(tiny_folder: Path, tiny: Denoiser, dtype: torch.dtype) -> None:
    half = Denoiser.load(str(tiny_folder), dtype=dtype)
    (found,) = half.run([half.noise(0)], 0, 2, STEPS, ["a cat"])
    (exact,) = tiny.run([tiny.noise(0)], 0, 2, STEPS, ["a cat"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1)


def test_full_models_are_bfloat16_on_gpus_and_the_packages_own_never(tmp_path: Path) -> None:
    assert weights_type("somebody/a-full-model", "cuda:1") is torch.bfloat16
    assert weights_type("somebody/a-full-model", "cpu") is torch.float32
    trained = tmp_path / "trained-like-it"
    shutil.copytree(ASSETS / EMBEDDED, trained, ignore=shutil.ignore_patterns("*.safetensors"))
    assert {weights_type(model, "cuda") for model in (EMBEDDED, EMBEDDED_SMALL, str(trained))} == {torch.float32}


def test_what_a_model_is_loaded_as_is_what_its_device_asks_for(
    tiny_folder: Path, tiny: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semct.diffusion.weights_type", lambda *_: torch.bfloat16)
    loaded = Denoiser.load(str(tiny_folder))
    (found,) = loaded.run([loaded.noise(0)], 0, 1, STEPS, ["a cat"])
    (exact,) = tiny.run([tiny.noise(0)], 0, 1, STEPS, ["a cat"])
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1)


def test_a_blend_is_conditioned_on_the_mean_of_its_prompts(tiny: Denoiser) -> None:
    a, b, both = tiny.encode("a cat"), tiny.encode("a red car at night"), tiny.encode(("a cat", "a red car at night"))
    torch.testing.assert_close(both.tokens, (a.tokens + b.tokens) / 2)
    torch.testing.assert_close(both.pooled, (a.pooled + b.pooled) / 2)
    assert tiny.encode(("a cat", "a red car at night")) is both
    (blended,) = tiny.run([tiny.noise(0)], 0, 2, STEPS, [("a cat", "a cat")])
    (alone,) = tiny.run([tiny.noise(0)], 0, 2, STEPS, ["a cat"])
    torch.testing.assert_close(blended, alone)


def test_a_model_for_the_processor_is_loaded_without_asking_for_gpus() -> None:
    """On a machine with GPUs the question starts CUDA, and the fork server could not fork any more."""
    check = (
        "import torch;"
        "asked = [];"
        "torch.cuda.is_available = lambda: asked.append(1) or False;"
        "torch.accelerator.is_available = lambda: torch.cuda.is_available();"  # as CUDA builds do
        "from semct.diffusion import Denoiser;"
        "denoiser = Denoiser.load('embedded');"
        "denoiser.run([denoiser.noise(0)], 0, 1, 1, ['a cat']);"
        "print(len(asked), torch.cuda.is_available(), len(asked))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0", "False", "1"], done.stderr
