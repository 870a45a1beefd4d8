"""The first tier: the best splits of a cluster's requests for the amounts of edge work that can be best at all.

What a cluster's edge work A costs in time is concave in A, whatever the other clusters do: for fixed others, the
planner's objective holds A below a root and linearly. On an edge of the lower convex hull of the cheapest costs over
A, a concave function is least at an end. So only the corners of that hull matter, and a corner is what some *price*
on edge work makes the best. Under a price users decide each for themselves, but for the longest shared length X:
given X, the corners are found by merging the corners of all users' own curves in order of their slopes.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from semct.cost import Floats, Ints, Network, NodeState, Users, Weights
from semct.quality import QualityModel
from semct.routes import Request

_FLAT = 1e-12  # a corner bends more than that; less is rounding


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """x shared steps, y personal steps on the edge, z on the device."""

    shared: int
    edge: int
    device: int


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster's costs in units of utility, so that splits are chosen by adding them up.

    ``own`` (users, X + 1, T + 1) is what a user loses by its (x, y), x at most X, infinite where x + y > T: its
    utility with the sign turned, but without the time at the edge. ``corners``, of the same shape, marks for every
    bound on x the corners of the convex hull over y. ``second`` is what one second of the edge's work costs the
    cluster's users together; ``step`` the seconds of a row's step with the whole edge; ``joules`` the cost of the
    energy of a shared step (as if the users who share it weighed energy like the cluster's average).
    """

    own: Floats
    corners: NDArray[np.bool_]
    second: float
    step: float
    joules: float


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """What users of T = ``steps`` steps lose by their splits, in units of utility, as arrays (users,).

    ``always`` whatever the split; ``sent`` once a latent comes down; ``device`` by a step on the device, ``edge`` by
    the energy of one on the edge, ``second`` by a second of waiting; ``lost`` (users, X + 1) by x shared steps.
    """

    steps: int
    always: Floats
    sent: Floats
    device: Floats
    edge: Floats
    second: Floats
    lost: Floats

    def own(self) -> Floats:
        """``Costs.own`` of these users."""
        x, y = np.meshgrid(np.arange(self.lost.shape[1]), np.arange(self.steps + 1), indexing="ij")
        z = self.steps - x - y
        own = self.device[:, None, None] * z
        own += self.edge[:, None, None] * y
        own += np.where(x + y > 0, (self.always + self.sent)[:, None, None], self.always[:, None, None])
        own += self.lost[:, :, None]
        own[:, z < 0] = np.inf
        return own


def costs(
    requests: Sequence[Request],
    groups: Sequence[Sequence[int]],
    similarity: Sequence[Floats],
    *,
    network: Network,
    weights: Weights,
    quality: QualityModel,
    most_shared: int,
    sharing: bool = True,
    own: Sequence[Floats] | None = None,
) -> list[Costs]:
    """The costs of each cluster; ``similarity`` (members,) is phi, group by group.

    ``own`` (members,) is each member's part in a public prompt that is a mean; without it, all are in words.
    Raises ``ValueError`` where the requests of a cluster differ in their number of steps.
    """
    for group in groups:
        if len({requests[i].steps for i in group}) > 1:
            differing = [requests[i].steps for i in group]
            raise ValueError(f"requests of one cluster must have the same number of steps, not {differing}")
    made: dict[int, Costs] = {}
    alike: dict[int, list[int]] = {}
    for m, group in enumerate(groups):
        alike.setdefault(requests[group[0]].steps, []).append(m)
    for steps, numbers in alike.items():
        longest = min(most_shared, steps) if sharing else 0
        members = [requests[i] for m in numbers for i in groups[m]]
        phi = np.concatenate([similarity[m] for m in numbers])
        parts = np.zeros(len(phi)) if own is None else np.concatenate([own[m] for m in numbers])
        users = Users.of(network, [r.device for r in members])
        edge = network.nodes[network.edge]
        prices = price(users, phi, steps, longest, edge=edge, weights=weights, quality=quality, own=parts)
        alone = prices.own()
        bends = corners(alone)
        first = 0
        for m in numbers:
            mine = slice(first, first := first + len(groups[m]))
            made[m] = Costs(
                own=alone[mine],
                corners=bends[mine],
                second=float(prices.second[mine].sum()),
                step=edge.full_seconds,
                joules=float(prices.edge[mine].mean()),
            )
    return [made[m] for m in range(len(groups))]


def price(
    users: Users,
    similarity: Floats,
    steps: int,
    longest: int,
    *,
    edge: NodeState,
    weights: Weights,
    quality: QualityModel,
    own: Floats | None = None,
) -> Prices:
    """The prices of users with this similarity (users,) of personal and public prompt, and at most so long an x.

    ``own`` (users,) is their part in a public prompt that is a mean.
    """
    parts = 0.0 if own is None else own[:, None]
    curve = quality.quality(similarity[:, None], np.arange(longest + 1) * (quality.steps / steps), parts)
    reference = users.alone(steps, curve[:, 0])
    second = weights.latency / reference.latency
    metered = reference.energy > 0
    joule = np.divide(weights.energy, reference.energy, out=np.zeros(len(second)), where=metered)
    order = second * users.order_seconds() + joule * users.order_joules()
    # Whatever the split: the batch waits for the slowest request, decoding is the device's.
    always = second * (users.asking_seconds().max(initial=0.0) + users.decode_seconds) - weights.latency
    always += joule * (users.asking_joules() + users.decode_joules) - weights.energy * metered
    return Prices(
        steps=steps,
        always=always + order,
        sent=second * users.latent_seconds() + joule * users.latent_joules() - order,
        device=second * users.step_seconds + joule * users.step_joules,
        edge=joule * edge.full_joules,
        second=second,
        lost=-weights.quality * curve / curve[:, :1],
    )


def corners(own: Floats) -> NDArray[np.bool_]:
    """For every user and every bound on x: the corners (users, X + 1, T + 1) of the lower convex hull over y."""
    best = np.minimum.accumulate(own, axis=1)
    size = best.shape[-1]
    found = np.ones(best.shape, dtype=bool)
    for y in range(1, size - 1):
        here = best[..., y, None]
        before = ((here - best[..., :y]) / np.arange(y, 0, -1)).max(axis=-1)
        after = ((best[..., y + 1 :] - here) / np.arange(1, size - y)).min(axis=-1)
        found[..., y] = before < after - _FLAT
    return found


class Frontier:
    """The least cost of a cluster at the corners of its hull over edge work A = max x + sum y, and the splits there.

    ``work`` and ``least`` hold them (and a few more points that splits reach), rising in work and falling in
    cost. With ``uniform`` all users take the same (x, y), and all those choices are held; a cluster of one does not
    share.
    """

    def __init__(self, costs: Costs, *, uniform: bool = False) -> None:
        users, bounds, size = costs.own.shape
        self._costs = costs
        self._uniform = uniform
        self._best = np.minimum.accumulate(costs.own, axis=1)
        longest = bounds - 1 if users > 1 else 0
        least = np.full(longest + users * (size - 1) + 1, np.inf)
        shared = np.zeros(len(least), dtype=np.int64)
        for bound in range(longest + 1):
            work, cost = self._same(bound) if uniform else self._chain(bound)
            cheaper = cost < least[work]
            least[work[cheaper]] = cost[cheaper]
            shared[work[cheaper]] = bound
        lowest = np.minimum.accumulate(least)
        falls = np.flatnonzero(np.isfinite(least) & (np.diff(lowest, prepend=np.inf) < 0))
        self.work: Ints = falls
        self.least: Floats = least[falls]
        self._shared = shared[falls]

    def splits(self, point: int) -> list[Split]:
        """The splits of the point with this index."""
        users, _, size = self._costs.own.shape
        bound = int(self._shared[point])
        rest = int(self.work[point]) - bound
        if self._uniform:
            return [Split(shared=bound, edge=rest // users, device=size - 1 - bound - rest // users)] * users
        user, steps, _ = self._edges(bound)
        taken = np.cumsum(steps) <= rest
        edge = np.bincount(user[taken], weights=steps[taken], minlength=users).astype(np.int64)
        shared = self._costs.own[np.arange(users), : bound + 1, edge].argmin(axis=1)
        return [
            Split(shared=x, edge=y, device=size - 1 - x - y)
            for x, y in zip(shared.tolist(), edge.tolist(), strict=True)
        ]

    def _edges(self, bound: int) -> tuple[Ints, Ints, Floats]:
        """The edges of the users' hulls that lead down, the steepest first: user, steps, cost."""
        user, y = np.nonzero(self._costs.corners[:, bound])
        cost = np.diff(self._best[user, bound, y])
        steps = np.diff(y)
        down = (np.diff(user) == 0) & (cost < 0)
        user, steps, cost = user[1:][down], steps[down], cost[down]
        order = np.argsort(cost / steps, kind="stable")
        return user[order], steps[order], cost[order]

    def _chain(self, bound: int) -> tuple[Ints, Floats]:
        """Work and cost where nobody shares more than ``bound`` steps, and so many are paid for."""
        _, steps, cost = self._edges(bound)
        work = bound + np.concatenate([[0], np.cumsum(steps)]).astype(np.int64)
        start = self._best[:, bound, 0].sum() + bound * self._costs.joules
        return work, start + np.concatenate([[0.0], np.cumsum(cost)])

    def _same(self, shared: int) -> tuple[Ints, Floats]:
        """Work and cost where everybody shares this many steps and all have the same y."""
        cost = self._costs.own[:, shared, :].sum(axis=0) + shared * self._costs.joules
        possible = np.isfinite(cost)
        work = shared + len(self._costs.own) * np.arange(len(cost))
        return work[possible], cost[possible]
