"""The second tier: how clusters share the edge's compute, in closed form."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from semct.cost import NodeState

_LEAST = 1e-6  # of the edge: a cluster without work there keeps a sliver, so that a late step can run


def shares(work: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares f (clusters,) that minimise sum_m weight_m work_m / f_m under sum_m f_m <= 1, f_m >= 0.

    ``work`` is a cluster's edge work A_m in seconds of the whole edge, ``weight`` what a second of its latency
    costs: the number of its users N_m where all count alike (the paper's case).

    Derivation: with c_m = weight_m work_m the sum of c_m / f_m is convex and falls in each f_m, so all of the edge
    is given away and the stationary point of the Lagrangian sum_m c_m / f_m + p (sum_m f_m - 1) is the optimum:
    c_m / f_m^2 = p for every m, hence f_m = sqrt(c_m / p); and since the shares sum to 1,

        f_m = sqrt(c_m) / sum_k sqrt(c_k),

    at which the sum costs (sum_m sqrt(c_m))^2. (By Cauchy and Schwarz no other shares reach that.) The planner
    searches splits with this square in place of the shares.
    """
    root = np.sqrt(work * weight)
    if root.sum() == 0:
        return np.full(len(work), 1 / len(work))
    least = min(_LEAST, 1 / len(work))
    floored = np.maximum(root / root.sum(), least)
    return np.asarray(floored / floored.sum(), dtype=np.float64)


def owed_root(edge: NodeState, second: float) -> float:
    """R = sum_j sqrt(c_j) over the clusters j of an edge's backlog, where a second costs each user ``second``.

    c_j = N_j second B_j as above: B_j are the seconds of the whole edge that cluster j has left, for N_j users. Their
    splits are made, but they share the edge with the new clusters. By the same closed form these have
    f_m = sqrt(c_m) / (R + sum_k sqrt(c_k)) of it, and all together cost (R + sum_m sqrt(c_m))^2. In it is the product
    2 R sum_m sqrt(c_m), half of it what new clusters wait for earlier ones, half what these wait for them.
    """
    return sum(math.sqrt(b.requests * second * edge.owed_seconds(b)) for b in edge.backlog)
