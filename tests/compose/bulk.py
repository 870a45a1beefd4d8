"""What a container's link carries, measured from the host's side of it; both programs run in the image.

``python bulk.py serve`` is the container's side. ``python - ADDRESS WANTED`` with this on its standard input, where the
links service is, shapes the link to that container, measures it, and prints what it found as JSON.
"""

import asyncio
import contextlib
import json
import math
import socket
import statistics
import struct
import sys
import time
from pathlib import Path

PORT = 5000
RATE, DELAY = 20e6, 0.010
"""What is asked of the link in each direction, in bit/s and seconds."""

_SETTLE, _SECONDS, _PINGS = 2.0, 8.0, 15
_AT_ONCE = 1 << 16  # bytes


def fill(connection: socket.socket) -> None:
    """Send as much as passes until the other side closes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(ConnectionError):
        while True:
            connection.sendall(bytes(_AT_ONCE))


def drain(connection: socket.socket) -> float:
    """The bit/s that come once the traffic has settled."""
    begin = time.monotonic() + _SETTLE
    received, started = 0, 0.0
    while (now := time.monotonic()) < begin + _SECONDS:
        if not started and now >= begin:
            received, started = 0, now
        received += len(connection.recv(_AT_ONCE))
    return 8 * received / (now - started)


def serve() -> None:
    """Send in bulk to whoever asks for it, take what others send, and say how fast that came last."""
    measured = 0.0
    with socket.create_server(("", PORT)) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                match connection.recv(1):
                    case b"u":
                        fill(connection)
                    case b"d":
                        measured = drain(connection)
                    case b"?":
                        connection.sendall(str(measured).encode())


def goodputs(address: str) -> dict[str, float]:
    """TCP's goodput in bit/s in each direction, one after the other."""
    with socket.create_connection((address, PORT)) as sender:
        sender.sendall(b"u")
        up = drain(sender)
    with socket.create_connection((address, PORT)) as receiver:
        receiver.sendall(b"d")
        fill(receiver)
    with socket.create_connection((address, PORT)) as told:
        told.sendall(b"?")
        return {"up": up, "down": float(told.recv(100))}


async def measure(container: str, address: str, wanted: str) -> dict[str, object]:
    """Shape the container's link and measure it while it is."""
    from netem.container_control import LinksClient  # noqa: PLC0415  only where the service is
    from netem.link import Duration, Link, LinkState, Rate  # noqa: PLC0415

    client = LinksClient(Path("/run/semct/links.sock"))
    shaped_by = await client.open(wanted, seed=1)  # type: ignore[arg-type]
    state = LinkState(rate=Rate(RATE), delay=Duration(DELAY))
    await client.shape(container, Link(up=state, down=state))
    pings = [await client.round_trip(container, 5.0) or math.inf for _ in range(_PINGS)]
    return {"shaped_by": shaped_by, "ping": statistics.median(pings), **await asyncio.to_thread(goodputs, address)}


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        print(json.dumps(asyncio.run(measure(*sys.argv[1:]))))
