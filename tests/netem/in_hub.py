"""Scenes for test_hosts.py. Each runs in a process of its own, since entering the hub cannot be undone.

python in_hub.py SCENE prints the scene's result and the namespaces it used, as JSON.
"""

import asyncio
import ctypes
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from netem.hosts import (
    HUB_ADDRESS,
    AttachError,
    Host,
    Hub,
    NamespaceError,
    enter_host,
    enter_hub,
    wait_for_link,
)
from netem.kernel import PlainLinks

namespaces: Final[set[int]] = set()


class Device:
    """A process that enters its own namespace, waits for its link, does one thing, and waits for its end."""

    def __init__(self, act: Callable[[], Any] = lambda: None) -> None:
        received, replies = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # die with the scene, also when it fails
            enter_host()
            os.write(replies, b"entered\n")
            wait_for_link()
            os.write(replies, json.dumps(act()).encode() + b"\n")
            signal.pause()
        os.close(replies)
        self._lines = os.fdopen(received)
        assert self._lines.readline() == "entered\n"
        namespaces.add(Path(f"/proc/{self.pid}/ns/net").stat().st_ino)

    async def result(self) -> Any:
        return json.loads(await asyncio.to_thread(self._lines.readline))

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._lines.close()


def interfaces() -> list[str]:
    return sorted(name for _, name in socket.if_nameindex())


def ipv6_addresses(interface: str) -> int:
    listing = Path("/proc/net/if_inet6")  # absent where the kernel has no IPv6
    return listing.read_text().split().count(interface) if listing.exists() else 0


def refusal(address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), timeout=0.3).close()
    except OSError as error:
        return type(error).__name__
    return "reached"


def ping(address: str) -> float:
    """The round trip of one ICMP echo in milliseconds."""
    header = struct.pack("!BBHHH", 8, 0, 0, 1, 1)
    checksum = ~sum(struct.unpack("!4H", header)) & 0xFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as probe:
        probe.settimeout(5)
        start = time.perf_counter()
        probe.sendto(struct.pack("!BBHHH", 8, 0, checksum, 1, 1), (address, 0))
        while probe.recv(1500)[20] != 0:  # not the reply
            pass
        return (time.perf_counter() - start) * 1000


async def reach() -> Any:
    """Devices reach a server on the hub's address, which was bound before them, and nothing else."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = writer.get_extra_info("peername")[0]
        congestion = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        writer.write(seen.encode() + b" " + congestion.rstrip(b"\0") + b" " + await reader.readline())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, HUB_ADDRESS, 1883)
    elsewhere = sys.argv[2]

    def explore() -> Any:
        with socket.create_connection((HUB_ADDRESS, 1883), timeout=5) as connection:
            connection.sendall(b"hello\n")
            answer = connection.makefile().readline()
            congestion = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        return {
            "answer": answer.strip(),
            "congestion": congestion.rstrip(b"\0").decode(),
            "ping_ms": ping(HUB_ADDRESS),
            "interfaces": interfaces(),
            "ipv6": ipv6_addresses("uplink"),
            "other device": refusal("10.83.1.1", 1883),
            "host": refusal(elsewhere, 22),
            "internet": refusal("192.0.2.1", 443),
        }

    devices = [Device(), Device(explore)]
    async with server, Hub(PlainLinks(), congestion="reno") as hub:
        hosts = [await hub.attach(f"device-{number}", device.pid) for number, device in enumerate(devices)]
        result = await devices[1].result()
        assert hub.hosts == tuple(hosts)
    for device in devices:
        device.kill()
    return {"address": hosts[1].address, **result}


async def fifty() -> Any:
    """Fifty devices with long names at once."""
    devices = [Device() for _ in range(50)]
    name = "a device with a name that no interface could have, number {}".format
    async with Hub(PlainLinks()) as hub:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            attaching = [
                tasks.create_task(hub.attach(name(number), device.pid)) for number, device in enumerate(devices)
            ]
        hosts: list[Host] = [task.result() for task in attaching]
        elapsed_s = time.perf_counter() - start
        for device in devices:
            assert await device.result() is None
        attached = interfaces()
        await hub.detach(name(7))
        without_one = interfaces()
    for device in devices:
        device.kill()
    return {
        "elapsed_s": elapsed_s,
        "addresses": [host.address for host in hosts],
        "hub_interfaces": [host.hub_interface for host in hosts],
        "attached": attached,
        "without_one": without_one,
        "left": interfaces(),
    }


async def device_dies() -> Any:
    """A device's death takes its link away; its name can be used again."""
    first, second = Device(), Device()
    async with Hub(PlainLinks()) as hub:
        await hub.attach("phone", first.pid)
        first.kill()
        for _ in range(500):  # the kernel takes namespaces down in the background
            if interfaces() == ["lo"]:
                break
            await asyncio.sleep(0.01)
        assert interfaces() == ["lo"]
        await hub.detach("phone")
        again = await hub.attach("phone", second.pid)
    second.kill()
    return again.address


async def failing_body() -> Any:
    """An exception in the body removes the links."""
    device = Device()
    try:
        async with Hub(PlainLinks()) as hub:
            await hub.attach("phone", device.pid)
            raise ZeroDivisionError
    except ZeroDivisionError:
        return interfaces()
    finally:
        device.kill()


async def wrong_attachments() -> Any:
    """What attach and detach say when they cannot."""
    device, other, dead = Device(), Device(), Device()
    dead.kill()
    sentences = []
    async with Hub(PlainLinks()) as hub:
        await hub.attach("phone", device.pid)
        for attempt in (
            hub.attach("phone", device.pid),
            hub.attach("dead", dead.pid),
            hub.attach("runner", os.getpid()),
            hub.attach("again", device.pid),
            hub.attach("x" * 300, other.pid),
            hub.detach("nobody"),
        ):
            try:
                await attempt
            except AttachError as error:
                sentences.append(str(error))
        left = interfaces()
    device.kill()
    other.kill()
    return {"sentences": sentences, "left": left}


async def unknown_congestion() -> Any:
    """What attach says to a congestion control that the kernel does not have, and what is left of the attempt."""
    device = Device()
    async with Hub(PlainLinks(), congestion="vegetarian") as hub:
        try:
            await hub.attach("phone", device.pid)
        except AttachError as error:
            sentence = str(error)
        left = interfaces()
    device.kill()
    return {"sentence": sentence, "left": left}


def threads() -> Any:
    """Entering the hub with a second thread."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        enter_hub()
    except NamespaceError as error:
        return str(error)
    finally:
        done.set()
        thread.join()


def refused() -> Any:
    """Entering the hub where the kernel does not permit it."""
    try:
        enter_hub()
    except NamespaceError as error:
        return str(error)


async def on_the_host() -> Any:
    """A Hub in a process that is still on the host's network."""
    try:
        async with Hub(PlainLinks()):
            pass
    except NamespaceError as error:
        return str(error)


def main() -> None:
    scene = globals()[sys.argv[1]]
    if scene in {threads, refused}:
        result = scene()
    else:
        if scene is not on_the_host:
            enter_hub()
            namespaces.add(Path("/proc/self/ns/net").stat().st_ino)
        result = asyncio.run(scene())
    print(json.dumps({"result": result, "namespaces": sorted(namespaces)}))


if __name__ == "__main__":
    main()
