"""A model with text encoders of its own is a whole diffusers pipeline, and gives what that gives."""

import json
import string
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from semct.diffusion import Denoiser, weights_type

STEPS = 4


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer with letters as its only words."""
    folder.mkdir()
    letters = string.ascii_lowercase
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def tiny_text_encoder(seed: int) -> CLIPTextModelWithProjection:
    """A CLIP text encoder with random weights."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return CLIPTextModelWithProjection(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 3 as it is published, but tiny, with random weights and without T5."""
    path = tmp_path_factory.mktemp("full")
    torch.manual_seed(0)
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=12,
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=tiny_text_encoder(1),
        text_encoder_2=tiny_text_encoder(2),
        text_encoder_3=None,
        tokenizer=tiny_tokenizer(path / "words"),
        tokenizer_2=tiny_tokenizer(path / "words_2"),
        tokenizer_3=None,
    )
    pipeline.save_pretrained(path / "model")
    return path / "model"


@pytest.fixture(scope="module")
def full(folder: Path) -> Denoiser:
    return Denoiser.load(str(folder))


def test_its_pictures_are_those_of_the_stock_pipeline(full: Denoiser, folder: Path) -> None:
    stock = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        "a cat in the snow",
        guidance_scale=full.guidance,
        num_inference_steps=STEPS,
        height=16,
        width=16,
        latents=full.noise(3)[None],
        output_type="np",
    ).images[0]
    latents = full.run([full.noise(3)], 0, STEPS, STEPS, ["a cat in the snow"])
    assert abs(full.decode(latents)[0] / 255 - expected).max() < 1.5 / 255


def test_it_stops_and_goes_on_at_any_step(full: Denoiser) -> None:
    noise = [full.noise(1), full.noise(2)]
    whole = full.run(noise, 0, STEPS, STEPS, ["a dog", "a red car"])
    early = full.run(noise, 0, 2, STEPS, ["a dog", "a red car"])
    late = full.run(early, 2, STEPS, STEPS, ["a dog", "a red car"])
    assert all(torch.equal(a, b) for a, b in zip(whole, late, strict=True))


def test_prompts_make_a_difference(full: Denoiser) -> None:
    a, b = (full.encode(prompt) for prompt in ("a dog", "a red car"))
    assert not torch.equal(a.pooled, b.pooled)
    assert not torch.equal(a.tokens, b.tokens)
    assert full.latent_shape == (4, 8, 8)


def test_its_operations_are_counted_attention_among_them(full: Denoiser) -> None:
    # Two rows, two blocks: each of 16 patches and 77 + 256 places of text in 4 heads of 8.
    attention = 2 * 2 * 4 * 4 * (16 + 77 + 256) ** 2 * 8
    assert attention < full.flops_per_step < 2 * attention
    assert full.flops_per_decode > 0


def test_it_is_bfloat16_on_gpus(folder: Path) -> None:
    assert weights_type(str(folder), "cuda") is torch.bfloat16
    assert weights_type(str(folder), "cpu") is torch.float32
    half = Denoiser.load(str(folder), dtype=torch.bfloat16)
    (latent,) = half.run([half.noise(0)], 0, 1, STEPS, ["a dog"])
    assert latent.dtype is torch.float32
