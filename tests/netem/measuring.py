"""Measures the links of a hub, whatever makes them: round trips, datagrams one by one, and TCP.

A measurement takes two processes, one at each end of a link; both have the machine's clock, so one-way times
are differences. Nothing here is imported that starts a thread: the hub is entered by the process that uses it.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, NamedTuple, Self, TypeVar, TypeVarTuple

from netem.hosts import HUB_ADDRESS, Hub, Links, enter_host
from netem.link import MTU, Link

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")
Direction = Literal["up", "down"]

UDP_PAYLOAD: Final = MTU - 28
"""Bytes in a datagram that fills a packet."""

_PORT: Final = 5000
_PATIENCE = 30.0  # seconds for something to happen at all
_AT_LEAST: Final = 1 << 15  # bytes that wake a receiver
_SO_RCVBUFFORCE: Final = 33
_SO_NO_CHECK: Final = 11
_SO_TIMESTAMPNS: Final = 35
_BUFFER: Final = 1 << 26
_HEADER: Final = struct.Struct("!IIq")  # checksum of what follows, number, nanoseconds

_opened: dict[str, socket.socket] = {}  # in an end's process: the socket of its next measurement


class Datagram(NamedTuple):
    """A datagram that arrived; numbers and times of a corrupted one mean nothing."""

    number: int
    sent: float
    """Seconds, on the same clock as `arrived`, which the receiving kernel stamps."""
    arrived: float
    intact: bool


class Target(NamedTuple):
    """Where a receiver listens."""

    address: str
    port: int


class End:
    """A process at one end of links that runs what it is told: in a device's namespace, or at home in the hub."""

    def __init__(self, *, device: bool) -> None:
        self._pipe, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # die with the measurement
            if device:
                enter_host()
            theirs.send("ready")
            while True:
                work, arguments = theirs.recv()
                try:
                    theirs.send((work(*arguments), None))
                except Exception as error:
                    theirs.send((None, repr(error)))
        theirs.close()
        assert self._pipe.recv() == "ready"

    async def call(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Run a function of a module there."""
        self._pipe.send((work, arguments))
        answered = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pipe.fileno(), answered.set)
        try:
            await answered.wait()
        finally:
            loop.remove_reader(self._pipe.fileno())
        result, error = self._pipe.recv()
        if error is not None:
            raise RuntimeError(error)
        return result

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._pipe.close()


class Cell:
    """A hub with devices, numbered from 0, and for each an end in the hub that is its counterpart."""

    def __init__(self, links: Links, *, devices: int = 1, link: Link | None = None, congestion: str = "cubic") -> None:
        self.links = links
        self.hub = Hub(links, congestion=congestion)
        self.devices: list[End] = []
        self.homes: list[End] = []
        self.addresses: list[str] = []
        self._count = devices
        self._link = link

    async def __aenter__(self) -> Self:
        for _ in range(self._count):  # before the hub starts its thread
            self.devices.append(End(device=True))
            self.homes.append(End(device=False))
        async with contextlib.AsyncExitStack() as stack:
            for end in (*self.devices, *self.homes):
                stack.callback(end.kill)
            await stack.enter_async_context(self.hub)
            for number, device in enumerate(self.devices):
                self.addresses.append((await self.hub.attach(self.name(number), device.pid, self._link)).address)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @staticmethod
    def name(number: int) -> str:
        return f"device-{number}"

    async def shape(self, link: Link, number: int = 0) -> None:
        await self.hub.shape(self.name(number), link)

    async def read(self, number: int = 0) -> Link:
        return await self.hub.read(self.name(number))

    async def pings(self, count: int, *, number: int = 0) -> list[float]:
        """Round trips in seconds, one after the other, from the device."""
        return await self.devices[number].call(ping, HUB_ADDRESS, count)

    async def datagrams(
        self,
        direction: Direction,
        count: int,
        *,
        every: float,
        together: int = 1,
        size: int = 64,
        quiet: float = 1.5,
        number: int = 0,
    ) -> list[Datagram]:
        """Send datagrams of `size` bytes, `together` at once `every` so many seconds; return what arrived.

        Ends when nothing has come for `quiet` seconds.
        """
        sender, receiver, target = self._ends(direction, number)
        await receiver.call(open_udp, target.port)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sender.call(send_datagrams, target, count, every, together, size))
            received = tasks.create_task(receiver.call(receive_datagrams, quiet))
        arrived, overflowed = received.result()
        assert overflowed == 0, f"the receiver was too slow for {overflowed} datagrams: the machine is too busy"
        return arrived

    async def goodput(
        self,
        direction: Direction,
        seconds: float,
        *,
        settle: float = 1.5,
        numbers: Sequence[int] = (0,),
    ) -> list[float]:
        """TCP's goodput in bit/s on some links in the same `seconds`, after `settle` seconds of the same traffic."""
        ends = [self._ends(direction, number) for number in numbers]
        await asyncio.gather(*(receiver.call(open_tcp, target.port) for _, receiver, target in ends))
        async with asyncio.TaskGroup() as tasks:
            for sender, receiver, target in ends:
                tasks.create_task(receiver.call(accept))
                tasks.create_task(sender.call(connect, target))
        begin = time.monotonic() + settle
        async with asyncio.TaskGroup() as tasks:
            awake = _AT_LEAST if len(ends) < 10 else 4 * _AT_LEAST
            drained = [
                tasks.create_task(receiver.call(drain, begin, begin + seconds, awake)) for _, receiver, _ in ends
            ]
            for sender, _, _ in ends:
                tasks.create_task(sender.call(fill))
        return [task.result() for task in drained]

    def _ends(self, direction: Direction, number: int) -> tuple[End, End, Target]:
        """Sender, receiver and where the receiver listens."""
        port = _PORT + number
        if direction == "up":
            return self.devices[number], self.homes[number], Target(HUB_ADDRESS, port)
        return self.homes[number], self.devices[number], Target(self.addresses[number], port)


def own_namespace() -> int:
    return Path("/proc/self/ns/net").stat().st_ino


def traffic(interface: str) -> tuple[int, int, int, int]:
    """Bytes and packets received, bytes and packets sent by an interface of this namespace."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    fields = next(line for line in lines if line.split(":")[0].strip() == interface).split(":")[1].split()
    return int(fields[0]), int(fields[1]), int(fields[8]), int(fields[9])


def ping(address: str, count: int) -> list[float]:
    """The round trips of ICMP echoes in seconds."""
    trips = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as probe:
        probe.settimeout(_PATIENCE)
        for number in range(count):
            checksum = ~sum(struct.unpack("!4H", struct.pack("!BBHHH", 8, 0, 0, 1, number))) & 0xFFFF
            start = time.perf_counter()
            probe.sendto(struct.pack("!BBHHH", 8, 0, checksum, 1, number), (address, 0))
            while True:
                packet = probe.recv(1500)
                if packet[20] == 0 and packet[26:28] == struct.pack("!H", number):
                    break
            trips.append(time.perf_counter() - start)
    return trips


def open_udp(port: int) -> None:
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        receiver.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    except PermissionError:  # in a user namespace
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    receiver.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    receiver.bind(("", port))
    _opened["udp"] = receiver


def send_datagrams(target: Target, count: int, every: float, together: int, size: int) -> None:
    filler = bytes(size - _HEADER.size)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        # Without a checksum of its own a corrupted datagram arrives, to be counted.
        sender.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        start = time.perf_counter()
        for number in range(count):
            if number % together == 0:
                time.sleep(max(0.0, start + number / together * every - time.perf_counter()))
            body = _HEADER.pack(0, number, time.time_ns())[4:] + filler
            sender.sendto(zlib.crc32(body).to_bytes(4, "big") + body, target)  # unconnected: no error comes back


def receive_datagrams(quiet: float) -> tuple[list[Datagram], int]:
    """What arrived until nothing came for `quiet` seconds, and how many the socket's buffer could not hold."""
    arrived: list[Datagram] = []
    before = _overflows()
    with _opened.pop("udp") as receiver:
        receiver.settimeout(max(quiet, 2.0))  # the first may take longer
        with contextlib.suppress(TimeoutError):
            while True:
                data, ancillary, _, _ = receiver.recvmsg(2048, 256)
                receiver.settimeout(quiet)
                ((_, _, stamp),) = ancillary
                seconds, nanoseconds = struct.unpack("qq", stamp)
                checksum, number, sent = _HEADER.unpack_from(data)
                intact = zlib.crc32(data[4:]) == checksum
                arrived.append(Datagram(number, sent / 1e9, seconds + nanoseconds / 1e9, intact))
    return arrived, _overflows() - before


def _overflows() -> int:
    """Datagrams that sockets of this namespace had no room for."""
    names, values = (
        line.split() for line in Path("/proc/self/net/snmp").read_text().splitlines() if line.startswith("Udp:")
    )
    return int(values[names.index("RcvbufErrors")])


def open_tcp(port: int) -> None:
    _opened["listener"] = socket.create_server(("", port))


def accept() -> None:
    with _opened.pop("listener") as listener:
        listener.settimeout(_PATIENCE)
        _opened["tcp"], _ = listener.accept()


def connect(target: Target) -> None:
    _opened["tcp"] = socket.create_connection(target, timeout=_PATIENCE)


def fill() -> None:
    """Send as much as passes until the receiver closes."""
    zeros = bytes(1 << 20)
    with _opened.pop("tcp") as sender:
        # What still waits in the link's queue at the end is of no use to anybody.
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sender.settimeout(None)
        with contextlib.suppress(ConnectionError):
            while True:
                sender.send(zeros)


def drain(begin: float, end: float, at_least: int) -> float:
    """The bit/s that came between two moments of the monotonic clock, read in portions of so many bytes.

    Few calls, and no copies: there may be fifty receivers on one processor.
    """
    with _opened.pop("tcp") as connection:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, at_least)
        buffer = bytearray(1 << 20)
        received, before, started = 0, 0, 0.0
        while (now := time.monotonic()) < end:
            if not started and now >= begin:
                before, started = received, now
            received += connection.recv_into(buffer, 0, socket.MSG_TRUNC)
        return (received - before) * 8 / (now - started) if started else 0.0
