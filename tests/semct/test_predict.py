"""The fluid model against the engine: whatever the routes, it expects what the engine does in virtual time."""

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semct.cost import Link, Network, NodeState, Pace, Weights
from semct.forecast import forecast
from semct.planner.predict import energies, latencies, predict
from semct.quality import load_quality_model
from semct.routes import Cluster, Plan, Request, Route, route

STEPS = 12
ROWS = 8
STEP = {"edge": 0.1, "edge-2": 0.2, "cloud": 0.05}
NODES = {
    name: NodeState(
        kind="cloud" if name == "cloud" else "edge",
        step_seconds=step,
        step_joules=10 * step,
        rows=ROWS,
        others={"small": Pace(step_seconds=step / 2, step_joules=4 * step)},
    )
    for name, step in STEP.items()
}
PHONE = NodeState(step_seconds=0.5, step_joules=5.0, decode_seconds=0.25, decode_joules=2.0)


def network(devices: list[str]) -> Network:
    radio = Link(rate=4e6, delay=0.01, watts=1.0)
    ends = {"cloud": Link(rate=40e6, delay=0.02), **dict.fromkeys(devices, radio)}
    nodes = {**NODES, **dict.fromkeys(devices, PHONE)}
    return Network(edge="edge", nodes=nodes, uplinks=ends, downlinks=ends, latent_bytes=10_000)


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[Request], list[Route]]:
    requests, routes = [], []
    for i in range(draw(st.integers(1, 6))):
        request = Request(id=f"r{i}", device=f"d{i}", prompt=f"p{draw(st.integers(0, 3))}", seed=1, steps=STEPS)
        places = st.sampled_from(["edge", "edge-2", "cloud", request.device])
        cuts = sorted(draw(st.lists(st.integers(0, STEPS), max_size=3)))
        lengths = [b - a for a, b in zip([0, *cuts], [*cuts, STEPS], strict=True)]
        spans = []
        for n in lengths:
            place = draw(places)
            model = "large" if place == request.device else draw(st.sampled_from(["large", "small"]))
            spans.append((place, model, draw(st.sampled_from(["public", request.prompt])), n))
        requests.append(request)
        routes.append(route(request, *spans))
    return requests, routes


@settings(max_examples=60)
@given(plans())
def test_it_agrees_with_the_engine_within_a_few_calls(made: tuple[list[Request], list[Route]]) -> None:
    requests, routes = made
    cell = network([r.device for r in requests])
    plan = Plan(clusters=(), routes=tuple(routes))
    played = forecast(plan, requests, network=cell, weights=Weights(), quality=load_quality_model("sd3-medium"))
    found, spent = latencies(requests, routes, network=cell), energies(requests, routes, network=cell)
    for r in routes:
        # A full call may have begun when a request comes, and another one makes the order of a few rows.
        slack = sum(3 * ROWS * STEP.get(node, 0.5 / ROWS) for node in r.nodes)
        assert found[r.request] == pytest.approx(played[r.request].latency, rel=0.25, abs=slack)
    # The engine runs a step again for a request that comes when those who share it have passed.
    alone = sum(sum(energies([r], [way], network=cell).values()) for r, way in zip(requests, routes, strict=True))
    total = sum(p.energy for p in played.values())
    assert sum(spent.values()) * (1 - 1e-6) <= total <= alone * (1 + 1e-6)


def test_one_request_alone_is_arithmetic() -> None:
    request = Request(id="r", device="d", prompt="p", seed=1, steps=STEPS)
    way = route(request, ("cloud", "large", "p", 4), ("edge", "small", "p", 6), ("d", "large", "p", 2))
    cell = network(["d"])
    asked = 0.01 + 8 * 400 / 4e6
    order = 0.02 + 8 * 400 / 40e6
    wide, radio = 0.02 + 8e4 / 40e6, 0.01 + 8e4 / 4e6
    expected = asked + order + 4 * 0.05 + wide + 6 * 0.05 + radio + 2 * 0.5 + 0.25
    assert latencies([request], [way], network=cell)["r"] == pytest.approx(expected)
    joules = 4 * 0.5 + 6 * 0.4 + 2 * 5 + 2 + 8 * 400 / 4e6 + 8e4 / 4e6
    assert energies([request], [way], network=cell)["r"] == pytest.approx(joules)
    found = predict(
        [request], [way], quality={"r": 0.3}, alone=0.3, network=cell, weights=Weights(quality=1, latency=0, energy=0)
    )
    assert found["r"].utility == pytest.approx(1.0)


def test_a_clusters_share_is_its_part_of_the_edge() -> None:
    requests = [Request(id=f"r{i}", device=f"d{i}", prompt=f"p{i}", seed=1, steps=STEPS) for i in range(2)]
    routes = [route(r, ("edge", "large", r.prompt, STEPS)) for r in requests]
    clusters = [
        Cluster(members=(r.id,), public_prompt=r.prompt, source="member", similarity=(1.0,), share=share)
        for r, share in zip(requests, (0.75, 0.25), strict=True)
    ]
    cell = network(["d0", "d1"])
    found = latencies(requests, routes, clusters=clusters, network=cell)
    rest = latencies(requests[:1], routes[:1], network=cell)["r0"] - STEPS * 0.1
    assert found["r0"] - rest == pytest.approx(STEPS * 0.1 / 0.75)
    assert found["r1"] - rest == pytest.approx(2 * STEPS * 0.1)  # all the work there was


def test_messages_over_one_link_wait_for_each_other() -> None:
    requests = [Request(id=f"r{i}", device=f"d{i}", prompt="p", seed=1, steps=STEPS) for i in range(3)]
    routes = [route(r, ("cloud", "large", "p", STEPS)) for r in requests]  # one trajectory: all end at once
    narrow = msgspec.structs.replace(network(["d0", "d1", "d2"]), uplinks={"cloud": Link(rate=8e4)}, downlinks={})
    found = sorted(latencies(requests, routes, network=narrow).values())
    assert gaps(found) == pytest.approx([1.0, 1.0])


def gaps(values: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(values)]
