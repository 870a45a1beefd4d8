"""Rendered compose files: Compose takes the one for GPUs, and a swarm of one node runs the same as a stack."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.composing import pin, read_compose, to_yaml, with_gpus
from semct.runs import load_run
from tests.compose.engine import ROOT, docker

pytestmark = pytest.mark.compose

SCENARIO = Path("tests/compose/unshaped.yaml")


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
        docker("stack", "rm", "semct", check=False)
        docker("swarm", "leave", "--force", check=False)


def test_a_swarm_runs_a_scenario(swarm: None) -> None:
    docker("compose", "build", "-q", "experiment")
    (ROOT / "runs").mkdir(exist_ok=True)
    before = set((ROOT / "runs").iterdir())
    command = [sys.executable, "-m", "experiments", "run", "--place", "swarm", str(SCENARIO)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (made,) = set((ROOT / "runs").iterdir()) - before
    assert made.name in done.stdout
    run = load_run(made)
    assert run.info.status == "finished", run.info.reason
    assert run.info.hosts == "containers"
    assert set(run.requests["outcome"]) == {"answered"}
    assert docker("stack", "ls", "--format", "{{.Name}}") == ""
