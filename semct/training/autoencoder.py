"""The autoencoder: latents in closed form, and the convolutional network that turns them into pictures.

A latent is the principal components of its 8 x 8 pixel patches, so it needs no training and every later stage
can start at once. diffusers' AutoencoderTiny then learns both directions: its decoder from latents to
pictures (better than the linear inverse, since it sees neighbouring patches), its encoder to give the same
latents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import torch
from diffusers import AutoencoderTiny
from torch.nn import functional

from semct.training.precision import mixed

if TYPE_CHECKING:
    from collections.abc import Callable

    from semct.training.schedule import Budget

PATCH = 8
CHANNELS = 24

LATENT_SCALE = 2.0
"""The decoder squashes its input at +-3 by a tanh, so it is fed latents of half their unit scale."""

_WHITENING = 0.3
"""Exponent of a component's deviation that its latent channel keeps. 0 would give the faintest component as
much of the denoiser's effort as the patch's colour, 1 nearly none."""


class PatchCode(msgspec.Struct, frozen=True):
    """A linear code of 8 x 8 patches: mean (192,), basis (192, 24) orthonormal, gain (24,)."""

    mean: torch.Tensor
    basis: torch.Tensor
    gain: torch.Tensor

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the latents, float32 (n, 24, 8, 8), of pictures in -1..1, float32 (n, 3, 64, 64)."""
        patches = functional.pixel_unshuffle(pictures, PATCH).movedim(1, -1) - self.mean
        return ((patches @ self.basis) * self.gain).movedim(-1, 1).contiguous()

    def invert(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the pictures that the linear code alone gives back, float32 (n, 3, 64, 64)."""
        patches = (latents.movedim(1, -1) / self.gain) @ self.basis.T + self.mean
        return functional.pixel_shuffle(patches.movedim(-1, 1), PATCH)


def fit_patch_code(pictures: torch.Tensor) -> PatchCode:
    """Fit the code to pictures, uint8 (n, 3, 64, 64), such that latents have unit variance on the whole."""
    patches = functional.pixel_unshuffle(pictures.float() / 127.5 - 1, PATCH).movedim(1, -1).reshape(-1, 192)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    deviation = values.flip(0)[:CHANNELS].sqrt()
    wanted = deviation**_WHITENING
    wanted = wanted / wanted.square().mean().sqrt()
    return PatchCode(mean, vectors.flip(1)[:, :CHANNELS].contiguous(), wanted / deviation)


def new_autoencoder() -> AutoencoderTiny:
    """Return an untrained autoencoder with a factor of 8 between pixels and latents."""
    return AutoencoderTiny(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(64, 64, 64, 64),
        num_encoder_blocks=(1, 1, 1, 2),
        num_decoder_blocks=(4, 3, 2, 1),
        scaling_factor=LATENT_SCALE,
        shift_factor=0.0,
    )


def train_autoencoder(
    pictures: torch.Tensor,
    code: PatchCode,
    budget: Budget,
    *,
    seed: int,
    device: str,
    report: Callable[[float], None],
    batch: int = 16,
) -> AutoencoderTiny:
    """Train the autoencoder on pictures, uint8 (n, 3, 64, 64); `report` gets each step's loss."""
    torch.manual_seed(seed)
    network = new_autoencoder().to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    while budget.progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * budget.rate(constant=0.3)
        chosen = torch.randint(len(pictures), (batch,))
        real = pictures[chosen].float() / 127.5 - 1
        latents = code.encode(real)
        # What the denoiser makes is a little off the real latents; the decoder should forgive that.
        noisy = latents + 0.2 * torch.rand(batch, 1, 1, 1) * torch.randn_like(latents)
        real, latents, noisy = (x.to(device) for x in (real, latents, noisy))
        with mixed(device):
            made = network.decoder((noisy / LATENT_SCALE).to(memory_format=torch.channels_last)).float()
            seen = network.encoder(real.to(memory_format=torch.channels_last)).float()
        error = made - real
        loss = error.square().mean() + 0.2 * error.abs().mean() + (seen * LATENT_SCALE - latents).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        budget.step += 1
        report(loss.item())
    return network.to(memory_format=torch.contiguous_format).eval()


@torch.inference_mode()
def psnr(network: AutoencoderTiny, latents: torch.Tensor, pictures: torch.Tensor) -> float:
    """Return the decoder's peak signal-to-noise ratio in dB against pictures, uint8 (n, 3, 64, 64)."""
    made = torch.cat([network.decode(part / LATENT_SCALE).sample for part in torch.split(latents, 64)])
    error = ((made.clamp(-1, 1) + 1) * 127.5).round() - pictures.float()
    return float(10 * torch.log10(255**2 / error.square().mean()))
