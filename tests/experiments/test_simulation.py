"""Simulating a scenario: the edge's planning without nodes, the same table as a run, thousands of users."""

from pathlib import Path

import msgspec
import polars as pl
import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.scenario import FOLDER, DeviceLinks, Devices, Scenario, load_prompts, load_scenario
from experiments.simulation import (
    Encoder,
    RememberingWriter,
    Simulation,
    SimulationInfo,
    Simulator,
    with_users,
)
from experiments.summary import summarise
from netem.link import decode_quantity
from semct.public_prompt import PublicPrompt

QUICKSTART = FOLDER / "scenarios" / "quickstart.yaml"


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator(Encoder())


def scenario(**changes: object) -> Scenario:
    made = load_scenario(QUICKSTART)
    planning = msgspec.structs.replace(made.planning, writer="medoid")
    return msgspec.structs.replace(made, planning=planning, **changes)


def simulated(simulator: Simulator, made: Scenario) -> Simulation:
    return simulator.play(made, load_prompts(made, QUICKSTART.parent))


def test_the_table_of_a_run_comes_out(simulator: Simulator) -> None:
    made = scenario(repetitions=2)
    found = simulated(simulator, made)
    summary = summarise(found.requests, frameworks=made.frameworks)
    assert summary["framework"].to_list() == list(made.frameworks)
    assert summary["answered"].to_list() == [16] * 5
    tflop = dict(summary.select("framework", "tflop").iter_rows())
    assert tflop["device-only"] == tflop["edge-device"] == 8 * 28 * 12
    assert tflop["semct"] < 8 * 28 * 12
    assert dict(summary.select("framework", "utility").iter_rows())["device-only"] == pytest.approx(0.4)
    assert set(found.seconds) == set(made.frameworks)


def test_steps_and_similarities_are_those_of_the_plan(simulator: Simulator) -> None:
    requests = simulated(simulator, scenario()).requests
    semct, alone = (requests.filter(framework=name) for name in ("semct", "device-only"))
    assert semct["cluster"].n_unique() == 3
    assert semct["similarity"].is_between(-1, 1).all()
    assert (semct["shared_steps"] + semct["device_steps"] <= 28).all()
    assert alone["cluster"].null_count() == alone["similarity"].null_count() == 8
    assert alone["device_steps"].to_list() == [28] * 8


def test_the_same_seed_gives_the_same_simulation(simulator: Simulator) -> None:
    made = scenario(frameworks=("semct", "clustering-free"))
    first, second = simulated(simulator, made), simulated(Simulator(Encoder()), made)
    assert first.requests.equals(second.requests)


def test_users_with_the_same_prompt_share_by_plan_only(simulator: Simulator) -> None:
    made = with_users(scenario(frameworks=("edge-device",)), 40)
    assert simulated(simulator, made).requests["tflop"].sum() == pytest.approx(40 * 28 * 12)


def test_a_scenarios_links_are_those_of_the_simulation(simulator: Simulator) -> None:
    slow = msgspec.convert({"down": {"rate": "1mbit"}}, DeviceLinks, dec_hook=decode_quantity)
    quick = scenario(frameworks=("clustering-free", "device-only"), links=DeviceLinks())
    made = msgspec.structs.replace(quick, links=slow)
    prompts = load_prompts(made, QUICKSTART.parent)
    latency = [
        dict(
            simulator.play(s, prompts, links=simulator.links_of(s, QUICKSTART.parent))
            .requests.group_by("framework")
            .agg(pl.col("latency_s").mean())
            .iter_rows()
        )
        for s in (quick, made)
    ]
    assert latency[1]["clustering-free"] > latency[0]["clustering-free"] + 0.01


def test_groups_of_devices_keep_their_proportions() -> None:
    made = scenario(devices=(Devices(count=6), Devices(count=2, compute="jetson-orin")))
    assert [(g.count, g.compute) for g in with_users(made, 1001).devices] == [
        (751, "rtx-3090-ti"),
        (250, "jetson-orin"),
    ]
    assert [g.count for g in with_users(made, 1).devices] == [1]


def test_a_cluster_is_worded_once() -> None:
    asked: list[list[list[str]]] = []

    class Counting:
        def write(self, clusters: list[list[str]], seed: int) -> list[PublicPrompt]:
            asked.append(clusters)
            return [PublicPrompt(f"{members[0]} {seed}", "medoid", 1.0, 1) for members in clusters]

    writer = RememberingWriter(Counting())  # type: ignore[arg-type]
    first = writer.write([["a", "b"], ["c"]], 0)
    assert writer.write([["c"], ["d"]], 0) == [first[1], PublicPrompt("d 0", "medoid", 1.0, 1)]
    assert writer.write([["c"]], 1) == [PublicPrompt("c 1", "medoid", 1.0, 1)]
    assert asked == [[["a", "b"], ["c"]], [["d"]], [["c"]]]


def test_the_command_prints_the_table_and_leaves_it(tmp_path: Path) -> None:
    made = tmp_path / "small.yaml"
    made.write_text(
        "name: small\nframeworks: [semct, device-only]\ndevices: [{count: 2}, {count: 2, compute: jetson-orin}]\n"
        "prompts: {list: [a cat in the snow, a dog in the snow, a bus at night, a car at night]}\n"
        "planning: {writer: medoid, clusters: 2}\nfaults: {script: [{at: 1s, what: dies, node: device-1}]}\n"
    )
    done = CliRunner().invoke(app, ["simulate", str(made), "--users", "12", "--seeds", "2", "--runs", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "24/24" in done.output
    assert "12 users ask for 4 different prompts" in " ".join(done.output.split())
    assert "the `faults` of small are left out" in done.output
    (folder,) = tmp_path.glob("*-small-*")
    assert pl.read_csv(folder / "summary.csv")["asked"].to_list() == [24, 24]
    assert pl.read_parquet(folder / "requests.parquet").height == 48
    info = msgspec.json.decode((folder / "simulation.json").read_bytes(), type=SimulationInfo)
    assert (info.users, info.repetitions, info.prompts) == (12, 2, 4)
    assert load_scenario(folder / "scenario.yaml").users == 12


def test_what_cannot_be_simulated_is_one_sentence(tmp_path: Path) -> None:
    made = tmp_path / "wrong.yaml"
    made.write_text("name: wrong\nframeworks: [no-such-thing]\ndevices: [{count: 2}]\nplanning: {writer: medoid}\n")
    done = CliRunner().invoke(app, ["simulate", str(made), "--runs", str(tmp_path)])
    assert done.exit_code == 1
    assert "framework 'no-such-thing' is not known" in done.output
