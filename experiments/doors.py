"""Doors of a local testbed: where devices from outside come in.

The broker of a local run is in a network namespace that nobody reaches from outside, and each of its nodes behind a
link of its own. A device from outside has a stand-in there: a process in a namespace behind such a link, which passes
on what comes through the device's door, a listening socket of the machine. So its link is shaped at the hub like all
others.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import msgspec

from broker.local import Listener

_WEBSOCKETS, _TLS, _TLS_WEBSOCKETS = 8083, 8883, 8884  # ports of the broker in the testbed
_CHUNK = 65536
_MOST = 8  # connections through one door at a time

_GET = b"GET "  # how a WebSocket begins
_HELLO = b"\x16"  # how TLS begins
_BROWSER = b"http/1.1"  # the protocol that a browser names when TLS begins, as MQTT clients do not


class NoDoor(ValueError):
    """A door cannot be opened here, or must not."""


class Doors:
    """One listening socket for each device from outside, and the ``authority`` that guards them, if any.

    To be opened while the process still is in the machine's own network namespace.
    """

    def __init__(self, sockets: dict[str, socket.socket], authority: Path | None) -> None:
        self.sockets = sockets
        self._authority = authority

    @classmethod
    def open(cls, listen: str, names: Sequence[str], authority: Path | None) -> Self:
        """Doors at ``ADDRESS`` or ``ADDRESS:PORT``, the first at the port and the others at those that follow.

        Without an authority they open on loopback only. Raises ``NoDoor``.
        """
        host, _, port = listen.partition(":")
        try:
            address, first = ipaddress.IPv4Address(host), int(port or 1883)
        except ValueError:
            raise NoDoor(f"{listen!r} is no IPv4 address with a port to listen on, such as 192.168.1.5:1883") from None
        if not names:
            raise NoDoor("there is nobody to listen for: give the scenario a group of devices with `attached: NAME`")
        if authority is None and not address.is_loopback:
            raise NoDoor(
                f"whoever reaches {host} could come in: make an authority with `semct enroll --ca {host}`, credentials "
                "with `semct enroll NAME`, and give --authority FOLDER"
            )
        sockets: dict[str, socket.socket] = {}
        try:
            for number, name in enumerate(names):
                at = first + number if first else 0
                sockets[name] = socket.create_server((host, at), backlog=_MOST)
        except (OSError, OverflowError) as error:
            for one in sockets.values():
                one.close()
            raise NoDoor(f"cannot listen on port {at} of {host}: {error}") from error
        return cls(sockets, authority and authority.resolve())

    @property
    def listeners(self) -> list[Listener]:
        """The ports that the broker needs beside its main one."""
        if self._authority is None:
            return [Listener(port=_WEBSOCKETS, websockets=True)]
        return [
            Listener(port=_TLS, authority=self._authority),
            Listener(port=_TLS_WEBSOCKETS, websockets=True, authority=self._authority),
        ]

    def address(self, name: str) -> str:
        """Where a device finds the broker."""
        host, port = self.sockets[name].getsockname()
        return f"{'mqtts' if self._authority else 'mqtt'}://{host}:{port}"

    def stand_in(self, name: str, host: str, port: int) -> dict[str, Any]:
        """What the process is started with that stands for a device in the testbed, whose broker is there."""
        plain = {"mqtt": port, "websockets": _WEBSOCKETS}
        guarded = {"mqtts": _TLS, "websockets": _TLS_WEBSOCKETS}
        ports = guarded if self._authority else plain
        return {"socket": self.sockets[name].fileno(), "host": host, "ports": ports}


class _StandIn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    socket: int
    host: str
    ports: dict[str, int]


def warm(_: dict[str, Any]) -> None:
    """There is nothing to load."""


def main(arguments: dict[str, Any]) -> int:
    """Stand for a device until killed."""
    asyncio.run(_stand_in(msgspec.convert(arguments, _StandIn)))
    return 0


async def _stand_in(settings: _StandIn) -> None:
    room = asyncio.Semaphore(_MOST)

    async def come_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            if not room.locked():
                async with room:
                    await _pass_on(settings, reader, writer)
        writer.close()

    server = await asyncio.start_server(come_in, sock=socket.socket(fileno=settings.socket), limit=_CHUNK)
    await server.serve_forever()


async def _pass_on(settings: _StandIn, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    first = await reader.read(_CHUNK)
    port = settings.ports.get(_language(first))
    if port is None:
        return
    inner_reader, inner_writer = await asyncio.open_connection(settings.host, port, limit=_CHUNK)
    try:
        inner_writer.write(first)
        async with asyncio.TaskGroup() as both:
            both.create_task(_pump(reader, inner_writer))
            both.create_task(_pump(inner_reader, writer))
    except* OSError:
        pass
    finally:
        inner_writer.close()


def _language(first: bytes) -> str:
    """What a connection that begins so speaks."""
    if first.startswith(_HELLO):
        return "websockets" if _BROWSER in first else "mqtts"
    return "websockets" if first.startswith(_GET) else "mqtt"


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on until one side ends; the other side then ends, too."""
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    writer.close()
