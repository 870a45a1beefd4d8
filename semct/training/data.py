"""The training set in memory: every picture, every latent, every caption's conditioning, encoded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from semct.prompts import SentenceEncoder
from semct.training.scenes import render_all, training_examples

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

    from semct.training.autoencoder import PatchCode

TOKENS = 16
"""Token states of a caption that the denoiser sees (98.7 % of captions are no longer)."""

TOKEN_SCALE = 2.5
POOLED_SCALE = 19.6
"""Factors that bring MiniLM's token states and unit sentence vectors to unit variance (19.6 = sqrt(384))."""


class Corpus(msgspec.Struct, frozen=True):
    """Pairs of picture and caption by index, and what they point to.

    pictures: uint8 (scenes, 3, 64, 64). states: float16 (captions, 16, 384), unscaled. pooled: float32
    (captions, 384), unit. pairs: int64 (n, 2), columns picture and caption. Caption 0 is the null prompt.
    """

    pictures: torch.Tensor
    states: torch.Tensor
    pooled: torch.Tensor
    pairs: torch.Tensor
    captions: tuple[str, ...]

    def conditioning(self, captions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scaled token states and sentence vectors of captions, float32."""
        return self.states[captions].float() * TOKEN_SCALE, self.pooled[captions] * POOLED_SCALE


def make_corpus(pairs: int, seed: int, encoder: SentenceEncoder) -> Corpus:
    """Draw pairs, render their distinct pictures and encode their distinct captions."""
    examples = training_examples(pairs, seed)
    scenes = list(dict.fromkeys(example.scene for example in examples))
    captions = ["", *dict.fromkeys(example.caption for example in examples)]
    scene_index = {scene: i for i, scene in enumerate(scenes)}
    caption_index = {caption: i for i, caption in enumerate(captions)}
    index = [(scene_index[e.scene], caption_index[e.caption]) for e in examples]
    pictures = torch.from_numpy(np.ascontiguousarray(render_all(scenes).transpose(0, 3, 1, 2)))
    # Sorted by length, so that little of a batch is padding.
    order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
    states = torch.empty(len(captions), TOKENS, 384, dtype=torch.float16)
    pooled = torch.empty(len(captions), 384)
    for start in range(0, len(order), 256):
        rows = order[start : start + 256]
        some_states, some_pooled = encoder.tokens([captions[i] for i in rows], TOKENS, batch=64)
        states[rows] = some_states.half()
        pooled[rows] = some_pooled
    return Corpus(pictures, states, pooled, torch.tensor(index), tuple(captions))


def encode_pictures(corpus: Corpus, code: PatchCode) -> torch.Tensor:
    """Return the latents of the corpus' pictures, float32 (scenes, 24, 8, 8)."""
    parts = torch.split(corpus.pictures, 512)
    return torch.cat([code.encode(part.float() / 127.5 - 1) for part in parts])


@torch.inference_mode()
def encode_pictures_by(autoencoder: AutoencoderTiny, pictures: torch.Tensor) -> torch.Tensor:
    """Return the latents, float32 (n, 24, 8, 8), that a trained autoencoder gives pictures, uint8 (n, 3, 64, 64)."""
    parts = torch.split(pictures, 128)
    latents = torch.cat([autoencoder.encode(part.float() / 127.5 - 1).latents for part in parts])
    return latents.mul_(autoencoder.config.scaling_factor).clone()
