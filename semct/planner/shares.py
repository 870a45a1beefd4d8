"""The second tier: how clusters share the edge's compute, in closed form."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LEAST = 1e-6  # of the edge: a cluster without work there keeps a sliver, so that a late step can run


def shares(work: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares f (clusters,) that minimise sum_m weight_m work_m / f_m under sum_m f_m = 1.

    By the Lagrangian, f_m is proportional to sqrt(weight_m work_m). ``work`` is a cluster's edge work A_m in
    seconds of the whole edge, ``weight`` what a second of its latency costs: the number of its users N_m
    where all count alike (the paper's case).
    """
    root = np.sqrt(work * weight)
    if root.sum() == 0:
        return np.full(len(work), 1 / len(work))
    least = min(_LEAST, 1 / len(work))
    floored = np.maximum(root / root.sum(), least)
    return np.asarray(floored / floored.sum(), dtype=np.float64)
