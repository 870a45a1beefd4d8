"""The shapes of jitter as tables that netem understands: the same numbers shape the links of every implementation.

A table holds the quantiles of a distribution with mean 0 and standard deviation 1 at (i + 1/2) / 4096, in units of
1/8192 (netem's ``NETEM_DIST_SCALE``), as 16-bit integers. So nothing is further than 4 standard deviations from
the mean. What lies beyond is moved there, and the rest is stretched until the deviation is 1 again: without
that, a Pareto distribution would lose a quarter of it.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist, fmean, pstdev
from typing import Final, Literal

SCALE: Final = 8192
_SIZE: Final = 4096
_FURTHEST: Final = 32767 / SCALE  # standard deviations
_PARETO_SHAPE: Final = 3
_ENOUGH: Final = 1e-6  # the table's integers resolve 1e-4


@cache
def table(distribution: Literal["normal", "pareto"]) -> tuple[int, ...]:
    """4096 values of 16 bits, in rising order."""
    points = [(number + 0.5) / _SIZE for number in range(_SIZE)]
    if distribution == "normal":
        quantiles = [NormalDist().inv_cdf(point) for point in points]
    else:
        quantiles = [(1 - point) ** (-1 / _PARETO_SHAPE) for point in points]
    return tuple(round(SCALE * value) for value in _standardised(quantiles))


def _standardised(values: list[float]) -> list[float]:
    """Shift, stretch and cut until the mean is 0 and the standard deviation 1."""
    while True:
        mean, deviation = fmean(values), pstdev(values)
        if abs(mean) < _ENOUGH and abs(deviation - 1) < _ENOUGH:
            return values
        values = [max(-_FURTHEST, min(_FURTHEST, (value - mean) / deviation)) for value in values]
