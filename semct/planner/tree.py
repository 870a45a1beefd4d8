"""Sharing at several levels: on a dendrogram of prompts, which node runs which denoising steps.

A node of the dendrogram may run steps [start, stop) for all requests below it, with the mean of their prompts;
its children go on at its stop, each with the mean of fewer and closer prompts, and each request ends with its own.
Early steps cost little quality even under a distant prompt, late ones only under a near one: so the root may share a
little, clusters more, near-duplicates nearly all.

Costs are in units of utility, as in ``splits``, and additive: what steps [a, b) under a prompt of similarity phi cost
is what the quality curve of phi falls between a and b, and a second of the edge delays all requests that use it
(sum_m N_m A_m / f_m with the closed-form shares is (sum_m sqrt(N_m A_m))^2, at most sum_m N_m times sum_m A_m, and
equal to it where clusters work in proportion to their users). So the best stops follow by dynamic programming from the
leaves to the root, in time linear in the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from semct.clustering import EQUAL, Dendrogram, medoid
from semct.cost import Floats, Network, Outcome, Outcomes, Users, Weights, device_only, utilities
from semct.planner.shares import shares
from semct.quality import QualityModel
from semct.routes import Cluster, Plan, Prediction, Prompt, Request, blend, route

_OWN = 0.2  # of the steps: measured on the embedded model, see docs/sharing.md


class PromptTree:
    """A dendrogram of n prompts with the mean of the prompts below each node, and how near each of them is to it.

    Leaves are nodes 0 to n - 1, merges n to 2n - 2, the last is the root. ``members`` are the prompts below each node
    and ``similarity`` what each has to all of them on average (as ``public_prompt.embed_prompts`` has it for a mean),
    or to their medoid where ``words`` are wanted; ``own`` is the part of each in that mean, 0 of words.
    """

    def __init__(
        self, dendrogram: Dendrogram, prompts: Sequence[str], vectors: NDArray[np.floating], *, words: bool = False
    ) -> None:
        self.prompts = tuple(prompts)
        self.children = [(m.left, m.right) for m in dendrogram.merges]
        self.closeness = [m.similarity for m in dendrogram.merges]
        self.members = [np.array([i]) for i in range(len(self.prompts))]
        self._worded: dict[int, Prompt] = {}
        self.similarity: list[NDArray[np.float64]] = [np.ones(1) for _ in self.prompts]
        self.own: list[NDArray[np.float64]] = [np.zeros(1) for _ in self.prompts]
        number = {p: i for i, p in enumerate(dict.fromkeys(self.prompts))}
        which = np.array([number[p] for p in self.prompts])
        for left, right in self.children:
            below = np.concatenate([self.members[left], self.members[right]])
            own = vectors[below].astype(np.float64)
            target = own[medoid(own)] if words else own.mean(axis=0)
            self.members.append(below)
            self.similarity.append(np.clip(own @ target, -1, 1))
            _, kind, count = np.unique(which[below], return_inverse=True, return_counts=True)
            self.own.append(np.zeros(len(below)) if words else count[kind] / len(below))

    @property
    def leaves(self) -> int:
        """The number of prompts."""
        return len(self.prompts)

    @cached_property
    def parent(self) -> list[int]:
        """The node above each node; the root is its own."""
        above = [len(self.members) - 1] * len(self.members)
        for i, pair in enumerate(self.children):
            for child in pair:
                above[child] = self.leaves + i
        return above

    def prompt(self, node: int) -> Prompt:
        """What the node's steps run with."""
        if node not in self._worded:
            self._worded[node] = blend([self.prompts[i] for i in self.members[node]])
        return self._worded[node]


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """What n requests of T steps pay, in units of utility.

    ``rest`` (n, T + 1) is the least that finishing alone from each step costs and ``edge`` (n, T + 1) the steps that
    the edge does of it; ``step`` (n,) what an edge step costs that is run for this request alone, ``quality`` (n,) what
    a lost unit of the score does.
    """

    rest: NDArray[np.float64]
    edge: NDArray[np.int64]
    step: NDArray[np.float64]
    quality: NDArray[np.float64]

    def shared(self, members: NDArray[np.int64]) -> float:
        """What an edge step costs that is run once for all members: as much as one alone, at their mean prices."""
        return float(self.step[members].mean())


def prices(
    requests: Sequence[Request], *, network: Network, weights: Weights, quality: QualityModel, waiting: int
) -> Prices:
    """The prices of requests of one length on this network, where so many of them are ``waiting`` for the edge.

    Raises ``ValueError`` where they differ in steps.
    """
    steps = requests[0].steps
    if any(r.steps != steps for r in requests):
        raise ValueError(f"requests that share must have the same number of steps, not {[r.steps for r in requests]}")
    edge = network.nodes[network.edge]
    alone = float(quality.quality(1.0, 0.0))
    references = [device_only(network, r.device, steps, alone) for r in requests]
    second = np.array([weights.latency / r.latency for r in references])
    joule = np.array([weights.energy / r.energy if r.energy > 0 else 0.0 for r in references])
    step = second.mean() * waiting * edge.full_seconds + joule * edge.full_joules
    device = np.array([network.nodes[r.device].lone_seconds for r in requests]) * second
    device += np.array([network.nodes[r.device].lone_joules for r in requests]) * joule
    down = [network.downlinks[r.device] for r in requests]
    transfer = np.array([d.seconds(network.latent_bytes) for d in down]) * second
    transfer += np.array([d.joules(network.latent_bytes) for d in down]) * joule
    # Finishing alone costs a price per step, so that all of it goes to the cheaper of edge and device.
    left = steps - np.arange(steps + 1)
    on_edge = left * step[:, None] + transfer[:, None]
    on_device = left * device[:, None] + transfer[:, None] * (left < steps)
    return Prices(
        rest=np.minimum(on_edge, on_device),
        edge=np.where(on_edge < on_device, left, 0),
        step=step,
        quality=np.full(len(requests), weights.quality / alone),
    )


def lost(
    quality: QualityModel, similarity: NDArray[np.float64], own: NDArray[np.float64], steps: int
) -> NDArray[np.float64]:
    """The score (n, T + 1) that k shared steps cost at each similarity (n,) to a mean, of which ``own`` (n,) is own."""
    at = np.arange(steps + 1) * (quality.steps / steps)
    return np.asarray(quality.quality(1.0, 0.0) - quality.quality(similarity[:, None], at[None, :], own[:, None]))


def _lost_together(
    tree: PromptTree, node: int, quality: QualityModel, steps: int, worth: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What k steps (T + 1,) cost the members of a node, for whom a lost unit of the score is ``worth`` (members,)."""
    # Of thousands of requests many have the same prompt, and so the same curve.
    phi, first, curve = np.unique(tree.similarity[node], return_index=True, return_inverse=True)
    return np.asarray(np.bincount(curve, weights=worth) @ lost(quality, phi, tree.own[node][first], steps))


def allowed_stops(tree: PromptTree, quality: QualityModel, steps: int, most_shared: int) -> NDArray[np.bool_]:
    """Which stops (inner nodes, T + 1) a node may have.

    ``most_shared`` bounds the root, whose prompt is the most distant one; another node may go on until its own members
    lose as much on average as the root's do there. Different prompts end with steps of their own, or a picture would
    show the mean of two wishes: the curves, which know sentences, do not see what that costs.
    """
    inner = range(tree.leaves, len(tree.members))
    means = [np.full(len(tree.members[v]), 1 / len(tree.members[v])) for v in inner]
    falls = np.array([_lost_together(tree, v, quality, steps, m) for v, m in zip(inner, means, strict=True)])
    falls = falls.reshape(-1, steps + 1)
    different = np.array([tree.similarity[v].min() < 1 - EQUAL for v in inner], dtype=bool)
    bound = falls[-1, min(most_shared, steps)] if len(falls) else 0.0
    last = np.where(different, int(steps * (1 - _OWN)), steps)
    at = np.arange(steps + 1)
    return np.asarray((falls <= bound + 1e-9) & (at <= last[:, None]), dtype=np.bool_)


def best_stops(tree: PromptTree, price: Prices, quality: QualityModel, most_shared: int) -> NDArray[np.int64]:
    """The step (nodes,) to which each node shares, of least total cost; one that shares none stops where it starts."""
    steps = price.rest.shape[1] - 1
    at = np.arange(steps + 1)
    allowed = allowed_stops(tree, quality, steps, most_shared)
    least = list(price.rest)  # by node: the least cost of all below from each step on
    choice = []
    for i, (left, right) in enumerate(tree.children):
        members = tree.members[tree.leaves + i]
        spent = at * price.shared(members)
        spent += _lost_together(tree, tree.leaves + i, quality, steps, price.quality[members])
        below = least[left] + least[right]
        # The best stop from each start: a running minimum from the right, the earliest of equals.
        total = np.where(allowed[i], spent + below, np.inf)
        best = np.minimum.accumulate(total[::-1])[::-1]
        earliest = np.minimum.accumulate(np.where(total <= best + 1e-12, at, steps + 1)[::-1])[::-1]
        idle = below <= best - spent  # sharing nothing is allowed always
        choice.append(np.where(idle, at, earliest))
        least.append(np.where(idle, below, best - spent))
    stops = np.zeros(len(tree.members), dtype=np.int64)
    for i in reversed(range(len(tree.children))):
        node = tree.leaves + i
        start = 0 if i == len(tree.children) - 1 else stops[tree.parent[node]]
        stops[node] = choice[i][start]
    return stops


def best_clusters(tree: PromptTree, price: Prices, quality: QualityModel, most_shared: int) -> int:
    """The number of clusters at which one level of sharing, each request at its own split, costs least.

    Going from one number to the next merges two clusters, so all numbers together cost one visit of each node.
    """
    steps = price.rest.shape[1] - 1
    longest = min(most_shared, steps) + 1
    cost = list(price.rest[:, 0])
    total, best, found = float(sum(cost)), np.inf, tree.leaves
    for i, (left, right) in enumerate(tree.children):
        node = tree.leaves + i
        members = tree.members[node]
        own = price.rest[members] + price.quality[members, None] * lost(
            quality, tree.similarity[node], tree.own[node], steps
        )
        shared = np.arange(longest) * price.shared(members)
        cost.append(float((shared + np.minimum.accumulate(own[:, :longest], axis=1).sum(axis=0)).min()))
        total += cost[node] - cost[left] - cost[right]
        if total <= best:
            best, found = total, tree.leaves - i - 1
    return found


class _Sharing:
    """Who shares what where node v runs the steps from its parent's stop to ``stops[v]``.

    ``paths`` are the (node, steps) that each request goes through before it is alone, from the top; ``groups`` its
    clusters by their topmost node: those below the root that share steps, and one of all that share the root's alone.
    """

    def __init__(self, tree: PromptTree, stops: NDArray[np.int64]) -> None:
        root = len(tree.members) - 1
        head, paths = [root] * (root + 1), [[] for _ in range(root + 1)]  # type: list[int], list[list[tuple[int, int]]]
        for node in range(root, -1, -1):
            above = tree.parent[node]
            start = 0 if node == root else int(stops[above])
            run = 0 if node < tree.leaves else int(stops[node]) - start
            paths[node] = ([] if node == root else paths[above]) + ([(node, run)] if run else [])
            topmost = head[above] == root and (run or (node < tree.leaves and not paths[node]))
            head[node] = node if topmost else head[above]
        self.paths = paths[: tree.leaves]
        self.groups: dict[int, list[int]] = {}
        for n in range(tree.leaves):
            self.groups.setdefault(head[n], []).append(n)
        self.trunk = int(stops[root]) if tree.children else 0  # steps of the root, for which everybody waits

    def shared(self, request: int) -> int:
        """The steps that a request shares."""
        return sum(run for _, run in self.paths[request])

    def work(self, group: list[int], root: int) -> int:
        """The shared steps of a group, each once, without the root's."""
        return sum(run for node, run in {step for n in group for step in self.paths[n]} if node != root)


def best_plan(
    requests: Sequence[Request],
    tree: PromptTree,
    *,
    model: str,
    network: Network,
    weights: Weights,
    quality: QualityModel,
    most_shared: int,
) -> Plan:
    """The plan of highest predicted utility of those with the best stops, for several numbers of waiting requests.

    To these come the requests of the edge's backlog, twice: a step delays them all, and they delay it by as much.
    """
    found = []
    waiting, earlier = len(requests), sum(b.requests for b in network.nodes[network.edge].backlog)
    while waiting:
        price = prices(requests, network=network, weights=weights, quality=quality, waiting=waiting + 2 * earlier)
        stops = best_stops(tree, price, quality, most_shared)
        found.append(_tried(requests, tree, stops, price.edge, network=network, weights=weights, quality=quality))
        waiting //= 4
    best = max(found, key=lambda each: float(each.utility.sum()))
    return _laid_out(requests, tree, best, model=model, edge=network.edge)


def plan(
    requests: Sequence[Request],
    tree: PromptTree,
    stops: NDArray[np.int64],
    personal: NDArray[np.int64],
    *,
    model: str,
    network: Network,
    weights: Weights,
    quality: QualityModel,
) -> Plan:
    """The plan in which node v shares the steps from its parent's stop to ``stops[v]``.

    ``personal`` (n, T + 1) are each request's own steps on the edge, by its last shared step; the device does the rest.
    """
    tried = _tried(requests, tree, stops, personal, network=network, weights=weights, quality=quality)
    return _laid_out(requests, tree, tried, model=model, edge=network.edge)


class _Tried(NamedTuple):
    """What comes of stops: the clusters' shares, and of each request its own steps on the edge and what it gets."""

    sharing: _Sharing
    share: Floats
    own: NDArray[np.int64]
    outcomes: Outcomes
    utility: Floats


def _tried(
    requests: Sequence[Request],
    tree: PromptTree,
    stops: NDArray[np.int64],
    personal: NDArray[np.int64],
    *,
    network: Network,
    weights: Weights,
    quality: QualityModel,
) -> _Tried:
    sharing, steps = _Sharing(tree, stops), requests[0].steps
    root, edge = len(tree.members) - 1, network.nodes[network.edge]
    users = Users.of(network, [r.device for r in requests])
    shared = np.array([sharing.shared(n) for n in range(tree.leaves)])
    own = personal[np.arange(tree.leaves), shared]
    references = users.alone(steps, np.full(tree.leaves, float(quality.quality(1.0, 0.0))))
    groups = list(sharing.groups.values())
    work = np.array([sharing.work(g, root) + int(own[g].sum()) for g in groups])
    share = shares(
        work * edge.full_seconds, np.array([float((weights.latency / references.latency[g]).sum()) for g in groups])
    )
    waiting = np.empty(tree.leaves)
    for m, group in enumerate(groups):
        waiting[group] = (sharing.trunk + work[m] / float(share[m])) * edge.full_seconds
    part = [sum(run / len(tree.members[node]) for node, run in path) for path in sharing.paths]
    left = steps - shared - own
    outcomes = Outcomes(
        quality=_expected_scores(tree, stops, quality, steps),
        latency=users.asking_seconds()
        + np.where(left < steps, waiting + users.latent_seconds(), 0.0)
        + left * users.step_seconds
        + users.decode_seconds,
        energy=users.asking_joules()
        + (np.array(part) + own) * edge.full_joules
        + np.where(left < steps, users.latent_joules(), 0.0)
        + left * users.step_joules
        + users.decode_joules,
    )
    return _Tried(sharing, share, own, outcomes, utilities(outcomes, references, weights))


def _laid_out(requests: Sequence[Request], tree: PromptTree, tried: _Tried, *, model: str, edge: str) -> Plan:
    """The plan of stops that were tried."""
    sharing, steps = tried.sharing, requests[0].steps
    clusters, routes = [], {}
    for m, (head, group) in enumerate(sharing.groups.items()):
        public = tree.prompt(head)
        near = dict(zip(tree.members[head].tolist(), tree.similarity[head].tolist(), strict=True))
        # Who shares steps starts from one noise, or they would not be the same steps.
        seed = requests[0 if sharing.trunk else group[0]].seed
        for n in group:
            request, path, own = requests[n], sharing.paths[n], int(tried.own[n])
            spans = [(edge, model, tree.prompt(node), run) for node, run in path]
            left = steps - sharing.shared(n) - own
            spans += [(edge, model, request.prompt, own), (request.device, model, request.prompt, left)]
            routes[n] = route(msgspec.structs.replace(request, seed=seed) if path else request, *spans)
        clusters.append(
            Cluster(
                members=tuple(requests[n].id for n in group),
                public_prompt=public,
                source="mean" if isinstance(public, tuple) else "member",
                similarity=tuple(near[n] for n in group),
                share=float(tried.share[m]),
            )
        )
    got = (tried.outcomes.quality, tried.outcomes.latency, tried.outcomes.energy, tried.utility)
    predictions = {
        r.id: Prediction(quality=q, latency=t, energy=e, utility=u)
        for r, q, t, e, u in zip(requests, *(column.tolist() for column in got), strict=True)
    }
    return Plan(clusters=tuple(clusters), routes=tuple(routes[n] for n in range(tree.leaves)), predictions=predictions)


def _expected_scores(
    tree: PromptTree, stops: NDArray[np.int64], quality: QualityModel, steps: int
) -> NDArray[np.float64]:
    """The score (n,) of each request: the best, less what each node above it loses between its start and its stop."""
    score = np.full(tree.leaves, float(quality.quality(1.0, 0.0)))
    scale = quality.steps / steps
    for node in range(tree.leaves, len(tree.members)):
        start = 0 if node == len(tree.members) - 1 else int(stops[tree.parent[node]])
        if stops[node] > start:
            phi, first, curve = np.unique(tree.similarity[node], return_index=True, return_inverse=True)
            own = tree.own[node][first]
            fall = quality.quality(phi, start * scale, own) - quality.quality(phi, stops[node] * scale, own)
            score[tree.members[node]] -= fall[curve]
    return score


def outcome(request: Request, network: Network, *, quality: float, waiting: float, part: float, left: int) -> Outcome:
    """What a request gets that waits for the edge, with its part of the edge's steps and those left to its device."""
    device, edge = network.nodes[request.device], network.nodes[network.edge]
    up, down = network.uplinks[request.device], network.downlinks[request.device]
    size = network.latent_bytes if left < request.steps else 0
    return Outcome(
        quality=quality,
        latency=up.seconds(network.request_bytes)
        + (waiting + down.seconds(size) if size else 0.0)
        + left * device.lone_seconds
        + device.decode_seconds,
        energy=up.joules(network.request_bytes)
        + part * edge.full_joules
        + down.joules(size)
        + left * device.lone_joules
        + device.decode_joules,
    )
