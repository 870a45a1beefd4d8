"""The planner: closed forms against a solver, splits and plans against enumeration."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from semct.cost import Backlog, Link, Network, NodeState, Weights
from semct.planner import coupling, two_tier
from semct.planner.coupling import choose
from semct.planner.shares import shares
from semct.planner.splits import Costs, Frontier, Split, corners, costs
from semct.public_prompt import PublicPrompt
from semct.quality import load_quality_model
from semct.routes import Plan, Request, shared_steps, steps_by_node

QUALITY = load_quality_model("sd3-medium")
STEPS = 28
SLIVER = 1e-3  # of utility: what the share costs that clusters without work keep

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

    def tables(self, *, most_shared: int = STEPS) -> list[Costs]:
        return costs(
            self.requests,
            self.groups,
            [np.array(phi) for phi in self.similarity],
            network=self.network,
            weights=self.weights,
            quality=QUALITY,
            most_shared=most_shared,
        )


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


@settings(max_examples=60)
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
        constraints={"type": "ineq", "fun": lambda f: 1 - f.sum(), "jac": lambda f: -np.ones_like(f)},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    found = shares(work, weight)
    assert found.sum() == pytest.approx(1)
    assert found == pytest.approx(solved.x, abs=2e-3)
    assert cost(found) <= cost(solved.x / solved.x.sum()) * (1 + 1e-6)
    assert cost(found) == pytest.approx(np.sqrt(weight * work).sum() ** 2, rel=1e-4)


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
    """The costs of a cluster from nowhere: any function of (x, y), with ties or without."""
    steps, users = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    own = rng.normal(size=(users, steps + 1, steps + 1)).round(draw(st.sampled_from([0, 6])))
    for x, y in itertools.product(range(steps + 1), repeat=2):
        if x + y > steps:
            own[:, x, y] = np.inf
    second, step, joules = (draw(st.floats(0, most)) for most in (2, 1, 1))
    return Costs(own=own, corners=corners(own), second=second, step=step, joules=joules)


def every_choice(table: Costs, *, uniform: bool = False) -> Iterator[list[Split]]:
    """All splits of a cluster's users."""
    users, bounds, size = table.own.shape
    choices = [
        Split(shared=x, edge=y, device=size - 1 - x - y)
        for x in range(bounds if users > 1 else 1)
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


@settings(max_examples=150)
@given(tables(), st.floats(0, 3), st.floats(0, 3), st.booleans())
def test_the_frontier_holds_the_best_of_all_splits(table: Costs, line: float, root: float, uniform: bool) -> None:
    """Whatever the edge's work costs, as long as that is concave in it."""
    frontier = Frontier(table, uniform=uniform)
    best = min(
        own_cost(table, s) + line * work_of(s) + root * math.sqrt(work_of(s))
        for s in every_choice(table, uniform=uniform)
    )
    found = frontier.least + line * frontier.work + root * np.sqrt(frontier.work)
    assert found.min() == pytest.approx(best, abs=1e-9)


@settings(max_examples=100)
@given(tables(), st.booleans())
def test_the_points_of_the_frontier_have_splits_that_cost_that_much(table: Costs, uniform: bool) -> None:
    steps = table.own.shape[2] - 1
    frontier = Frontier(table, uniform=uniform)
    assert (np.diff(frontier.work) > 0).all()
    assert (np.diff(frontier.least) < 0).all()
    for point, (work, least) in enumerate(zip(frontier.work, frontier.least, strict=True)):
        splits = frontier.splits(point)
        assert all(s.shared + s.edge + s.device == steps and min(s.shared, s.edge, s.device) >= 0 for s in splits)
        assert work_of(splits) <= work
        assert own_cost(table, splits) <= least + 1e-9
        assert not uniform or len({(s.shared, s.edge) for s in splits}) == 1


@settings(max_examples=30)
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


def test_clusters_may_differ_in_their_steps() -> None:
    asked = situation(A100, [RTX] * 4, sizes=[2, 2])
    mixed = tuple(msgspec.structs.replace(r, steps=20 if i > 1 else 28) for i, r in enumerate(asked.requests))
    plan = msgspec.structs.replace(asked, requests=mixed).plan()
    assert [r.steps for r in plan.routes] == [28, 28, 20, 20]


# The coupling of clusters

points = st.lists(st.tuples(st.floats(-2, 2), st.floats(0, 2)), min_size=1, max_size=5)


@settings(max_examples=200)
@given(st.lists(points, min_size=1, max_size=5), st.just(0.0) | st.floats(0, 3))
def test_one_choice_per_cluster_is_the_best_of_all(clusters: list[list[tuple[float, float]]], owed: float) -> None:
    losses, roots = ([np.array([p[i] for p in c]) for c in clusters] for i in (0, 1))

    def cost(picked: Sequence[tuple[float, float]]) -> float:
        return sum(loss for loss, _ in picked) + (owed + sum(root for _, root in picked)) ** 2 - owed**2

    chosen = choose(losses, roots, owed=owed)
    assert chosen.cost == pytest.approx(min(map(cost, itertools.product(*clusters))), abs=1e-9)
    picked = [c[p] for c, p in zip(clusters, chosen.points.tolist(), strict=True)]
    assert chosen.cost == pytest.approx(cost(picked), abs=1e-9)
    assert chosen.gap <= 1e-9


def test_where_the_search_is_cut_short_the_bound_says_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    losses, roots = [rng.normal(size=4) for _ in range(7)], [rng.uniform(0, 0.5, 4) for _ in range(7)]
    exact = choose(losses, roots)
    monkeypatch.setattr(coupling, "_MOST", 2)
    short = choose(losses, roots)
    assert short.bound <= exact.bound + 1e-12
    assert exact.cost <= short.cost
    assert exact.gap <= 1e-9


# Both tiers


def total(made: Sequence[Costs], splits: Sequence[Sequence[Split]], share: NDArray[np.float64]) -> float:
    """What splits and shares cost, in units of utility."""
    return sum(
        own_cost(t, s) + work_of(s) * t.step * t.second / float(f) for t, s, f in zip(made, splits, share, strict=True)
    )


def brute_force(made: Sequence[Costs], *, uniform: bool = False) -> float:
    """The least cost of all splits of all clusters, each with its best shares."""
    outlines = []
    for table in made:  # of splits with the same work only the cheapest can be best
        cheapest: dict[int, float] = defaultdict(lambda: math.inf)
        for splits in every_choice(table, uniform=uniform):
            cheapest[work_of(splits)] = min(cheapest[work_of(splits)], own_cost(table, splits))
        outlines.append(list(cheapest.items()))
    weight = np.array([t.second for t in made])
    best = math.inf
    for picked in itertools.product(*outlines):
        work = np.array([a * t.step for (a, _), t in zip(picked, made, strict=True)])
        edge = float((work * weight / shares(work, weight)).sum())
        best = min(best, sum(loss for _, loss in picked) + edge)
    return best


def small(seed: int) -> Situation:
    """Up to four users in up to three clusters, on any edge, devices and links, with any weights."""
    rng = np.random.default_rng(seed)
    sizes = [(1,), (2,), (3,), (1, 1), (2, 1), (2, 2), (1, 1, 1), (2, 1, 1)][rng.integers(8)]
    users = sum(sizes)
    devices = [
        NodeState(
            step_seconds=rng.uniform(0.05, 1),
            step_joules=rng.choice([0.0, rng.uniform(1, 200)]),
            decode_seconds=rng.uniform(0, 0.5),
        )
        for _ in range(users)
    ]
    edge = NodeState(step_seconds=rng.uniform(0.01, 0.5), step_joules=rng.uniform(1, 100))
    parts = rng.dirichlet([1, 1, 1])
    made = situation(
        edge,
        devices,
        sizes=sizes,
        weights=Weights(quality=parts[0], latency=parts[1], energy=parts[2]),
        steps=int(rng.integers(2, 7)),
    )
    downs = {r.device: Link(rate=10 ** rng.uniform(3, 6), delay=rng.uniform(0, 0.1), watts=1.0) for r in made.requests}
    similarity = tuple(tuple(rng.uniform(0.1, 0.9, size)) for size in sizes)
    return msgspec.structs.replace(
        made, network=msgspec.structs.replace(made.network, downlinks=downs), similarity=similarity
    )


@pytest.mark.parametrize("uniform", [False, True])
def test_two_hundred_plans_are_the_best_of_all(uniform: bool) -> None:
    """The whole planner against enumeration of every split; costs are utilities with the sign turned."""
    for seed in range(200):
        asked = small(seed)
        made = asked.tables()
        plan = asked.plan(uniform=uniform)
        splits = [[split_of(plan, m) for m in c.members] for c in plan.clusters]
        found = total(made, splits, np.array([c.share for c in plan.clusters]))
        best = brute_force(made, uniform=uniform)
        assert best - 1e-9 <= found <= best + 1e-3 * abs(best), seed
        assert plan.gap is not None
        assert plan.gap <= 1e-9


def busy(asked: Situation, *backlog: Backlog) -> Situation:
    """The same on an edge that has so much left to do."""
    edge = msgspec.structs.replace(asked.network.nodes["edge"], backlog=backlog)
    network = msgspec.structs.replace(asked.network, nodes={**asked.network.nodes, "edge": edge})
    return msgspec.structs.replace(asked, network=network)


def best_shares(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of clusters whose seconds at the whole edge cost so much, without the sliver that idle ones keep."""
    return np.sqrt(costs) / max(np.sqrt(costs).sum(), 1e-12)


@pytest.mark.parametrize("uniform", [False, True])
def test_two_hundred_plans_on_a_busy_edge_are_the_best_of_all(uniform: bool) -> None:
    """Against enumeration, earlier clusters taking part in the shares and in what everybody waits."""
    moved = 0
    for seed in range(200):
        rng, idle = np.random.default_rng(seed), small(seed)
        earlier = [
            Backlog(steps={"m": int(rng.integers(1, 30))}, requests=int(rng.integers(1, 4)), weight=0.5)
            for _ in range(rng.integers(1, 4))
        ]
        asked = busy(idle, *earlier)
        made = asked.tables()
        second = sum(t.second for t in made) / len(asked.requests)
        owed = [b.requests * second * b.steps["m"] * asked.network.nodes["edge"].step_seconds for b in earlier]

        def cost(
            splits: Sequence[Sequence[Split]], made: list[Costs] = made, owed: list[float] = owed
        ) -> tuple[float, NDArray[np.float64]]:
            """What all lose, and the new clusters' shares: each user waits for its cluster's work at its share."""
            work = np.array(
                [*(work_of(s) * t.step * t.second for t, s in zip(made, splits, strict=True)), *owed], dtype=np.float64
            )
            share = best_shares(work)
            waited = float((work[work > 0] / share[work > 0]).sum())
            return sum(own_cost(t, s) for t, s in zip(made, splits, strict=True)) + waited, share[: len(made)]

        cheapest: list[dict[int, list[Split]]] = []
        for table in made:  # of splits with the same work only the cheapest can be best
            best_of: dict[int, list[Split]] = {}
            for splits in every_choice(table, uniform=uniform):
                here = best_of.get(work_of(splits))
                if here is None or own_cost(table, splits) < own_cost(table, here):
                    best_of[work_of(splits)] = splits
            cheapest.append(best_of)
        best = min(cost(picked)[0] for picked in itertools.product(*(c.values() for c in cheapest)))
        plan = asked.plan(uniform=uniform)
        found, share = cost([[split_of(plan, m) for m in c.members] for c in plan.clusters])
        assert found == pytest.approx(best, abs=1e-9), seed
        assert plan.gap is not None
        assert plan.gap <= 1e-9
        if share.sum() > 0:
            assert [c.share for c in plan.clusters] == pytest.approx((share / share.sum()).tolist(), abs=1e-5)
        moved += plan.routes != idle.plan(uniform=uniform).routes
    assert moved > 50


def test_nothing_left_to_do_changes_nothing() -> None:
    for seed in range(20):
        asked = small(seed)
        plan, other = asked.plan(), busy(asked, Backlog(steps={}, requests=3)).plan()
        assert (plan.routes, plan.clusters, plan.gap) == (other.routes, other.clusters, other.gap)


def test_the_more_is_left_to_do_the_more_stays_on_the_devices() -> None:
    asked = situation(A100, [RTX] * 8, sizes=[4, 4], similarity=0.7)
    plans = [busy(asked, Backlog(steps={"m": n}, requests=4)).plan() for n in (0, 20, 100, 400, 10_000)]
    work = [steps_by_node(p.routes).get("edge", 0) for p in plans]
    assert work[0] > 0 == work[-1]
    assert work == sorted(work, reverse=True)
    assert len(set(work)) > 2


@settings(max_examples=40)
@given(situations())
def test_sharing_and_own_splits_do_not_make_a_plan_worse(asked: Situation) -> None:
    made = asked.tables()

    def cost(plan: Plan) -> float:
        splits = [[split_of(plan, m) for m in c.members] for c in plan.clusters]
        return total(made, splits, np.array([c.share for c in plan.clusters]))

    free = cost(asked.plan())
    assert free <= cost(asked.plan(sharing=False)) + SLIVER
    assert free <= cost(asked.plan(uniform=True)) + SLIVER


@settings(max_examples=60)
@given(situations(singletons=True))
def test_what_the_planner_minimises_is_the_utility_lost(asked: Situation) -> None:
    """Of clusters of one, where nobody shares: each user's utility by hand, from the plan's routes alone."""
    plan = asked.plan()
    made = asked.tables()
    utility = 0.0
    slowest = max(link.seconds(400) for link in asked.network.uplinks.values())
    w = asked.weights
    for request, cluster in zip(asked.requests, plan.clusters, strict=True):
        split = split_of(plan, request.id)
        device, edge = asked.network.nodes[request.device], asked.network.nodes["edge"]
        up, down = asked.network.uplinks[request.device], asked.network.downlinks[request.device]
        size = asked.network.latent_bytes if split.edge else asked.network.request_bytes
        latency = slowest + split.edge * edge.step_seconds / cluster.share
        latency += down.seconds(size) + split.device * device.step_seconds + device.decode_seconds
        energy = up.joules(400) + split.edge * edge.step_joules + down.joules(size)
        energy += split.device * device.step_joules + device.decode_joules
        alone = request.steps * device.step_seconds + device.decode_seconds
        burnt = request.steps * device.step_joules + device.decode_joules
        utility += w.quality + w.latency * (1 - latency / alone) + (w.energy * (1 - energy / burnt) if burnt else 0.0)
    splits = [[split_of(plan, m) for m in c.members] for c in plan.clusters]
    assert utility == pytest.approx(-total(made, splits, np.array([c.share for c in plan.clusters])))


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


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_mean_of_prompts_is_priced_as_one(weight: float) -> None:
    curves = load_quality_model("embedded")
    asked = situation(A100, [RTX] * 2, sizes=[2])
    public = PublicPrompt(tuple(r.prompt for r in asked.requests), "mean", 0.6, 1)
    rest = (1 - weight) / 2
    plan = two_tier.plan(
        asked.requests,
        asked.groups,
        [public],
        [np.full(2, 0.6)],
        model="m",
        network=asked.network,
        weights=Weights(quality=weight, latency=rest, energy=rest),
        quality=curves,
        most_shared=STEPS,
    )
    for request in asked.requests:
        route = next(r for r in plan.routes if r.request == request.id)
        shared = sum(s.stop - s.start for s in route.segments if s.prompt == public.text)
        expected = curves.quality(0.6, shared * curves.steps / STEPS, 0.5)
        assert plan.predictions[request.id].quality == pytest.approx(float(expected))
        if weight == 0:
            assert shared > 0
            assert float(expected) != pytest.approx(float(curves.quality(0.6, shared * curves.steps / STEPS)), abs=1e-4)
