"""Whose energy it was: a meter counts all that its processors or its GPU take, whichever node made them busy.

A native node reads its meter before and after each of its calls. Nodes that share a meter and are busy at once each
count the whole, so an instant with n busy nodes counts 1/n for each of them; what is left divides among a node's
requests by their parts of its busy time. Energy between calls, and of whatever else the machine does meanwhile but
for the nodes, is not told apart from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker.messages import Compute, Stage
from experiments.served import Served
from semct.compute import Native

Spans: TypeAlias = NDArray[np.float64]
"""When a node was busy: starts and stops (n, 2), in the order of time."""


def without_meter(computes: Mapping[str, Compute]) -> frozenset[str]:
    """The native nodes whose energy nothing measures."""
    return frozenset(n for n, c in computes.items() if c.profile == Native.profile and c.meter is None)


def share_out(served: Served, computes: Mapping[str, Compute]) -> None:
    """Give every metered node of a round its part of what its meter counted, and every request its part of that."""
    meters = {n: (c.machine, c.meter) for n, c in computes.items() if c.meter is not None}
    busy = {node: _busy(served, node) for node in meters}
    watts = {}
    for node, meter in meters.items():
        others = [busy[n] for n in meters if n != node and meters[n] == meter]
        watts[node] = own_part(busy[node], others) * _gross_watts(served, node)
    for request, result in served.results.items():
        stages = tuple(_metered(s, watts) for s in result.stages)
        served.results[request] = msgspec.structs.replace(result, stages=stages)
    for node, spent in served.spent.items():
        if node in watts:
            served.spent[node] = msgspec.structs.replace(spent, joules=spent.busy * watts[node])


def own_part(own: Spans, others: Sequence[Spans]) -> float:
    """The part of ``own`` busy time that is a node's own, where each of the ``others`` may have been busy meanwhile.

    The mean over it of 1 / (nodes that are busy).
    """
    edges = np.unique(np.concatenate([own.ravel(), *(o.ravel() for o in others)]))
    if not len(own) or len(edges) < 2:
        return 1.0
    at, length = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    mine = _covers(own, at) * length
    crowd = 1 + sum((_covers(o, at) for o in others), np.zeros(len(at)))
    return float((mine / crowd).sum() / mine.sum())


def _covers(spans: Spans, at: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each instant 1 where one of the spans holds it, else 0."""
    inside = np.searchsorted(np.sort(spans[:, 0]), at) > np.searchsorted(np.sort(spans[:, 1]), at)
    return np.where(inside, 1.0, 0.0)


def _busy(served: Served, node: str) -> Spans:
    calls = [(c.start, c.stop) for c in served.spent[node].calls] if node in served.spent else []
    decoded = [(s.start, s.stop) for s in _stages(served, node) if s.name == "decode"]
    return np.array(sorted(calls + decoded), dtype=np.float64).reshape(-1, 2)


def _gross_watts(served: Served, node: str) -> float:
    """What the meter counted in a node's calls, for each second of them."""
    decoding = [s for s in _stages(served, node) if s.name == "decode"]
    joules, seconds = sum(s.joules for s in decoding), sum(s.busy for s in decoding)
    if node in served.spent:
        joules, seconds = joules + served.spent[node].joules, seconds + served.spent[node].busy
    return joules / seconds if seconds > 0 else 0.0


def _stages(served: Served, node: str) -> Iterator[Stage]:
    return (s for result in served.results.values() for s in result.stages if s.node == node)


def _metered(stage: Stage, watts: Mapping[str, float]) -> Stage:
    if stage.busy == 0 or stage.node not in watts:
        return stage
    return msgspec.structs.replace(stage, joules=stage.busy * watts[stage.node])
