"""Costs: the utility's zero point, weights, links from unshaped to hopeless, and the time at a shared edge."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semct.cost import (
    Backlog,
    Link,
    Network,
    NodeState,
    Outcome,
    Outcomes,
    Pace,
    Splits,
    Users,
    Weights,
    airtime,
    device_only,
    edge_seconds,
    serve,
    utilities,
    utility,
)
from semct.forecast import expect, forecast
from semct.quality import load_quality_model
from semct.routes import Cluster, Plan, Request, route

positive = st.floats(1e-3, 1e6)
outcomes = st.builds(Outcome, quality=st.floats(1e-3, 2), latency=positive, energy=positive)
weights = (
    st.tuples(*[st.integers(0, 10)] * 3)
    .filter(any)
    .map(lambda w: Weights(quality=w[0] / sum(w), latency=w[1] / sum(w), energy=w[2] / sum(w)))
)


@given(outcomes, weights)
def test_device_only_against_itself_scores_the_quality_weight(reference: Outcome, w: Weights) -> None:
    assert utility(reference, reference, w) == pytest.approx(w.quality)


@given(outcomes, outcomes, weights, st.floats(1.01, 10))
def test_better_is_more(outcome: Outcome, reference: Outcome, w: Weights, factor: float) -> None:
    before = utility(outcome, reference, w)
    for change in (
        Outcome(quality=outcome.quality * factor, latency=outcome.latency, energy=outcome.energy),
        Outcome(quality=outcome.quality, latency=outcome.latency / factor, energy=outcome.energy),
        Outcome(quality=outcome.quality, latency=outcome.latency, energy=outcome.energy / factor),
    ):
        assert utility(change, reference, w) >= before


def test_utility_is_the_weighted_sum() -> None:
    reference = Outcome(quality=0.5, latency=10.0, energy=100.0)
    outcome = Outcome(quality=0.4, latency=5.0, energy=20.0)
    w = Weights(quality=0.5, latency=0.3, energy=0.2)
    assert utility(outcome, reference, w) == pytest.approx(0.5 * 0.8 + 0.3 * 0.5 + 0.2 * 0.8)


def test_an_energy_that_nobody_meters_counts_as_unchanged() -> None:
    reference = Outcome(quality=0.5, latency=10.0, energy=0.0)
    assert utility(reference, reference, Weights()) == pytest.approx(1 / 3)


@pytest.mark.parametrize("parts", [(0.5, 0.5, 0.5), (0, 0, 0), (1.2, -0.2, 0), (math.nan, 0.5, 0.5)])
def test_weights_that_are_none_are_refused(parts: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and sum to 1"):
        Weights(quality=parts[0], latency=parts[1], energy=parts[2])


def test_an_unshaped_link_takes_its_delay() -> None:
    link = Link(delay=0.02, watts=1.0)
    assert link.seconds(10**9) == 0.02
    assert airtime(10**9, link.rate) == 0.0
    assert link.joules(10**9) == 0.0


@given(rate=st.floats(1, 1e9), delay=st.floats(0, 10), watts=st.floats(0, 10), size=st.integers(0, 10**7))
def test_a_link_takes_delay_and_bits_over_rate(rate: float, delay: float, watts: float, size: int) -> None:
    link = Link(rate=rate, delay=delay, watts=watts)
    assert link.seconds(size) == pytest.approx(delay + 8 * size / rate)
    assert link.joules(size) == pytest.approx(watts * 8 * size / rate)


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": -1.0}, {"rate": math.nan}, {"delay": -1.0}])
def test_a_link_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Link(**wrong)


def test_device_only_is_all_steps_and_one_decode() -> None:
    node = NodeState(step_seconds=0.5, step_joules=3.0, decode_seconds=0.25, decode_joules=7.0)
    network = Network(edge="edge", nodes={"d": node}, uplinks={}, downlinks={}, latent_bytes=1)
    assert device_only(network, "d", 28, 0.9) == Outcome(quality=0.9, latency=14.25, energy=91.0)


def test_a_lone_step_pays_for_its_call_alone() -> None:
    node = NodeState(step_seconds=0.02, step_joules=1.0, call_seconds=0.08, call_joules=4.0, rows=8)
    assert (node.lone_seconds, node.lone_joules) == (pytest.approx(0.10), pytest.approx(5.0))
    assert (node.full_seconds, node.full_joules) == (pytest.approx(0.03), pytest.approx(1.5))


def test_a_message_takes_the_senders_uplink_and_the_receivers_downlink() -> None:
    up, wide, down = Link(rate=8e3, delay=0.5, watts=2.0), Link(rate=16e3), Link(rate=32e3, delay=0.25)
    ends = {"uplinks": {"d": up, "cloud": wide}, "downlinks": {"d": down, "cloud": wide}}
    node = NodeState(step_seconds=1.0, step_joules=1.0, kind="edge")
    nodes = {"edge": node, "edge-2": node, "a": node}
    network = Network(edge="edge", nodes=nodes, latent_bytes=1, **ends)
    assert network.way("d", "edge") == (up,)
    assert network.way("cloud", "d") == (wide, down)
    assert network.way("edge", "edge-2") == ()  # both stand at the hub
    assert network.seconds("cloud", "d", 1000) == pytest.approx(0.5 + 0.25 + 0.25)
    assert network.joules("d", "cloud", 1000) == pytest.approx(2.0)
    assert network.of_kind("edge") == ("edge", "a", "edge-2")
    assert network.of_kind("cloud") == ()


def test_a_node_has_a_pace_for_each_of_its_models() -> None:
    small = Pace(step_seconds=0.5, step_joules=2.0)
    node = NodeState(step_seconds=1.0, step_joules=4.0, others={"small": small})
    assert node.pace("small") == small
    assert node.pace("large") == Pace(step_seconds=1.0, step_joules=4.0)


@given(st.lists(st.tuples(outcomes, outcomes), min_size=1, max_size=5), weights)
def test_utilities_of_many_are_those_of_each(pairs: list[tuple[Outcome, Outcome]], w: Weights) -> None:
    def arrays(column: int) -> Outcomes:
        rows = [msgspec.structs.astuple(pair[column]) for pair in pairs]
        quality, latency, energy = np.array(rows).T
        return Outcomes(quality=quality, latency=latency, energy=energy)

    found = utilities(arrays(0), arrays(1), w)
    assert found.tolist() == pytest.approx([utility(outcome, reference, w) for outcome, reference in pairs])


# The time at a shared edge

QUALITY = load_quality_model("sd3-medium")
STEPS = 28


@st.composite
def batches(draw: st.DrawFn, *, call: bool = False) -> tuple[Plan, tuple[Request, ...], Network]:
    """A plan of random splits with random shares, over one edge and as many devices as requests."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    step = st.floats(0.01, 0.5)
    fixed = draw(step) if call else 0.0
    edge = NodeState(
        step_seconds=draw(step), step_joules=10.0, call_seconds=fixed, call_joules=fixed, rows=draw(st.integers(1, 8))
    )
    names = [f"d{i}" for i in range(sum(sizes))]
    link = st.builds(Link, rate=st.floats(1e6, 1e9), delay=st.floats(0, 0.1), watts=st.floats(0, 2))
    network = Network(
        edge="edge",
        nodes={
            "edge": edge,
            **{n: NodeState(step_seconds=draw(step), step_joules=5.0, decode_seconds=0.1) for n in names},
        },
        uplinks={n: draw(link) for n in names},
        downlinks={n: draw(link) for n in names},
        latent_bytes=10_000,
    )
    requests = tuple(Request(id=n, device=n, prompt=f"wish of {n}", seed=1, steps=STEPS) for n in names)
    left, routes, clusters = list(requests), [], []
    raw = [draw(st.floats(0.2, 1)) for _ in sizes]
    for m, size in enumerate(sizes):
        members, left = left[:size], left[size:]
        for r in members:
            x = draw(st.integers(0, 13)) if size > 1 else 0
            y = draw(st.integers(0, STEPS - x))
            spans = (("edge", f"public {m}", x), ("edge", r.prompt, y), (r.device, r.prompt, STEPS - x - y))
            routes.append(route(r, *((node, "m", prompt, steps) for node, prompt, steps in spans)))
        clusters.append(
            Cluster(
                members=tuple(r.id for r in members),
                public_prompt=f"public {m}",
                source="medoid",
                similarity=(0.5,) * size,
                share=raw[m] / sum(raw),
            )
        )
    return Plan(clusters=tuple(clusters), routes=tuple(routes)), requests, network


@settings(max_examples=100)
@given(batches())
def test_the_closed_form_is_what_the_engine_does(made: tuple[Plan, tuple[Request, ...], Network]) -> None:
    """But for whole rows and calls: a row waits for its turn and its call, and a cluster may be a call ahead."""
    plan, requests, network = made
    splits, edge = Splits.of(plan, "edge"), network.nodes["edge"]
    users = Users.of(network, [r.device for r in requests])
    quality = QUALITY.quality(0.5, splits.shared)
    expected = serve(users, splits, edge, quality, planning=1.0)
    found = forecast(plan, requests, network=network, weights=Weights(), quality=QUALITY, planning=1.0)
    latency = np.array([found[r.id].latency for r in requests])
    turn = (edge.rows + len(requests)) * edge.step_seconds
    off = np.abs(latency - expected.latency)
    assert off.max() <= 3 * turn
    assert np.median(off) <= turn
    assert [found[r.id].energy for r in requests] == pytest.approx(expected.energy)
    assert [found[r.id].quality for r in requests] == pytest.approx(expected.quality)
    # The same as predictions, but for the time of planning.
    told = expect(requests, splits, np.full(len(requests), 0.5), network=network, weights=Weights(), quality=QUALITY)
    assert [told[r.id].latency + 1.0 for r in requests] == pytest.approx(expected.latency)
    assert [told[r.id].energy for r in requests] == pytest.approx(expected.energy)
    # What a framework knows of its pictures stands.
    better = {i: msgspec.structs.replace(p, quality=0.9) for i, p in told.items()}
    plan = msgspec.structs.replace(plan, predictions=better)
    found = forecast(plan, requests, network=network, weights=Weights(), quality=QUALITY)
    assert {p.quality for p in found.values()} == {0.9}
    # The last to leave does so when all work is done, whatever the order.
    assert edge_seconds(splits, edge).max() == pytest.approx(splits.work.sum() * edge.step_seconds)


backlogs = st.builds(
    Backlog,
    steps=st.integers(1, 100).map(lambda n: {"m": n}),
    requests=st.integers(1, 5),
    weight=st.floats(0.2, 1),
)


@settings(max_examples=40)
@given(batches(), st.lists(backlogs, min_size=1, max_size=3))
def test_an_edge_with_a_backlog_does_what_the_closed_form_says(
    made: tuple[Plan, tuple[Request, ...], Network], backlog: list[Backlog]
) -> None:
    plan, requests, network = made
    edge = msgspec.structs.replace(network.nodes["edge"], backlog=tuple(backlog))
    network = msgspec.structs.replace(network, nodes={**network.nodes, "edge": edge})
    splits = Splits.of(plan, "edge")
    expected = serve(Users.of(network, [r.device for r in requests]), splits, edge, QUALITY.quality(0.5, splits.shared))
    found = forecast(plan, requests, network=network, weights=Weights(), quality=QUALITY)
    off = np.abs(np.array([found[r.id].latency for r in requests]) - expected.latency)
    # Earlier clusters make a turn longer, by their number and by their weight beside the new ones', which is 1.
    weight = 1 + sum(b.weight for b in backlog)
    turn = (edge.rows + (len(requests) + len(backlog)) * weight) * edge.step_seconds
    assert off.max() <= 3 * turn
    assert np.median(off) <= turn
    assert [found[r.id].energy for r in requests] == pytest.approx(expected.energy)


@settings(max_examples=60)
@given(batches(call=True))
def test_the_edge_is_never_slower_than_in_the_papers_model(made: tuple[Plan, tuple[Request, ...], Network]) -> None:
    plan, _, network = made
    splits, edge = Splits.of(plan, "edge"), msgspec.structs.replace(network.nodes["edge"], call_seconds=0.0)
    paper = splits.work / splits.share * edge.step_seconds
    assert (edge_seconds(splits, edge) <= paper[splits.cluster] * (1 + 1e-9)).all()
    # A call's own time only adds to that, the less of it the more rows ride along.
    dear = edge_seconds(splits, network.nodes["edge"])
    alone = edge_seconds(splits, msgspec.structs.replace(network.nodes["edge"], rows=1))
    assert (edge_seconds(splits, edge) <= dear + 1e-9).all()
    assert (dear <= alone + 1e-9).all()


@given(batches())
def test_every_step_on_the_edge_is_somebodys(made: tuple[Plan, tuple[Request, ...], Network]) -> None:
    splits = Splits.of(made[0], "edge")
    assert (splits.shared_part() + splits.edge).sum() == pytest.approx(splits.work.sum())
    assert (splits.shared_part() <= splits.shared + 1e-9).all()


def test_users_who_wait_alone_wait_for_the_edge_alone() -> None:
    splits = Splits(
        cluster=np.array([0, 0, 1]),
        shared=np.array([4, 4, 0]),
        edge=np.array([0, 6, 0]),
        device=np.array([24, 18, 28]),
        share=np.array([0.75, 0.25]),
    )
    edge = NodeState(step_seconds=0.5, step_joules=1.0)
    # The first leaves at the split, the second goes on by itself, the third has no steps there at all; its
    # cluster's share goes to the others.
    assert edge_seconds(splits, edge).tolist() == pytest.approx([2.0, 5.0, 0.0])
