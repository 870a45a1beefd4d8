"""The transformer of Stable Diffusion 3 (arXiv 2403.03206, section 4), as diffusers' SD3Transformer2DModel has it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from semct.networks.weights import Weights

_EPS = 1e-6
_FREQUENCIES = 128  # of the waves that tell a time
_LONGEST_PERIOD = 10_000


class MMDiTConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``config.json`` of a transformer, as far as the weights do not tell it."""

    sample_size: int
    patch_size: Literal[1]
    in_channels: int
    num_layers: int
    num_attention_heads: int
    pos_embed_max_size: int
    qk_norm: Literal["rms_norm"]
    dual_attention_layers: tuple[()] = ()


class _Stream(NamedTuple):
    """What the layers of picture or text are called in a block."""

    signal: str
    query: str
    key: str
    value: str
    query_norm: str
    key_norm: str
    out: str
    feed_forward: str


_IMAGE = _Stream(
    "norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.norm_q", "attn.norm_k", "attn.to_out.0", "ff"
)
_TEXT = _Stream(
    "norm1_context.linear",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.norm_added_q",
    "attn.norm_added_k",
    "attn.to_add_out",
    "ff_context",
)


class MMDiT:
    """The velocity of latents (n, channels, height, width) at times (n,) from 0 to 1000.

    Picture and text (n, length, width) are two streams that attend to each other; the time and the text's pooled vector
    (n, width) set what each layer is shifted, scaled and gated by.
    """

    def __init__(self, weights: Weights, config: MMDiTConfig) -> None:
        self._weights = weights
        self._config = config
        self._blocks = [weights.below(f"transformer_blocks.{i}.") for i in range(config.num_layers)]

    def __call__(self, latents: Tensor, tokens: Tensor, pooled: Tensor, times: Tensor) -> Tensor:
        height, width = latents.shape[-2:]
        image = self._weights.convolution("pos_embed.proj", latents).flatten(2).transpose(1, 2)
        image = (image + self._positions(height, width)).contiguous()
        text = self._weights.linear("context_embedder", tokens)
        signal = self._signal(times, pooled)
        for block in self._blocks[:-1]:
            image, text = self._pass(block, image, text, signal)
        image = self._last_pass(self._blocks[-1], image, text, signal)
        scale, shift = self._weights.linear("norm_out.linear", functional.silu(signal)).chunk(2, dim=1)
        velocity = self._weights.linear("proj_out", _modulated(image, shift, scale))
        return velocity.transpose(1, 2).reshape(latents.shape)

    @functools.lru_cache(maxsize=4)  # noqa: B019  a size or two, as long as the network
    def _positions(self, height: int, width: int) -> Tensor:
        """The middle of the table of positions: (1, height * width, channels)."""
        largest = self._config.pos_embed_max_size
        top, left = (largest - height) // 2, (largest - width) // 2
        table = self._weights["pos_embed.pos_embed"].view(1, largest, largest, -1)
        return table[:, top : top + height, left : left + width].flatten(1, 2)

    def _signal(self, times: Tensor, pooled: Tensor) -> Tensor:
        exponents = -math.log(_LONGEST_PERIOD) * torch.arange(_FREQUENCIES, dtype=torch.float32, device=times.device)
        phases = times[:, None].float() * torch.exp(exponents / _FREQUENCIES)
        waves = torch.cat([torch.cos(phases), torch.sin(phases)], dim=-1).to(pooled.dtype)
        return self._embedded("timestep_embedder", waves) + self._embedded("text_embedder", pooled)

    def _embedded(self, embedder: str, x: Tensor) -> Tensor:
        inner = self._weights.linear(f"time_text_embed.{embedder}.linear_1", x)
        return self._weights.linear(f"time_text_embed.{embedder}.linear_2", functional.silu(inner))

    def _pass(self, block: Weights, image: Tensor, text: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
        image_shift, image_scale, *of_image = block.linear(_IMAGE.signal, functional.silu(signal)).chunk(6, dim=1)
        text_shift, text_scale, *of_text = block.linear(_TEXT.signal, functional.silu(signal)).chunk(6, dim=1)
        to_image, to_text = self._attention(
            block, _modulated(image, image_shift, image_scale), _modulated(text, text_shift, text_scale)
        )
        return _fed(block, _IMAGE, image, to_image, of_image), _fed(block, _TEXT, text, to_text, of_text)

    def _last_pass(self, block: Weights, image: Tensor, text: Tensor, signal: Tensor) -> Tensor:
        """Like the others, but nothing comes after it that would ask for the text."""
        image_shift, image_scale, *of_image = block.linear(_IMAGE.signal, functional.silu(signal)).chunk(6, dim=1)
        text_scale, text_shift = block.linear(_TEXT.signal, functional.silu(signal)).chunk(2, dim=1)
        to_image, _ = self._attention(
            block, _modulated(image, image_shift, image_scale), _modulated(text, text_shift, text_scale)
        )
        return _fed(block, _IMAGE, image, to_image, of_image)

    def _attention(self, block: Weights, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """What the two streams take from each other."""
        both = zip(self._heads(block, _IMAGE, image), self._heads(block, _TEXT, text), strict=True)
        query, key, value = (torch.cat(parts, dim=2) for parts in both)
        taken = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return taken[:, : image.shape[1]], taken[:, image.shape[1] :]

    def _heads(self, block: Weights, stream: _Stream, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value: (n, heads, length, width of a head) each."""
        query, key, value = (
            block.linear(layer, x).view(*x.shape[:2], self._config.num_attention_heads, -1).transpose(1, 2)
            for layer in (stream.query, stream.key, stream.value)
        )
        query = block.rms_norm(stream.query_norm, query, eps=_EPS)
        return query, block.rms_norm(stream.key_norm, key, eps=_EPS), value


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=_EPS) * (1 + scale[:, None]) + shift[:, None]


def _fed(block: Weights, stream: _Stream, x: Tensor, taken: Tensor, signal: Sequence[Tensor]) -> Tensor:
    """A stream after what it took by attention and after its feed-forward layers, both gated."""
    gate, shift, scale, last_gate = signal
    x = x + gate[:, None] * block.linear(stream.out, taken)
    inner = block.linear(f"{stream.feed_forward}.net.0.proj", _modulated(x, shift, scale))
    fed = block.linear(f"{stream.feed_forward}.net.2", functional.gelu(inner, approximate="tanh"))
    return x + last_gate[:, None] * fed
