"""What keeps a testbed from coming up in containers is said in one sentence, before anything is started."""

import socket
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from experiments.cli import app
from experiments.scenario import FOLDER

QUICKSTART = FOLDER / "scenarios" / "quickstart.yaml"
UNSHAPED = FOLDER.parent / "tests" / "compose" / "unshaped.yaml"


def answer(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Have a Docker that does nothing but what the script says."""
    docker = folder / "docker"
    docker.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def run(*more: str, place: str = "compose") -> str:
    """What running in containers says, which is one line and an exit status of 1."""
    done = CliRunner().invoke(app, ["run", "--place", place, *(more or [str(QUICKSTART)])])
    assert done.exit_code == 1, done.output
    (said,) = done.stderr.strip().splitlines()
    return said


def test_there_is_no_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run().startswith("semct: there is no Docker here: install")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('echo "permission denied while trying to connect to the socket" >&2; exit 1', "may not use Docker's socket"),
        ('echo "Cannot connect to the Docker daemon" >&2; exit 1', "Docker does not answer: start its service"),
        ('test "$1" != compose || { echo "unknown command" >&2; exit 1; }', "Docker has no Compose 2 here"),
        ('test "$1" != image || exit 1', "the image absent is not here: build it with"),
    ],
)
def test_what_docker_complains_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str) -> None:
    answer(tmp_path, monkeypatch, script)
    monkeypatch.setenv("IMAGE", "absent")
    assert said in run()


def test_the_brokers_port_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path, monkeypatch, "exit 0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("BROKER_PORT", str(port))
        assert f"the broker cannot have port {port} of 127.0.0.1" in run()


def test_a_scenario_that_containers_do_not_see(tmp_path: Path) -> None:
    elsewhere = tmp_path / "cell.yaml"
    elsewhere.write_text(QUICKSTART.read_text(encoding="utf-8"), encoding="utf-8")
    assert "copy it there" in run(str(elsewhere))


_DOCKER = """
echo "$*" >>"{journal}"
case "$*" in
  "compose up "*) echo '{said}' >&2; exit {up} ;;
  "compose ps "*) echo c0ffee ;;
  "wait c0ffee") echo 3 ;;
esac
"""


@pytest.mark.parametrize(("up", "status"), [(0, 3), (1, 1)])
def test_the_status_is_the_experiments_and_all_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, up: int, status: int
) -> None:
    journal = tmp_path / "journal"
    answer(tmp_path, monkeypatch, _DOCKER.format(journal=journal, up=up, said=""))
    done = CliRunner().invoke(app, ["run", "--place", "compose", str(QUICKSTART)])
    assert done.exit_code == status, done.output
    assert ("the containers did not come up" in done.stderr) == bool(up)
    assert journal.read_text(encoding="utf-8").splitlines()[-1] == "compose stop"


@pytest.mark.parametrize(
    ("complaint", "said"),
    [
        ('could not select device driver "nvidia" with capabilities: [[gpu]]', "install NVIDIA's container toolkit"),
        ("nvidia-container-cli: device error: 7: unknown device: unknown", "names a GPU that is not here"),
        ("nvidia-container-cli: initialization error: nvml error: driver not loaded", "there is no GPU here"),
    ],
)
def test_a_gpu_that_containers_cannot_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complaint: str, said: str
) -> None:
    answer(tmp_path, monkeypatch, _DOCKER.format(journal=tmp_path / "journal", up=1, said=complaint))
    done = CliRunner().invoke(app, ["run", "--place", "compose", str(QUICKSTART)])
    assert done.exit_code == 1
    relayed, sentence = done.stderr.strip().splitlines()
    assert relayed == complaint
    assert sentence.startswith("semct: ")
    assert said in sentence


def test_what_keeps_a_scenario_from_a_swarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path, monkeypatch, "exit 0")
    assert "a swarm's links cannot be shaped" in run(place="swarm")
    assert "this machine manages no swarm: `docker swarm init`" in run(str(UNSHAPED), place="swarm")


@pytest.mark.parametrize(("state", "status"), [("complete", 0), ("failed", 3)])
def test_a_stack_ends_as_its_experiment_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, status: int
) -> None:
    script = f'''
echo "$@" >>{tmp_path}/asked
case "$1 $2" in
  "info --format") echo true;;
  "stack deploy") cat >{tmp_path}/stack.yaml;;
  "service ps") echo a-task;;
  "inspect --format") echo '{{"State": "{state}", "ContainerStatus": {{"ExitCode": {status}}}}}';;
esac'''
    answer(tmp_path, monkeypatch, script)
    done = CliRunner().invoke(app, ["run", "--place", "swarm", str(UNSHAPED)])
    assert done.exit_code == status, done.output
    stack = yaml.safe_load((tmp_path / "stack.yaml").read_text())
    assert stack["services"]["device"]["deploy"]["replicas"] == 2
    assert "stack rm semct" in (tmp_path / "asked").read_text()
