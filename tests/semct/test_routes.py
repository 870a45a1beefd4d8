"""Routes: no gaps, and steps counted as a brute-force walk over them counts."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semct.routes import (
    MOST_BLENDED,
    Cluster,
    Plan,
    Prediction,
    Request,
    Route,
    Segment,
    blend,
    merged,
    route,
    shared_steps,
    steps_by_node,
    wording,
)

Span = tuple[str, str, str, int]

spans = st.lists(
    st.tuples(st.sampled_from(["edge", "d1"]), st.sampled_from("mn"), st.sampled_from("pq"), st.integers(0, 4)),
    max_size=5,
)


def request(name: str, steps: int, seed: int = 0) -> Request:
    return Request(id=name, device="d1", prompt="p", seed=seed, steps=steps)


def whole(name: str, spans: Sequence[Span], seed: int = 0) -> Route:
    return route(request(name, sum(length for *_, length in spans), seed), *spans)


def segment(start: int, stop: int, node: str = "edge") -> Segment:
    return Segment(node=node, model="m", prompt="p", start=start, stop=stop)


def trail(r: Route) -> list[tuple[str, str, str]]:
    """Who does each step, with which model and prompt."""
    return [(s.node, s.model, s.prompt) for s in r.segments for _ in range(s.start, s.stop)]


@given(spans)
def test_spans_laid_end_to_end_make_a_route(spans: list[Span]) -> None:
    made = whole("r", spans)
    assert trail(made) == [(node, model, prompt) for node, model, prompt, n in spans for _ in range(n)]
    keys = [(s.node, s.model, s.prompt) for s in made.segments]
    assert all(a != b for a, b in itertools.pairwise(keys))
    assert all(s.start < s.stop for s in made.segments)


def test_twins_merge_and_empty_spans_vanish() -> None:
    made = route(
        request("r", 9),
        ("edge", "m", "p", 2),
        ("edge", "m", "q", 0),
        ("edge", "m", "p", 3),
        ("d1", "m", "p", 4),
    )
    assert made.segments == (segment(0, 5), segment(5, 9, "d1"))
    assert made.nodes == ("edge", "d1")


@pytest.mark.parametrize(
    "segments",
    [
        (),
        (segment(0, 3),),
        (segment(1, 4),),
        (segment(0, 2), segment(3, 4)),
        (segment(0, 3), segment(2, 4)),
        (segment(0, 2), segment(2, 2), segment(2, 4)),
        (segment(0, 2), segment(2, 5)),
        (segment(2, 4), segment(0, 2)),
    ],
    ids=["none", "short", "late", "gap", "overlap", "empty", "long", "backwards"],
)
def test_a_route_that_does_not_lead_from_start_to_end_is_refused(segments: tuple[Segment, ...]) -> None:
    with pytest.raises(ValueError, match="the route of r does not lead from 0 to 4"):
        Route(request="r", seed=0, steps=4, segments=segments)


def test_a_route_off_the_wire_is_checked_too() -> None:
    good = msgspec.msgpack.encode(whole("r", [("edge", "m", "p", 4)]))
    bad = good.replace(b"\xa5steps\x04", b"\xa5steps\x05")
    assert good != bad
    with pytest.raises(msgspec.ValidationError, match="does not lead"):
        msgspec.msgpack.decode(bad, type=Route)


def test_spans_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="does not lead from 0 to 5"):
        route(request("r", 5), ("edge", "m", "p", 4))


@given(st.lists(st.tuples(spans, st.integers(0, 1)), max_size=5))
def test_steps_are_shared_as_far_as_routes_begin_alike(drawn: list[tuple[list[Span], int]]) -> None:
    routes = [whole(f"r{i}", spans, seed) for i, (spans, seed) in enumerate(drawn)]
    riders: dict[object, set[str]] = defaultdict(set)
    for r in routes:
        walked = trail(r)
        for k in range(r.steps):
            # A step is another request's step where everything up to it was the same.
            riders[(r.seed, r.steps, tuple(walked[: k + 1]))].add(r.request)
    by_node = Counter(beginning[2][-1][0] for beginning in riders)  # type: ignore[index]
    assert steps_by_node(routes) == dict(by_node)
    assert shared_steps(routes) == {
        r.request: sum(len(names) > 1 for names in riders.values() if r.request in names) for r in routes
    }


def test_the_same_prompt_after_another_past_is_not_shared() -> None:
    a = whole("a", [("edge", "m", "public", 3), ("edge", "m", "p", 2), ("d1", "m", "p", 3)])
    b = whole("b", [("edge", "m", "public", 2), ("edge", "m", "p", 3), ("d1", "m", "p", 3)])
    assert shared_steps([a, b]) == {"a": 2, "b": 2}
    assert steps_by_node([a, b]) == {"edge": 3 + 2 + 3, "d1": 6}


def test_a_plan_knows_a_requests_share() -> None:
    cluster = Cluster(members=("a",), public_prompt="p", source="member", similarity=(1.0,), share=0.25)
    plan = Plan(clusters=(cluster,), routes=())
    assert plan.share("a") == 0.25
    assert plan.share("somebody else") == 1.0


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=200), st.randoms())
def test_a_blend_is_the_same_in_any_order(prompts: list[str], chance: Random) -> None:
    made = blend(prompts)
    chance.shuffle(prompts)
    assert blend(prompts) == made
    assert (made in prompts) if len(set(prompts)) == 1 else (2 <= len(made) <= MOST_BLENDED and set(made) <= {*prompts})
    if len(prompts) <= MOST_BLENDED and len(set(prompts)) > 1:
        assert sorted(made) == sorted(prompts)


def test_steps_of_equal_blends_are_shared_and_read_as_their_prompts() -> None:
    ab, ba = blend(["a", "b"]), blend(["b", "a"])
    spans = {"x": ab, "y": ba, "z": blend(["a", "c"])}
    routes = [route(request(n, 6), ("edge", "m", p, 4), ("d1", "m", n, 2)) for n, p in spans.items()]
    assert shared_steps(routes) == {"x": 4, "y": 4, "z": 0}
    assert wording(ab) == "mean of: a; b"
    assert wording("a") == "a"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(routes[0]), type=Route) == routes[0]


def test_plans_of_one_round_become_one() -> None:
    def plan(number: int, *, caching: bool) -> Plan:
        cluster = Cluster(members=(f"r{number}",), public_prompt="p", source="member", similarity=(0.5,), share=0.5)
        prediction = Prediction(quality=1.0, latency=1.0, energy=1.0, utility=float(number))
        routes = (whole(f"r{number}", [("edge", "m", "p", 4)]),)
        return Plan(clusters=(cluster,), routes=routes, predictions={f"r{number}": prediction}, caching=caching)

    batches = merged([plan(0, caching=False), plan(1, caching=False)])
    assert [c.members for c in batches.clusters] == [("r0",), ("r1",)]
    assert [r.request for r in batches.routes] == ["r0", "r1"]
    assert {r: p.utility for r, p in batches.predictions.items()} == {"r0": 0.0, "r1": 1.0}
    online = merged([plan(0, caching=True), plan(1, caching=True)])
    assert [(c.members, c.similarity) for c in online.clusters] == [(("r0", "r1"), (0.5, 0.5))]
    assert merged([plan(0, caching=True)]) == plan(0, caching=True)
