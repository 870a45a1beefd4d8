"""The service that breaks containers, with a Docker that stands in for the real one (which tests/compose has)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import docker.errors
import pytest

from netem import containers
from netem.container_control import BROKER, LinksClient, LinksRefused, Seen


class Container:
    """Keeps what was done to it; it counts memory as control groups of the second version do."""

    def __init__(self, identity: str, service: str, project: str = "ours") -> None:
        self.short_id = identity
        self.labels = {"com.docker.compose.project": project, "com.docker.compose.service": service}
        self.status = "running"
        self.done: list[str] = []

    def __getattr__(self, name: str) -> Any:
        after = {"kill": "exited", "stop": "exited", "start": "running", "pause": "paused", "unpause": "running"}

        def act(*_: object) -> None:
            self.done.append(name)
            self.status = after.get(name, self.status)

        return act

    def stats(self, **_: object) -> Mapping[str, Any]:
        return {"memory_stats": {"stats": {"anon": 2**20}}}


class Engine:
    def __init__(self, *there: Container) -> None:
        self.containers = self
        self._there = there

    def get(self, name: str) -> Container:
        for one in self._there:
            if one.short_id == name:
                return one
        raise docker.errors.NotFound("no such container")

    def list(self, *, filters: Mapping[str, Any], all: bool = False) -> list[Container]:  # noqa: A002
        labels = [filters["label"]] if isinstance(filters["label"], str) else filters["label"]
        wanted = dict(label.split("=") for label in labels)
        return [c for c in self._there if all and wanted.items() <= c.labels.items()]

    def events(self, **_: object) -> list[Any]:
        return []


@asynccontextmanager
async def serving(monkeypatch: pytest.MonkeyPatch, folder: Path, *there: Container) -> AsyncIterator[LinksClient]:
    monkeypatch.setattr(containers.docker, "from_env", lambda: Engine(*there))
    path = folder / "links.sock"
    service = asyncio.create_task(containers.Service("ours").run(path))
    try:
        while not path.exists():  # noqa: ASYNC110  nothing tells
            await asyncio.sleep(0.01)
        yield LinksClient(path)
    finally:
        service.cancel()
        await asyncio.wait({service})


async def test_containers_are_broken_and_mended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device, edge, broker = Container("d", "device-3"), Container("e", "edge"), Container("b", BROKER)
    async with serving(monkeypatch, tmp_path, device, edge, broker) as client:
        assert await client.look("d") == Seen(runs=True, memory=2**20)
        await client.kill("d")
        assert await client.look("d") == Seen(runs=False)
        await client.start("d")
        await client.pause("e")
        assert (await client.look("e")).runs
        await client.resume("e")
        await client.stop(BROKER)
        await client.start(BROKER)
        assert device.done == ["kill", "wait", "start"]
        assert edge.done == ["pause", "unpause"]
        assert broker.done == ["exec_run", "stop", "start"]


async def test_what_is_so_already_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = Container("d", "device")
    async with serving(monkeypatch, tmp_path, device) as client:
        await client.start("d")
        await client.resume("d")
        device.status = "exited"
        await client.kill("d")
        await client.pause("d")
        assert not device.done


async def test_nobody_elses_containers_are_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    theirs, bystander = Container("t", "device", "theirs"), Container("x", "experiment")
    their_broker = Container("b", BROKER, "theirs")
    async with serving(monkeypatch, tmp_path, theirs, bystander, their_broker) as client:
        for name in ("t", "x", "b", BROKER, "nobody"):
            with pytest.raises(LinksRefused, match=f"{name} is no device|no container {name}"):
                await client.kill(name)
            assert await client.look(name) == Seen(runs=False)
    assert not theirs.done + bystander.done + their_broker.done


async def test_what_is_broken_when_the_runner_leaves_is_mended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device, edge, broker = Container("d", "device"), Container("e", "edge"), Container("b", BROKER)
    async with serving(monkeypatch, tmp_path, device, edge, broker) as client:
        await client.open("none", 0)
        await client.kill("d")
        await client.pause("e")
        await client.stop(BROKER)
        await client.close()
        async with asyncio.timeout(5):
            while not all(c.status == "running" for c in (device, edge, broker)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert device.done[-1] == broker.done[-1] == "start"
    assert edge.done[-1] == "unpause"
