"""Frameworks over several nodes and models: who needs what, where routes lead, and when another way pays."""

from typing import Any

import msgspec
import numpy as np
import pytest

from semct import frameworks
from semct.cache import CacheSettings, LatentCache
from semct.cost import Link, Network, NodeState, Pace, Weights
from semct.frameworks import Batch, UnmetNeed, check_needs
from semct.prompts import load_sentence_encoder
from semct.public_prompt import MedoidWriter
from semct.quality import load_quality_model
from semct.routes import Plan, Request
from semct.tradeoffs import load_tradeoffs

STEPS = 28
SMALL = Pace(step_seconds=0.025, step_joules=10.0)
EDGE = NodeState(kind="edge", step_seconds=0.05, step_joules=20.0, others={"small": SMALL})
PHONE = NodeState(step_seconds=0.6, step_joules=150.0, decode_seconds=0.3, decode_joules=70.0)
WIDE = Link(rate=200e6, delay=0.03)
NODES: dict[str, Any] = {
    "edge": EDGE,
    "edge-2": msgspec.structs.replace(EDGE, step_seconds=0.1, step_joules=30.0),
    "cloud": msgspec.structs.replace(EDGE, kind="cloud", step_seconds=0.02, step_joules=15.0),
}
BY_NODES = ("edge-only", "cloud-only", "stage-wise", "load-balanced", "fewer-steps", "device-edge", "cloud-edge")


def batch(
    users: int = 6, *, weights: Weights | None = None, phone: NodeState = PHONE, steps: int = STEPS, **nodes: NodeState
) -> Batch:
    encoder = load_sentence_encoder()
    devices = [f"device-{i}" for i in range(users)]
    return Batch(
        requests=tuple(
            Request(id=f"r{i}", device=d, prompt=f"{i} cats", seed=7, steps=steps) for i, d in enumerate(devices)
        ),
        network=Network(
            edge="edge",
            nodes={**NODES, **nodes, **dict.fromkeys(devices, phone)},
            uplinks={"cloud": WIDE, **dict.fromkeys(devices, Link(rate=20e6, delay=0.005, watts=0.2))},
            downlinks={"cloud": WIDE, **dict.fromkeys(devices, Link(rate=80e6, delay=0.005, watts=1.0))},
            latent_bytes=512 * 1024,
        ),
        weights=weights or Weights(),
        quality=load_quality_model("sd3-medium"),
        encoder=encoder,
        writer=MedoidWriter(encoder),
        model="large",
        small_model="small",
        clusters=3,
        most_shared=13,
        seed=7,
        cache=LatentCache(CacheSettings(), latent_bytes=512 * 1024),
    )


def plan_of(name: str, asked: Batch) -> Plan:
    return frameworks.load(name)(asked)


def spans(plan: Plan) -> list[list[tuple[str, str, int]]]:
    return [[(s.node, s.model, s.stop - s.start) for s in r.segments] for r in plan.routes]


@pytest.mark.parametrize("name", BY_NODES)
@pytest.mark.parametrize("users", [1, 7])
def test_each_plan_leads_every_request_home_and_says_what_to_expect(name: str, users: int) -> None:
    asked = batch(users)
    plan = plan_of(name, asked)
    assert [r.request for r in plan.routes] == [r.id for r in asked.requests]
    assert {s.prompt for r in plan.routes for s in r.segments} == {r.prompt for r in asked.requests}
    assert set(plan.predictions) == {r.id for r in asked.requests}
    # The engine itself, played in virtual time, agrees with what the framework reckons with.
    forecast = asked.forecast(plan).predictions
    for request, expected in plan.predictions.items():
        played = forecast[request]
        assert expected.latency == pytest.approx(played.latency, rel=0.1, abs=0.3)
        assert expected.energy == pytest.approx(played.energy, rel=0.02)
        assert expected.quality == played.quality
    assert plan == plan_of(name, batch(users))


@pytest.mark.parametrize(
    ("name", "route"), [("edge-only", [("edge", "large", STEPS)]), ("cloud-only", [("cloud", "large", STEPS)])]
)
def test_one_node_does_all(name: str, route: list[tuple[str, str, int]]) -> None:
    assert spans(plan_of(name, batch())) == [route] * 6


def test_load_balancing_gives_each_edge_what_it_can_finish() -> None:
    plan = plan_of("load-balanced", batch(9))
    chosen = [route[0][0] for route in spans(plan)]
    assert chosen.count("edge") == 6  # twice as fast, twice as many
    assert chosen.count("edge-2") == 3
    # An edge that nobody can wait for is left alone.
    slow = msgspec.structs.replace(EDGE, step_seconds=50.0)
    assert {route[0][0] for route in spans(plan_of("load-balanced", batch(9, **{"edge-2": slow})))} == {"edge"}


def test_fewer_steps_where_quality_counts_for_nothing_and_all_where_it_is_everything() -> None:
    curves = load_tradeoffs()
    hasty = plan_of("fewer-steps", batch(weights=Weights(quality=0, latency=1, energy=0)))
    assert [r.steps for r in hasty.routes] == [curves.fewest] * 6
    careful = plan_of("fewer-steps", batch(weights=Weights(quality=1, latency=0, energy=0)))
    best = max(range(curves.fewest, STEPS + 1), key=lambda n: float(curves.steps_factor(n)))
    assert [r.steps for r in careful.routes] == [best] * 6
    assert spans(careful) == [[("edge", "large", best)]] * 6
    assert [r.steps for r in plan_of("fewer-steps", batch(steps=1)).routes] == [1] * 6


@pytest.mark.parametrize(("name", "first"), [("stage-wise", "edge"), ("cloud-edge", "cloud")])
def test_the_large_model_comes_first_and_the_small_one_finishes_on_the_edge(name: str, first: str) -> None:
    careful = plan_of(name, batch(weights=Weights(quality=1, latency=0, energy=0)))
    scores = load_tradeoffs().switch_factor(np.arange(1, STEPS), STEPS)
    large = 1 + int(scores.argmax())
    assert spans(careful) == [[(first, "large", large), ("edge", "small", STEPS - large)]] * 6
    hasty = plan_of(name, batch(weights=Weights(quality=0, latency=0, energy=1)))
    assert spans(hasty) == [[(first, "large", 1), ("edge", "small", STEPS - 1)]] * 6
    assert spans(plan_of(name, batch(steps=1))) == [[(first, "large", 1)]] * 6


def test_device_edge_splits_by_who_is_faster() -> None:
    hasty = Weights(quality=0, latency=1, energy=0)
    assert spans(plan_of("device-edge", batch(weights=hasty)))[0] == [
        ("device-0", "large", 1),
        ("edge", "large", STEPS - 1),
    ]
    quick = msgspec.structs.replace(PHONE, step_seconds=0.01)
    assert spans(plan_of("device-edge", batch(weights=hasty, phone=quick)))[0] == [("device-0", "large", STEPS)]


@pytest.mark.parametrize(
    ("name", "lack", "sentence"),
    [
        ("cloud-only", {"clouds": 0}, "framework 'cloud-only' needs a cloud node"),
        ("cloud-edge", {"clouds": 0}, "framework 'cloud-edge' needs a cloud node"),
        ("load-balanced", {"edges": 1}, "framework 'load-balanced' needs 2 edge nodes and there is 1"),
        ("stage-wise", {"small": False}, "framework 'stage-wise' needs the small model on the edge"),
        ("cloud-edge", {"small": False}, "framework 'cloud-edge' needs the small model on the edge"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(name: str, lack: dict[str, Any], sentence: str) -> None:
    enough = {"edges": 2, "clouds": 1, "small": True}
    check_needs(name, **enough)
    with pytest.raises(UnmetNeed, match=sentence) as raised:
        check_needs(name, **{**enough, **lack})
    assert "\n" not in str(raised.value)


def test_requests_of_different_length_are_refused_where_one_curve_serves_all() -> None:
    asked = batch(2)
    longer = msgspec.structs.replace(asked.requests[1], steps=40)
    mixed = Batch(**{**vars(asked), "requests": (asked.requests[0], longer)})
    with pytest.raises(ValueError, match="must have the same number of steps"):
        plan_of("stage-wise", mixed)
