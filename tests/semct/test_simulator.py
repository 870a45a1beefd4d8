"""The simulator's arrays: steps counted as a walk over the routes counts them, and plans taken as they predict."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semct.routes import Cluster, Plan, Prediction, Request, Route, route, shared_steps
from semct.simulator import Unpredicted, simulate, work

spans = st.lists(
    st.tuples(st.sampled_from(["edge", "d0", "d1"]), st.sampled_from("mn"), st.sampled_from("pq"), st.integers(0, 4)),
    max_size=4,
)


def request(i: int, seed: int, steps: int) -> Request:
    return Request(id=f"r{i}", device=f"d{i % 2}", prompt="p", seed=seed, steps=steps)


@st.composite
def routes(draw: st.DrawFn) -> list[Route]:
    made = []
    for i in range(draw(st.integers(0, 6))):
        taken = draw(spans)
        made.append(route(request(i, draw(st.integers(0, 1)), sum(n for *_, n in taken)), *taken))
    return made


def steps(r: Route) -> Iterator[tuple[Hashable, str, str]]:
    """Each step by all that its result depends on, with its node and model."""
    history: tuple[Hashable, ...] = (r.seed, r.steps)
    for s in r.segments:
        for step in range(s.start, s.stop):
            yield (history, s.node, s.model, s.prompt, s.start, step), s.node, s.model
        history = (*history, (s.node, s.model, s.prompt, s.start, s.stop))


@given(routes())
def test_steps_are_counted_as_a_walk_counts_them(made: list[Route]) -> None:
    devices = [f"d{i % 2}" for i in range(len(made))]
    found = work(made, devices)
    riders = Counter(key for r in made for key, *_ in steps(r))
    parts: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(made))
    for i, r in enumerate(made):
        for key, _, model in steps(r):
            parts[model][i] += 1 / riders[key]
    assert found.shared.tolist() == [shared_steps(made)[r.request] for r in made]
    assert found.device.tolist() == [
        sum(node == d for _, node, _ in steps(r)) for r, d in zip(made, devices, strict=True)
    ]
    assert set(found.parts) == set(parts)
    for model, counted in parts.items():
        assert found.parts[model] == pytest.approx(counted)


def test_steps_that_nobody_shares_add_up_to_whole_numbers() -> None:
    asked = [request(i, seed=i, steps=28) for i in range(1000)]
    made = [
        route(r, ("edge", "m", r.prompt, i % 29), (r.device, "m", r.prompt, 28 - i % 29)) for i, r in enumerate(asked)
    ]
    assert float(sum(work(made, [r.device for r in asked]).parts["m"])) == 28_000


def test_a_plan_is_taken_as_it_predicts_in_the_order_of_the_requests() -> None:
    asked = [request(i, seed=0, steps=4) for i in range(3)]
    made = [route(asked[i], ("edge", "m", "q" if i else "p", 3), (asked[i].device, "m", "p", 1)) for i in (2, 0, 1)]
    predictions = {
        f"r{i}": Prediction(quality=i, latency=10.0 + i, energy=20.0 + i, utility=30.0 + i) for i in (1, 2, 0)
    }
    pair = Cluster(members=("r2", "r1"), public_prompt="q", source="medoid", similarity=(0.2, 0.1), share=1.0)
    plan = Plan(clusters=(pair,), routes=tuple(made), predictions=predictions)
    found = simulate(plan, asked)
    assert found.quality.tolist() == [0, 1, 2]
    assert found.latency.tolist() == [10, 11, 12]
    assert found.energy.tolist() == [20, 21, 22]
    assert found.utility.tolist() == [30, 31, 32]
    assert found.cluster.tolist() == [-1, 0, 0]
    assert np.isnan(found.similarity[0])
    assert found.similarity[1:].tolist() == [0.1, 0.2]
    assert found.work.parts["m"].tolist() == [4, 2.5, 2.5]


def test_a_plan_without_predictions_is_refused_in_one_sentence() -> None:
    asked = [request(0, seed=0, steps=2)]
    plan = Plan(clusters=(), routes=(route(asked[0], ("d0", "m", "p", 2)),))
    with pytest.raises(Unpredicted, match="1 requests, the first is r0"):
        simulate(plan, asked)
