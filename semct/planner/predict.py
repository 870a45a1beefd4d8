"""What any routes are expected to give: latency, energy and utility of each request, wherever its segments run.

Latency comes from a fluid model of what the nodes do. A node shares itself among the clusters that have work there
by their weights, and a cluster's part equally among its trajectories, as the engine does row by row; requests
whose routes begin alike ride on one trajectory. A link sends one message after the other. What the model leaves
out: the granularity of denoiser calls, planning time, and the time of the software itself.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from semct.cost import Link, Network, Outcome, Weights, airtime, device_only, utility
from semct.routes import Cluster, Prediction, Request, Route, Segment, steps_of


def predict(
    requests: Sequence[Request],
    routes: Sequence[Route],
    *,
    clusters: Sequence[Cluster] = (),
    quality: Mapping[str, float],
    alone: float,
    network: Network,
    weights: Weights,
) -> dict[str, Prediction]:
    """The prediction for each request that takes these routes, all asking at once.

    ``quality`` is the expected content quality by request, ``alone`` that of a picture made by the request's
    device alone. ``clusters`` hold the shares of the planning edge.
    """
    latency = latencies(requests, routes, clusters=clusters, network=network)
    energy = energies(requests, routes, network=network)
    found = {}
    for r in requests:
        outcome = Outcome(quality=quality[r.id], latency=latency[r.id], energy=energy[r.id])
        reference = device_only(network, r.device, r.steps, alone)
        found[r.id] = Prediction(
            quality=outcome.quality,
            latency=outcome.latency,
            energy=outcome.energy,
            utility=utility(outcome, reference, weights),
        )
    return found


def energies(requests: Sequence[Request], routes: Sequence[Route], *, network: Network) -> dict[str, float]:
    """Joules of each request: its part of every step, its transmissions, and the decoding on its device."""
    riders = Counter(key for r in routes for key in steps_of(r))
    devices = {r.id: r.device for r in requests}
    found = {}
    for route in routes:
        device = devices[route.request]
        keys = iter(steps_of(route))
        steps = sum(
            network.nodes[s.node].pace(s.model).step_joules / riders[next(keys)]
            for s in route.segments
            for _ in range(s.start, s.stop)
        )
        sent = sum(link.joules(size) for hop in _hops(route, device, network) for link, size in hop)
        found[route.request] = steps + sent + network.nodes[device].decode_joules
    return found


def latencies(
    requests: Sequence[Request], routes: Sequence[Route], *, clusters: Sequence[Cluster] = (), network: Network
) -> dict[str, float]:
    """Seconds from each request to its decoded picture, all asking at once."""
    devices = {r.id: r.device for r in requests}
    share = {m: (i, c.share) for i, c in enumerate(clusters) for m in c.members}
    run = _Run(network)
    for route in routes:
        run.start(_Trip(route, devices[route.request], *share.get(route.request, (None, 1.0)), network=network))
    return run.finish()


def _hops(route: Route, device: str, network: Network) -> Iterator[list[tuple[Link, int]]]:
    """The links and sizes of each message of a request: to the planner, to the first node, and on to the device."""
    yield [(link, network.request_bytes) for link in network.way(device, network.edge)]
    stops = [*route.nodes, device]
    if stops[0] != network.edge:
        yield [(link, network.request_bytes) for link in network.way(network.edge, stops[0])]
    for sender, receiver in itertools.pairwise(stops):
        if sender != receiver:
            yield [(link, network.latent_bytes) for link in network.way(sender, receiver)]


class _Trip:
    """One request on its way: its visits to nodes, in order."""

    def __init__(self, route: Route, device: str, cluster: int | None, weight: float, *, network: Network) -> None:
        self.route = route
        self.device = device
        self.visits = [tuple(part) for _, part in itertools.groupby(route.segments, key=lambda s: s.node)]
        self.at = -1  # the visit under way
        self.segment = 0  # of that visit
        self._edge = network.edge
        self._cluster = cluster
        self._weight = weight

    @property
    def group(self) -> tuple[Hashable, float]:
        """Whose share of the present node the request uses, and its weight: the planning edge knows clusters."""
        if self.at == 0 and self.visits[0][0].node == self._edge:
            return ("cluster", self._cluster), self._weight
        return ("request", self.route.request), 1.0

    @property
    def here(self) -> Segment:
        """The segment under way."""
        return self.visits[self.at][self.segment]


@dataclass(eq=False)
class _Track:
    """One trajectory on a node; ``joined`` is the group's progress when it began, ``stops`` are still to come."""

    key: tuple[Hashable, ...]
    start: int
    joined: float
    cost: float
    riders: dict[int, list[_Trip]] = field(default_factory=dict)


@dataclass(eq=False)
class _Group:
    """A cluster's trajectories on a node. Each of them has made ``progress`` steps since the group came."""

    weight: float
    progress: float = 0.0
    since: float = 0.0  # the node's virtual time at which ``progress`` held
    tracks: int = 0
    cost: float = 0.0  # seconds of a step, summed over the tracks
    events: list[tuple[float, int, _Track, int]] = field(default_factory=list)
    version: int = 0

    @property
    def load(self) -> float:
        """What one unit of the node's virtual time costs for this group, in seconds."""
        return self.weight * self.cost / self.tracks if self.tracks else 0.0

    def advance(self, virtual: float) -> None:
        if self.tracks:
            self.progress += (virtual - self.since) * self.weight / self.tracks
        self.since = virtual

    def next(self) -> float:
        """The node's virtual time at which the next track reaches a stop."""
        return self.since + (self.events[0][0] - self.progress) * self.tracks / self.weight


class _Node:
    """Generalised processor sharing, in virtual time: rows that a group of weight 1 has had."""

    def __init__(self, network: Network, name: str) -> None:
        self._state = network.nodes[name]
        self._time = 0.0
        self._virtual = 0.0
        self._groups: dict[Hashable, _Group] = {}
        self._tracks: dict[tuple[Hashable, ...], tuple[_Track, _Group]] = {}
        self._queue: list[tuple[float, int, int, _Group]] = []
        self._order = itertools.count()
        self._load = 0.0

    def next(self) -> float | None:
        """When the next track reaches a stop."""
        while self._queue and self._queue[0][1] != self._queue[0][3].version:
            heapq.heappop(self._queue)
        return self._time + (self._queue[0][0] - self._virtual) * self._load if self._queue else None

    def board(self, now: float, trip: _Trip, origin: tuple[Hashable, ...]) -> list[tuple[_Trip, tuple[Hashable, ...]]]:
        """Put a trip on the track of its segment; return it where its stop is behind the track already."""
        self._advance(now)
        segment = trip.here
        key = (origin, trip.route.steps, segment.start, segment.model, segment.prompt)
        if key in self._tracks:
            track, group = self._tracks[key]
            group.advance(self._virtual)
            if segment.stop - track.start <= group.progress - track.joined + 1e-9:
                return [(trip, (key, segment.stop))]
        else:
            name, weight = trip.group
            group = self._groups.setdefault(name, _Group(weight=weight, since=self._virtual))
            group.advance(self._virtual)
            track = _Track(key, segment.start, group.progress, self._row_seconds(segment.model))
            self._tracks[key] = track, group
            self._change(group, 1, track.cost)
        if segment.stop not in track.riders:
            at = track.joined + segment.stop - track.start
            heapq.heappush(group.events, (at, next(self._order), track, segment.stop))
        track.riders.setdefault(segment.stop, []).append(trip)
        self._schedule(group)
        return []

    def leave(self, now: float) -> list[tuple[_Trip, tuple[Hashable, ...]]]:
        """The trips that reach a stop now, each with the origin of what follows."""
        _, _, _, group = heapq.heappop(self._queue)
        self._advance(now)
        group.advance(self._virtual)
        at, _, track, stop = heapq.heappop(group.events)
        group.progress = at  # no drift by rounding
        leaving = track.riders.pop(stop)
        if not track.riders:
            del self._tracks[track.key]
            self._change(group, -1, -track.cost)
        self._schedule(group)
        return [(trip, (track.key, stop)) for trip in leaving]

    def _advance(self, now: float) -> None:
        if now > self._time:
            if self._load > 0:
                self._virtual += (now - self._time) / self._load
            self._time = now

    def _row_seconds(self, model: str) -> float:
        """Time of a row's step: in calls of many rows, but on a device, which serves one user."""
        rows = 1 if self._state.kind == "device" else self._state.rows
        return self._state.call_seconds / rows + self._state.pace(model).step_seconds

    def _change(self, group: _Group, tracks: int, cost: float) -> None:
        self._load -= group.load
        group.tracks += tracks
        group.cost += cost
        if not group.tracks:
            group.cost = 0.0
        self._load = max(0.0, self._load + group.load)

    def _schedule(self, group: _Group) -> None:
        group.version = next(self._order)
        if group.events:
            heapq.heappush(self._queue, (group.next(), group.version, next(self._order), group))


class _Run:
    """The events of all nodes in the order of time."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._nodes: dict[str, _Node] = {}
        self._due: list[tuple[float, int, str, _Trip | None]] = []  # arrivals; None: look at the node
        self._look: dict[str, int] = {}  # the latest look at each node: earlier ones have been overtaken
        self._free: dict[tuple[str, str], float] = defaultdict(float)
        self._order = itertools.count()
        self._finished: dict[str, float] = {}

    def start(self, trip: _Trip) -> None:
        """A request is sent: to the planner, and from there to its first node."""
        edge, first = self._network.edge, trip.route.nodes[0]
        at = self._send(0.0, trip.device, edge, self._network.request_bytes)
        self._go(at, edge, first, trip, self._network.request_bytes)

    def finish(self) -> dict[str, float]:
        """Play it all, and return when each picture was there."""
        while self._due:
            now, order, name, trip = heapq.heappop(self._due)
            if trip is None and order != self._look[name]:
                continue
            node = self._nodes[name]
            if trip is not None:
                trip.at += 1
                first = trip.here.start
                origin = ("noise", trip.route.seed) if first == 0 else ("latent", trip.route.request)
                self._walk(now, name, node.board(now, trip, origin))
            elif (due := node.next()) is not None and due <= now + 1e-12:
                self._walk(now, name, node.leave(now))
            if (due := node.next()) is not None:
                self._look[name] = next(self._order)
                heapq.heappush(self._due, (max(due, now), self._look[name], name, None))
        return self._finished

    def _walk(self, now: float, name: str, leaving: list[tuple[_Trip, tuple[Hashable, ...]]]) -> None:
        """Lead trips that reached a stop to their next segment, node, or end."""
        while leaving:
            trip, origin = leaving.pop()
            if trip.segment + 1 < len(trip.visits[trip.at]):
                trip.segment += 1
                leaving += self._nodes[name].board(now, trip, origin)
                continue
            trip.segment = 0
            if trip.at + 1 < len(trip.visits):
                self._go(now, name, trip.visits[trip.at + 1][0].node, trip, self._network.latent_bytes)
                continue
            there = self._send(now, name, trip.device, self._network.latent_bytes)
            self._finished[trip.route.request] = there + self._network.nodes[trip.device].decode_seconds

    def _go(self, now: float, sender: str, receiver: str, trip: _Trip, size: int) -> None:
        self._nodes.setdefault(receiver, _Node(self._network, receiver))
        # A device that starts by itself gets its own route back by its downlink, latent or not.
        heapq.heappush(self._due, (self._send(now, sender, receiver, size), next(self._order), receiver, trip))

    def _send(self, now: float, sender: str, receiver: str, size: int) -> float:
        """When a message is over: each link sends one after the other."""
        if sender == receiver:
            return now
        for end, link in (("up", self._network.uplinks.get(sender)), ("down", self._network.downlinks.get(receiver))):
            if link is not None:
                owner = (sender if end == "up" else receiver, end)
                self._free[owner] = max(now, self._free[owner]) + airtime(size, link.rate)
                now = self._free[owner] + link.delay
        return now
