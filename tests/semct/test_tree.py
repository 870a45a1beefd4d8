"""Sharing at several levels: the best stops are those of brute force, and plans add up to what routes say."""

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from semct.clustering import Dendrogram, dendrogram
from semct.cost import Backlog, Link, Network, NodeState, Weights
from semct.planner import tree
from semct.planner.tree import Prices, PromptTree
from semct.quality import load_quality_model
from semct.routes import Request, blend, steps_by_node

QUALITY = load_quality_model("embedded")
STEPS = 28


def unit(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Vectors around a few directions, some of them equal."""
    centres = rng.normal(size=(3, 8))
    vectors = centres[rng.integers(3, size=n)] + 0.6 * rng.normal(size=(n, 8)) * rng.integers(2, size=(n, 1))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def grown(seed: int, n: int) -> PromptTree:
    vectors = unit(np.random.default_rng(seed), n)
    same = {v.tobytes(): f"prompt {i}" for i, v in enumerate(vectors)}
    return PromptTree(dendrogram(vectors), [same[v.tobytes()] for v in vectors], vectors)


def requests(n: int) -> list[Request]:
    return [Request(id=f"r{i}", device=f"d{i}", prompt="", seed=i, steps=STEPS) for i in range(n)]


def network(n: int, *, edge: float = 0.05, joules: float = 20.0) -> Network:
    names = [f"d{i}" for i in range(n)]
    phone = NodeState(step_seconds=0.4, step_joules=130.0, decode_seconds=0.3, decode_joules=70.0)
    return Network(
        edge="edge",
        nodes={"edge": NodeState(step_seconds=edge, step_joules=joules), **dict.fromkeys(names, phone)},
        uplinks=dict.fromkeys(names, Link(rate=20e6)),
        downlinks=dict.fromkeys(names, Link(rate=80e6, delay=0.005)),
        latent_bytes=512 * 1024,
    )


def cost(prompts: PromptTree, price: Prices, stops: NDArray[np.int64]) -> float:
    """What the requests pay with these stops, walked path by path."""
    steps = price.rest.shape[1] - 1
    total = 0.0
    start = [0 if p == v else int(stops[p]) for v, p in enumerate(prompts.parent)]
    for v, members in enumerate(prompts.members):
        if v < prompts.leaves:
            total += price.rest[v, start[v] if prompts.children else 0]
            continue
        fall = tree.lost(QUALITY, prompts.similarity[v], prompts.own[v], steps)
        total += (stops[v] - start[v]) * price.shared(members)
        total += float(price.quality[members] @ (fall[:, stops[v]] - fall[:, start[v]]))
    return total


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 4), steps=st.integers(1, 5), most=st.integers(0, 5))
def test_the_best_stops_are_those_of_brute_force(seed: int, n: int, steps: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = grown(seed, n)
    price = Prices(
        rest=-np.sort(-rng.random((n, steps + 1)), axis=1),
        edge=np.zeros((n, steps + 1), dtype=np.int64),
        step=rng.random(n) / 4,
        quality=rng.random(n),
    )
    found = tree.best_stops(prompts, price, QUALITY, most)
    inner = range(n, 2 * n - 1)
    allowed = tree.allowed_stops(prompts, QUALITY, steps, most)

    def legal(stops: dict[int, int]) -> bool:
        starts = {v: 0 if prompts.parent[v] == v else stops[prompts.parent[v]] for v in stops}
        return all(starts[v] == s or (starts[v] < s and allowed[v - n, s]) for v, s in stops.items())

    least = min(
        cost(prompts, price, np.array([0] * n + list(each)))
        for each in itertools.product(range(steps + 1), repeat=n - 1)
        if legal(dict(zip(inner, each, strict=True)))
    )
    assert cost(prompts, price, found) == pytest.approx(least, abs=1e-9)
    assert legal({v: int(found[v]) for v in inner})


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 12), quality=st.floats(0, 1))
def test_a_plan_runs_every_shared_step_once(seed: int, n: int, quality: float) -> None:
    prompts, asked, net = grown(seed, n), requests(n), network(n)
    asked = [
        Request(id=r.id, device=r.device, prompt=p, seed=r.seed, steps=r.steps)
        for r, p in zip(asked, prompts.prompts, strict=True)
    ]
    weights = Weights(quality=quality, latency=(1 - quality) / 2, energy=(1 - quality) / 2)
    price = tree.prices(asked, network=net, weights=weights, quality=QUALITY, waiting=n)
    stops = tree.best_stops(prompts, price, QUALITY, 13)
    plan = tree.plan(asked, prompts, stops, price.edge, model="m", network=net, weights=weights, quality=QUALITY)
    assert [r.request for r in plan.routes] == [r.id for r in asked]
    assert sorted(m for c in plan.clusters for m in c.members) == sorted(r.id for r in asked)
    assert sum(c.share for c in plan.clusters) == pytest.approx(1)
    run = sum(
        int(stops[v]) - (0 if prompts.parent[v] == v else int(stops[prompts.parent[v]])) for v in range(n, 2 * n - 1)
    )
    starts = [int(stops[prompts.parent[i]]) if n > 1 else 0 for i in range(n)]
    own = sum(int(price.edge[i, s]) for i, s in enumerate(starts))
    # Equal prompts share more than the tree knows of, never less.
    assert steps_by_node(plan.routes).get("edge", 0) <= run + own
    if len(set(prompts.prompts)) == n:
        assert steps_by_node(plan.routes).get("edge", 0) == run + own
    for route, request in zip(plan.routes, asked, strict=True):
        assert all(s.prompt == request.prompt for s in route.segments if s.node == request.device)
        assert plan.predictions[request.id].quality <= float(QUALITY.quality(1.0, 0.0)) + 1e-9


def test_equal_prompts_share_all_the_edge_does() -> None:
    vectors = np.repeat(np.eye(2), 3, axis=0)
    prompts = PromptTree(dendrogram(vectors), ["a"] * 3 + ["b"] * 3, vectors)
    asked = [Request(id=f"r{i}", device=f"d{i}", prompt=p, seed=7, steps=STEPS) for i, p in enumerate(prompts.prompts)]
    weights = Weights(quality=0.8, latency=0.1, energy=0.1)
    plan = tree.best_plan(
        asked, prompts, model="m", network=network(6), weights=weights, quality=QUALITY, most_shared=13
    )
    assert steps_by_node(plan.routes)["edge"] <= 2 * STEPS
    assert {r.segments[-1].prompt for r in plan.routes} == {"a", "b"}


def test_with_quality_alone_in_mind_nothing_is_lost() -> None:
    prompts, asked = grown(3, 8), requests(8)
    quality_only = Weights(quality=1.0, latency=0.0, energy=0.0)
    plan = tree.best_plan(
        asked, prompts, model="m", network=network(8), weights=quality_only, quality=QUALITY, most_shared=13
    )
    assert all(
        p.quality == pytest.approx(float(QUALITY.quality(1.0, 0.0)), abs=1e-6) for p in plan.predictions.values()
    )


def test_requests_of_different_lengths_cannot_share() -> None:
    asked = [Request(id=f"r{i}", device="d0", prompt="", seed=0, steps=i) for i in (3, 4)]
    with pytest.raises(ValueError, match=r"must have the same number of steps, not \[3, 4\]"):
        tree.prices(asked, network=network(1), weights=Weights(), quality=QUALITY, waiting=2)


def test_the_medoid_of_a_node_is_nearer_than_its_mean() -> None:
    vectors = unit(np.random.default_rng(5), 9)
    names = [f"p{i}" for i in range(9)]
    means = PromptTree(dendrogram(vectors), names, vectors)
    words = PromptTree(dendrogram(vectors), names, vectors, words=True)
    assert all(a.mean() <= b.mean() + 1e-9 for a, b in zip(means.similarity, words.similarity, strict=True))
    assert means.prompt(2 * 9 - 2) == blend(names)
    assert PromptTree(Dendrogram(1, ()), ["p"], vectors[:1]).prompt(0) == "p"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 9), most=st.integers(0, STEPS))
def test_the_best_number_of_clusters_costs_least_of_all(seed: int, n: int, most: int) -> None:
    vectors = unit(np.random.default_rng(seed), n)
    grove, prompts = dendrogram(vectors), grown(seed, n)
    price = tree.prices(requests(n), network=network(n), weights=Weights(), quality=QUALITY, waiting=n)

    def total(clusters: int) -> float:
        merged = {tuple(sorted(m.tolist())): v for v, m in enumerate(prompts.members)}
        # All merges down to this number, equal prompts or not.
        left = grove._after(n - clusters)
        found = 0.0
        for group in left:
            v = merged[group]
            fall = tree.lost(QUALITY, prompts.similarity[v], prompts.own[v], STEPS)
            own = price.rest[prompts.members[v]] + price.quality[prompts.members[v], None] * fall
            longest = most if len(group) > 1 else 0
            found += min(
                x * price.shared(prompts.members[v]) + own[:, : x + 1].min(axis=1).sum() for x in range(longest + 1)
            )
        return found

    best = tree.best_clusters(prompts, price, QUALITY, most)
    assert total(best) == pytest.approx(min(total(k) for k in range(1, n + 1)), abs=1e-9)


def test_the_root_keeps_its_bound_and_different_wishes_end_with_steps_of_their_own() -> None:
    vectors = np.repeat(unit(np.random.default_rng(2), 6), 2, axis=0)
    prompts = PromptTree(dendrogram(vectors), [f"p{i // 2}" for i in range(12)], vectors)
    allowed = tree.allowed_stops(prompts, QUALITY, STEPS, 13)
    assert np.flatnonzero(allowed[-1]).max() == 13
    for v in range(12, 23):
        longest = int(np.flatnonzero(allowed[v - 12]).max())
        same = len({prompts.prompts[i] for i in prompts.members[v]}) == 1
        assert longest == STEPS if same else longest <= 22
        mean = tree.lost(QUALITY, prompts.similarity[v], prompts.own[v], STEPS).mean(axis=0)
        assert (
            mean[longest] <= tree.lost(QUALITY, prompts.similarity[-1], prompts.own[-1], STEPS).mean(axis=0)[13] + 1e-9
        )


def test_a_tree_leaves_a_busy_edge_alone() -> None:
    prompts, asked = grown(3, 8), requests(8)
    work = []
    for steps in (0, 10_000):
        net = network(8)
        busy = msgspec.structs.replace(net.nodes["edge"], backlog=(Backlog(steps={"m": steps}, requests=steps // 100),))
        plan = tree.best_plan(
            asked,
            prompts,
            model="m",
            network=msgspec.structs.replace(net, nodes={**net.nodes, "edge": busy}),
            weights=Weights(),
            quality=QUALITY,
            most_shared=13,
        )
        work.append(steps_by_node(plan.routes).get("edge", 0))
    assert work[0] > 0 == work[1]
