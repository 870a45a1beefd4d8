"""The decoder of a tiny autoencoder (TAESD's architecture), as diffusers' AutoencoderTiny computes it."""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from semct.networks.weights import Weights

_MAGNITUDE = 3.0  # latents are squeezed into so much to both sides of 0


class TinyDecoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``config.json`` of an autoencoder, as far as its decoder needs it."""

    num_decoder_blocks: tuple[int, ...]
    scaling_factor: float
    shift_factor: float
    upsampling_scaling_factor: int


class TinyDecoder:
    """Pictures (n, 3, height, width) from -1 to 1 of latents as the denoiser has them."""

    def __init__(self, weights: Weights, config: TinyDecoderConfig) -> None:
        self._weights = weights.below("decoder.layers.")
        self._config = config

    def __call__(self, latents: Tensor) -> Tensor:
        x = latents / self._config.scaling_factor + self._config.shift_factor
        x = torch.tanh(x / _MAGNITUDE) * _MAGNITUDE
        x = functional.relu(self._weights.convolution("0", x, padding=1))
        layer = 2  # those without weights count, too
        *stages, _ = all_stages = self._config.num_decoder_blocks
        for stage, blocks in enumerate(all_stages):
            for block in range(layer, layer + blocks):
                x = self._residual(block, x)
            layer += blocks
            if stage < len(stages):
                x = functional.interpolate(x, scale_factor=float(self._config.upsampling_scaling_factor))
                layer += 1
            x = self._weights.convolution(str(layer), x, padding=1)
            layer += 1
        return x.mul(2).sub(1)

    def _residual(self, block: int, x: Tensor) -> Tensor:
        inner = functional.relu(self._weights.convolution(f"{block}.conv.0", x, padding=1))
        inner = functional.relu(self._weights.convolution(f"{block}.conv.2", inner, padding=1))
        return functional.relu(self._weights.convolution(f"{block}.conv.4", inner, padding=1) + x)
