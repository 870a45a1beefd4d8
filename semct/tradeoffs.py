"""What fewer steps and a smaller model cost in content quality: measured curves, as factors.

A quality model says what sharing steps costs; these curves say what it costs to run fewer steps, or to hand over from
the large model to the small one half-way. They are measured on the embedded models (`python -m
semct.training.tradeoffs`) and used as factors on whatever quality model a scenario plans with: for another model than
the embedded one that is an assumption.
"""

from __future__ import annotations

import functools
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

_ASSET = Path(__file__).parent / "assets" / "quality" / "tradeoffs.json"


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """The mean score of pictures at one setting, and its standard error."""

    at: int
    score: float
    error: float


class Tradeoffs(msgspec.Struct, frozen=True, kw_only=True):
    """Scores of one prompt's own picture, by what was saved on it.

    ``by_steps``: the large model in ``at`` steps instead of ``full``. ``by_switch``: of ``full`` steps, the first
    ``at`` with the large model and the rest with the small one.
    """

    model: str
    small_model: str
    scorer: str
    source: str
    full: int
    by_steps: tuple[Point, ...]
    by_switch: tuple[Point, ...]

    @property
    def fewest(self) -> int:
        """The least number of steps that was measured."""
        return min(p.at for p in self.by_steps)

    def steps_factor(self, steps: ArrayLike) -> NDArray[np.float64]:
        """Quality in so many steps against that in ``full``, between measurements by straight lines."""
        return self._factor(self.by_steps, steps)

    def switch_factor(self, large: ArrayLike, steps: int) -> NDArray[np.float64]:
        """Quality with the first ``large`` of ``steps`` by the large model against that of the large one alone."""
        return self._factor(self.by_switch, np.asarray(large, np.float64) * self.full / steps)

    def _factor(self, points: tuple[Point, ...], at: ArrayLike) -> NDArray[np.float64]:
        scores = np.interp(np.asarray(at, np.float64), [p.at for p in points], [p.score for p in points])
        best = next(p.score for p in points if p.at == self.full)
        return np.asarray(scores / best, dtype=np.float64)


@functools.cache
def load_tradeoffs() -> Tradeoffs:
    """The curves that come with the package."""
    return msgspec.json.decode(_ASSET.read_bytes(), type=Tradeoffs)
