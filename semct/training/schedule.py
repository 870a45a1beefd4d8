"""How long a training lasts: by steps or by the clock, also across a resumption."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch


class Budget:
    """The length of one training, in steps or in minutes of training time.

    Args:
        steps: Optimiser steps, or None.
        minutes: Minutes, or None. Exactly one of the two is given.
        spent: Seconds that an earlier, interrupted run has used.
        step: Steps that it has made.
    """

    def __init__(
        self, *, steps: int | None = None, minutes: float | None = None, spent: float = 0.0, step: int = 0
    ) -> None:
        if (steps is None) == (minutes is None):
            msg = "A training's length is given either in steps or in minutes."
            raise ValueError(msg)
        self._steps = steps
        self._minutes = minutes
        self._before = spent
        self._started = time.monotonic()
        self.step = step

    @property
    def spent(self) -> float:
        """Seconds of training so far."""
        return self._before + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """The part of the budget that is used, 0 to 1."""
        if self._steps is not None:
            return min(1.0, self.step / max(1, self._steps))
        assert self._minutes is not None  # noqa: S101 (the constructor saw to it)
        return min(1.0, self.spent / max(1e-9, 60 * self._minutes))

    def rate(self, warmup: int = 100, constant: float = 0.5, floor: float = 0.02) -> float:
        """Return the learning rate's factor now: a linear rise, a plateau, a linear decay to the floor."""
        rise = min(1.0, (self.step + 1) / warmup)
        decay = (1 - self.progress) / (1 - constant)
        return max(floor, min(rise, decay))


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a crash leaves either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return the checkpoint at path (tensors and plain values only), or None where there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
