"""Forecasts: any route over any nodes, by hand; what is shared, weighted and sent is in them."""

from typing import Any

import msgspec
import pytest

from semct.cache import CacheSettings, LatentCache
from semct.cost import Backlog, Link, Network, NodeState, Weights, device_only
from semct.forecast import Sent, forecast, replay
from semct.quality import load_quality_model
from semct.routes import Cluster, Plan, Prediction, Request, Route, route

QUALITY = load_quality_model("sd3-medium")
EDGE = NodeState(step_seconds=0.1, step_joules=2.0)
CLOUD = NodeState(step_seconds=0.05, step_joules=4.0)
DEVICE = NodeState(step_seconds=0.5, step_joules=7.0, decode_seconds=0.25, decode_joules=3.0)
UP, DOWN = Link(rate=8000, delay=0.01, watts=0.5), Link(rate=80_000, delay=0.02, watts=1.0)
REQUESTS = tuple(Request(id=f"r{n}", device=f"d{n}", prompt=f"wish {n}", seed=3, steps=10) for n in (1, 2))
NETWORK = Network(
    edge="edge",
    nodes={"edge": EDGE, "cloud": CLOUD, "d1": DEVICE, "d2": DEVICE},
    uplinks=dict.fromkeys(("d1", "d2"), UP),
    downlinks=dict.fromkeys(("d1", "d2"), DOWN),
    latent_bytes=5000,
    request_bytes=400,
)
ASKING, ORDER, LATENT_DOWN, LATENT_UP = 0.41, 0.06, 0.52, 5.01  # seconds, from sizes and links


def predicted(*routes: Route, clusters: tuple[Cluster, ...] = (), planning: float = 0.0) -> list[Prediction]:
    plan = Plan(clusters=clusters, routes=routes)
    asked = [r for r in REQUESTS if r.id in {route.request for route in routes}]
    found = forecast(plan, asked, network=NETWORK, weights=Weights(), quality=QUALITY, planning=planning)
    assert set(found) == {r.id for r in asked}
    return [found[r.id] for r in asked]


def walk(number: int, *spans: tuple[str, str, int]) -> Route:
    """A route over (node, prompt, steps), a dot standing for the user's own prompt."""
    request = REQUESTS[number - 1]
    return route(request, *((node, "m", request.prompt if p == "." else p, steps) for node, p, steps in spans))


def test_staying_on_the_device_takes_an_order_from_the_edge() -> None:
    (found,) = predicted(walk(1, ("d1", ".", 10)), planning=2.0)
    assert found.latency == pytest.approx(ASKING + 2.0 + ORDER + 10 * 0.5 + 0.25)
    assert found.energy == pytest.approx(0.5 * 0.4 + 1.0 * 0.04 + 70 + 3)
    assert found.quality == pytest.approx(float(QUALITY.quality(1.0, 0.0)))
    reference = device_only(NETWORK, "d1", 10, 1.0)
    lost = (found.latency / reference.latency - 1 + found.energy / reference.energy - 1) / 3
    assert found.utility == pytest.approx(1 / 3 - lost)


def test_a_route_may_lead_over_cloud_edge_and_device() -> None:
    (found,) = predicted(walk(1, ("cloud", ".", 4), ("edge", ".", 3), ("d1", ".", 3)))
    assert found.latency == pytest.approx(ASKING + 4 * 0.05 + 3 * 0.1 + LATENT_DOWN + 3 * 0.5 + 0.25)
    assert found.energy == pytest.approx(0.2 + 16 + 6 + 0.5 + 21 + 3)


def test_a_device_may_begin_and_the_edge_finish() -> None:
    (found,) = predicted(walk(1, ("d1", ".", 4), ("edge", ".", 6)))
    assert found.latency == pytest.approx(ASKING + ORDER + 4 * 0.5 + LATENT_UP + 6 * 0.1 + LATENT_DOWN + 0.25)


def test_shared_steps_are_run_once_and_paid_by_all() -> None:
    found = predicted(walk(1, ("edge", "both", 6), ("d1", ".", 4)), walk(2, ("edge", "both", 6), ("edge", ".", 4)))
    assert [p.latency for p in found] == pytest.approx(
        [ASKING + 6 * 0.1 + LATENT_DOWN + 4 * 0.5 + 0.25, ASKING + 10 * 0.1 + LATENT_DOWN + 0.25]
    )
    assert [p.energy - 0.2 - 0.5 - 3 for p in found] == pytest.approx([6 + 28, 6 + 8])
    assert found[0].quality == pytest.approx(float(QUALITY.quality(1.0, 6 * QUALITY.steps / 10)))


def test_the_heavier_cluster_is_through_first() -> None:
    clusters = tuple(
        Cluster(members=(r.id,), public_prompt=r.prompt, source="member", similarity=(1.0,), share=share)
        for r, share in zip(REQUESTS, (0.9, 0.1), strict=True)
    )
    fast, slow = predicted(walk(1, ("edge", ".", 10)), walk(2, ("edge", ".", 10)), clusters=clusters)
    both = ASKING + 20 * 0.1 + LATENT_DOWN + 0.25
    assert slow.latency == pytest.approx(both)
    assert fast.latency < both - 0.5


def test_rows_of_a_call_share_its_fixed_time() -> None:
    edge = NodeState(step_seconds=0.01, step_joules=1.0, call_seconds=0.09, call_joules=9.0)
    network = msgspec.structs.replace(NETWORK, nodes={**NETWORK.nodes, "edge": edge})
    plan = Plan(clusters=(), routes=(walk(1, ("edge", ".", 10)), walk(2, ("edge", ".", 10))))
    found = forecast(plan, REQUESTS, network=network, weights=Weights(), quality=QUALITY)
    assert {round(p.latency, 6) for p in found.values()} == {round(ASKING + 10 * 0.11 + LATENT_DOWN + 0.25, 6)}
    assert {round(p.energy, 6) for p in found.values()} == {round(0.2 + 10 * 5.5 + 0.5 + 3, 6)}


@pytest.mark.parametrize(("steps", "planning", "more"), [(4, 0.0, 0.4), (20, 0.0, 1.0), (10, 2.0, 0.0)])
def test_a_busy_node_shares_itself_while_it_has_other_work(steps: int, planning: float, more: float) -> None:
    """Half of it for each of two clusters of equal weight; what it has done by the time of the plan delays nobody."""
    edge = msgspec.structs.replace(EDGE, backlog=(Backlog(steps={"m": steps}, requests=1),))
    network = msgspec.structs.replace(NETWORK, nodes={**NETWORK.nodes, "edge": edge})
    plan = Plan(clusters=(), routes=(walk(1, ("edge", ".", 10)),))
    found = forecast(plan, REQUESTS[:1], network=network, weights=Weights(), quality=QUALITY, planning=planning)["r1"]
    assert found.latency == pytest.approx(ASKING + planning + 10 * 0.1 + more + LATENT_DOWN + 0.25)


@pytest.mark.parametrize(("spared", "left"), [(0, 6 + 2), (4, 2 + 2), (6, 2), (8, 0)])
def test_steps_that_earlier_batches_left_are_not_run_again(spared: int, left: int) -> None:
    way = walk(1, ("edge", "public", 6), ("edge", ".", 2), ("d1", ".", 2))
    plan = Plan(clusters=(), routes=(way,), caching=True, spared={"r1": spared})
    found = forecast(plan, REQUESTS[:1], network=NETWORK, weights=Weights(), quality=QUALITY)["r1"]
    assert found.latency == pytest.approx(ASKING + left * 0.1 + LATENT_DOWN + 2 * 0.5 + 0.25)
    assert found.quality == pytest.approx(float(QUALITY.quality(1.0, 6 * QUALITY.steps / 10)))


def batch(number: int, at: float, *spans: tuple[str, str, int], **more: Any) -> Sent:
    """The request of a user, alone in its batch, on its way from ``at`` on."""
    plan = Plan(clusters=(), routes=(walk(number, *spans),), **more)
    request = REQUESTS[number - 1]
    return Sent(plan=plan, requests=[request], at=at, asked={request.id: at})


def replayed(*batches: Sent, caching: bool = False) -> list[float]:
    cache = LatentCache(CacheSettings(), latent_bytes=5000) if caching else None
    found = replay(batches, network=NETWORK, weights=Weights(), quality=QUALITY, cache=cache)
    return [found[r.id].latency for r in REQUESTS]


@pytest.mark.parametrize(("later", "meets"), [(0.0, True), (0.5, True), (5.0, False)])
def test_batches_that_meet_wait_for_each_other(later: float, *, meets: bool) -> None:
    alone = 10 * 0.1 + LATENT_DOWN + 0.25
    first, second = replayed(batch(1, 3.0, ("edge", ".", 10)), batch(2, 3.0 + later, ("edge", ".", 10)))
    if not meets:
        assert [first, second] == pytest.approx([alone, alone])
        return
    assert second == pytest.approx(alone + 1.0 - later, abs=0.11)  # when all 20 steps are done
    assert alone < first <= second + later + 1e-9


@pytest.mark.parametrize(("later", "left"), [(0.0, 8), (0.35, 8 - 3.5), (2.0, 0)])
def test_cached_steps_are_spared_once_they_have_been_run(later: float, left: float) -> None:
    way = (("edge", "public", 8), ("d2", ".", 2))
    first = batch(1, 0.0, ("edge", "public", 8), ("d1", ".", 2), caching=True)
    second = batch(2, later, *way, caching=True, spared={"r2": 8})
    rest = LATENT_DOWN + 2 * 0.5 + 0.25
    assert replayed(first, second, caching=True) == pytest.approx([8 * 0.1 + rest, left * 0.1 + rest])


def test_what_was_cached_before_these_batches_is_there_at_once() -> None:
    first = batch(1, 0.0, ("edge", ".", 4), ("d1", ".", 6))
    second = batch(2, 0.0, ("edge", "public", 8), ("d2", ".", 2), caching=True, spared={"r2": 8})
    assert replayed(first, second, caching=True)[1] == pytest.approx(LATENT_DOWN + 2 * 0.5 + 0.25)
