"""One choice per cluster so that the clusters together cost the least, with a proof of how good that is.

With the best shares (see ``shares``) clusters with work A_m cost sum_m L_m + (sum_m r_m)^2, r_m = sqrt(weight_m A_m
step): L_m is what the cluster's splits lose, the square what its time at the edge costs. Clusters meet in one number
only, S = sum_m r_m, in which earlier clusters that are on the edge already have a fixed part. Since S^2 >= 2 s S - s^2
for every s,

    D(s) = sum_m min over the cluster's choices of (L + 2 s r) - s^2

is a lower bound on every plan, and the plan that takes d_m more than the minimum in each cluster costs exactly
D(s) + sum_m d_m + (S - s)^2. So after the best s is known, only choices with a d_m below the gap to the best plan
found so far can belong to a better one; those few are searched through, all of them where they are not too many.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from semct.cost import Floats, Ints

_HALVINGS = 100  # of the interval that s lies in
_MOST = 20_000  # partial plans kept in the search; beyond, the least promising are given up and bound the gap
_SWEEPS = 20
_SAME = 1e-12


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The chosen point of each cluster, what they cost together, and a bound that no choice is below."""

    points: Ints
    cost: float
    bound: float

    @property
    def gap(self) -> float:
        """How much the best choice may be better at most; 0 where this one is proven the best."""
        return max(0.0, self.cost - self.bound)


def choose(losses: Sequence[Floats], roots: Sequence[Floats], *, owed: float = 0.0) -> Choice:
    """The choice of least sum of losses plus squared sum of roots, one point of each cluster.

    ``losses`` and ``roots`` (points,) describe the points of each cluster. ``owed`` is a root that is in the sum
    whatever is chosen; its own square is no part of the cost.
    """
    if owed > 0:
        chosen = choose([*losses, np.zeros(1)], [*roots, np.array([owed])])
        return Choice(points=chosen.points[:-1], cost=chosen.cost - owed**2, bound=chosen.bound - owed**2)
    table = _Table(losses, roots)
    price = table.best_price()
    found = min((table.improved(p) for p in table.candidates(price)), key=table.cost)
    bound = table.bound(price)
    if table.cost(found) - bound > _SAME:
        found, bound = table.searched(found, price)
    return Choice(points=found, cost=table.cost(found), bound=min(bound, table.cost(found)))


class _Table:
    def __init__(self, losses: Sequence[Floats], roots: Sequence[Floats]) -> None:
        self._sizes = np.array([len(loss) for loss in losses])
        self._first = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])
        self._loss = np.concatenate(losses)
        self._root = np.concatenate(roots)

    def cost(self, points: Ints) -> float:
        at = self._first + points
        return float(self._loss[at].sum() + self._root[at].sum() ** 2)

    def bound(self, price: float) -> float:
        """D(s) for s = ``price``."""
        values = self._loss + 2 * price * self._root
        return float(np.minimum.reduceat(values, self._first).sum()) - price**2

    def best_price(self) -> float:
        """The s of the greatest bound: there the clusters' answers add up to s, or jump over it."""
        low, high = 0.0, float(np.maximum.reduceat(self._root, self._first).sum())
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self._root[self._first + self._answers(middle)].sum() > middle:
                low = middle
            else:
                high = middle
        return low if self.bound(low) > self.bound(high) else high

    def candidates(self, price: float) -> list[Ints]:
        """The answers right and left of the price, and what lies between the two, cluster by cluster."""
        more = self._answers(price * (1 - 1e-9) - 1e-15)
        less = self._answers(price * (1 + 1e-9) + 1e-15)
        differ = np.flatnonzero(more != less)
        found = [more, less]
        if len(differ):
            at_more, at_less = self._first + more, self._first + less
            loss = self._loss[at_more].sum() + np.cumsum((self._loss[at_less] - self._loss[at_more])[differ])
            root = self._root[at_more].sum() + np.cumsum((self._root[at_less] - self._root[at_more])[differ])
            changed = differ[: int(np.argmin(loss + root**2)) + 1]
            between = more.copy()
            between[changed] = less[changed]
            found.append(between)
        return found

    def improved(self, points: Ints) -> Ints:
        """One cluster after another takes its best answer to the others, until nobody wants to change."""
        points = points.copy()
        total = float(self._root[self._first + points].sum())
        for _ in range(_SWEEPS):
            changed = False
            for m, (first, size) in enumerate(zip(self._first.tolist(), self._sizes.tolist(), strict=True)):
                if size == 1:
                    continue
                loss, root = self._loss[first : first + size], self._root[first : first + size]
                others = total - float(root[points[m]])
                value = loss + (others + root) ** 2
                best = int(np.argmin(value))
                if value[best] < value[points[m]] - _SAME:
                    points[m], changed = best, True
                    total = others + float(root[best])
            if not changed:
                break
        return points

    def searched(self, found: Ints, price: float) -> tuple[Ints, float]:
        """The best choice, and a bound: branch and bound over the points that the price does not rule out."""
        values = self._loss + 2 * price * self._root
        excess = values - np.repeat(np.minimum.reduceat(values, self._first), self._sizes)
        bound = self.bound(price)
        limit = self.cost(found) - bound
        open_points = [
            first + np.flatnonzero(excess[first : first + size] < limit)
            for first, size in zip(self._first.tolist(), self._sizes.tolist(), strict=True)
        ]
        # Those with the widest choice of roots first: what is left then moves the sum little.
        spread = [float(np.ptp(self._root[at])) for at in open_points]
        order = sorted(range(len(open_points)), key=lambda m: -spread[m])
        least = np.array([self._root[at].min() for at in open_points])[order]
        most = np.array([self._root[at].max() for at in open_points])[order]
        rest_least = np.concatenate([np.cumsum(least[::-1])[::-1][1:], [0.0]])
        rest_most = np.concatenate([np.cumsum(most[::-1])[::-1][1:], [0.0]])
        spent, total = np.zeros(1), np.zeros(1)
        steps: list[tuple[Ints, Ints]] = []
        given_up = np.inf
        for depth, m in enumerate(order):
            at = open_points[m]
            parent = np.repeat(np.arange(len(spent)), len(at))
            point = np.tile(at, len(spent))
            new_spent, new_total = spent[parent] + excess[point], total[parent] + self._root[point]
            # The sum may yet come to anywhere in this interval.
            off = np.maximum(new_total + rest_least[depth] - price, price - new_total - rest_most[depth])
            value = new_spent + np.maximum(off, 0.0) ** 2
            kept = _distinct(new_spent, new_total, np.flatnonzero(value < limit))
            if len(kept) > _MOST:
                kept = kept[np.argsort(value[kept], kind="stable")]
                given_up = min(given_up, float(value[kept[_MOST]]))
                kept = kept[:_MOST]
            if len(kept) == 0:
                return found, bound + min(limit, given_up)
            spent, total = new_spent[kept], new_total[kept]
            steps.append((parent[kept], point[kept]))
        state = int(np.argmin(spent + (total - price) ** 2))
        points = found.copy()
        for m, (parents, taken) in zip(reversed(order), reversed(steps), strict=True):
            points[m] = taken[state] - self._first[m]
            state = int(parents[state])
        best = min(points, found, key=self.cost)
        return best, bound + min(self.cost(best) - bound, given_up)

    def _answers(self, price: float) -> Ints:
        """Each cluster's best point at a price on roots of twice that; the first of equals."""
        values = self._loss + 2 * price * self._root
        least = np.repeat(np.minimum.reduceat(values, self._first), self._sizes)
        hits = np.flatnonzero(values == least)
        _, first = np.unique(np.searchsorted(self._first, hits, side="right"), return_index=True)
        return np.asarray(hits[first] - self._first, dtype=np.int64)


def _distinct(spent: Floats, total: Floats, among: Ints) -> Ints:
    """One of each kind of partial plans that come to the same (like users make many of those)."""
    _, first = np.unique(np.round(spent[among], 12) + 1j * np.round(total[among], 12), return_index=True)
    kept: NDArray[np.int64] = among[np.sort(first)]
    return kept
