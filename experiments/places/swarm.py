"""A scenario as a stack of the swarm that this machine manages: deployed, followed to its end, and taken down."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from experiments.composing import as_stack, read_compose, to_yaml
from experiments.places import PlaceFailed
from experiments.places.engine import PROJECT, surroundings
from experiments.scenario import Scenario

_STACK: Final = "semct"
_EXPERIMENT: Final = f"{_STACK}_experiment"
_OVER: Final = {"complete", "failed", "rejected", "shutdown", "orphaned"}  # states of a task that does not run any more
_LOOK: Final = 0.5  # seconds between two looks at what nothing tells of
_LAST_WORDS: Final = 2.0  # seconds that the experiment's last words may take to come here
_GONE: Final = 60.0  # seconds that a stack may take to go


def deploy(scenario: Scenario, file: Path, seed: int | None = None) -> int:
    """Run a scenario with ``docker stack deploy`` and return its exit status; raises ``PlaceFailed``.

    Edge and devices ask for a GPU each where the scenario has models run on GPUs.
    """
    environment = surroundings(scenario, file, seed)
    if scenario.shaping != "none":
        raise PlaceFailed("a swarm's links cannot be shaped: the scenario has to say `links: {shaped_by: none}`")
    if _docker("info", "--format", "{{.Swarm.ControlAvailable}}") != "true":
        raise PlaceFailed("this machine manages no swarm: `docker swarm init` makes it one of this host alone")
    gpus = {scenario.edge.torch_device, *(group.torch_device for group in scenario.devices)} != {"cpu"}
    stack = as_stack(read_compose(PROJECT / "compose.yaml", file), devices=scenario.users, gpus=gpus)
    (PROJECT / "runs").mkdir(exist_ok=True)
    command = ["docker", "stack", "deploy", "--resolve-image", "never", "-c", "-", _STACK]
    try:
        made = subprocess.run(
            command, cwd=PROJECT, env=environment, input=to_yaml(stack, file.name), text=True, check=False
        )
        if made.returncode:
            raise PlaceFailed("the stack was not deployed: Docker says why above")
        with subprocess.Popen(["docker", "service", "logs", "--follow", "--raw", _EXPERIMENT]) as log:
            try:
                status = _ended()
                with suppress(subprocess.TimeoutExpired):  # it follows what does not speak any more
                    log.wait(_LAST_WORDS)
                return status
            finally:
                log.terminate()
    finally:
        _take_down()


def _ended() -> int:
    """The exit status of the experiment, once it has ended; raises ``PlaceFailed`` where it never began."""
    while True:
        task = _docker("service", "ps", "--quiet", "--no-trunc", _EXPERIMENT).partition("\n")[0]
        status = json.loads(_docker("inspect", "--format", "{{json .Status}}", task) or "{}") if task else {}
        if status.get("State") == "rejected":
            raise PlaceFailed(f"the swarm did not take the experiment: {status.get('Err')}")
        if status.get("State") in _OVER:
            return int(status.get("ContainerStatus", {}).get("ExitCode", 1))
        time.sleep(_LOOK)


def _take_down() -> None:
    """Take the stack down, and wait until the next can come up."""
    _docker("stack", "rm", _STACK)
    until = time.monotonic() + _GONE
    label = f"label=com.docker.stack.namespace={_STACK}"
    while time.monotonic() < until and _docker("network", "ls", "-q", "--filter", label):
        time.sleep(_LOOK)


def _docker(*words: str) -> str:
    """What Docker answers; nothing where it refuses."""
    done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()
