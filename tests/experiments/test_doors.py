"""Doors for devices from outside: who may open one, and what passes through."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from broker.authority import enroll, make_authority
from broker.credentials import load_credentials
from broker.local import LocalBroker, _mosquitto
from broker.messages import Birth
from broker.session import BrokerUnreachable, Session
from broker.topics import Topics
from experiments.doors import Doors, NoDoor, _stand_in, _StandIn

BIRTH = Birth(name="phone", role="device", state="ready")
TOPIC = Topics("t").own("phone", "birth")

Opened = tuple[str, int]


@asynccontextmanager
async def door(directory: Path, port: int, authority: Path | None) -> AsyncIterator[Opened]:
    """A broker and a door to it, without namespaces between the two."""
    if _mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    doors = Doors.open("127.0.0.1:0", ["phone"], authority)
    address = doors.sockets["phone"].getsockname()
    settings = msgspec.convert(doors.stand_in("phone", "127.0.0.1", port), _StandIn)
    doors.sockets["phone"].detach()  # as in the stand-in's process, where it is its own
    async with LocalBroker(hosts=["127.0.0.1"], port=port, directory=directory, more=doors.listeners):
        standing = asyncio.create_task(_stand_in(settings))
        yield address
        standing.cancel()
        await asyncio.wait({standing})


async def test_mqtt_goes_through_an_open_door(tmp_path: Path, unused_tcp_port: int) -> None:
    async with (
        door(tmp_path, unused_tcp_port, None) as (host, port),
        Session(host, port, testbed="t", name="phone", birth=BIRTH) as phone,
    ):
        await phone.publish(TOPIC, BIRTH)


async def test_websockets_go_through_the_same_door(tmp_path: Path, unused_tcp_port: int) -> None:
    async with door(tmp_path, unused_tcp_port, None) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        lines = ["GET /mqtt HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade",
                 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13",
                 "Sec-WebSocket-Protocol: mqtt", "", ""]  # fmt: skip
        writer.write("\r\n".join(lines).encode())
        async with asyncio.timeout(5):
            assert b"101" in await reader.readline()
        writer.close()


async def test_who_shows_no_credentials_does_not_pass_a_guarded_door(tmp_path: Path, unused_tcp_port: int) -> None:
    make_authority(tmp_path / "a", ["127.0.0.1"])
    shown = load_credentials(enroll(tmp_path / "a", "phone"))
    async with door(tmp_path, unused_tcp_port, tmp_path / "a") as (host, port):
        async with Session(host, port, testbed="t", name="phone", birth=BIRTH, credentials=shown) as phone:
            await phone.publish(TOPIC, BIRTH)
        stranger = Session(host, port, testbed="t", name="phone", birth=BIRTH, patience=1)
        with pytest.raises(BrokerUnreachable):
            await stranger.__aenter__()


async def test_silence_and_noise_do_no_harm(tmp_path: Path, unused_tcp_port: int) -> None:
    async with door(tmp_path, unused_tcp_port, None) as (host, port):
        for noise in (b"", b"\x16\x03\x01 no such language here", b"SSH-2.0", b"\x10\xff\xff\xff\x7f" + bytes(100)):
            _, writer = await asyncio.open_connection(host, port)
            writer.write(noise)
            writer.close()
        async with Session(host, port, testbed="t", name="phone", birth=BIRTH) as phone:
            await phone.publish(TOPIC, BIRTH)


def test_doors_are_numbered_from_the_first(free_ports: Callable[[int], int], tmp_path: Path) -> None:
    first = free_ports(2)
    doors = Doors.open(f"127.0.0.1:{first}", ["a", "b"], None)
    assert [doors.address(name) for name in ("a", "b")] == [f"mqtt://127.0.0.1:{first + n}" for n in (0, 1)]
    with pytest.raises(NoDoor, match=f"cannot listen on port {first} of 127.0.0.1"):
        Doors.open(f"127.0.0.1:{first}", ["c"], None)
    for one in doors.sockets.values():
        one.close()


@pytest.mark.parametrize(
    ("listen", "names", "sentence"),
    [
        ("0.0.0.0:1", ["a"], r"semct enroll --ca 0\.0\.0\.0"),
        ("nowhere:1", ["a"], "is no IPv4 address with a port"),
        ("127.0.0.1:x", ["a"], "is no IPv4 address with a port"),
        ("127.0.0.1:65535", ["a", "b"], "cannot listen"),
        ("127.0.0.1:70000", ["a"], "cannot listen"),
        ("127.0.0.1", [], "nobody to listen for"),
    ],
)
def test_a_door_that_must_not_be_is_refused(listen: str, names: list[str], sentence: str) -> None:
    with pytest.raises(NoDoor, match=sentence):
        Doors.open(listen, names, None)


@pytest.fixture
def free_ports() -> Callable[[int], int]:
    def find(count: int) -> int:
        """The first of so many free ports in a row."""
        for first in range(21000, 29000, count):
            try:
                for one in [socket.create_server(("127.0.0.1", first + n)) for n in range(count)]:
                    one.close()
            except OSError:
                continue
            return first
        raise AssertionError("no free ports")

    return find
