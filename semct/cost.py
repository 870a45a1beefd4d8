"""What a plan costs: service latency, energy and network utility of each request.

Notation as in the paper: of T denoising steps a request shares x on the edge, runs y personal ones there and
z = T - x - y on its device. Seconds, joules, bits per second. Formulas take one user or arrays over users alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Self, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from semct.routes import Plan

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Amount = TypeVar("Amount", float, Floats)


def airtime(size: int, rate: Amount) -> Amount:
    """Time for which a sender of ``rate`` bit/s transmits ``size`` bytes."""
    return 8 * size / rate


def transfer(size: int, rate: Amount, delay: Amount) -> Amount:
    """Time until ``size`` bytes are over: bits / rate + delay."""
    return delay + airtime(size, rate)


Kind = Literal["edge", "cloud", "device"]
"""What a node is: near the users, in a distant data centre, or a user's own."""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """What one row's denoising step with one model takes on a node, alone: seconds and joules."""

    step_seconds: float
    step_joules: float


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """What a node has left to do for one cluster of earlier requests.

    ``steps`` are those left, by model, shared ones once; so many ``requests`` wait for them, and ``weight`` is the
    cluster's in the node's engine: the share that it was planned with.
    """

    steps: Mapping[str, int]
    requests: int
    weight: float = 1.0


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """What denoising and decoding take on a node, alone: seconds and joules.

    A denoiser call takes ``call_*`` once and ``step_*`` for each of its rows, of which it takes up to ``rows``.
    Emulated nodes are saturated GPUs: their calls cost nothing beside their rows.

    The step is one with the main model, which every node holds; ``others`` are the paces of the other models
    that it holds, by name. ``backlog`` is what it has left to do for requests that came earlier.
    """

    step_seconds: float
    step_joules: float
    decode_seconds: float = 0.0
    decode_joules: float = 0.0
    call_seconds: float = 0.0
    call_joules: float = 0.0
    rows: int = 8
    kind: Kind = "device"
    others: Mapping[str, Pace] = {}
    backlog: tuple[Backlog, ...] = ()

    def pace(self, model: str) -> Pace:
        """What a row's step with this model takes; the main model's where it is none of the others."""
        return self.others.get(model) or Pace(step_seconds=self.step_seconds, step_joules=self.step_joules)

    @property
    def lone_seconds(self) -> float:
        """Time of a step of one row by itself."""
        return self.call_seconds + self.step_seconds

    @property
    def lone_joules(self) -> float:
        """Energy of a step of one row by itself."""
        return self.call_joules + self.step_joules

    @property
    def full_seconds(self) -> float:
        """Time of a row's step in a full call."""
        return self.call_seconds / self.rows + self.step_seconds

    @property
    def full_joules(self) -> float:
        """Energy of a row's step in a full call."""
        return self.call_joules / self.rows + self.step_joules

    def owed_seconds(self, backlog: Backlog) -> float:
        """Time that what is left for a cluster takes of the whole node, in full calls."""
        return sum(
            count * (self.call_seconds / self.rows + self.pace(model).step_seconds)
            for model, count in backlog.steps.items()
        )


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """What a node's link to the hub gives in one direction; an infinite rate means that nothing shapes it.

    ``watts`` is the sender's transmission power.
    """

    rate: float = math.inf
    delay: float = 0.0
    watts: float = 0.0

    def __post_init__(self) -> None:
        if not (self.rate > 0 and self.delay >= 0 and self.watts >= 0):
            raise ValueError(
                f"a link's rate must be above 0, its delay and watts at least 0; these are "
                f"{self.rate}, {self.delay} and {self.watts}"
            )

    def seconds(self, size: int) -> float:
        """Time until ``size`` bytes are over."""
        return transfer(size, self.rate, self.delay)

    def joules(self, size: int) -> float:
        """Energy that transmitting ``size`` bytes takes."""
        return self.watts * airtime(size, self.rate)


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the network that a framework plans on: nodes by name, their links to the cell's hub.

    ``edge`` is the edge node that plans; it stands at the hub. A node that stands there too has no link: neither an
    uplink (from it to the hub) nor a downlink. ``latent_bytes`` and ``request_bytes`` are the sizes of an
    intermediate result and of a request on the wire.
    """

    edge: str
    nodes: Mapping[str, NodeState]
    uplinks: Mapping[str, Link]
    downlinks: Mapping[str, Link]
    latent_bytes: int
    request_bytes: int = 400

    def of_kind(self, kind: Kind) -> tuple[str, ...]:
        """The nodes of a kind, the planning edge first and the others by name."""
        return tuple(sorted((n for n, s in self.nodes.items() if s.kind == kind), key=lambda n: (n != self.edge, n)))

    def way(self, sender: str, receiver: str) -> tuple[Link, ...]:
        """The links between two nodes, in order; a hub that stores and forwards takes one after the other."""
        ends = (self.uplinks.get(sender), self.downlinks.get(receiver))
        return tuple(link for link in ends if link is not None)

    def seconds(self, sender: str, receiver: str, size: int) -> float:
        """Time until a message is over, where no other is on the way."""
        return sum(link.seconds(size) for link in self.way(sender, receiver))

    def joules(self, sender: str, receiver: str, size: int) -> float:
        """Energy that transmitting a message takes."""
        return sum(link.joules(size) for link in self.way(sender, receiver))


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """How much quality, latency and energy count in the utility; they sum to 1."""

    quality: float = 1 / 3
    latency: float = 1 / 3
    energy: float = 1 / 3

    def __post_init__(self) -> None:
        parts = (self.quality, self.latency, self.energy)
        if min(parts) < 0 or not math.isclose(sum(parts), 1.0, abs_tol=1e-6):
            raise ValueError(f"utility weights must be at least 0 and sum to 1, these are {parts}")


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a request got: content quality, service latency in seconds, energy in joules."""

    quality: float
    latency: float
    energy: float


class Outcomes(msgspec.Struct, frozen=True, kw_only=True):
    """What users got, as arrays (users,): content quality, service latency in seconds, energy in joules."""

    quality: Floats
    latency: Floats
    energy: Floats


def utility(outcome: Outcome, reference: Outcome, weights: Weights) -> float:
    """Network utility of one request against the same user's device-only inference; see ``utilities``."""
    return float(utilities(_one(outcome), _one(reference), weights)[0])


def utilities(outcomes: Outcomes, references: Outcomes, weights: Weights) -> Floats:
    """Network utility (users,) against the same users' device-only inference.

    w_q Q / Q_ref + w_t (1 - T / T_ref) + w_e (1 - E / E_ref). Device-only itself scores w_q. An energy that
    the reference does not have (native nodes without a meter) counts as unchanged.
    """
    unmetered = np.ones(np.broadcast_shapes(outcomes.energy.shape, references.energy.shape))
    energy = np.divide(outcomes.energy, references.energy, out=unmetered, where=references.energy > 0)
    return np.asarray(
        weights.quality * outcomes.quality / references.quality
        + weights.latency * (1 - outcomes.latency / references.latency)
        + weights.energy * (1 - energy),
        dtype=np.float64,
    )


def device_only(network: Network, device: str, steps: int, quality: float) -> Outcome:
    """The reference of a device: all steps on itself, nothing sent."""
    node = network.nodes[device]
    return Outcome(
        quality=quality,
        latency=steps * node.lone_seconds + node.decode_seconds,
        energy=steps * node.lone_joules + node.decode_joules,
    )


class Users(msgspec.Struct, frozen=True, kw_only=True):
    """Users' devices and their links as arrays (users,): what ``NodeState`` and ``Link`` say of one.

    ``step_*`` are those of a lone row. ``latent_bytes`` and ``request_bytes`` as in ``Network``.
    """

    step_seconds: Floats
    step_joules: Floats
    decode_seconds: Floats
    decode_joules: Floats
    up_rate: Floats
    up_delay: Floats
    up_watts: Floats
    down_rate: Floats
    down_delay: Floats
    down_watts: Floats
    latent_bytes: int
    request_bytes: int = 400

    @classmethod
    def of(cls, network: Network, devices: Sequence[str]) -> Self:
        """The users of these devices."""
        nodes = [network.nodes[d] for d in devices]
        ups, downs = [network.uplinks[d] for d in devices], [network.downlinks[d] for d in devices]
        return cls(
            step_seconds=np.array([n.lone_seconds for n in nodes]),
            step_joules=np.array([n.lone_joules for n in nodes]),
            decode_seconds=np.array([n.decode_seconds for n in nodes]),
            decode_joules=np.array([n.decode_joules for n in nodes]),
            up_rate=np.array([link.rate for link in ups]),
            up_delay=np.array([link.delay for link in ups]),
            up_watts=np.array([link.watts for link in ups]),
            down_rate=np.array([link.rate for link in downs]),
            down_delay=np.array([link.delay for link in downs]),
            down_watts=np.array([link.watts for link in downs]),
            latent_bytes=network.latent_bytes,
            request_bytes=network.request_bytes,
        )

    def alone(self, steps: Ints | int, quality: Floats) -> Outcomes:
        """Their device-only inference, with this content quality."""
        return Outcomes(
            quality=quality,
            latency=steps * self.step_seconds + self.decode_seconds,
            energy=steps * self.step_joules + self.decode_joules,
        )

    def asking_seconds(self) -> Floats:
        """Time until the request is at the edge."""
        return transfer(self.request_bytes, self.up_rate, self.up_delay)

    def asking_joules(self) -> Floats:
        """Energy of sending the request."""
        return self.up_watts * airtime(self.request_bytes, self.up_rate)

    def order_seconds(self) -> Floats:
        """Time until the order to start by itself has come down; it is as long as a request."""
        return transfer(self.request_bytes, self.down_rate, self.down_delay)

    def order_joules(self) -> Floats:
        """Energy of sending that order."""
        return self.down_watts * airtime(self.request_bytes, self.down_rate)

    def latent_seconds(self) -> Floats:
        """Time until an intermediate result has come down."""
        return transfer(self.latent_bytes, self.down_rate, self.down_delay)

    def latent_joules(self) -> Floats:
        """Energy of sending an intermediate result down."""
        return self.down_watts * airtime(self.latent_bytes, self.down_rate)


class Splits(msgspec.Struct, frozen=True, kw_only=True):
    """Decisions of a batch as arrays: the cluster of each user, their x, y and z, and the clusters' shares (K,)."""

    cluster: Ints
    shared: Ints
    edge: Ints
    device: Ints
    share: Floats

    @classmethod
    def of(cls, plan: Plan, edge: str) -> Self:
        """Those of a plan whose routes lead from one edge, with a public prompt first, to devices."""
        number = {member: i for i, c in enumerate(plan.clusters) for member in c.members}
        public = [c.public_prompt for c in plan.clusters]
        rows = np.zeros((len(plan.routes), 4), dtype=np.int64)
        for row, route in zip(rows, plan.routes, strict=True):
            row[0] = number[route.request]
            for s in route.segments:
                kind = 3 if s.node != edge else 1 if s.prompt == public[row[0]] else 2
                row[kind] += s.stop - s.start
        cluster, shared, on_edge, device = rows.T
        share = np.array([c.share for c in plan.clusters])
        return cls(cluster=cluster, shared=shared, edge=on_edge, device=device, share=share)

    @property
    def offloaded(self) -> NDArray[np.bool_]:
        """Who has steps on the edge at all."""
        return self.shared + self.edge > 0

    @property
    def work(self) -> Ints:
        """Steps A_m (K,) that the edge runs for each cluster: max x + sum y."""
        work = np.bincount(self.cluster, weights=self.edge, minlength=len(self.share))
        return work.astype(np.int64) + self.longest

    def shared_part(self) -> Floats:
        """Each user's part (users,) of its cluster's shared steps: a step that n users share counts 1/n for each."""
        steps = int(self.shared.max(initial=0))
        sharers = np.zeros((len(self.share), steps + 1))
        np.add.at(sharers, (self.cluster, self.shared), 1.0)
        sharers = np.cumsum(sharers[:, ::-1], axis=1)[:, ::-1]  # of step k (1-based): those with x >= k
        part = np.cumsum(np.divide(1.0, sharers, out=np.zeros_like(sharers), where=sharers > 0)[:, 1:], axis=1)
        padded = np.concatenate([np.zeros((len(self.share), 1)), part], axis=1)
        return np.asarray(padded[self.cluster, self.shared], dtype=np.float64)

    @property
    def longest(self) -> Ints:
        """Shared steps (K,) that the edge runs for each cluster: max x."""
        longest = np.zeros(len(self.share), dtype=np.int64)
        np.maximum.at(longest, self.cluster, self.shared)
        return longest


def edge_seconds(splits: Splits, edge: NodeState) -> Floats:
    """Seconds (users,) from the start of a batch on the edge until each user's latent leaves it.

    The edge shares itself between clusters in proportion to their shares f, and a cluster its part equally
    between its running prompts, the public one among them (generalised processor sharing, which the engine's
    stride scheduling approximates with whole rows). So all prompts of a cluster advance alike: a user is through
    after x + y of its cluster's *turns*, whose length depends on how many prompts run. What a cluster does not
    need any more goes to the others: with W_m(u) the work that cluster m has done after u turns, and v =
    W_m(x + y) / f_m, the time is the sum over clusters k of min(f_k v, A_k) steps, those of the edge's backlog among
    them, each by its weight and as one prompt. On an edge without a backlog it never exceeds the time A_m / f_m of
    the paper's model, in which everybody waits for its whole cluster at its bare share.
    """
    turns = int((splits.shared + splits.edge).max(initial=0))
    running = np.zeros((len(splits.share), turns + 1))  # prompts of each cluster in each turn
    personal = splits.edge > 0
    np.add.at(running, (splits.cluster[personal], splits.shared[personal]), 1.0)
    np.add.at(running, (splits.cluster[personal], (splits.shared + splits.edge)[personal]), -1.0)
    running = np.cumsum(running, axis=1) + (np.arange(turns + 1) < splits.longest[:, None])
    done = np.concatenate([np.zeros((len(running), 1)), np.cumsum(running, axis=1)[:, :-1]], axis=1)
    virtual, share = done / splits.share[:, None], splits.share
    if edge.backlog:
        owed = np.array([edge.owed_seconds(b) for b in edge.backlog]) / edge.full_seconds
        weight = np.array([b.weight for b in edge.backlog])
        earlier = np.arange(turns + 1) > 0
        virtual = np.concatenate([virtual, np.where(earlier, (owed / weight)[:, None], 0.0)])
        running = np.concatenate([running, np.broadcast_to(~earlier, (len(owed), turns + 1))])
        share = np.concatenate([share, weight])
    clock = _clock(virtual, running, share, edge)
    return np.asarray(clock[splits.cluster, splits.shared + splits.edge], dtype=np.float64)


def _clock(virtual: Floats, running: Floats, share: Floats, edge: NodeState) -> Floats:
    """The real time of every cluster's turns (K, turns + 1), which start at the ``virtual`` times.

    Between two events the clusters at work advance at the sum of their shares, with so many rows to a call.
    """
    busy = running > 0
    order = np.argsort(virtual, axis=None, kind="stable")
    # The number of prompts that run, and the shares of the clusters at work, change where a turn starts.
    rows = np.diff(running, axis=1, prepend=0.0).ravel()[order].cumsum()
    active = (np.diff(busy.astype(np.float64), axis=1, prepend=0.0) * share[:, None]).ravel()[order].cumsum()
    together = np.clip(rows, 1, edge.rows)
    passed = np.diff(virtual.ravel()[order], prepend=0.0)
    pace = np.maximum(active, 0.0) * (edge.step_seconds + edge.call_seconds / together)
    clock = np.empty(virtual.size)
    clock[order] = np.cumsum(passed * np.concatenate([[0.0], pace[:-1]]))
    return clock.reshape(virtual.shape)


def serve(users: Users, splits: Splits, edge: NodeState, quality: Floats, *, planning: float = 0.0) -> Outcomes:
    """What a batch is expected to get from these splits on one edge, with this content quality (users,).

    All ask at once. Latency is the slowest request's way up (the batch waits for it), the seconds of ``planning``,
    ``edge_seconds``, the latent's way down, the device's steps and its decoding; energy what the edge, the two
    senders and the device take. Who has no steps on the edge still gets the order to start from there.
    """
    sent = splits.offloaded
    return Outcomes(
        quality=quality,
        latency=users.asking_seconds().max(initial=0.0)
        + planning
        + np.where(sent, edge_seconds(splits, edge) + users.latent_seconds(), users.order_seconds())
        + splits.device * users.step_seconds
        + users.decode_seconds,
        energy=users.asking_joules()
        + (splits.shared_part() + splits.edge) * edge.full_joules
        + np.where(sent, users.latent_joules(), users.order_joules())
        + splits.device * users.step_joules
        + users.decode_joules,
    )


def _one(outcome: Outcome) -> Outcomes:
    return Outcomes(
        quality=np.array([outcome.quality]), latency=np.array([outcome.latency]), energy=np.array([outcome.energy])
    )
