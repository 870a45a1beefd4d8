"""From the requests of a round to a plan: what the edge knows, handed to a framework."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from broker import messages
from semct import frameworks
from semct.cache import CacheSettings, LatentCache
from semct.clustering import Number
from semct.cost import Backlog, Kind, Link, Network, NodeState, Pace, Weights
from semct.forecast import Sent, replay
from semct.planner.learned import Policy
from semct.prompts import SentenceEncoder
from semct.public_prompt import Writer
from semct.quality import QualityModel
from semct.routes import Plan, Request, Route


class NodeLinks(msgspec.Struct, frozen=True, kw_only=True):
    """A node's link to the cell's hub in both directions: a device's wireless one, a cloud's over the wide area."""

    up: Link = Link()
    down: Link = Link()


class Departure(NamedTuple):
    """A batch whose work has left the edge: what was ``asked``, when it was ``received``, and its plan.

    Planning ``began`` then and took so many ``seconds``, all by the edge's clock; ``parts`` say on what. When it began,
    the edge had that ``backlog``.
    """

    asked: Sequence[messages.Request]
    received: Mapping[str, float]
    plan: Plan
    began: float
    seconds: float
    parts: dict[str, float]
    backlog: tuple[Backlog, ...]


class Planner:
    """Holds what planning needs, and plans a round with the framework that it names.

    ``links`` are those of nodes whose links the rounds do not tell.
    """

    def __init__(
        self,
        *,
        edge: str,
        compute: messages.Compute,
        latent_bytes: int,
        links: Mapping[str, NodeLinks] = MappingProxyType({}),
        weights: Weights,
        clusters: Number,
        most_shared: int,
        policy: Policy | None = None,
        model: str,
        small_model: str,
        quality: QualityModel,
        encoder: SentenceEncoder,
        writer: Writer,
        cache: CacheSettings,
    ) -> None:
        self._edge = edge
        self._nodes = {edge: _state("edge", compute)}
        self._thin: set[str] = set()
        self._latent_bytes = latent_bytes
        self._links = links
        self._weights = weights
        self._most_shared = most_shared
        self._policy = policy
        self._clusters = clusters
        self._model = model
        self._small_model = small_model
        self._quality = quality
        self._encoder = encoder
        self._writer = writer
        self._cache = cache
        self._caches: dict[str, LatentCache] = {}

    def meet(self, name: str, kind: Kind, compute: messages.Compute | None) -> None:
        """Learn of a node and how it computes; a device that holds no model does not, and the edge does it instead."""
        if compute is None:
            self._thin.add(name)
            self._nodes[name] = msgspec.structs.replace(self._nodes[self._edge], kind=kind)
        else:
            self._thin.discard(name)
            self._nodes[name] = _state(kind, compute)

    def cache(self, order: messages.Round) -> LatentCache:
        """The cache of the round's framework: its own, from its first round on or new for each."""
        key = order.framework if self._cache.lasts == "run" else order.round
        if key not in self._caches:
            if self._cache.lasts == "round":
                self._caches.clear()
            self._caches[key] = LatentCache(self._cache, latent_bytes=self._latent_bytes)
        return self._caches[key]

    def cache_report(self, order: messages.Round) -> messages.CacheCounts | None:
        """What the round's cache did, if its framework uses one."""
        counts = self.cache(order).report()
        used = counts.hits or counts.misses
        return msgspec.convert(counts, messages.CacheCounts, from_attributes=True) if used else None

    def plan(
        self, order: messages.Round, asked: Sequence[messages.Request], *, backlog: tuple[Backlog, ...] = ()
    ) -> tuple[Plan, dict[str, float]]:
        """The plan for these requests, and the wall seconds of each part of planning and in total.

        ``backlog`` is what the edge has left to do for earlier ones.

        Raises what the framework raises, and ``ValueError`` for a request of a device that never announced
        itself or a plan that does not lead each request over nodes that are there.
        """
        self._encoder.forget()
        start = time.perf_counter()
        frameworks.check_needs(
            order.framework,
            edges=sum(n.kind == "edge" for n in self._nodes.values()),
            clouds=sum(n.kind == "cloud" for n in self._nodes.values()),
            small=self._small_model in self._nodes[self._edge].others,
        )
        batch = self._batch(order, asked, backlog)
        plan = moved(frameworks.load(order.framework)(batch), self._thin, self._edge)
        self._check(plan, batch.requests)
        return plan, {**batch.seconds, "total": time.perf_counter() - start}

    def forecast(
        self,
        order: messages.Round,
        asked: Sequence[messages.Request],
        plan: Plan,
        *,
        planning: float,
        backlog: tuple[Backlog, ...] = (),
    ) -> Plan:
        """The plan for these requests, after so many seconds of planning, with what is expected of it.

        ``backlog`` is what the edge had left to do when planning began; what comes later is not known.
        """
        return self._batch(order, asked, backlog).forecast(plan, planning=planning)

    def replay(self, order: messages.Round, departures: Sequence[Departure], *, slowdown: float) -> list[Plan]:
        """The plans of a round with what is expected of them where they meet each other, at the times they left at.

        ``slowdown`` is how many wall seconds make one of the emulated world, in which planning takes as long as here.
        """
        batch = self._batch(order, [request for d in departures for request in d.asked])
        size, sent = batch.network.request_bytes, []
        for d in departures:
            at = (d.began + d.seconds - departures[0].began) / slowdown
            asked = {
                r.request: at
                - batch.network.seconds(r.reply, self._edge, size)
                - (d.began - d.received[r.request]) / slowdown
                - d.seconds
                for r in d.asked
            }
            requests = [r for r in batch.requests if r.id in asked]
            sent.append(Sent(plan=d.plan, requests=requests, at=at, asked=asked))
        expected = replay(
            sent,
            network=batch.network,
            weights=self._weights,
            quality=self._quality,
            cache=LatentCache(self._cache, latent_bytes=self._latent_bytes),
        )
        return [
            msgspec.structs.replace(d.plan, predictions={r.request: expected[r.request] for r in d.asked})
            for d in departures
        ]

    def _batch(
        self, order: messages.Round, asked: Sequence[messages.Request], backlog: tuple[Backlog, ...] = ()
    ) -> frameworks.Batch:
        requests = tuple(
            Request(id=r.request, device=r.reply, prompt=r.prompt, seed=r.seed, steps=r.steps)
            for r in sorted(asked, key=lambda r: r.request)
        )
        for r in requests:
            if r.device not in self._nodes:
                raise ValueError(f"device {r.device} asks for a picture but has not announced how it computes")
        here = [name for name, node in self._nodes.items() if node.kind != "device" and name != self._edge]
        known = {**self._links, **{name: _links(now) for name, now in order.links.items()}}
        linked = {n: known.get(n, NodeLinks()) for n in (*here, *(r.device for r in requests))}
        return frameworks.Batch(
            requests=requests,
            network=Network(
                edge=self._edge,
                nodes=self._nodes | {self._edge: msgspec.structs.replace(self._nodes[self._edge], backlog=backlog)},
                uplinks={name: links.up for name, links in linked.items()},
                downlinks={name: links.down for name, links in linked.items()},
                latent_bytes=self._latent_bytes,
            ),
            weights=self._weights,
            most_shared=self._most_shared,
            policy=self._policy,
            quality=self._quality,
            encoder=self._encoder,
            writer=self._writer,
            model=self._model,
            small_model=self._small_model,
            clusters=self._clusters,
            seed=order.seed,
            cache=self.cache(order),
        )

    def _check(self, plan: Plan, requests: Sequence[Request]) -> None:
        if sorted(r.request for r in plan.routes) != sorted(r.id for r in requests):
            raise ValueError(f"its plan has {len(plan.routes)} routes, not one for each of {len(requests)} requests")
        unknown = {node for r in plan.routes for node in r.nodes} - set(self._nodes)
        if unknown:
            raise ValueError(f"its plan leads over {', '.join(sorted(unknown))}, which nobody knows")


def moved(plan: Plan, thin: Collection[str], edge: str) -> Plan:
    """The plan with the edge doing what it gives to nodes that hold no model."""
    if not any(node in thin for route in plan.routes for node in route.nodes):
        return plan

    def instead(route: Route) -> Route:
        segments = (msgspec.structs.replace(s, node=edge) if s.node in thin else s for s in route.segments)
        return msgspec.structs.replace(route, segments=tuple(segments))

    return msgspec.structs.replace(plan, routes=tuple(instead(route) for route in plan.routes))


def _links(now: messages.LinkNow) -> NodeLinks:
    def link(way: messages.Way) -> Link:
        return Link(rate=math.inf if way.rate is None else way.rate, delay=way.delay, watts=way.watts)

    return NodeLinks(up=link(now.up), down=link(now.down))


def _state(kind: Kind, compute: messages.Compute) -> NodeState:
    return NodeState(
        kind=kind,
        others={m: Pace(step_seconds=p.step_seconds, step_joules=p.step_joules) for m, p in compute.others.items()},
        step_seconds=compute.step_seconds,
        step_joules=compute.step_joules,
        decode_seconds=compute.decode_seconds,
        decode_joules=compute.decode_joules,
        call_seconds=compute.call_seconds,
        call_joules=compute.call_joules,
        rows=compute.rows,
    )
