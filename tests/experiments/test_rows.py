"""Rows: where time and energy went, the slowdown divided out, and utility against the measured reference."""

from pathlib import Path

import msgspec
import pytest

from broker.messages import Compute, Planned, Result, Stage
from experiments.clocks import Offset
from experiments.judging import Judgement
from experiments.rows import node_rows, predicted_references, request_rows, with_utility
from experiments.scenario import Scenario, load_scenario
from experiments.served import Served
from semct.cost import Kind, Weights
from semct.routes import Cluster, Plan, Prediction, Request, route

DEVICE_SECONDS = 10.0
KINDS: dict[str, Kind] = {"d1": "device", "d2": "device", "edge": "edge", "far": "cloud"}


@pytest.fixture
def scenario(tmp_path: Path) -> Scenario:
    path = tmp_path / "s.yaml"
    path.write_text("name: s\ndevices: [{count: 2}]\nsteps: 4\nslowdown: 2\nradio: {device_watts: 1, edge_watts: 3}")
    return load_scenario(path)


def served(framework: str = "semct") -> Served:
    """Two users who share two steps; the second has no result."""
    requests = [Request(id=f"{framework}-d{n}", device=f"d{n}", prompt=f"p{n}", seed=1, steps=4) for n in (1, 2)]
    plan = Plan(
        clusters=(
            Cluster(
                members=tuple(r.id for r in requests),
                public_prompt="p",
                source="llm",
                similarity=(0.5, 0.6),
                share=1.0,
            ),
        ),
        routes=tuple(route(r, ("edge", "m", "p", 2), (r.device, "m", r.prompt, 2)) for r in requests),
        predictions={requests[0].id: Prediction(quality=0.9, latency=5, energy=50, utility=0.7)},
    )
    first = f"{framework}-d1"
    stages = (
        Stage(name="transfer", node="d1", to="edge", start=100, stop=101, size=400),
        Stage(name="collect", node="edge", start=101, stop=102),
        Stage(name="plan", node="edge", start=102, stop=104),
        Stage(name="queue", node="edge", start=104, stop=105),
        Stage(name="denoise", node="edge", start=105, stop=109, joules=20, flops=1e12, steps=1, modelled=True),
        Stage(name="transfer", node="edge", to="d1", start=109, stop=111, size=5000),
        Stage(
            name="denoise", node="d1", start=111, stop=115, joules=30, flops=2e12, steps=2, overruns=1, modelled=True
        ),
        Stage(name="decode", node="d1", start=115, stop=116, joules=5, flops=1e12, modelled=True),
    )
    result = Result(round="r", request=first, device="d1", outcome="answered", asked=100, finished=116, stages=stages)
    planned = Planned(round="r", framework=framework, plan=msgspec.Raw(msgspec.msgpack.encode(plan)), seconds={})
    return Served(
        round="r",
        framework=framework,
        repetition=0,
        seed=1,
        prompts={r.id: r.prompt for r in requests},
        devices={r.id: r.device for r in requests},
        planned={planned.began: planned},
        results={first: result},
        reasons={f"{framework}-d2": "no answer within 9 s"},
    )


def test_a_row_says_where_time_and_energy_went(scenario: Scenario) -> None:
    answered, unanswered = request_rows(
        served(), scenario, kinds=KINDS, judged={"semct-d1": Judgement(0.8)}, images={"semct-d1": "images/a.png"}
    )
    # 16 s on the wall, of which 2 s of planning count in full and the rest half.
    assert answered.latency_s == pytest.approx(14 / 2 + 2)
    assert (answered.upload_s, answered.collect_s, answered.plan_s, answered.queue_s) == (0.5, 0.5, 2.0, 0.5)
    assert (answered.edge_denoise_s, answered.download_s, answered.device_denoise_s, answered.decode_s) == (
        2,
        1,
        2,
        0.5,
    )
    assert (answered.energy_edge_j, answered.energy_device_j) == (20, 35)
    assert answered.energy_radio_j == pytest.approx(0.5 * 1 + 1 * 3)
    assert answered.energy_j == pytest.approx(58.5)
    assert answered.tflop == pytest.approx(3)
    assert (answered.shared_steps, answered.edge_steps, answered.device_steps) == (2, 0, 2)
    assert (answered.bytes_up, answered.bytes_down, answered.overruns, answered.modelled) == (400, 5000, 1, True)
    assert (answered.cluster, answered.public_prompt, answered.similarity) == (0, "p", 0.5)
    assert (answered.predicted_latency_s, answered.quality, answered.image) == (5, 0.8, "images/a.png")
    assert (unanswered.outcome, unanswered.reason) == ("failed", "no answer within 9 s")
    assert unanswered.latency_s is unanswered.energy_j is unanswered.quality is None
    assert unanswered.shared_steps == 2


def test_what_a_device_did_alone_has_its_own_cost_and_nothing_of_the_plan(scenario: Scenario) -> None:
    alone = served()
    request, result = next(iter(alone.results.items()))
    own = (Stage(name="denoise", node="d1", start=130, stop=138, joules=50, flops=4e12, steps=4, modelled=True),)
    alone.results[request] = msgspec.structs.replace(
        result, outcome="degraded", reason="edge did not answer within 30 s", stages=own, finished=140
    )
    row = request_rows(alone, scenario, kinds=KINDS, judged={request: Judgement(0.7)}, images={})[0]
    assert (row.outcome, row.reason, row.quality) == ("degraded", "edge did not answer within 30 s", 0.7)
    assert row.latency_s == pytest.approx(40 / 2)
    assert (row.energy_j, row.tflop) == (50, 4)
    assert row.cluster is row.public_prompt is row.predicted_latency_s is None
    assert (row.shared_steps, row.edge_steps, row.cloud_steps, row.device_steps) == (0, 0, 0, 4)
    assert alone.answered == {request}


def test_work_that_goes_by_the_cloud_is_counted_there_and_its_way_takes_no_radio(scenario: Scenario) -> None:
    around = served()
    (request, result) = next(iter(around.results.items()))
    detour = (
        Stage(name="transfer", node="edge", to="far", start=104, stop=106, size=300),
        Stage(name="denoise", node="far", start=106, stop=110, joules=40, flops=3e12, steps=3, modelled=True),
        Stage(name="transfer", node="far", to="d1", start=110, stop=111, size=5000),
    )
    around.results[request] = msgspec.structs.replace(result, stages=(*result.stages[:3], *detour, *result.stages[6:]))
    routes = tuple(
        route(Request(id=r, device=d, prompt=r, seed=1, steps=4), ("far", "m", r, 3), (d, "m", r, 1))
        for r, d in around.devices.items()
    )
    plan = msgspec.msgpack.encode(Plan(clusters=(), routes=routes))
    around.planned = {0.0: Planned(round="r", framework="semct", plan=msgspec.Raw(plan), seconds={})}
    (row, _) = request_rows(around, scenario, kinds=KINDS, judged={}, images={})
    assert (row.edge_denoise_s, row.cloud_denoise_s, row.relay_s, row.download_s) == (0, 2, 1, 0.5)
    assert (row.energy_edge_j, row.energy_cloud_j, row.energy_device_j) == (0, 40, 35)
    assert row.energy_radio_j == pytest.approx(0.5 * 1 + 0.5 * 3)
    assert row.energy_j == pytest.approx(40 + 35 + 2)
    assert (row.bytes_up, row.bytes_relayed, row.bytes_down) == (400, 300, 5000)
    assert (row.shared_steps, row.edge_steps, row.cloud_steps, row.device_steps) == (0, 0, 3, 1)


def test_utility_is_against_the_same_users_device_only_where_there_is_one(scenario: Scenario) -> None:
    weights = Weights(quality=0.5, latency=0.25, energy=0.25)
    (row, lost) = request_rows(served(), scenario, kinds=KINDS, judged={"semct-d1": Judgement(0.8)}, images={})
    reference = msgspec.structs.replace(
        row, framework="device-only", quality=1.0, latency_s=DEVICE_SECONDS, energy_j=117.0
    )
    rows = with_utility([row, lost, reference], weights, references={})
    assert rows[0].utility == pytest.approx(0.5 * 0.8 + 0.25 * (1 - 9 / DEVICE_SECONDS) + 0.25 * 0.5)
    assert rows[1].utility is None
    assert rows[2].utility == pytest.approx(0.5)


def test_without_device_only_the_reference_is_predicted(scenario: Scenario) -> None:
    compute = Compute(profile="x", step_seconds=2, step_joules=25, decode_seconds=1, decode_joules=17)
    references = predicted_references({"d1": compute}, scenario, edge="edge", quality=1.0)
    assert references.keys() == {"d1"}
    assert (references["d1"].latency, references["d1"].energy) == (4 * 2 + 1, 4 * 25 + 17)
    (row, _) = request_rows(served(), scenario, kinds=KINDS, judged={"semct-d1": Judgement(0.8)}, images={})
    (found,) = with_utility([row], Weights(quality=1, latency=0, energy=0), references)
    assert found.utility == pytest.approx(0.8)


def test_every_node_has_a_row_and_the_dead_are_marked() -> None:
    rows = node_rows(
        served(), kinds=KINDS, clocks={"d1": Offset(60.0, 0.01)}, memory={"d1": 12.5}, ended={"d2": "was killed"}
    )
    assert [(r.node, r.role, r.memory_mib, r.alive) for r in rows] == [
        ("edge", "edge", None, True),
        ("far", "cloud", None, True),
        ("d1", "device", 12.5, True),
        ("d2", "device", None, False),
    ]
