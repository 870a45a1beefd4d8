"""What a plan gives thousands of requests by the models of quality and cost alone: no nodes, no pictures.

A framework plans a batch and predicts what each request gets; this turns its plan into arrays over requests, and
counts the denoising steps as an engine would run them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from semct.routes import Plan, Prediction, Request, Route

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Unpredicted(ValueError):
    """A framework's plan says nothing of what some requests get."""


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """The denoising steps of requests, arrays (requests,).

    ``steps`` is T, ``shared`` are those that other requests share, ``device`` those on the request's own device.
    In ``parts``, by model, a step that n requests share counts 1/n for each of them.
    """

    steps: Ints
    shared: Ints
    device: Ints
    parts: dict[str, Floats]


class Simulated(msgspec.Struct, frozen=True, kw_only=True):
    """What requests get, arrays (requests,): score, seconds, joules, utility, and the steps that it takes.

    ``cluster`` is the index of a request's cluster, -1 without one, ``similarity`` the cosine of personal and
    public prompt, NaN without one.
    """

    quality: Floats
    latency: Floats
    energy: Floats
    utility: Floats
    cluster: Ints
    similarity: Floats
    work: Work


def simulate(plan: Plan, requests: Sequence[Request]) -> Simulated:
    """What the plan's own predictions say, in the order of the requests.

    Raises:
        Unpredicted: The plan has no prediction or no route for a request.
    """
    routes = {r.request: r for r in plan.routes}
    missing = [r.id for r in requests if r.id not in plan.predictions or r.id not in routes]
    if missing:
        raise Unpredicted(f"its plan predicts nothing for {len(missing)} requests, the first is {missing[0]}")
    found: list[Prediction] = [plan.predictions[r.id] for r in requests]
    row = {r.id: i for i, r in enumerate(requests)}
    cluster = np.full(len(requests), -1, dtype=np.int64)
    similarity = np.full(len(requests), np.nan)
    for number, members in enumerate(plan.clusters):
        rows = [row[m] for m in members.members]
        cluster[rows] = number
        similarity[rows] = members.similarity
    return Simulated(
        quality=np.array([p.quality for p in found]),
        latency=np.array([p.latency for p in found]),
        energy=np.array([p.energy for p in found]),
        utility=np.array([p.utility for p in found]),
        cluster=cluster,
        similarity=similarity,
        work=work([routes[r.id] for r in requests], [r.device for r in requests]),
    )


def work(routes: Sequence[Route], devices: Sequence[str]) -> Work:
    """The steps of each route, whose request belongs to the device of the same index.

    Two requests share a step when all that its result depends on is equal, as in an engine: the noise, and
    models, prompts and nodes up to there.
    """
    tracks: dict[Hashable, int] = {}
    models: dict[str, int] = {}
    riders: list[tuple[int, int, int, int, int, bool]] = []
    for request, (route, device) in enumerate(zip(routes, devices, strict=True)):
        origin: Hashable = (route.seed, route.steps)
        for s in route.segments:
            track = tracks.setdefault((origin, s.node, s.model, s.prompt, s.start), len(tracks))
            model = models.setdefault(s.model, len(models))
            riders.append((track, s.stop, s.start, request, model, s.node == device))
            origin = (track, s.stop)
    table = np.array(riders, dtype=np.int64).reshape(-1, 6)
    track, stop, start, request, model, own = table[np.lexsort((table[:, 1], table[:, 0]))].T
    # The riders of a track in the order in which they leave it: from one to the next, all who are left share.
    first = np.flatnonzero(np.diff(track, prepend=-1))
    aboard = np.diff(first, append=len(track))
    left = np.repeat(first + aboard, aboard) - np.arange(len(track))
    came_from = np.where(np.diff(track, prepend=-1) != 0, start, np.roll(stop, 1))
    length = stop - came_from
    part = _running(length / left, first, aboard)
    shared = _running(length * (left > 1), first, aboard)
    n = len(routes)
    return Work(
        steps=np.array([r.steps for r in routes], dtype=np.int64),
        shared=np.bincount(request, weights=shared, minlength=n).astype(np.int64),
        device=np.bincount(request, weights=own * (stop - start), minlength=n).astype(np.int64),
        parts={
            name: np.bincount(request, weights=part * (model == i), minlength=n).astype(np.float64)
            for name, i in models.items()
        },
    )


def _running(values: NDArray[np.number], first: Ints, length: Ints) -> Floats:
    """Sums of values so far, beginning anew at each index in ``first``, for ``length`` values."""
    total = np.cumsum(values, dtype=np.float64)
    before = np.concatenate([[0.0], total])[first]
    running = total - np.repeat(before, length)
    alone = np.repeat(length == 1, length)
    running[alone] = values[alone]  # to the bit, so that steps nobody shares add up to whole numbers
    return np.asarray(running, dtype=np.float64)
