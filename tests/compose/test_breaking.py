"""What happens to a run in containers when containers come and go: every request has one outcome, and the run ends."""

import functools
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from semct.runs import Run, load_run
from tests.compose import engine

pytestmark = pytest.mark.compose

RUNS = engine.ROOT / "runs"
ENVIRONMENT = {**os.environ, "SCENARIO": "tests/compose/five.yaml", "DEVICES": "5", "HF_HUB_OFFLINE": "1"}
FAULTS = "tests/compose/faults.yaml"
ROUNDS = 2

docker = functools.partial(engine.docker, environment=ENVIRONMENT)


@pytest.fixture(scope="module", autouse=True)
def image() -> Iterator[None]:
    docker("compose", "build", "-q", "experiment")
    yield
    docker("compose", "down", "--volumes", "--timeout", "1")


@pytest.fixture
def running() -> Iterator[Path]:
    """The folder of a run whose first round has begun."""
    RUNS.mkdir(exist_ok=True)
    before = set(RUNS.iterdir())
    docker("compose", "up", "--detach", "--no-build")
    deadline = time.monotonic() + 180
    while not (made := [path for path in set(RUNS.iterdir()) - before if asked(path)]):
        assert time.monotonic() < deadline, docker("compose", "logs", "experiment")[-3000:]
        time.sleep(0.2)
    (folder,) = made
    yield folder
    docker("compose", "down", "--volumes", "--timeout", "1")


def asked(folder: Path) -> bool:
    """Whether the links of the first round's devices are shaped, after which they are asked."""
    events = folder / "events.jsonl"
    kinds = [json.loads(line)["kind"] for line in events.read_text().splitlines()] if events.exists() else []
    return kinds.count("link") == 5


def containers(service: str) -> list[str]:
    return docker("compose", "ps", "--quiet", service).split()


def ended(folder: Path) -> tuple[int, str, Run]:
    """Wait for the run's end: its status, what it said, and its record."""
    container = docker("compose", "ps", "--all", "--quiet", "experiment")
    status = int(docker("wait", container))
    done = subprocess.run(["docker", "logs", container], capture_output=True, text=True, check=True)
    return status, done.stdout + done.stderr, load_run(folder)


def test_devices_come_and_one_dies_in_the_middle_of_a_run(running: Path) -> None:
    five = containers("device")
    docker("kill", five[0])
    docker("compose", "up", "--detach", "--no-build", "--no-deps", "--no-recreate", "--scale", "device=8", "device")
    assert len(containers("device")) == 8
    status, said, run = ended(running)
    assert run.requests["request"].n_unique() == len(run.requests) == 5 * ROUNDS
    failed = run.requests.filter(outcome="failed")
    assert set(run.requests["outcome"]) <= {"answered", "degraded", "failed"}
    # Only the one that died has none, unless one of those that came has taken its place by then.
    assert failed["device"].n_unique() <= 1
    assert all(five[0][:12] in reason for reason in failed["reason"])
    assert run.info.status == ("failed" if len(failed) else "finished")
    assert status == (1 if len(failed) else 0)
    assert "Traceback" not in said


def test_the_run_ends_in_one_sentence_when_the_edge_dies(running: Path) -> None:
    (edge,) = containers("edge")
    docker("kill", edge)
    status, said, run = ended(running)
    assert status == 1
    assert run.info.status == "failed"
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1] == f"semct: the container {edge[:12]} of edge has ended, or is cut off"
    assert len(containers("device")) == 5


def test_faults_of_a_scenario_break_containers_and_mend_them() -> None:
    RUNS.mkdir(exist_ok=True)
    before = set(RUNS.iterdir())
    # One device more than the scenario has: it must not take the place of one that comes back.
    docker("compose", "up", "--detach", "--no-build", environment={**ENVIRONMENT, "SCENARIO": FAULTS, "DEVICES": "4"})
    there = {service: containers(service) for service in ("device", "edge", "broker")}
    docker("wait", docker("compose", "ps", "--all", "--quiet", "experiment"))
    (folder,) = set(RUNS.iterdir()) - before
    status, said, run = ended(folder)
    assert status == 0, said
    assert run.info.status == "finished"
    assert len(run.requests) == 3
    assert set(run.requests["outcome"]) <= {"answered", "degraded"}
    assert sorted(run.faults["what"]) == ["broker-restarts", "dies", "dies", "hangs"]
    assert set(run.faults["note"]) == {""}
    for fault in run.faults.iter_rows(named=True):
        assert fault["ended"] - fault["began"] >= fault["lasts_s"], fault
    assert {service: containers(service) for service in there} == there
    enrolled = docker("compose", "logs", "--no-color", "device", "edge")
    assert enrolled.count(" is device-1 from now on") == enrolled.count(" is edge from now on") == 2
    assert enrolled.count(" is device-2 from now on") == enrolled.count(" is device-3 from now on") == 1
    assert run.nodes["memory_mib"].min() > 10
    assert "Traceback" not in said
