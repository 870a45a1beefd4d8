"""Planning requests one after the other, each with what is running or cached already.

A request may start from a *prefix*, the first steps of some prompt from some noise, which earlier requests have made
the edge run. What that saves is the steps; what it costs is read from the quality curve at the similarity of the two
prompts: so similarity decides how many steps can be skipped, as NIRVANA's table does. A request that no prefix serves
better than its own steps founds a new one, and the next one may use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from semct.cache import LatentCache, Prefix
from semct.cost import Network, Weights, device_only, utility
from semct.planner.shares import shares
from semct.planner.tree import Prices, lost, outcome, prices
from semct.quality import QualityModel
from semct.routes import Cluster, Plan, Prediction, Prompt, Request, Route, blend, part, route

_NEIGHBOURS = (0, 1, 2, 4)  # recent prompts that a new public prompt may take in
_FORESEEN = 16  # recent prompts, the most similar ones, that stand for requests to come
_SAME = 1e-9  # of utility: no difference
_HOPE = 0.5  # of those like them, so many are expected


class _Start(msgspec.Struct, frozen=True, kw_only=True):
    """How a request begins: ``shared`` steps of a prefix, of which the edge still runs ``fresh`` ones for it."""

    prefix: Prefix
    vector: NDArray[np.float32]
    similarity: float
    shared: int
    fresh: int
    cost: float
    known: bool


class _Known(NamedTuple):
    """Prefixes with their vectors (n, d), and by prefix and step of sharing (n, T + 1) fresh steps and cost."""

    prefixes: list[Prefix]
    vectors: NDArray[np.float32]
    similarity: NDArray[np.float64]
    fresh: NDArray[np.int64]
    cost: NDArray[np.float64]


def plan(
    requests: Sequence[Request],
    vectors: NDArray[np.float32],
    cache: LatentCache,
    *,
    model: str,
    network: Network,
    weights: Weights,
    quality: QualityModel,
    most_shared: int,
    foresee: bool,
) -> Plan:
    """Routes for requests in their order; ``vectors`` (n, d) are their prompts' unit vectors.

    With ``foresee``, a new prefix may run on the mean of the request's and some recent prompts, where that promises
    more for requests to come than it costs this one; without, it runs ``most_shared`` steps of the request's own.
    """
    for request, vector in zip(requests, vectors, strict=True):
        cache.recent.append((request.prompt, vector))
    starts: list[_Start | None] = []
    own: list[int] = []
    # The edge is shared: a step delays all that are under way there, and by as many it is itself delayed.
    waiting = 2 * cache.active + len(requests)
    for n, (request, vector) in enumerate(zip(requests, vectors, strict=True)):
        price = prices([request], network=network, weights=weights, quality=quality, waiting=waiting)
        arrival = _Arrival(request, vector, price, cache, quality, model)
        new = arrival.foreseeing(most_shared, len(requests) - n - 1) if foresee else arrival.own(most_shared)
        best = min((o for o in (arrival.join(most_shared), new) if o is not None), key=lambda o: o.cost, default=None)
        if foresee and best is not None and best.cost > price.rest[0, 0] + _SAME:
            best = None
        if best is None:
            cache.miss()
        else:
            cache.plan(best.prefix, best.vector, best.shared)
        starts.append(best)
        own.append(int(price.edge[0, best.shared if best else 0]))
        if best is not None or own[-1]:
            cache.begin()
    return _routes(requests, starts, own, model=model, network=network, weights=weights, quality=quality)


@dataclass(frozen=True)
class _Arrival:
    """A request that has come, and the ways in which it may begin."""

    request: Request
    vector: NDArray[np.float32]
    price: Prices
    cache: LatentCache
    quality: QualityModel
    model: str

    def join(self, most_shared: int) -> _Start | None:
        """The best start from a prefix that is there or coming, if any saves steps; ``most_shared`` bounds it.

        But for its own prompt: of that it may take all there is.
        """
        prefixes, theirs, similarity, fresh, cost = self._known(self.vector)
        at = np.arange(self.request.steps + 1)
        own = np.array([p.prompt == self.request.prompt for p in prefixes], dtype=bool)
        cost = np.where((fresh < at) & ((at <= most_shared) | own[:, None]), cost, np.inf)
        if not np.isfinite(cost).any():
            return None
        best, step = (int(i) for i in np.unravel_index(int(np.argmin(cost)), cost.shape))
        return _Start(
            prefix=prefixes[best],
            vector=theirs[best],
            similarity=float(similarity[best]),
            shared=step,
            fresh=int(fresh[best, step]),
            cost=float(cost[best, step]),
            known=True,
        )

    def own(self, most_shared: int) -> _Start | None:
        """A new prefix of the request's own prompt: what it may save later is unknown, and does not count."""
        shared = min(most_shared, self.request.steps)
        cost = float(shared * self.price.step[0] + self.price.rest[0, shared])
        return self._new(self.request.prompt, self.vector, 1.0, shared, cost) if shared else None

    def foreseeing(self, most_shared: int, pending: int) -> _Start | None:
        """The new prefix that promises most: its cost here, less what it would save requests like recent ones.

        Recent prompts count only as far as no known prefix serves them already. As many as half of those near to it
        are expected again, or as many as are ``pending`` beside it, where these are more.
        """
        request, price = self.request, self.price
        longest = min(most_shared, request.steps)
        if any(p.prompt == request.prompt for p in self._there[0]):
            return None  # nothing serves it better than its own prompt
        others = [(p, v) for p, v in self.cache.recent if p != request.prompt]
        others.sort(key=lambda other: -float(other[1] @ self.vector))
        near = others[:_FORESEEN]
        expected = max(_HOPE * len(near), pending) / max(len(near), 1)
        served = np.array([min(self._known(v).cost.min(initial=np.inf), price.rest[0, 0]) for _, v in near])
        best: _Start | None = None
        for count in sorted({min(c, len(near)) for c in _NEIGHBOURS}) if longest else ():
            mean = np.mean([self.vector, *(v for _, v in near[:count])], axis=0).astype(np.float32)
            phi = np.clip(np.array([self.vector @ mean, *(v @ mean for _, v in near)], np.float64), -1, 1)
            # Of those near, the first ones are in the mean, too.
            own = (np.arange(len(phi)) <= count) / (count + 1)
            own[own == 1] = 0  # its own prompt alone is no mean
            paid = price.quality[0] * lost(self.quality, phi, own, request.steps) + price.rest[0]
            saved = np.maximum(served[:, None] - np.minimum.accumulate(paid[1:], axis=1), 0).sum(axis=0)
            worth = (paid[0] + np.arange(request.steps + 1) * price.step[0] - expected * saved)[1 : longest + 1]
            least = float(worth.min())
            if best is None or least < best.cost - _SAME:
                prompt = blend([request.prompt, *(p for p, _ in near[:count])])
                # Of equally good lengths the longest: steps that cost nothing more may still serve somebody.
                shared = int(np.flatnonzero(worth <= least + _SAME)[-1]) + 1
                best = self._new(prompt, mean, float(phi[0]), shared, least)
        return best

    def _new(self, prompt: Prompt, vector: NDArray[np.float32], similarity: float, shared: int, cost: float) -> _Start:
        prefix = Prefix(seed=self.request.seed, steps=self.request.steps, model=self.model, prompt=prompt)
        return _Start(
            prefix=prefix, vector=vector, similarity=similarity, shared=shared, fresh=shared, cost=cost, known=False
        )

    def _known(self, vector: NDArray[np.float32]) -> _Known:
        """The known prefixes, and what they are for a prompt of this vector."""
        known, theirs, fresh = self._there
        similarity = np.clip((theirs @ vector if known else np.empty(0)).astype(np.float64), -1, 1)
        own = np.array([part(self.request.prompt, p.prompt) for p in known])
        paid = self.price.quality[0] * lost(self.quality, similarity, own, self.request.steps) + self.price.rest[0]
        return _Known(known, theirs, similarity, fresh, fresh * self.price.step[0] + paid)

    @cached_property
    def _there(self) -> tuple[list[Prefix], NDArray[np.float32], NDArray[np.int64]]:
        """The known prefixes, their vectors (n, d) and fresh steps (n, T + 1)."""
        steps = self.request.steps
        known, theirs = self.cache.prefixes(steps, self.model)
        fresh = [self.cache.fresh_steps(p) for p in known]
        return known, theirs, np.array(fresh, dtype=np.int64).reshape(-1, steps + 1)


def _routes(
    requests: Sequence[Request],
    starts: Sequence[_Start | None],
    own: Sequence[int],
    *,
    model: str,
    network: Network,
    weights: Weights,
    quality: QualityModel,
) -> Plan:
    """The plan of these starts; requests of one prefix are a cluster."""
    groups: dict[Prefix | str, list[int]] = {}
    for n, (request, start) in enumerate(zip(requests, starts, strict=True)):
        groups.setdefault(start.prefix if start else request.id, []).append(n)
    edge = network.nodes[network.edge]
    fresh = [s.fresh if s else 0 for s in starts]
    alone = float(quality.quality(1.0, 0.0))
    references = [device_only(network, r.device, r.steps, alone) for r in requests]
    work = [sum(fresh[n] + own[n] for n in g) for g in groups.values()]
    waiting = [sum(weights.latency / references[n].latency for n in g) for g in groups.values()]
    share = shares(np.array(work) * edge.full_seconds, np.array(waiting))
    clusters, predictions = [], {}
    routes: dict[int, Route] = {}
    for m, group in enumerate(groups.values()):
        for n in group:
            request, start = requests[n], starts[n]
            shared = start.shared if start else 0
            left = request.steps - shared - own[n]
            prompt: Prompt = start.prefix.prompt if start else request.prompt
            begun = msgspec.structs.replace(request, seed=start.prefix.seed) if start else request
            routes[n] = route(
                begun,
                (network.edge, model, prompt, shared),
                (network.edge, model, request.prompt, own[n]),
                (request.device, model, request.prompt, left),
            )
            phi, inside = np.array([start.similarity if start else 1.0]), np.array([part(request.prompt, prompt)])
            fall = lost(quality, phi, inside, request.steps)[0, shared]
            expected = outcome(
                request,
                network,
                quality=alone - float(fall),
                waiting=work[m] / float(share[m]) * edge.full_seconds,
                part=fresh[n] + own[n],
                left=left,
            )
            predictions[request.id] = Prediction(
                quality=expected.quality,
                latency=expected.latency,
                energy=expected.energy,
                utility=utility(expected, references[n], weights),
            )
        first = starts[group[0]]
        public: Prompt = first.prefix.prompt if first else requests[group[0]].prompt
        words = "member" if isinstance(public, str) else "mean"
        clusters.append(
            Cluster(
                members=tuple(requests[n].id for n in group),
                public_prompt=public,
                source="cache" if first and first.known else words,
                similarity=tuple(s.similarity if (s := starts[n]) else 1.0 for n in group),
                share=float(share[m]),
            )
        )
    new = {s.prefix for s in starts if s and not s.known}
    return Plan(
        clusters=tuple(clusters),
        routes=tuple(routes[n] for n in range(len(requests))),
        predictions=predictions,
        caching=True,
        spared={r.id: s.shared - s.fresh for r, s in zip(requests, starts, strict=True) if s and s.prefix not in new},
    )
