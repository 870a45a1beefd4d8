"""The compose place over a real broker, with a service that stands in for the one that has Docker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.address import Address
from broker.messages import Assign, Birth, Enrol
from broker.session import Session
from broker.topics import Topics
from device_node.node import DeviceSettings
from edge_node.node import EdgeSettings
from experiments.places import Breakable, PlaceFailed
from experiments.places.compose import ComposePlace, TendedPlace
from netem.container_control import Break, LinksClient, Look, Question, Seen, Use, Using, read_question, write
from netem.control import Done, Shape
from netem.link import Duration, Link, LinkState

TOPICS = Topics("t")
SLOW = Link(up=LinkState(delay=Duration("10ms")))
Ears = Callable[..., AbstractAsyncContextManager[Any]]


class Engine:
    """What the service would do, noted down; ``running`` are the containers that run."""

    def __init__(self, *running: str) -> None:
        self.running = set(running)
        self.done: list[tuple[str, Any]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                write(writer, self.answer(await read_question(reader)))
        except asyncio.IncompleteReadError:
            writer.close()

    def answer(self, question: Question) -> Any:
        match question:
            case Use():
                return Using("pretended")
            case Look(name=name):
                return Seen(runs=name in self.running, memory=3 * 2**20 if name in self.running else None)
            case Break(name=name, what=what):
                self.done.append((name, what))
                (self.running.add if what == "start" else self.running.discard)(name)
            case Shape(name=name, link=link):
                self.done.append((name, link))
        return Done()


@asynccontextmanager
async def tended(bus: tuple[str, int], folder: Path, engine: Engine) -> AsyncIterator[TendedPlace]:
    common: dict[str, Any] = {"testbed": "t", "host": bus[0], "port": bus[1]}
    server = await asyncio.start_unix_server(engine.serve, str(folder / "links.sock"))
    async with (
        server,
        TendedPlace(
            Address(*bus),
            links=LinksClient(folder / "links.sock"),
            testbed="t",
            edge=EdgeSettings(name="edge", **common),
            helpers=[],
            devices=[DeviceSettings(name="device-1", **common)],
        ) as place,
    ):
        watching = asyncio.create_task(place.watch())
        try:
            yield place
        finally:
            watching.cancel()
            await asyncio.wait({watching})


@asynccontextmanager
async def life(bus: tuple[str, int], node: str, container: str, started: float) -> AsyncIterator[None]:
    """A node in a container, from its birth to its end by a power cut."""
    birth = Birth(name=node, role="device", state="ready", host=container, started=started)
    session = Session(*bus, testbed="t", name=node, birth=birth)
    await session.__aenter__()
    yield
    await session.__aexit__(RuntimeError, RuntimeError("power cut"), None)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110  nothing tells
            await asyncio.sleep(0.05)


def wish(container: str) -> Enrol:
    return Enrol(name=container, role="device", state="ready", host=container)


async def place_of(ears: Ears, container: str, patience: float = 10.0) -> str | None:
    """The place that a container is given as long as it waits; none where it is given none in time."""
    async with ears(container, TOPICS.inbox(container, "control"), birth=wish(container)) as ear:
        try:
            async with asyncio.timeout(patience):
                (assign,) = await ear.until(Assign)
        except TimeoutError:
            return None
        return str(msgspec.msgpack.decode(assign.settings, type=DeviceSettings).name)


async def test_a_node_that_is_cut_off_has_not_ended_until_its_container_has(
    bus: tuple[str, int], ear: Ears, tmp_path: Path
) -> None:
    engine = Engine("first")
    async with tended(bus, tmp_path, engine) as place:
        assert await place_of(ear, "first") == "device-1"
        async with life(bus, "device-1", "first", 1.0):
            await until(lambda: "device-1" in place._births)
            assert await place.memory() == {"device-1": 3.0}
        assert await place_of(ear, "second", patience=1.5) is None
        assert not place.ended
        engine.running.clear()
        await until(lambda: "device-1" in place.ended)
        assert place.ended == {"device-1": "the container first of device-1 has ended, or is cut off"}
        assert await place_of(ear, "second") == "device-1"


async def test_a_node_that_is_killed_gets_its_place_and_its_link_again(
    bus: tuple[str, int], ear: Ears, tmp_path: Path
) -> None:
    engine = Engine("first")
    async with tended(bus, tmp_path, engine) as place:
        assert isinstance(place, Breakable)
        assert await place_of(ear, "first") == "device-1"
        async with life(bus, "device-1", "first", 1.0):
            await until(lambda: "device-1" in place._births)
            await place.shape("device-1", SLOW)
            await place.kill("device-1")
        assert place.ended == {"device-1": "device-1 was killed by a fault of the scenario"}
        assert await place_of(ear, "second", patience=1.5) is None
        await place.start("device-1")
        assert not place.ended
        await place.shape("device-1", SLOW)
        assert await place_of(ear, "first") == "device-1"
        async with life(bus, "device-1", "first", 2.0):
            again = [("first", SLOW), ("first", "kill"), ("first", "start"), ("first", SLOW), ("first", SLOW)]
            await until(lambda: engine.done == again)


async def test_what_the_service_refuses_ends_the_run_in_one_sentence(
    bus: tuple[str, int], ear: Ears, tmp_path: Path
) -> None:
    async with tended(bus, tmp_path, Engine()) as place:
        with pytest.raises(PlaceFailed, match="device-1 cannot be killed: device-1 is not there yet"):
            await place.kill("device-1")


def test_without_the_service_nothing_can_be_broken() -> None:
    assert not issubclass(ComposePlace, Breakable)
