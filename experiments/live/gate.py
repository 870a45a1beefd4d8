"""The door of the live page: its files over HTTP, and the way to the testbed's broker over WebSockets.

The broker of a local run is in a network namespace, so the door is a socket of the machine that was opened before.
Behind it is the broker's own MQTT, in WebSockets as MQTT has them; so it works with a broker that knows none. Viewers
read: what else they send ends their connection. A page of another origin is not let in.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import AsyncExitStack, suppress
from http import HTTPStatus
from importlib import resources
from typing import Any, Final, Self
from urllib.parse import urlsplit

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from broker.address import BadAddress, listener

PATH: Final = "/mqtt"
"""Where WebSockets come in."""

_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}
_POLICY: Final = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src *"
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_MOST = 16  # viewers at a time
_CHUNK = 65536
_LONGEST = 4096  # bytes of a packet that a viewer has reason to send
_LATER = 1013  # how a WebSocket is told to try again later

# What a reader says in MQTT: the types of its packets.
_CONNECT: Final = 1
_READING: Final = frozenset({_CONNECT, 4, 5, 7, 8, 10, 12, 14})
_WILL, _CLEAN = 0x04, 0x02  # flags of CONNECT
_VIEWER: Final = b"viewer-"  # how a viewer's client identifier begins: no node's does

_quiet = logging.getLogger(__name__)
_quiet.setLevel(logging.CRITICAL)  # a browser that changes its mind is no news


class NoGate(OSError):
    """The live page cannot be served there."""


class Forbidden(ValueError):
    """A viewer sent what is none of a viewer's."""


class Reading:
    """Watches that the bytes of one MQTT connection are those of a reader."""

    def __init__(self) -> None:
        self._rest = b""
        self._connected = False

    def feed(self, data: bytes) -> bytes:
        """The whole packets so far; raises ``Forbidden`` for any that a reader does not send."""
        self._rest += data
        passed = b""
        while (size := self._whole()) is not None and size <= len(self._rest):
            packet, self._rest = self._rest[:size], self._rest[size:]
            self._check(packet)
            passed += packet
        return passed

    def _whole(self) -> int | None:
        """The bytes of the first packet; none while its length is not there yet."""
        length = 0
        for position, byte in enumerate(self._rest[1:5]):
            length |= (byte & 0x7F) << (7 * position)
            if not byte & 0x80:
                size = 2 + position + length
                if size > _LONGEST:
                    raise Forbidden(f"a packet of {size} bytes")
                return size
        if len(self._rest) >= 5:
            raise Forbidden("a packet without a length")
        return None

    def _check(self, packet: bytes) -> None:
        kind = packet[0] >> 4
        if kind not in _READING or (kind == _CONNECT) is self._connected:
            raise Forbidden(f"an MQTT packet of type {kind}")
        if kind == _CONNECT:
            self._connected = True
            body = packet[2 if packet[1] < 0x80 else 3 :]
            name = int.from_bytes(body[:2], "big") + 2  # the protocol's; level, flags and two bytes of time follow
            if len(body) < name + 6 or body[name] not in (3, 4):
                raise Forbidden("a connection that is not MQTT 3.1 or 3.1.1")
            if body[name + 1] & _WILL or not body[name + 1] & _CLEAN:
                raise Forbidden("a connection with a will, or one that lasts")
            if not body[name + 6 :].startswith(_VIEWER):
                raise Forbidden("a client identifier that is no viewer's")


class Gate:
    """Serves the live page on a listening socket while its ``async with`` block lasts.

    ``viewers`` counts the pages that are open, ``changed`` is set whenever that changes.
    """

    def __init__(self, listening: socket.socket) -> None:
        self.viewers = 0
        self.changed = asyncio.Event()
        self.url = url(listening)
        self._socket = listening
        self._broker: tuple[str, int] | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        server = serve(
            self._view,
            sock=self._socket,
            process_request=self._answer,
            subprotocols=["mqtt", "mqttv3.1"],  # type: ignore[list-item]
            compression=None,
            max_size=_CHUNK,
            server_header=None,
            logger=_quiet,
        )
        await self._stack.enter_async_context(server)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    def lead_to(self, host: str, port: int) -> None:
        """The broker is there: let viewers in."""
        self._broker = host, port

    def _answer(self, _: ServerConnection, request: Request) -> Response | None:
        """The file that was asked for; none lets a WebSocket in."""
        path = urlsplit(request.path).path
        host = urlsplit(f"//{request.headers.get('Host', '')}")
        local = self._socket.getsockname()[0] in _LOOPBACK
        if local and host.hostname not in _LOOPBACK:  # a name of somebody else's that leads here
            return _response(HTTPStatus.FORBIDDEN, "this page is for this machine alone")
        if path != PATH:
            return _file(path)
        if urlsplit(request.headers.get("Origin", "")).netloc != host.netloc:
            return _response(HTTPStatus.FORBIDDEN, "a page of another origin may not watch")
        return None

    async def _view(self, viewer: ServerConnection) -> None:
        if self._broker is None or self.viewers >= _MOST:
            await viewer.close(_LATER, "the testbed is not there yet" if self._broker is None else "too many viewers")
            return
        self._count(+1)
        try:
            reader, writer = await asyncio.open_connection(*self._broker, limit=_CHUNK)
            try:
                await _relay(viewer, reader, writer)
            finally:
                writer.close()
        except (OSError, ConnectionClosed):
            pass  # broker or viewer are gone
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self.viewers += change
        self.changed.set()


def open_gate(address: str) -> socket.socket:
    """A socket for the live page at ``PORT`` of loopback, 0 for any that is free, or at ``ADDRESS:PORT``.

    Raises ``NoGate``.
    """
    try:
        return socket.create_server(listener(address, "for the live page"))
    except BadAddress as error:
        raise NoGate(str(error)) from error
    except OSError as error:
        raise NoGate(f"the live page cannot be served at {address}: {error}") from error


def url(listening: socket.socket) -> str:
    """Where a browser finds the page."""
    host, port = listening.getsockname()[:2]
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/"  # noqa: S104  only compared


async def _relay(viewer: ServerConnection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on until one of the two ends."""
    reading = Reading()

    async def ask() -> None:
        async for frame in viewer:
            writer.write(reading.feed(frame if isinstance(frame, bytes) else frame.encode()))
            await writer.drain()

    async def tell() -> None:
        while data := await reader.read(_CHUNK):
            await viewer.send(data)

    both = {asyncio.create_task(ask()), asyncio.create_task(tell())}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in both:
            task.cancel()
        ended = await asyncio.gather(*both, return_exceptions=True)
    forbidden = next((e for e in ended if isinstance(e, Forbidden)), None)
    with suppress(ConnectionClosed):
        await viewer.close(1008 if forbidden else 1001, str(forbidden or "the testbed has ended")[:100])


def _file(path: str) -> Response:
    name = path.removeprefix("/") or "index.html"
    kind = _TYPES.get(name.rpartition(".")[2])
    parts = name.split("/")
    found = resources.files("experiments.live").joinpath("page", *parts)
    if kind is None or any(part in {"", ".", ".."} or "\\" in part for part in parts) or not found.is_file():
        return _response(HTTPStatus.NOT_FOUND, "there is no such file")
    return _response(HTTPStatus.OK, found.read_bytes(), kind)


def _response(status: HTTPStatus, body: str | bytes, kind: str = _TYPES["txt"]) -> Response:
    content = body.encode() if isinstance(body, str) else body
    headers = Headers(
        {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Connection": "close",
        }
    )
    return Response(status, status.phrase, headers, content)
