"""What can be measured of a link from the hub's end, while others use it: its round trip and its traffic."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple

_ECHO: Final = 8
_REPLY: Final = 0
_numbers = count(1)


class Traffic(NamedTuple):
    """Bytes that a device has sent (``up``) and received (``down``), headers included."""

    up: int
    down: int


def traffic(interface: str) -> Traffic:
    """What has passed an interface of the hub since it was made; raises ``OSError`` where there is none.

    The hub receives what the device sends.
    """
    for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            fields = numbers.split()
            return Traffic(up=int(fields[0]), down=int(fields[8]))
    raise OSError(f"there is no interface {interface}")


async def ping(address: str, patience: float) -> float | None:
    """Seconds that an ICMP echo takes to an address and back; none where no answer comes in time."""
    loop = asyncio.get_running_loop()
    identity, number = os.getpid() & 0xFFFF, next(_numbers) & 0xFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP) as probe:
        probe.connect((address, 0))
        start = time.perf_counter()
        await loop.sock_sendall(probe, struct.pack("!BBHHH", _ECHO, 0, _checksum(identity, number), identity, number))
        try:
            async with asyncio.timeout(patience):
                while True:
                    packet = await loop.sock_recv(probe, 1500)
                    kind, _, _, *mine = struct.unpack_from("!BBHHH", packet, 4 * (packet[0] & 15))
                    if kind == _REPLY and mine == [identity, number]:
                        return time.perf_counter() - start
        except (TimeoutError, OSError):
            return None


def _checksum(identity: int, number: int) -> int:
    """The complement of the ones' complement sum of an echo's other words (RFC 1071)."""
    total = (_ECHO << 8) + identity + number
    return ~(total % 0xFFFF) & 0xFFFF
