"""Writes what was trained as ordinary folders: a diffusers pipeline and a scorer."""

from __future__ import annotations

import contextlib
import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import save_file

from semct.prompts import BUNDLED
from semct.training.data import POOLED_SCALE, TOKEN_SCALE, TOKENS
from semct.training.denoiser import TRAIN_TIMESTEPS
from semct.training.scorer import CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterator

    from semct.quality import ScorerNetwork

SHIFT = 0.1875
"""The schedule's shift: SD3's 3 at 128 x 128 latents, carried over to 8 x 8 by SD3's own rule (the shift goes with
the latent's width: 3 x 8 / 128). Small latents keep their content at noise that would drown it in large ones; with a
shift of 1 the last six of 28 steps decide what a picture shows, with this one the middle ones do, as in SD3."""


class TextConditioning(msgspec.Struct, frozen=True):
    """How the sentence encoder conditions the denoiser: what `text.json` says.

    The null prompt of the guidance is the empty string.
    """

    encoder: str = BUNDLED
    tokens: int = TOKENS
    token_scale: float = TOKEN_SCALE
    pooled_scale: float = POOLED_SCALE
    guidance: float = 4.0
    steps: int = 28


def write_pipeline(folder: Path, denoiser: SD3Transformer2DModel, autoencoder: AutoencoderTiny) -> None:
    """Write a StableDiffusion3Pipeline without text encoders, its weights in float16."""
    pipeline = StableDiffusion3Pipeline(
        transformer=copy.deepcopy(denoiser).half().cpu().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=SHIFT),
        vae=copy.deepcopy(autoencoder).half().cpu().eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    with _replacing(folder) as partial:
        pipeline.save_pretrained(partial)
        # diffusers notes the folder a model came from, and a key that its own loading then warns of.
        _drop_keys(partial / "vae" / "config.json", "_name_or_path", "block_out_channels")
        text = msgspec.json.format(msgspec.json.encode(TextConditioning()), indent=2)
        (partial / "text.json").write_bytes(text + b"\n")


def write_transformer(folder: Path, denoiser: SD3Transformer2DModel, *, of: str) -> None:
    """Write a denoiser alone, in float16, to a folder beside the model ``of``, whose other parts it shares."""
    with _replacing(folder) as partial:
        copy.deepcopy(denoiser).half().cpu().eval().save_pretrained(partial / "transformer")
        parts = msgspec.json.format(msgspec.json.encode({"of": f"../{of}"}), indent=2)
        (partial / "parts.json").write_bytes(parts + b"\n")


def write_scorer(folder: Path, network: ScorerNetwork) -> None:
    """Write a scorer, its weights in float16."""
    with _replacing(folder) as partial:
        weights = {name: value.half().contiguous() for name, value in network.state_dict().items()}
        save_file(weights, partial / "model.safetensors")
        (partial / "scorer.json").write_bytes(msgspec.json.format(msgspec.json.encode(CONFIG), indent=2) + b"\n")


def _drop_keys(path: Path, *keys: str) -> None:
    config = {key: value for key, value in msgspec.json.decode(path.read_bytes()).items() if key not in keys}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the given one's place once it is complete."""
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for path in partial.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors makes files that only their owner reads
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
