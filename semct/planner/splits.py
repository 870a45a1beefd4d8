"""The first tier: the best splits of a cluster's requests for every amount of work that the edge may do for it."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from semct.cost import Network, Weights, device_only
from semct.quality import QualityModel
from semct.routes import Request


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """x shared steps, y personal steps on the edge, z on the device."""

    shared: int
    edge: int
    device: int


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster's costs in units of utility, so that splits are chosen by adding them up.

    ``own`` (users, T + 1, T + 1) is what a user pays for its (x, y), infinite where x + y > T, without the
    time at the edge; ``second`` is what one second of the edge's work costs the cluster's users together;
    ``step`` the seconds of a step with the whole edge; ``joules`` the cost of the energy of a shared step.
    """

    own: NDArray[np.float64]
    second: float
    step: float
    joules: float


def costs(
    requests: tuple[Request, ...],
    similarity: NDArray[np.float64],
    *,
    network: Network,
    weights: Weights,
    quality: QualityModel,
) -> Costs:
    """The costs of a cluster of requests with the same number of steps; ``similarity`` (users,) is phi."""
    steps = requests[0].steps
    if any(r.steps != steps for r in requests):
        raise ValueError(
            f"requests of one cluster must have the same number of steps, not {[r.steps for r in requests]}"
        )
    edge = network.nodes[network.edge]
    x, y = np.meshgrid(np.arange(steps + 1), np.arange(steps + 1), indexing="ij")
    z = steps - x - y
    own = np.empty((len(requests), steps + 1, steps + 1))
    second = joule = 0.0
    for n, request in enumerate(requests):
        device = network.nodes[request.device]
        down = network.downlinks[request.device]
        curve = quality.quality(float(similarity[n]), np.arange(steps + 1) * (quality.steps / steps))
        reference = device_only(network, request.device, steps, float(curve[0]))
        per_second = weights.latency / reference.latency
        per_joule = weights.energy / reference.energy if reference.energy > 0 else 0.0
        offloaded = x + y > 0
        latency = z * device.step_seconds + offloaded * down.seconds(network.latent_bytes)
        energy = y * edge.step_joules + z * device.step_joules + offloaded * down.joules(network.latent_bytes)
        own[n] = per_second * latency + per_joule * energy - weights.quality * curve[x] / reference.quality
        own[n][z < 0] = np.inf
        second += per_second
        joule += per_joule / len(requests)
    return Costs(own=own, second=second, step=edge.step_seconds, joules=joule * edge.step_joules)


class Frontier:
    """The least cost of a cluster for every amount of edge work A = max x + sum y, and the splits that reach it.

    Given the longest shared length X, users' costs only add up, so the best way to spend sum y on them is a
    knapsack, solved exactly by dynamic programming; X is enumerated. With ``uniform`` all users take the same
    (x, y); without ``sharing`` x is 0, as it is for a cluster of one.
    """

    def __init__(self, costs: Costs, *, most_shared: int, sharing: bool = True, uniform: bool = False) -> None:
        users, size, _ = costs.own.shape
        longest = min(most_shared, size - 1) if sharing and users > 1 else 0
        self._own = costs.own
        self._choices: list[list[NDArray[np.int64]]] = []
        rows = []
        for shared in range(longest + 1):
            if uniform:
                least = np.full(users * (size - 1) + 1, np.inf)
                least[::users] = costs.own[:, shared, :].sum(axis=0)
            else:
                least = self._spend(costs.own[:, : shared + 1, :].min(axis=1))
            row = np.full(longest + users * (size - 1) + 1, np.inf)
            row[shared : shared + len(least)] = least + shared * costs.joules
            rows.append(row)
        table = np.stack(rows)
        self._uniform = uniform
        self._shared = table.argmin(axis=0)
        self.least: NDArray[np.float64] = table.min(axis=0)

    def splits(self, work: int) -> list[Split]:
        """The splits of least cost that take ``work`` steps on the edge, shared ones counted once."""
        users = len(self._own)
        shared = int(self._shared[work])
        rest = work - shared
        if self._uniform:
            return [self._split(shared, rest // users)] * users
        personal: list[int] = []
        for choice in reversed(self._choices[shared]):
            personal.append(int(choice[rest]))
            rest -= personal[-1]
        return [self._split(int(self._own[n, : shared + 1, y].argmin()), y) for n, y in enumerate(reversed(personal))]

    def _split(self, shared: int, edge: int) -> Split:
        return Split(shared=shared, edge=edge, device=self._own.shape[1] - 1 - shared - edge)

    def _spend(self, price: NDArray[np.float64]) -> NDArray[np.float64]:
        """The least cost for every sum of y; ``price`` (users, T + 1) is what each y costs each user."""
        least = np.zeros(1)
        choices = []
        for row in price:
            total = np.full((len(row), len(least) + len(row) - 1), np.inf)
            for y, cost in enumerate(row):
                total[y, y : y + len(least)] = least + cost
            choices.append(total.argmin(axis=0))
            least = total.min(axis=0)
        self._choices.append(choices)
        return least
