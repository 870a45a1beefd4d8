"""What a plan is expected to give every request.

``expect`` says it in closed form and for thousands of requests, for plans that lead from one edge to devices.
``forecast`` plays any routes over any nodes through in virtual time: it drives the engine that the nodes drive, with
a denoiser that computes nothing and a clock that the cost model moves on. So whatever the engine does (steps shared,
rows batched, clusters weighted) is in the forecast by construction, whichever framework made the plan. ``replay``
does so for several plans that were made one after the other, whose requests meet on nodes and links.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
import torch

from semct.cache import LatentCache, Prefix
from semct.compute import Cost, Processor
from semct.cost import (
    Backlog,
    Floats,
    Network,
    NodeState,
    Outcome,
    Splits,
    Users,
    Weights,
    airtime,
    device_only,
    serve,
    utilities,
    utility,
)
from semct.engine import Done, Engine, Job
from semct.quality import QualityModel
from semct.routes import Plan, Prediction, Request, Route, Segment

_NOTHING = torch.empty(0)
_NO_VECTOR = np.empty(0, np.float32)


def expect(
    requests: Sequence[Request],
    splits: Splits,
    similarity: Floats,
    *,
    network: Network,
    weights: Weights,
    quality: QualityModel,
    own: Floats | float = 0.0,
) -> dict[str, Prediction]:
    """The predictions for requests with these splits, by their ids; ``similarity`` (requests,) is phi.

    ``own`` (requests,) is their part in a public prompt that is a mean. Planning takes no time here.
    """
    users, steps = Users.of(network, [r.device for r in requests]), np.array([r.steps for r in requests])
    expected = quality.quality(similarity, splits.shared * quality.steps / steps, own)
    outcomes = serve(users, splits, network.nodes[network.edge], expected)
    gained = utilities(outcomes, users.alone(steps, quality.quality(similarity, 0.0)), weights)
    columns = (outcomes.quality, outcomes.latency, outcomes.energy, gained)
    return {
        r.id: Prediction(quality=q, latency=t, energy=e, utility=u)
        for r, q, t, e, u in zip(requests, *(c.tolist() for c in columns), strict=True)
    }


def forecast(
    plan: Plan,
    requests: Sequence[Request],
    *,
    network: Network,
    weights: Weights,
    quality: QualityModel,
    planning: float = 0.0,
) -> dict[str, Prediction]:
    """Expected content quality, service latency, energy and utility of each request, by its id.

    All ask at once. ``planning`` are the seconds from the last request's arrival to the plan, which everybody
    waits for, while nodes go on with their backlogs. Where the plan says what quality its framework expects, that
    stands; else it is what the curves say of the steps with another prompt than the user's own. Raises ``KeyError``
    for a route over a node that the network does not know.
    """
    size = network.request_bytes
    start = planning + max((network.seconds(r.device, network.edge, size) for r in requests), default=0.0)
    sent = Sent(plan=plan, requests=requests, at=start, asked=dict.fromkeys((r.id for r in requests), 0.0))
    return replay([sent], network=network, weights=weights, quality=quality, since=start - planning)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A batch of ``requests`` whose work left the edge that planned it ``at`` a time, and when each was ``asked`` for.

    Times are seconds on a clock that all batches have in common.
    """

    plan: Plan
    requests: Sequence[Request]
    at: float
    asked: Mapping[str, float]


def replay(
    batches: Sequence[Sent],
    *,
    network: Network,
    weights: Weights,
    quality: QualityModel,
    cache: LatentCache | None = None,
    since: float = 0.0,
) -> dict[str, Prediction]:
    """What ``forecast`` says, for batches that meet each other. Nodes have their backlogs ``since`` then.

    ``cache`` is an empty one for what earlier batches leave to later ones, where these are plans over a cache: steps
    are spared once they have been run. Without it, what a plan takes for spared is there at once.
    """
    found = _Play(batches, network, cache, since).all()
    predictions = {}
    for batch in batches:
        similarity = {m: phi for c in batch.plan.clusters for m, phi in zip(c.members, c.similarity, strict=True)}
        routes = {r.request: r for r in batch.plan.routes}
        for request in batch.requests:
            finished, joules = found[request.id]
            phi = similarity.get(request.id, 1.0)
            best, expected = quality.quality(phi, [0.0, _foreign(routes[request.id], request.prompt, quality.steps)])
            told = batch.plan.predictions.get(request.id)
            outcome = Outcome(
                quality=float(expected) if told is None else told.quality,
                latency=finished - batch.asked[request.id],
                energy=joules + network.joules(request.device, network.edge, network.request_bytes),
            )
            reference = device_only(network, request.device, request.steps, float(best))
            predictions[request.id] = Prediction(
                quality=outcome.quality,
                latency=outcome.latency,
                energy=outcome.energy,
                utility=utility(outcome, reference, weights),
            )
    return predictions


def _foreign(route: Route, prompt: str, scale: int) -> float:
    """The steps that a route runs with another prompt than the user's own, as so many of ``scale`` steps."""
    return sum(s.stop - s.start for s in route.segments if s.prompt != prompt) * scale / route.steps


class _Leg(NamedTuple):
    """Consecutive segments of a route on one node."""

    node: str
    segments: tuple[Segment, ...]


@dataclass(eq=False)
class _Way:
    """A request on its way: the legs that are left, its cluster and that one's share, and the energy so far.

    ``caching`` says that its first segment is looked up in the cache, and kept there.
    """

    route: Route
    device: str
    at: float
    legs: list[_Leg]
    group: Hashable
    weight: float
    caching: bool
    joules: float = 0.0
    begun: bool = False


def _legs(route: Route, spared: int) -> list[_Leg]:
    """The legs of a route that are left where its first steps are there already."""
    left = [msgspec.structs.replace(s, start=max(s.start, spared)) for s in route.segments if s.stop > spared]
    return [_Leg(node, tuple(segments)) for node, segments in groupby(left, key=lambda s: s.node)]


def _left(backlog: Sequence[Backlog]) -> Iterator[Job]:
    """A backlog as jobs: a cluster's steps in a row for each model."""
    for number, b in enumerate(backlog):
        for model, count in b.steps.items():
            name = f"backlog {number} {model}"
            segment = Segment(node="", model=model, prompt=name, start=0, stop=count)
            yield Job(
                request=name, seed=0, steps=count, segments=(segment,), group=("backlog", number), weight=b.weight
            )


class _NoModel:
    """Stands where the engine has a denoiser, and computes nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def noise(self, _: int) -> torch.Tensor:
        return _NOTHING

    def encode(self, *_: object) -> torch.Tensor:
        return _NOTHING


class _Node:
    """A node with an engine, in its own time; it is its engine's processor."""

    def __init__(self, state: NodeState, models: set[str], since: float) -> None:
        self.state = state
        self.now = 0.0
        self.ways: dict[str, _Way] = {}
        self._arrivals: list[tuple[float, Job]] = [(since, job) for job in _left(state.backlog)]
        models = models.union(*(b.steps for b in state.backlog))
        denoisers: dict[str, Any] = {model: _NoModel(model) for model in models}
        self._engine = Engine(denoisers, cast("Processor", self), rows=state.rows, clock=lambda: self.now)

    @property
    def due(self) -> float:
        """When its next call starts; infinite where it has nothing to do."""
        if not self._engine.idle:
            return self.now
        return max(self.now, min((at for at, _ in self._arrivals), default=math.inf))

    def take(self, at: float, way: _Way, job: Job) -> None:
        """A request arrives."""
        self.ways[job.request] = way
        self._arrivals.append((at, job))

    def call(self) -> list[Done]:
        """The next call: who is there by then rides along."""
        self.now = self.due
        for at, job in self._arrivals:
            if at <= self.now:
                self._engine.submit(job)
        self._arrivals = [(at, job) for at, job in self._arrivals if at > self.now]
        return self._engine.call()

    def step(self, model: _NoModel, latents: Sequence[object], *_: object) -> tuple[list[torch.Tensor], Cost]:
        """What the engine asks of its processor."""
        rows, pace = len(latents), self.state.pace(model.name)
        seconds = self.state.call_seconds + rows * pace.step_seconds
        joules = self.state.call_joules + rows * pace.step_joules
        self.now += seconds
        return [_NOTHING] * rows, Cost(seconds, joules, 0.0, overrun=False, modelled=True)


class _Play:
    """All requests of some plans on their ways through the network."""

    def __init__(self, batches: Sequence[Sent], network: Network, cache: LatentCache | None, since: float) -> None:
        self._network = network
        self._cache = cache
        self._noted: set[Prefix] = set()
        self._ways = [way for number, batch in enumerate(batches) for way in self._ways_of(batch, number)]
        self._ways.sort(key=lambda way: way.at)
        models = {s.model for way in self._ways for s in way.route.segments}
        visited = {s.node for way in self._ways for s in way.route.segments}
        self._nodes = {name: _Node(network.nodes[name], models, since) for name in visited}
        self._free: dict[tuple[str, str], float] = {}
        self._found: dict[str, tuple[float, float]] = {}

    def _ways_of(self, batch: Sent, number: int) -> Iterator[_Way]:
        devices = {r.id: r.device for r in batch.requests}
        shares = {m: (i, c.share) for i, c in enumerate(batch.plan.clusters) for m in c.members}
        for route in batch.plan.routes:
            cluster, share = shares.get(route.request, (None, 1.0))
            spared = batch.plan.spared.get(route.request, 0)
            caching = batch.plan.caching and self._notes(route, spared)
            yield _Way(
                route=route,
                device=devices[route.request],
                at=batch.at,
                legs=_legs(route, 0 if caching else spared),
                group=(number, cluster),
                weight=share,
                caching=caching,
                begun=spared > 0 and not caching,
            )

    def _notes(self, route: Route, spared: int) -> bool:
        """Whether the cache is told of the start of a route; not where its steps come from before these batches."""
        first = route.segments[0]
        prefix = Prefix(seed=route.seed, steps=route.steps, model=first.model, prompt=first.prompt)
        if self._cache is None or (spared and prefix not in self._noted):
            return False
        self._noted.add(prefix)
        self._cache.plan(prefix, _NO_VECTOR, first.stop)
        return True

    def all(self) -> dict[str, tuple[float, float]]:
        """When each request is done, and its energy."""
        waiting = deque(self._ways)
        while len(self._found) < len(self._ways):
            # Nothing arrives before it was sent, so the node that is due first knows all that it will know then.
            name, node = min(self._nodes.items(), key=lambda item: item[1].due)
            if waiting and waiting[0].at <= node.due:
                way = waiting.popleft()
                self._pass_on(way, self._network.edge, way.at)
                continue
            for done in node.call():
                if done.job.request not in node.ways:
                    continue  # it was backlog
                way = node.ways.pop(done.job.request)
                way.joules += done.joules
                self._pass_on(way, name, done.finished)
        return self._found

    def _pass_on(self, way: _Way, sender: str, at: float) -> None:
        """To the next node, or to the device, which decodes."""
        receiver = way.legs[0].node if way.legs else way.device
        if receiver != sender:
            size = self._network.latent_bytes if way.begun else self._network.request_bytes
            at = self._send(sender, receiver, size, at)
            way.joules += self._network.joules(sender, receiver, size)
        if not way.legs:
            node = self._network.nodes[way.device]
            self._found[way.route.request] = (at + node.decode_seconds, way.joules + node.decode_joules)
            return
        leg = way.legs.pop(0)
        # As the nodes do it: the edge that planned weighs clusters, for others each request stands for itself.
        planned = not way.begun and receiver == self._network.edge
        job = Job(
            request=way.route.request,
            seed=way.route.seed,
            steps=way.route.steps,
            segments=leg.segments,
            latent=_NOTHING if way.begun else None,
            group=way.group if planned else way.route.request,
            weight=way.weight if planned else 1.0,
            cache=self._cache if planned and way.caching else None,
        )
        way.begun = True
        self._nodes[receiver].take(at, way, job)

    def _send(self, sender: str, receiver: str, size: int, at: float) -> float:
        """When a message is over that leaves at ``at``: each link sends one after the other."""
        for end, link in (("up", self._network.uplinks.get(sender)), ("down", self._network.downlinks.get(receiver))):
            if link is not None:
                owner = (sender if end == "up" else receiver, end)
                self._free[owner] = max(at, self._free.get(owner, 0.0)) + airtime(size, link.rate)
                at = self._free[owner] + link.delay
        return at
