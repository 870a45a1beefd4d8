"""Both tiers together: splits and compute shares of least total cost."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from semct.cost import Network, Outcome, Weights, device_only, utility
from semct.planner.shares import shares
from semct.planner.splits import Costs, Frontier, Split, costs
from semct.public_prompt import PublicPrompt
from semct.quality import QualityModel
from semct.routes import Cluster, Plan, Prediction, Request, route

_SUMS = 512  # of that sum in the table
_PRICES = 256  # tried on the sum that couples the clusters


def plan(
    requests: Sequence[Request],
    groups: Sequence[Sequence[int]],
    public: Sequence[PublicPrompt],
    similarity: Sequence[NDArray[np.float64]],
    *,
    model: str,
    network: Network,
    weights: Weights,
    quality: QualityModel,
    most_shared: int,
    sharing: bool = True,
    uniform: bool = False,
) -> Plan:
    """Routes (edge, public, x) (edge, personal, y) (device, personal, z) of least predicted cost.

    ``groups`` are the members of each cluster as indices into ``requests``, with their ``public`` prompts and
    the ``similarity`` (members,) of each member's prompt to it. Frameworks that give every member the same
    split are ``uniform``; those without shared inference pass one group per request and no ``sharing``.
    ``most_shared`` bounds x.
    """
    members = [tuple(requests[i] for i in group) for group in groups]
    tables = [
        costs(m, phi, network=network, weights=weights, quality=quality)
        for m, phi in zip(members, similarity, strict=True)
    ]
    frontiers = [Frontier(t, most_shared=most_shared, sharing=sharing, uniform=uniform) for t in tables]
    share, splits = _solve(tables, frontiers)
    clusters, routes, predictions = [], [], {}
    for m, cluster in enumerate(members):
        prompt = public[m].text
        edge_steps = _work(splits[m])
        for request, split, phi in zip(cluster, splits[m], similarity[m], strict=True):
            spans = (
                (network.edge, model, prompt, split.shared),
                (network.edge, model, request.prompt, split.edge),
                (request.device, model, request.prompt, split.device),
            )
            # Who shares steps starts from one noise, or they would not be the same steps.
            start = request if split.shared == 0 else msgspec.structs.replace(request, seed=cluster[0].seed)
            routes.append(route(start, *spans))
            sharers = sum(s.shared > 0 for s in splits[m])
            predictions[request.id] = predict(
                request,
                split,
                float(phi),
                edge_steps=edge_steps,
                shared_part=max(s.shared for s in splits[m]) / sharers if split.shared else 0.0,
                share=float(share[m]),
                network=network,
                weights=weights,
                quality=quality,
            )
        clusters.append(
            Cluster(
                members=tuple(r.id for r in cluster),
                public_prompt=prompt,
                source=public[m].credit,
                similarity=tuple(float(s) for s in similarity[m]),
                share=float(share[m]),
            )
        )
    order = {r.id: i for i, r in enumerate(requests)}
    routes.sort(key=lambda r: order[r.request])
    return Plan(clusters=tuple(clusters), routes=tuple(routes), predictions=predictions)


def predict(
    request: Request,
    split: Split,
    similarity: float,
    *,
    edge_steps: int,
    shared_part: float,
    share: float,
    network: Network,
    weights: Weights,
    quality: QualityModel,
) -> Prediction:
    """What the models expect of one request.

    ``edge_steps`` is the edge work A_m of its cluster, ``shared_part`` its part of the shared steps' energy,
    in steps, ``share`` the cluster's share of the edge.
    """
    device, edge = network.nodes[request.device], network.nodes[network.edge]
    up, down = network.uplinks[request.device], network.downlinks[request.device]
    offloaded = split.shared + split.edge > 0
    size = network.latent_bytes
    scale = quality.steps / request.steps
    outcome = Outcome(
        quality=float(quality.quality(similarity, np.array([split.shared * scale]))[0]),
        latency=up.seconds(network.request_bytes)
        + (edge_steps * edge.step_seconds / share + down.seconds(size) if offloaded else 0.0)
        + split.device * device.step_seconds
        + device.decode_seconds,
        energy=up.joules(network.request_bytes)
        + (shared_part + split.edge) * edge.step_joules
        + (down.joules(size) if offloaded else 0.0)
        + split.device * device.step_joules
        + device.decode_joules,
    )
    alone = float(quality.quality(similarity, np.array([0.0]))[0])
    reference = device_only(network, request.device, request.steps, alone)
    return Prediction(
        quality=outcome.quality,
        latency=outcome.latency,
        energy=outcome.energy,
        utility=utility(outcome, reference, weights),
    )


def _solve(tables: Sequence[Costs], frontiers: Sequence[Frontier]) -> tuple[NDArray[np.float64], list[list[Split]]]:
    """Shares and splits of least total cost.

    With the best shares the edge time of clusters with work A_m costs (sum_m c_m)^2, c_m = sqrt(weight_m A_m
    step). The square couples the clusters through one number only: for a price on that sum, each cluster
    chooses its work alone. That finds what lies on the convex hull; a table over a grid of sums finds, to the
    grid's precision, what lies above it. The better of both is then improved one cluster at a time.
    """
    roots = [np.sqrt(t.second * t.step * np.arange(len(f.least))) for t, f in zip(tables, frontiers, strict=True)]

    def total(work: Sequence[int]) -> float:
        own = sum(float(f.least[a]) for f, a in zip(frontiers, work, strict=True))
        return own + sum(float(r[a]) for r, a in zip(roots, work, strict=True)) ** 2

    dearest = 2 * sum(float(r[np.isfinite(f.least)].max()) for r, f in zip(roots, frontiers, strict=True))
    candidates = (
        [int(np.argmin(f.least + price * r)) for f, r in zip(frontiers, roots, strict=True)]
        for price in np.linspace(0, dearest, _PRICES)
    )
    work = min([*candidates, _knapsack(frontiers, roots)], key=total)
    best = np.inf
    while total(work) < best - 1e-12:
        best = total(work)
        for m, (f, r) in enumerate(zip(frontiers, roots, strict=True)):
            others = sum(float(roots[i][a]) for i, a in enumerate(work) if i != m)
            work[m] = int(np.argmin(f.least + (others + r) ** 2))
    seconds = np.array([a * t.step for a, t in zip(work, tables, strict=True)])
    share = shares(seconds, np.array([t.second for t in tables]))
    return share, [f.splits(a) for f, a in zip(frontiers, work, strict=True)]


def _knapsack(frontiers: Sequence[Frontier], roots: Sequence[NDArray[np.float64]]) -> list[int]:
    """The work of each cluster of least total cost, where each c_m counts as the nearest of a grid."""
    # Whatever saves less than its edge time costs is worse than no work at all.
    saved = sum(float(f.least[0] - f.least.min()) for f in frontiers)
    sums = np.linspace(0, max(np.sqrt(saved), 1e-9), _SUMS)
    least = np.where(sums == 0, 0.0, np.inf)
    choices: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for frontier, root in zip(frontiers, roots, strict=True):
        level = np.rint(np.minimum(root / sums[1], _SUMS)).astype(np.int64)
        best = np.full(_SUMS, -1)  # work at each level: of that of one level, the cheapest
        for work in np.argsort(-frontier.least, kind="stable").tolist():
            if level[work] < _SUMS:
                best[level[work]] = work
        total = np.full((_SUMS, _SUMS), np.inf)
        for at in np.flatnonzero(best >= 0).tolist():
            total[at, at:] = least[: _SUMS - at] + frontier.least[best[at]]
        choices.append((total.argmin(axis=0), best))
        least = total.min(axis=0)
    at = int(np.argmin(least + sums**2))
    found = []
    for level, best in reversed(choices):
        found.append(int(best[level[at]]))
        at -= int(level[at])
    return found[::-1]


def _work(splits: Sequence[Split]) -> int:
    """A cluster's edge work A_m in steps: shared ones once, personal ones for each."""
    return max(s.shared for s in splits) + sum(s.edge for s in splits)
