"""Both tiers together: splits and compute shares of least total cost."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from semct.cost import Floats, Network, Splits, Weights
from semct.forecast import expect
from semct.planner.coupling import choose
from semct.planner.learned import Field, Policy, cost, field_of
from semct.planner.shares import owed_root, shares
from semct.planner.splits import Costs, Frontier, Split, costs
from semct.public_prompt import PublicPrompt
from semct.quality import QualityModel
from semct.routes import Cluster, Plan, Request, part, route


class Solution(msgspec.Struct, frozen=True, kw_only=True):
    """The splits and the share (clusters,) of each cluster, what they cost, and a proven bound that nothing is below.

    Costs are the users' utilities, added up, with the sign turned; times at the edge by the paper's model, in which
    a user waits for all of its cluster's edge work at its cluster's bare share. On an edge with a backlog they hold
    what its requests wait longer, too.
    """

    splits: list[list[Split]]
    share: Floats
    cost: float
    bound: float | None = None


def plan(
    requests: Sequence[Request],
    groups: Sequence[Sequence[int]],
    public: Sequence[PublicPrompt],
    similarity: Sequence[Floats],
    *,
    model: str,
    network: Network,
    weights: Weights,
    quality: QualityModel,
    most_shared: int,
    sharing: bool = True,
    uniform: bool = False,
    policy: Policy | None = None,
) -> Plan:
    """Routes (edge, public, x) (edge, personal, y) (device, personal, z) of least predicted cost.

    ``groups`` are the members of each cluster as indices into ``requests``, with their ``public`` prompts and
    the ``similarity`` (members,) of each member's prompt to it. Frameworks that give every member the same
    split are ``uniform``; those without shared inference pass one group per request and no ``sharing``.
    ``most_shared`` bounds x. A ``policy`` decides in place of the exact search, but for those who are ``uniform``.
    """
    # A mean of prompts does not cost what a sentence of its similarity does.
    own = [np.array([part(requests[i].prompt, p.text) for i in group]) for group, p in zip(groups, public, strict=True)]
    if policy is not None and not uniform:
        field = field_of(
            requests,
            groups,
            similarity,
            network=network,
            weights=weights,
            quality=quality,
            most_shared=most_shared,
            sharing=sharing,
            own=own,
        )
        solution = decided(policy, field)
    else:
        tables = costs(
            requests,
            groups,
            similarity,
            network=network,
            weights=weights,
            quality=quality,
            most_shared=most_shared,
            sharing=sharing,
            own=own,
        )
        second = sum(t.second for t in tables) / max(1, len(requests))
        solution = solve(tables, owed=owed_root(network.nodes[network.edge], second), uniform=uniform)
    made = lay_out(requests, groups, public, similarity, solution, model=model, edge=network.edge)
    taken = arrays(groups, solution, len(requests))
    phi, parts = np.empty((2, len(requests)))
    for group, values, theirs in zip(groups, similarity, own, strict=True):
        phi[list(group)], parts[list(group)] = values, theirs
    predictions = expect(requests, taken, phi, network=network, weights=weights, quality=quality, own=parts)
    return msgspec.structs.replace(made, predictions=predictions)


def solve(tables: Sequence[Costs], *, owed: float = 0.0, uniform: bool = False) -> Solution:
    """Splits and shares of least total cost: the best point of each cluster's frontier, with the shares for it.

    ``owed`` is the sum of the roots of earlier clusters, which are on the edge already (see ``shares.owed_root``).
    """
    frontiers = [Frontier(t, uniform=uniform) for t in tables]
    roots = [np.sqrt(t.second * t.step * f.work) for t, f in zip(tables, frontiers, strict=True)]
    chosen = choose([f.least for f in frontiers], roots, owed=owed)
    points = chosen.points.tolist()
    seconds = np.array([f.work[p] * t.step for f, t, p in zip(frontiers, tables, points, strict=True)])
    return Solution(
        splits=[f.splits(p) for f, p in zip(frontiers, points, strict=True)],
        share=shares(seconds, np.array([t.second for t in tables])),
        cost=chosen.cost,
        bound=chosen.bound,
    )


def decided(policy: Policy, field: Field) -> Solution:
    """What the agents of one batch decide, with the best shares for it."""
    shared, edge = policy.decide(field)
    device = field.prices.steps - shared - edge
    splits: list[list[Split]] = [[] for _ in field.batch]
    for m, x, y, z in zip(field.cluster.tolist(), shared.tolist(), edge.tolist(), device.tolist(), strict=True):
        splits[m].append(Split(shared=x, edge=y, device=z))
    work = np.array([max(s.shared for s in c) + sum(s.edge for s in c) for c in splits])
    return Solution(
        splits=splits,
        share=shares(work * field.step[field.batch], field.per_cluster(field.prices.second)),
        cost=float(cost(field, shared, edge)[0]),
    )


def arrays(groups: Sequence[Sequence[int]], solution: Solution, users: int) -> Splits:
    """A solution as arrays over so many users."""
    x, y, z, cluster = np.zeros((4, users), dtype=np.int64)
    for m, (group, splits) in enumerate(zip(groups, solution.splits, strict=True)):
        own = list(group)
        cluster[own] = m
        x[own], y[own], z[own] = np.array([(s.shared, s.edge, s.device) for s in splits]).T
    return Splits(cluster=cluster, shared=x, edge=y, device=z, share=solution.share)


def lay_out(
    requests: Sequence[Request],
    groups: Sequence[Sequence[int]],
    public: Sequence[PublicPrompt],
    similarity: Sequence[Floats],
    solution: Solution,
    *,
    model: str,
    edge: str,
) -> Plan:
    """The plan that a solution amounts to: routes in the order of the requests, and the clusters' shares."""
    clusters, routes = [], {}
    for group, prompt, phi, share, splits in zip(
        groups, public, similarity, solution.share.tolist(), solution.splits, strict=True
    ):
        first = requests[group[0]]
        for i, split in zip(group, splits, strict=True):
            request = requests[i]
            # Who shares steps starts from one noise, or they would not be the same steps.
            start = request if split.shared == 0 else msgspec.structs.replace(request, seed=first.seed)
            routes[i] = route(
                start,
                (edge, model, prompt.text, split.shared),
                (edge, model, request.prompt, split.edge),
                (request.device, model, request.prompt, split.device),
            )
        clusters.append(
            Cluster(
                members=tuple(requests[i].id for i in group),
                public_prompt=prompt.text,
                source=prompt.credit,
                similarity=tuple(phi.tolist()),
                share=share,
            )
        )
    gap = None if solution.bound is None else max(0.0, solution.cost - solution.bound) / max(1, len(requests))
    return Plan(clusters=tuple(clusters), routes=tuple(routes[i] for i in sorted(routes)), gap=gap)
