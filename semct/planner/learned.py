"""The first tier as the paper has it: one agent per user, which sees its own state and decides its own split.

All agents carry the same network, and the edge runs it as their central controller. What an agent observes are its
device's pace and energy, its link, its similarity (by what sharing costs in quality) and the state of the edge that the
others' decisions make, all in units of utility, so that one policy serves any hardware, weights and number of steps.
Its action is (x, y); shares follow in closed form. The controller lets the agents decide in turns, a part of them at a
time, and keeps the best of the joint decisions that they come by. How they learn is in ``semct.planner.learning``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from semct.cost import Floats, Ints, Network, Users, Weights
from semct.planner.shares import owed_root
from semct.planner.splits import Prices, price
from semct.quality import QualityModel
from semct.routes import Request

SHARED = 14
"""Values of x: 0 to 13, as in the system model of [13]."""

LEVELS = 17
"""Values of y: 0 to 16 sixteenths of the steps that x leaves."""

ROUNDS = 3
"""How often each agent decides from each start."""

PARTS = 8
"""Into how many parts the agents fall that decide one after the other."""

SHIPPED = Path(__file__).parents[1] / "assets" / "planner" / "policy.safetensors"
"""The policy that comes with the package."""

_LOADS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # parts of the clusters that are on the edge at a start
_FORMAT = "semct-policy"
_VERSION = 1
_LOOKED_AT = (2, 4, 6, 8, 10, 13)  # values of x at which an agent sees what sharing costs it


Tier = Literal["exact", "learned"]
"""Who chooses splits: the exact search, or agents that learned to."""


class NotAPolicy(ValueError):
    """A file holds no policy, or one of another version."""


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint says of itself, as JSON in the metadata of the safetensors file."""

    format: str = _FORMAT
    version: int = _VERSION
    observations: int
    hidden: tuple[int, ...]
    episodes: int = 0
    seed: int = 0
    gap: float | None = None


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """Users in clusters in batches, flat over all users: what agents decide on.

    ``cluster`` (users,) and ``batch`` (clusters,) are indices; ``step`` (batches,) are the seconds of a row's step on
    each batch's edge, ``owed`` (batches,) the sum of the roots of earlier clusters there (``shares.owed_root``).
    """

    prices: Prices
    cluster: Ints
    batch: Ints
    step: Floats
    owed: Floats

    @property
    def users(self) -> int:
        """How many users there are."""
        return len(self.cluster)

    def per_cluster(self, values: NDArray[np.number]) -> Floats:
        """Sums over the users of each cluster."""
        return np.bincount(self.cluster, weights=values.astype(np.float64), minlength=len(self.batch)).astype(
            np.float64
        )

    def per_batch(self, values: Floats) -> Floats:
        """Sums over the clusters of each batch."""
        return np.bincount(self.batch, weights=values, minlength=len(self.step)).astype(np.float64)


class Others(msgspec.Struct, frozen=True, kw_only=True):
    """What the decisions of all others leave to each user, arrays (users,).

    ``longest`` is max x of its cluster and ``work`` the cluster's edge work, both without the user; ``elsewhere`` the
    sum of the other clusters' roots, earlier ones among them, ``weight`` what turns the cluster's work into the square
    of its root.
    """

    longest: Ints
    work: Floats
    elsewhere: Floats
    weight: Floats
    joules: Floats

    def waiting(self, shared: Ints, edge: Ints) -> Floats:
        """What all pay more in time and shared energy where the user decides so than where it needs no edge."""
        more = np.maximum(shared - self.longest, 0)
        before = self.elsewhere + np.sqrt(self.weight * self.work)
        after = self.elsewhere + np.sqrt(self.weight * (self.work + more + edge))
        return np.asarray(after**2 - before**2 + self.joules * more, dtype=np.float64)


def cost(field: Field, shared: Ints, edge: Ints) -> Floats:
    """What decisions cost each batch (batches,) with the best shares for them, in units of utility over its users.

    On an edge with a backlog what its requests wait longer counts, too.
    """
    longest, _ = _longest(shared, field.cluster, len(field.batch))
    work = longest + field.per_cluster(edge)
    root = np.sqrt(field.per_cluster(field.prices.second) * field.step[field.batch] * work)
    joules = field.per_cluster(field.prices.edge) / field.per_cluster(np.ones(field.users))
    waiting = (field.per_batch(root) + field.owed) ** 2 - field.owed**2
    return field.per_batch(field.per_cluster(own(field, shared, edge)) + joules * longest) + waiting


def own(field: Field, shared: Ints, edge: Ints) -> Floats:
    """What users lose by their own decisions (users,), without the time at the edge; see ``splits.Costs``."""
    prices = field.prices
    lost = prices.always + prices.device * (prices.steps - shared - edge) + prices.edge * edge
    return np.asarray(
        lost + np.where(shared + edge > 0, prices.sent, 0.0) + prices.lost[np.arange(field.users), shared],
        dtype=np.float64,
    )


def others(field: Field, shared: Ints, edge: Ints) -> Others:
    """What everybody's decisions but the user's own leave to each user."""
    mine = field.cluster
    longest, without = _longest(shared, mine, len(field.batch))
    weight = field.per_cluster(field.prices.second) * field.step[field.batch]
    work = longest + field.per_cluster(edge)
    root = np.sqrt(weight * work)
    joules = field.per_cluster(field.prices.edge) / field.per_cluster(np.ones(field.users))
    return Others(
        longest=without,
        work=np.maximum(work[mine] - edge - (longest[mine] - without), 0.0),
        elsewhere=np.maximum((field.per_batch(root) + field.owed)[field.batch[mine]] - root[mine], 0.0),
        weight=weight[mine],
        joules=joules[mine],
    )


def _longest(shared: Ints, cluster: Ints, clusters: int) -> tuple[Ints, Ints]:
    """max x of each cluster (clusters,), and of each user's cluster without that user (users,)."""
    longest, second = np.zeros((2, clusters), dtype=np.int64)
    np.maximum.at(longest, cluster, shared)
    at_top = shared == longest[cluster]
    np.maximum.at(second, cluster[~at_top], shared[~at_top])
    alone = np.bincount(cluster[at_top], minlength=clusters)[cluster] == 1
    return longest, np.where(at_top & alone, second[cluster], longest[cluster])


def observe(field: Field, shared: Ints, edge: Ints) -> NDArray[np.float32]:
    """What each agent sees (users, observations) where all have decided so."""
    prices, steps, around = field.prices, field.prices.steps, others(field, shared, edge)
    bounds = most_shared(field)
    lost = prices.lost - prices.lost[:, :1]
    size = field.per_cluster(np.ones(field.users))[field.cluster]
    nothing = np.zeros(field.users, dtype=np.int64)
    # What plain decisions would cost the agent itself, and all others on its account.
    plain = [(nothing, nothing + steps), (bounds, nothing), (bounds, steps - bounds), (bounds // 2, nothing)]
    stay = own(field, nothing, nothing)
    columns = [
        prices.device * steps,
        prices.edge * steps,
        prices.sent,
        *(lost[np.arange(field.users), np.minimum(x, bounds)] for x in _LOOKED_AT),
        *(own(field, x, y) - stay for x, y in plain),
        *(np.arcsinh(5 * around.waiting(x, y)) / 5 for x, y in plain),
        *(np.arcsinh(5 * (own(field, x, y) - stay + around.waiting(x, y))) / 5 for x, y in plain),
        around.longest / (SHARED - 1),
        np.log1p(around.work / steps),
        np.log(around.weight * steps),
        np.log1p(around.elsewhere),
        np.log(size),
        bounds / (SHARED - 1),
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def most_shared(field: Field) -> Ints:
    """The longest x that each agent may take; who is alone in its cluster shares nothing."""
    several = field.per_cluster(np.ones(field.users)) > 1
    return np.where(several, field.prices.lost.shape[1] - 1, 0)[field.cluster]


def _loads(field: Field, longest: Ints) -> Iterator[Ints]:
    """Own steps on the edge (users,) to start from: of no cluster, of some, of all of them.

    No agent alone can move a whole cluster there, so the controller begins with those that gain most for their time.
    """
    size = field.per_cluster(np.ones(field.users))
    gain = field.per_cluster(field.prices.device - field.prices.edge - field.prices.sent / field.prices.steps)
    worth = gain / np.sqrt(field.per_cluster(field.prices.second) * field.step[field.batch] * size)
    clusters = field.per_batch(np.ones(len(field.batch)))
    order = np.lexsort((-worth, field.batch))
    place = np.empty(len(order))
    first = np.concatenate([[0], np.cumsum(clusters)[:-1]])
    place[order] = np.arange(len(order)) - first[field.batch[order]]
    for part in _LOADS:
        on_edge = place < np.rint(part * clusters)[field.batch]
        yield np.where(on_edge[field.cluster], field.prices.steps - longest, 0)


def personal(level: Ints, shared: Ints, steps: int) -> Ints:
    """y for an agent's level of it, rounded to whole steps."""
    return np.rint(level * (steps - shared) / (LEVELS - 1)).astype(np.int64)


class Policy(nn.Module):
    """The agents' network: observations to logits of x and of y's level.

    ``mean`` and ``std`` bring observations to one scale; they belong to the checkpoint.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, header: Header) -> None:
        super().__init__()
        self.header = header
        self.body = tower(header.observations, header.hidden, SHARED + LEVELS)
        self.register_buffer("mean", torch.zeros(header.observations))
        self.register_buffer("std", torch.ones(header.observations))

    def forward(self, observations: Tensor, longest: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, SHARED) and (n, LEVELS); x above ``longest`` (n,) is ruled out."""
        logits = self.body((observations - self.mean) / self.std)
        ruled_out = torch.arange(SHARED) > longest[:, None]
        return logits[:, :SHARED].masked_fill(ruled_out, -1e9), logits[:, SHARED:]

    @torch.inference_mode()
    def decide(self, field: Field) -> tuple[Ints, Ints]:
        """x and y (users,): the best joint decision of each batch that the agents come by."""
        nothing, longest = np.zeros(field.users, dtype=np.int64), most_shared(field)
        best: tuple[Ints, Ints] = (nothing, nothing)
        least = cost(field, *best)
        for decided in [best, *((longest, edge) for edge in _loads(field, longest))]:
            x, y = decided
            for turn in range(ROUNDS * PARTS):
                acting = np.flatnonzero(np.arange(field.users) % PARTS == turn % PARTS)
                x, y = self._turn(field, x, y, acting, longest)
                found = cost(field, x, y)
                better = (found < least)[field.batch[field.cluster]]
                best = (np.where(better, x, best[0]), np.where(better, y, best[1]))
                least = np.minimum(found, least)
        return best

    def _turn(self, field: Field, shared: Ints, edge: Ints, acting: Ints, longest: Ints) -> tuple[Ints, Ints]:
        """The decisions after the acting agents took their likeliest actions."""
        seen = torch.from_numpy(observe(field, shared, edge)[acting])
        logits = self(seen, torch.from_numpy(longest[acting]))
        x, level = (part.argmax(dim=1).numpy() for part in logits)
        shared, edge = shared.copy(), edge.copy()
        shared[acting], edge[acting] = x, personal(level, x, field.prices.steps)
        return shared, edge

    def save(self, path: Path) -> None:
        """Write the checkpoint: tensors and the header, nothing that would run when it is read."""
        header = msgspec.json.encode(self.header).decode()
        tensors = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        path.write_bytes(save(tensors, metadata={"policy": header}))

    @classmethod
    def load(cls, path: Path = SHIPPED) -> Self:
        """The policy of a checkpoint; raises ``NotAPolicy`` in one sentence."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            header = msgspec.json.decode(metadata.get("policy", ""), type=Header)
        except (OSError, SafetensorError, struct.error) as error:
            raise NotAPolicy(f"the policy {path} cannot be read: {error}") from error
        except msgspec.MsgspecError as error:
            raise NotAPolicy(f"{path} is no policy of a planner: {error}") from error
        if (header.format, header.version) != (_FORMAT, _VERSION):
            raise NotAPolicy(f"{path} is a {header.format} of version {header.version}; this reads version {_VERSION}")
        policy = cls(header)
        try:
            policy.load_state_dict(tensors)
        except RuntimeError as error:
            raise NotAPolicy(f"{path} is no policy of a planner: its tensors are not those of its header") from error
        return policy.eval()


def load_policy(tier: Tier) -> Policy | None:
    """The shipped policy where splits are to be ``learned``, none where they are ``exact``."""
    return Policy.load() if tier == "learned" else None


def tower(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """A perceptron with tanh between its layers."""
    sizes = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        linear = nn.Linear(a, b)
        nn.init.orthogonal_(linear.weight, 0.01 if i == len(sizes) - 2 else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def field_of(
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
) -> Field:
    """One batch as its agents find it: users in the order of the groups; ``own`` as in ``splits.costs``.

    Raises ``ValueError`` where requests differ in their number of steps.
    """
    members = [requests[i] for group in groups for i in group]
    steps = {r.steps for r in members}
    if len(steps) != 1:
        raise ValueError(f"the learned planner plans requests of one number of steps, not of {sorted(steps)}")
    edge = network.nodes[network.edge]
    length = steps.pop()
    prices = price(
        Users.of(network, [r.device for r in members]),
        np.concatenate(similarity),
        length,
        min(most_shared, SHARED - 1, length) if sharing else 0,
        edge=edge,
        weights=weights,
        quality=quality,
        own=None if own is None else np.concatenate(own),
    )
    return Field(
        prices=prices,
        cluster=np.repeat(np.arange(len(groups)), [len(g) for g in groups]),
        batch=np.zeros(len(groups), dtype=np.int64),
        step=np.array([edge.full_seconds]),
        owed=np.array([owed_root(edge, float(prices.second.mean()))]),
    )
