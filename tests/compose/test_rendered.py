"""Rendered compose files: Compose takes the one for GPUs, and a swarm of one node runs the stack."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.composing import as_stack, pin, read_compose, to_yaml, with_gpus
from experiments.scenario import load_scenario
from semct.runs import load_run
from tests.compose.engine import ROOT, docker

pytestmark = pytest.mark.compose

SCENARIO = Path("tests/compose/unshaped.yaml")
STACK = "semct-stack"


@pytest.fixture
def file() -> Iterator[Path]:
    """A file beside compose.yaml, from where its relative paths lead."""
    path = ROOT / "compose.rendered.yaml"
    yield path
    path.unlink(missing_ok=True)


def test_compose_takes_the_file_for_gpus(file: Path) -> None:
    made = with_gpus(read_compose(ROOT / "compose.yaml", SCENARIO), pin(5, ["0", "1"]))
    file.write_text(to_yaml(made, "a test"))
    services = docker("compose", "-f", str(file), "config", "--services").split()
    assert sum(name.startswith("device-") for name in services) == 5


@pytest.fixture
def swarm() -> Iterator[None]:
    docker("swarm", "init", "--advertise-addr", "127.0.0.1")
    try:
        yield
    finally:
        docker("stack", "rm", STACK, check=False)
        docker("swarm", "leave", "--force", check=False)


def test_a_swarm_runs_the_stack(file: Path, swarm: None) -> None:
    docker("compose", "build", "-q", "experiment")
    scenario = load_scenario(ROOT / SCENARIO)
    stack = as_stack(read_compose(ROOT / "compose.yaml", SCENARIO), devices=scenario.users, gpus=False)
    file.write_text(to_yaml(stack, "a test"))
    (ROOT / "runs").mkdir(exist_ok=True)
    before = set((ROOT / "runs").iterdir())
    docker("stack", "deploy", "--resolve-image", "never", "-c", str(file), STACK)
    deadline = time.monotonic() + 240
    while True:
        made = set((ROOT / "runs").iterdir()) - before
        if made and load_run(next(iter(made))).info.status != "running":
            break
        said = docker("service", "logs", "--tail", "20", f"{STACK}_experiment", check=False)
        tasks = docker("stack", "ps", "--no-trunc", "--format", "{{.Name}} {{.CurrentState}} {{.Error}}", STACK)
        assert time.monotonic() < deadline, f"the experiment did not end:\n{tasks}\n{said}"
        time.sleep(1)
    run = load_run(made.pop())
    assert run.info.status == "finished", run.info.reason
    assert run.info.hosts == "containers"
    assert set(run.requests["outcome"]) == {"answered"}
