"""The container engine of this machine: finds out whether it can carry a testbed, and has compose.yaml bring one up."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from experiments.places import PlaceFailed
from experiments.scenario import FOLDER, Scenario

PROJECT = FOLDER.parent
"""The checkout, which the containers see."""

_ANSWER = 30  # seconds that the engine may take for one

# What the engine says of GPUs, and what that means.
_GPUS = {
    "could not select device driver": "Docker cannot give containers a GPU here: install NVIDIA's container toolkit and"
    " restart Docker, or use compose.yaml as it is",
    "driver not loaded": "there is no GPU here, or its driver is not loaded: see `nvidia-smi`",
    "unknown device": "the compose file names a GPU that is not here: `nvidia-smi -L` tells which are, and"
    " `semct compose render --gpus` makes the file anew",
}


def up(scenario: Scenario, file: Path, seed: int | None = None) -> int:
    """Run a scenario with ``docker compose up`` and return its exit status; raises ``PlaceFailed``.

    Detached, since an attached ``up`` that tells a status ends all as soon as any container, a device's too, ends.
    """
    environment = surroundings(scenario, file, seed)

    def compose(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["docker", "compose", *words]
        return subprocess.run(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True, check=False)

    try:
        command = ["docker", "compose", "up", "--detach", "--no-build", "--force-recreate"]
        said = []
        with subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=subprocess.PIPE, text=True) as starting:
            for line in starting.stderr or ():
                sys.stderr.write(line)
                said.append(line)
        experiment = compose("ps", "--all", "--quiet", "experiment").stdout.strip()
        if starting.returncode or not experiment:
            known = [means for complaint, means in _GPUS.items() if any(complaint in line for line in said)]
            raise PlaceFailed(
                known[0] if known else "the containers did not come up: `docker compose logs` tells what they said"
            )
        subprocess.run(["docker", "logs", "--follow", experiment], check=False)
        waited = subprocess.run(["docker", "wait", experiment], capture_output=True, text=True, check=False)
        return int(waited.stdout) if waited.returncode == 0 else 1
    finally:
        compose("stop")


def surroundings(scenario: Scenario, file: Path, seed: int | None) -> dict[str, str]:
    """The environment in which compose.yaml is this scenario's testbed; raises ``PlaceFailed`` where it cannot be."""
    try:
        inside = file.resolve().relative_to(PROJECT)
    except ValueError:
        raise PlaceFailed(
            f"containers see what lies below {PROJECT} only, and {file} does not: copy it there"
        ) from None
    if not (PROJECT / "compose.yaml").exists():
        raise PlaceFailed(f"{PROJECT} has no compose.yaml: run semct from a checkout to run in containers")
    check(os.environ.get("IMAGE", "semct"))
    edges = 1 + sum(group.count for group in scenario.edges) + (scenario.cloud is not None)
    settings = {"SCENARIO": str(inside), "DEVICES": str(scenario.users), "EDGES": str(edges)}
    if seed is not None:
        settings["SEED"] = str(seed)
    return {**os.environ, **settings}


def check(image: str) -> None:
    """Raise ``PlaceFailed`` in one sentence where a testbed of this image could not come up here."""
    if shutil.which("docker") is None:
        raise PlaceFailed("there is no Docker here: install Docker Engine with Compose 2, or run with --place local")
    said = _ask("info")
    if "permission denied" in said.lower():
        raise PlaceFailed(
            "this user may not use Docker's socket: run as root, or join the group docker and log in again"
        )
    if said:
        raise PlaceFailed("Docker does not answer: start its service (systemctl start docker), or see `docker info`")
    if _ask("compose", "version"):
        raise PlaceFailed("Docker has no Compose 2 here: install docker-compose-plugin (or Debian's docker-compose)")
    if _ask("image", "inspect", image):
        raise PlaceFailed(f"the image {image} is not here: build it with `docker compose build experiment`")
    port = os.environ.get("BROKER_PORT", "0")
    try:
        socket.create_server(("127.0.0.1", int(port))).close()
    except (OSError, ValueError, OverflowError) as error:
        raise PlaceFailed(
            f"the broker cannot have port {port} of 127.0.0.1: {error}; set another BROKER_PORT"
        ) from error


def _ask(*question: str) -> str:
    """What the engine complains of; nothing when all is well."""
    try:
        done = subprocess.run(["docker", *question], capture_output=True, text=True, timeout=_ANSWER, check=False)
    except subprocess.TimeoutExpired:
        return "no answer"
    return (done.stderr or "failed") if done.returncode else ""
