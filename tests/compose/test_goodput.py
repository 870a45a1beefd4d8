"""What a container's shaped link carries is what was asked of it, in both directions, and so is its delay."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.compose.bulk import DELAY, RATE
from tests.compose.engine import ROOT, docker
from tests.netem.conformance import settled

pytestmark = pytest.mark.compose

BULK = Path(__file__).with_name("bulk.py")
WANTED = os.environ.get("SHAPED_BY", "auto")
"""Netem where a machine is there for it, which has the image already."""


@pytest.fixture(scope="module")
def device() -> Iterator[str]:
    """A device's container that only sends and receives; the links service runs beside it."""
    if WANTED != "netem":
        docker("compose", "build", "-q", "experiment")
    docker("compose", "up", "--detach", "--no-build", "--no-deps", "links")
    mounted = f"{BULK}:/bulk.py:ro"
    serve = ["python", "/bulk.py", "serve"]
    yield docker("compose", "run", "--detach", "--no-deps", "--volume", mounted, "device", *serve).splitlines()[-1]
    docker("compose", "down", "--volumes", "--timeout", "1", "--remove-orphans")


def measure(device: str) -> dict[str, Any]:
    address = docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", device)
    links = docker("compose", "ps", "--quiet", "links")
    command = ["docker", "exec", "-i", links, "python", "-", device, address, WANTED]
    done = subprocess.run(command, cwd=ROOT, input=BULK.read_bytes(), capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_rate_and_delay_are_as_asked(device: str, record_property: Callable[[str, object], None]) -> None:
    def right(found: dict[str, Any]) -> bool:
        return all(0.92 <= found[way] / RATE <= 1 for way in ("up", "down")) and found["ping"] <= 2 * DELAY + 0.002

    found = settled(3, lambda: measure(device), right)
    print(f"shaped by {found['shaped_by']}: {found['up'] / 1e6:.2f} Mbit/s up, {found['down'] / 1e6:.2f} Mbit/s down")
    print(f"round trip {1e3 * found['ping']:.2f} ms")
    record_property("measured", found)
    assert right(found), found
    assert found["ping"] >= 2 * DELAY
