"""What happens to userspace links when one of those that hold them ends. A scene's process enters the hub.

python -m tests.netem.userspace_scenes SCENE prints the scene's result as JSON.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

from netem.hosts import AttachError, enter_hub
from netem.link import Duration, Link, LinkState, Probability, Rate
from netem.userspace import SchedulerEnded, UserspaceLinks
from tests.netem.measuring import Cell

SLOW = Link(up=LinkState(rate=Rate("5mbit"), delay=Duration("20ms")), down=LinkState(delay=Duration("10ms")))


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def children() -> dict[int, str]:
    """The command lines of this process's living children."""
    found = {}
    for pid in Path("/proc/self/task").glob("*/children"):
        for child in map(int, pid.read_text().split()):
            with contextlib.suppress(OSError):
                found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    return found


def scheduler() -> int:
    (pid,) = (pid for pid, command in children().items() if "netem.scheduler" in command)
    return pid


def takes_huge_pages(pid: int) -> bool:
    """Whether a process has asked for huge pages in any part of its memory."""
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    return any("hg" in line.split() for line in lines if line.startswith("VmFlags"))


async def until_there_are_only(*names: str) -> None:
    for _ in range(1000):  # the kernel takes interfaces down in the background
        if interfaces() == set(names):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(interfaces())


async def device_dies() -> Any:
    """The link goes with its device, the others stay, the counters can still be read, the name is free again."""
    links = UserspaceLinks()
    async with Cell(links, devices=2, link=SLOW) as cell:
        await cell.pings(3, number=0)
        os.kill(cell.devices[0].pid, signal.SIGKILL)
        await until_there_are_only("lo", "device2")
        try:
            await cell.shape(SLOW, number=0)
            refusal = ""
        except AttachError as error:
            refusal = str(error)
        counted = links.counters(cell.hub.hosts[0])
        trips = await cell.pings(3, number=1)
        await cell.hub.detach(cell.name(0))
        return {"refusal": refusal, "seen": counted.up.packets_out, "trips": trips, "left": sorted(interfaces())}


async def scheduler_dies() -> Any:
    """Everybody learns of it: who waits, who shapes, and the devices, whose link is gone; the end is in order."""
    links = UserspaceLinks()
    async with Cell(links, link=SLOW) as cell:
        waiting = asyncio.create_task(links.wait())
        os.kill(scheduler(), signal.SIGKILL)
        try:
            await asyncio.wait_for(waiting, 10)
        except SchedulerEnded as error:
            learnt = str(error)
        await until_there_are_only("lo")
        try:
            await cell.shape(SLOW)
            refusal = ""
        except AttachError as error:
            refusal = str(error)
        await cell.hub.detach(cell.name(0))
    return {"learnt": learnt, "refusal": refusal, "left": sorted(children().values())}


async def hub_is_killed() -> Any:
    """Says who is there, then waits for its own end."""
    async with Cell(UserspaceLinks(), link=SLOW) as cell:
        print(json.dumps({"scheduler": scheduler(), "device": cell.devices[0].pid}), flush=True)
        await asyncio.sleep(60)


async def interrupted() -> Any:
    """Ctrl-C is for the hub: the scheduler goes on until the hub is done."""
    async with Cell(UserspaceLinks(), link=SLOW) as cell:
        os.kill(scheduler(), signal.SIGINT)
        return await cell.pings(3)


async def shaped() -> Any:
    """Round trips, the state that is read back, what was counted, and whether packets may lie in huge pages."""
    links = UserspaceLinks()
    async with Cell(links, link=SLOW) as cell:
        trips = await cell.pings(10)
        counted = links.counters(cell.hub.hosts[0])
        same = await cell.read() == SLOW
        huge = takes_huge_pages(scheduler())
    return {"trips": trips, "same": same, "counters": msgspec.to_builtins(counted), "huge": huge}


async def same_seed() -> Any:
    """Which datagrams are lost with one seed, with the same again, and with another."""
    link = Link(up=LinkState(loss=Probability("30%")))
    patterns = []
    for seed in (1, 1, 2):
        async with Cell(UserspaceLinks(seed=seed), link=link) as cell:
            arrived = await cell.datagrams("up", 500, every=0.001)
            patterns.append(sorted(datagram.number for datagram in arrived))
    return patterns


def main() -> None:
    enter_hub()
    print(json.dumps(asyncio.run(globals()[sys.argv[1]]())))


if __name__ == "__main__":
    main()
