"""The planner: closed forms against a solver, splits against enumeration, predictions against arithmetic."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from semct.cost import Link, Network, NodeState, Weights
from semct.planner import two_tier
from semct.planner.shares import shares
from semct.planner.splits import Costs, Frontier, Split, costs
from semct.public_prompt import PublicPrompt
from semct.quality import load_quality_model
from semct.routes import Plan, Request, shared_steps

QUALITY = load_quality_model("sd3-medium")
STEPS = 28
GRID = 2e-3  # of utility: the planner's search over sums is that fine

positive = st.floats(0.05, 20)


def weights_of(parts: tuple[int, int, int]) -> Weights:
    total = sum(parts)
    return Weights(quality=parts[0] / total, latency=parts[1] / total, energy=parts[2] / total)


weightings = st.tuples(*[st.integers(0, 5)] * 3).filter(any).map(weights_of)
nodes = st.builds(
    NodeState,
    step_seconds=st.floats(0.01, 2),
    step_joules=st.just(0.0) | st.floats(0.1, 300),
    decode_seconds=st.floats(0, 1),
)
links = st.builds(Link, rate=st.floats(1e5, 1e9), delay=st.floats(0, 0.1), watts=st.floats(0, 2))


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan is made of."""

    requests: tuple[Request, ...]
    groups: tuple[tuple[int, ...], ...]
    similarity: tuple[tuple[float, ...], ...]
    network: Network
    weights: Weights

    def plan(
        self,
        *,
        sharing: bool = True,
        uniform: bool = False,
        most_shared: int = STEPS,
    ) -> Plan:
        public = [PublicPrompt(f"public {m}", "medoid", 1.0, 1) for m in range(len(self.groups))]
        return two_tier.plan(
            self.requests,
            self.groups,
            public,
            [np.array(phi) for phi in self.similarity],
            model="m",
            network=self.network,
            weights=self.weights,
            quality=QUALITY,
            most_shared=most_shared,
            sharing=sharing,
            uniform=uniform,
        )

    def tables(self) -> list[Costs]:
        return [
            costs(
                tuple(self.requests[i] for i in group),
                np.array(phi),
                network=self.network,
                weights=self.weights,
                quality=QUALITY,
            )
            for group, phi in zip(self.groups, self.similarity, strict=True)
        ]


def situation(
    edge: NodeState,
    devices: Sequence[NodeState],
    *,
    sizes: Sequence[int],
    link: Link | None = None,
    similarity: float = 0.6,
    weights: Weights | None = None,
    steps: int = STEPS,
) -> Situation:
    names = [f"d{i}" for i in range(len(devices))]
    bounds = list(itertools.pairwise([0, *itertools.accumulate(sizes)]))
    return Situation(
        requests=tuple(Request(id=f"r{n}", device=n, prompt=f"wish of {n}", seed=3, steps=steps) for n in names),
        groups=tuple(tuple(range(a, b)) for a, b in bounds),
        similarity=tuple((similarity,) * size for size in sizes),
        network=Network(
            edge="edge",
            nodes={"edge": edge, **dict(zip(names, devices, strict=True))},
            uplinks=dict.fromkeys(names, link or Link()),
            downlinks=dict.fromkeys(names, link or Link()),
            latent_bytes=1000,
        ),
        weights=weights or Weights(),
    )


@st.composite
def situations(draw: st.DrawFn, *, singletons: bool = False, steps: int = 6) -> Situation:
    sizes = draw(st.lists(st.integers(1, 1 if singletons else 3), min_size=1, max_size=3))
    users = sum(sizes)
    devices = draw(st.lists(nodes, min_size=users, max_size=users))
    made = situation(draw(nodes), devices, sizes=sizes, weights=draw(weightings), steps=steps)
    names = [f"d{i}" for i in range(users)]
    network = msgspec.structs.replace(
        made.network, uplinks={n: draw(links) for n in names}, downlinks={n: draw(links) for n in names}
    )
    similarity = tuple(tuple(1.0 if singletons else draw(st.floats(0, 1)) for _ in group) for group in made.groups)
    return msgspec.structs.replace(made, network=network, similarity=similarity)


def split_of(plan: Plan, request: str) -> Split:
    found = {"shared": 0, "edge": 0, "device": 0}
    for s in next(r for r in plan.routes if r.request == request).segments:
        kind = "device" if s.node != "edge" else "shared" if s.prompt.startswith("public") else "edge"
        found[kind] += s.stop - s.start
    return Split(**found)


# The second tier


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=6))
def test_shares_are_what_a_solver_finds(clusters: list[tuple[float, float]]) -> None:
    work, weight = (np.array(column) for column in zip(*clusters, strict=True))

    def cost(f: NDArray[np.float64]) -> float:
        return float((weight * work / f).sum())

    n = len(work)
    solved = minimize(
        cost,
        np.full(n, 1 / n),
        jac=lambda f: -weight * work / f**2,
        bounds=[(1e-4, 1)] * n,
        constraints={"type": "eq", "fun": lambda f: f.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    found = shares(work, weight)
    assert found.sum() == pytest.approx(1)
    assert cost(found) <= cost(solved.x / solved.x.sum()) * (1 + 1e-6)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=2000))
def test_every_cluster_gets_a_share_and_no_more_than_all_is_given(work: list[float]) -> None:
    found = shares(np.array(work), np.ones(len(work)))
    assert (found > 0).all()
    assert found.sum() == pytest.approx(1)
    order = np.argsort(work, kind="stable")
    assert (np.diff(found[order]) >= -1e-12).all()


# The first tier


@st.composite
def tables(draw: st.DrawFn) -> Costs:
    steps, users = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    own = rng.normal(size=(users, steps + 1, steps + 1)).round(draw(st.sampled_from([0, 6])))
    for x, y in itertools.product(range(steps + 1), repeat=2):
        if x + y > steps:
            own[:, x, y] = np.inf
    return Costs(own=own, second=draw(st.floats(0, 2)), step=draw(st.floats(0, 1)), joules=draw(st.floats(0, 1)))


def every_choice(table: Costs, *, sharing: bool, uniform: bool) -> Iterator[list[Split]]:
    """All splits of a cluster's users."""
    users, size, _ = table.own.shape
    choices = [
        Split(shared=x, edge=y, device=size - 1 - x - y)
        for x in range(size if sharing and users > 1 else 1)
        for y in range(size - x)
    ]
    if uniform:
        yield from ([split] * users for split in choices)
    else:
        yield from (list(picked) for picked in itertools.product(choices, repeat=users))


def own_cost(table: Costs, splits: Sequence[Split]) -> float:
    """What splits cost but for the edge's time."""
    own = sum(float(table.own[n, s.shared, s.edge]) for n, s in enumerate(splits))
    return own + max(s.shared for s in splits) * table.joules


def work_of(splits: Sequence[Split]) -> int:
    return max(s.shared for s in splits) + sum(s.edge for s in splits)


@settings(max_examples=100, deadline=None)
@given(tables(), st.floats(0, 3), st.booleans(), st.booleans())
def test_the_frontier_holds_the_best_of_all_splits(table: Costs, price: float, sharing: bool, uniform: bool) -> None:
    """At any price of the edge's work, the best point of the frontier is the best of an exhaustive search."""
    steps = table.own.shape[1] - 1
    frontier = Frontier(table, most_shared=steps, sharing=sharing, uniform=uniform)
    best = min(own_cost(table, s) + price * work_of(s) for s in every_choice(table, sharing=sharing, uniform=uniform))
    assert float((frontier.least + price * np.arange(len(frontier.least))).min()) == pytest.approx(best, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(tables(), st.booleans(), st.booleans())
def test_every_amount_of_work_has_the_splits_that_cost_the_least(table: Costs, sharing: bool, uniform: bool) -> None:
    steps = table.own.shape[1] - 1
    frontier = Frontier(table, most_shared=steps, sharing=sharing, uniform=uniform)
    best: dict[int, float] = defaultdict(lambda: math.inf)
    for splits in every_choice(table, sharing=sharing, uniform=uniform):
        best[work_of(splits)] = min(best[work_of(splits)], own_cost(table, splits))
    for work, least in enumerate(frontier.least):
        assert least <= best[work] + 1e-9
        if not np.isfinite(least):
            assert best[work] == math.inf
            continue
        splits = frontier.splits(work)
        assert all(s.shared + s.edge + s.device == steps and min(s.shared, s.edge, s.device) >= 0 for s in splits)
        assert work_of(splits) <= work
        assert own_cost(table, splits) <= least + 1e-9
        assert not uniform or len({(s.shared, s.edge) for s in splits}) == 1


@settings(max_examples=30, deadline=None)
@given(situations(), st.integers(0, 6), st.booleans())
def test_no_more_is_shared_than_allowed(asked: Situation, most: int, uniform: bool) -> None:
    plan = asked.plan(most_shared=most, uniform=uniform)
    assert all(split_of(plan, r.id).shared <= most for r in asked.requests)


def test_a_cluster_of_different_step_counts_is_refused() -> None:
    node = NodeState(step_seconds=1, step_joules=1)
    asked = situation(node, [node, node], sizes=[2])
    mixed = (asked.requests[0], msgspec.structs.replace(asked.requests[1], steps=20))
    with pytest.raises(ValueError, match="same number of steps"):
        msgspec.structs.replace(asked, requests=mixed).plan()


# Both tiers


def by_hand(asked: Situation, plan: Plan, request: Request) -> tuple[float, float, float, float]:
    """Quality, latency, energy and utility by the formulas of the design document, from the plan's routes alone."""
    network, w = asked.network, asked.weights
    m = next(m for m, c in enumerate(plan.clusters) if request.id in c.members)
    group = [asked.requests[i] for i in asked.groups[m]]
    splits = {r.id: split_of(plan, r.id) for r in group}
    mine, share = splits[request.id], plan.clusters[m].share
    phi = plan.clusters[m].similarity[plan.clusters[m].members.index(request.id)]
    device, edge = network.nodes[request.device], network.nodes["edge"]
    up, down = network.uplinks[request.device], network.downlinks[request.device]
    longest = max(s.shared for s in splits.values())
    sharers = sum(s.shared > 0 for s in splits.values())
    on_edge = longest + sum(s.edge for s in splits.values())
    quality = float(QUALITY.quality(phi, mine.shared * 28 / request.steps))
    latency = 8 * network.request_bytes / up.rate + up.delay + mine.device * device.step_seconds + device.decode_seconds
    energy = up.watts * 8 * network.request_bytes / up.rate + mine.device * device.step_joules + device.decode_joules
    if mine.shared or mine.edge:
        latency += on_edge * edge.step_seconds / share + 8 * network.latent_bytes / down.rate + down.delay
        energy += mine.edge * edge.step_joules + down.watts * 8 * network.latent_bytes / down.rate
    if mine.shared:
        energy += longest / sharers * edge.step_joules
    alone = request.steps * device.step_seconds + device.decode_seconds
    burnt = request.steps * device.step_joules + device.decode_joules
    utility = w.quality * quality / float(QUALITY.quality(phi, 0)) + w.latency * (1 - latency / alone)
    utility += w.energy * (1 - energy / burnt) if burnt else 0.0
    return quality, latency, energy, utility


@settings(max_examples=60, deadline=None)
@given(situations(), st.booleans(), st.booleans())
def test_predictions_are_what_the_formulas_give(asked: Situation, sharing: bool, uniform: bool) -> None:
    plan = asked.plan(sharing=sharing, uniform=uniform)
    assert [r.request for r in plan.routes] == [r.id for r in asked.requests]
    for request in asked.requests:
        found = plan.predictions[request.id]
        expected = by_hand(asked, plan, request)
        assert (found.quality, found.latency, found.energy, found.utility) == pytest.approx(expected)


def total(made: Sequence[Costs], splits: Sequence[Sequence[Split]], share: NDArray[np.float64]) -> float:
    """What splits and shares cost, in units of utility."""
    return sum(
        own_cost(t, s) + work_of(s) * t.step * t.second / float(f) for t, s, f in zip(made, splits, share, strict=True)
    )


def best_shares(made: Sequence[Costs], splits: Sequence[Sequence[Split]]) -> NDArray[np.float64]:
    work = np.array([work_of(s) * t.step for s, t in zip(splits, made, strict=True)])
    return shares(work, np.array([t.second for t in made]))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(situations(steps=3), st.booleans())
def test_the_plan_is_the_best_of_all_splits_with_their_best_shares(asked: Situation, uniform: bool) -> None:
    assume(len(asked.requests) <= 3)
    made = asked.tables()
    choices = [every_choice(t, sharing=True, uniform=uniform) for t in made]
    best = min(total(made, splits, best_shares(made, splits)) for splits in itertools.product(*choices))
    plan = asked.plan(uniform=uniform)
    splits = [[split_of(plan, m) for m in c.members] for c in plan.clusters]
    found = total(made, splits, np.array([c.share for c in plan.clusters]))
    assert best - 1e-9 <= found <= best + GRID


@settings(max_examples=40, deadline=None)
@given(situations())
def test_sharing_and_own_splits_do_not_make_a_plan_worse(asked: Situation) -> None:
    made = asked.tables()

    def cost(plan: Plan) -> float:
        splits = [[split_of(plan, m) for m in c.members] for c in plan.clusters]
        return total(made, splits, np.array([c.share for c in plan.clusters]))

    free = cost(asked.plan())
    assert free <= cost(asked.plan(sharing=False)) + GRID
    assert free <= cost(asked.plan(uniform=True)) + GRID


@settings(max_examples=40, deadline=None)
@given(situations(singletons=True))
def test_what_the_planner_minimises_is_the_predicted_utility(asked: Situation) -> None:
    """Of clusters of one: no plan that all users follow alike is predicted to be better than the plan."""

    def mean(plan: Plan) -> float:
        return float(np.mean([p.utility for p in plan.predictions.values()]))

    found = mean(asked.plan())
    assert found == pytest.approx(mean(asked.plan(sharing=False)))
    # Staying on the device, with the request sent in vain, is one of the choices.
    alone = asked.weights.quality
    for r in asked.requests:
        up, node = asked.network.uplinks[r.device], asked.network.nodes[r.device]
        size = asked.network.request_bytes
        alone -= (
            asked.weights.latency
            * up.seconds(size)
            / (r.steps * node.step_seconds + node.decode_seconds)
            / len(asked.requests)
        )
        burnt = r.steps * node.step_joules + node.decode_joules
        alone -= asked.weights.energy * up.joules(size) / burnt / len(asked.requests) if burnt else 0.0
    assert found >= alone - 1e-4


A100 = NodeState(step_seconds=12 / 156, step_joules=400 * 12 / 156, decode_seconds=10.5 / 156)
RTX = NodeState(step_seconds=0.3, step_joules=135.0, decode_seconds=0.26, decode_joules=118.0)


def test_an_edge_too_slow_for_all_serves_some() -> None:
    """An eighth of an A100 is slower than a 3090 Ti: equal shares alone would leave the edge without work."""
    asked = situation(A100, [RTX] * 8, sizes=[1] * 8)
    plan = asked.plan(sharing=False)
    used = [split_of(plan, r.id).edge for r in asked.requests]
    assert sum(used) > 0
    assert np.mean([p.utility for p in plan.predictions.values()]) > asked.weights.quality


def test_over_a_hopeless_link_all_stays_on_the_device() -> None:
    asked = situation(A100, [RTX] * 4, sizes=[2, 2], link=Link(rate=1.0, watts=1.0))
    plan = asked.plan()
    assert all(r.nodes == (r.request.removeprefix("r"),) for r in plan.routes)
    assert all(p.quality == pytest.approx(float(QUALITY.quality(0.6, 0))) for p in plan.predictions.values())


def test_for_a_hopeless_device_the_edge_does_all() -> None:
    snail = NodeState(step_seconds=1e4, step_joules=1e4, decode_seconds=1.0)
    plan = situation(A100, [snail] * 4, sizes=[2, 2]).plan()
    assert all(r.nodes == ("edge",) for r in plan.routes)


def test_with_quality_alone_in_view_nothing_is_shared() -> None:
    plan = situation(A100, [RTX] * 4, sizes=[2, 2], weights=Weights(quality=1, latency=0, energy=0)).plan()
    assert not any(shared_steps(plan.routes).values())


def test_sharing_members_start_from_one_noise() -> None:
    """Or their shared steps would not be the same computation."""
    asked = situation(A100, [RTX] * 3, sizes=[3], similarity=0.7)
    own = tuple(msgspec.structs.replace(r, seed=i) for i, r in enumerate(asked.requests))
    plan = msgspec.structs.replace(asked, requests=own).plan()
    expected = {r.id: split_of(plan, r.id).shared for r in own}
    assert max(expected.values()) > 0
    assert shared_steps(plan.routes) == expected


def test_shares_follow_the_clusters_work() -> None:
    plan = situation(A100, [RTX] * 5, sizes=[4, 1]).plan()
    assert sum(c.share for c in plan.clusters) == pytest.approx(1)
    assert [c.members for c in plan.clusters] == [("rd0", "rd1", "rd2", "rd3"), ("rd4",)]
