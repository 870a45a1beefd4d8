"""The embedded scorer's training: contrastive, on real pictures, reconstructed ones and blends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from semct.prompts import BUNDLED
from semct.quality import ScorerConfig, ScorerNetwork
from semct.training.precision import mixed
from semct.training.scenes import SIZE, Example, Scene

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from semct.training.autoencoder import PatchCode
    from semct.training.data import Corpus
    from semct.training.schedule import Budget

CONFIG = ScorerConfig(encoder=BUNDLED, channels=(32, 64, 128, 192), width=128, picture_size=SIZE)

_LEARNING_RATE = 1e-3


def _key(scene: Scene) -> tuple[int, int, int]:
    return -1 if scene.thing is None else scene.thing, scene.background, scene.placement


def _also_true(scenes: NDArray[np.int64]) -> torch.Tensor:
    """Mark the pairs that are no counterexamples, bool (n, n): caption i also suits picture j.

    Rows of `scenes` are thing, background, placement; captions do not mention placement 0.
    """
    same = (scenes[:, None, :2] == scenes[None, :, :2]).all(-1)
    placed = (scenes[:, None, 2] == scenes[None, :, 2]) | (scenes[:, None, 2] == 0)
    suits = same & placed
    np.fill_diagonal(suits, val=False)
    return torch.from_numpy(suits)


def train_scorer(
    corpus: Corpus,
    examples: Sequence[Example],
    code: PatchCode,
    budget: Budget,
    *,
    seed: int,
    device: str,
    report: Callable[[float], None],
    batch: int = 192,
) -> ScorerNetwork:
    """Train a scorer on the corpus; `examples` are the corpus' pairs, row by row.

    Half of the pictures are seen through the latent code with a little noise, so that a generator's blur does
    not count against it. Blends of two pictures are counterexamples to every caption: without them the scorer
    accepts any blob of the right colour.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    network = ScorerNetwork(CONFIG).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=0.05)
    scenes = np.array([_key(example.scene) for example in examples])
    usable = np.flatnonzero([not example.vague for example in examples])
    while budget.progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * budget.rate(constant=0.3)
        rows = random.choice(usable, batch, replace=False)
        also_true = _also_true(scenes[rows])
        pictures, captions = corpus.pairs[rows].unbind(1)
        seen = _through_code(corpus.pictures[pictures].float() / 127.5 - 1, code)
        weight = 0.35 + 0.3 * torch.rand(batch // 2, 1, 1, 1)
        blends = weight * seen[: batch // 2] + (1 - weight) * seen[batch // 2 : 2 * (batch // 2)]
        with mixed(device):
            vectors = network.embed_pictures(torch.cat([seen, blends]).to(device)).float()
            sentences = network.embed_prompts(corpus.pooled[captions].to(device)).float()
        likeness = network.log_temperature.exp() * sentences @ vectors.T
        masked = likeness[:, :batch].masked_fill(also_true.to(device), -torch.inf)
        target = torch.arange(batch, device=device)
        loss = functional.cross_entropy(torch.cat([masked, likeness[:, batch:]], 1), target)
        loss = (loss + functional.cross_entropy(masked.T, target)) / 2
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        budget.step += 1
        report(loss.item())
    return network.cpu().eval()


def _through_code(pictures: torch.Tensor, code: PatchCode) -> torch.Tensor:
    """Replace every second picture by what its latent, slightly disturbed, says of it."""
    coded = pictures[::2]
    latents = code.encode(coded)
    noise = 0.25 * torch.rand(len(coded), 1, 1, 1) * torch.randn_like(latents)
    result = pictures.clone()
    result[::2] = code.invert(latents + noise).clamp(-1, 1)
    return result
