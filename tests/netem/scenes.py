"""What is measured of each implementation of links. A scene runs in a process of its own, which enters the hub:

python -m tests.netem.scenes MODULE:CLASS SCENE '{"argument": ...}' prints the scene's result as JSON.
"""

import asyncio
import importlib
import json
import sys
import time
from typing import Any

import msgspec

from netem.hosts import Links, enter_hub
from netem.link import MTU, Duration, Link, LinkState, Rate, decode_quantity, mismatch
from tests.netem.measuring import UDP_PAYLOAD, Cell, Direction, own_namespace, traffic


def one_way(direction: Direction, state: LinkState) -> Link:
    return Link(up=state) if direction == "up" else Link(down=state)


async def delay(links: Links, direction: Direction, state: LinkState, count: int) -> list[float]:
    """Round trips in seconds over a link with a state in one direction."""
    async with Cell(links, link=one_way(direction, state)) as cell:
        return await cell.pings(count)


async def datagrams(
    links: Links,
    direction: Direction,
    state: LinkState,
    count: int,
    *,
    every: float = 0.002,
    together: int = 10,
    size: int = 64,
    quiet: float = 1.5,
) -> list[Any]:
    """The datagrams that arrived of `count`: number, sent, arrived, intact."""
    async with Cell(links, link=one_way(direction, state)) as cell:
        return list(await cell.datagrams(direction, count, every=every, together=together, size=size, quiet=quiet))


async def goodput(
    links: Links,
    direction: Direction,
    link: Link,
    *,
    devices: int = 1,
    settle: float = 1.5,
    seconds: float = 3.0,
    congestion: str = "cubic",
) -> list[float]:
    """TCP's goodput in bit/s over each of so many links at the same time."""
    async with Cell(links, devices=devices, link=link, congestion=congestion) as cell:
        return await cell.goodput(direction, seconds, settle=settle, numbers=range(devices))


async def packet_sizes(links: Links, link: Link) -> dict[str, float]:
    """The mean size of packets as the device's interface sees them, while TCP fills the link down and up."""
    async with Cell(links, link=link) as cell:
        (device,), (host,) = cell.devices, cell.hub.hosts
        await cell.goodput("down", 1.0, settle=0.5)
        received, packets_received, _, _ = await device.call(traffic, host.device_interface)
        _, _, sent_before, packets_before = await device.call(traffic, host.device_interface)
        await cell.goodput("up", 1.0, settle=0.5)
        _, _, sent, packets_sent = await device.call(traffic, host.device_interface)
    return {
        "down": received / packets_received,
        "up": (sent - sent_before) / (packets_sent - packets_before),
    }


async def hold(links: Links, link: Link) -> None:
    """Fill two links until somebody kills this process; say first which namespaces are in use."""
    async with Cell(links, devices=2, link=link) as cell:
        await cell.goodput("up", 0.2, settle=0.2, numbers=range(2))
        print(json.dumps([await end.call(own_namespace) for end in (*cell.devices, cell.homes[0])]), flush=True)
        await cell.goodput("up", 60, numbers=range(2))


async def read_back(links: Links, states: list[Link]) -> list[str | None]:
    """Apply one state after the other, and compare each with what is read back."""
    async with Cell(links) as cell:
        found = []
        for state in states:
            await cell.shape(state)
            found.append(mismatch(state, await cell.read()))
    return found


async def changes(
    links: Links, direction: Direction, rates: list[Rate], *, every: float, wait: Duration
) -> dict[str, Any]:
    """Change a link's rate again and again under trains of ten full packets, and see what became of them.

    A train is sent back to back and arrives at the link's rate. Returns the rates and when they were asked for, the
    datagrams that arrived, and how many were sent.
    """
    train, pause = 10, 0.025

    def state(rate: Rate) -> Link:
        # A sender that was held up sends several trains at once, which is not to lose packets either.
        return one_way(direction, LinkState(rate=rate, delay=wait, limit=1000))

    async with Cell(links, link=state(rates[-1])) as cell:
        count = train * round((every * len(rates) + 0.5) / pause)
        traffic = asyncio.create_task(cell.datagrams(direction, count, every=pause, together=train, size=UDP_PAYLOAD))
        await asyncio.sleep(0.3)
        moments = []
        for rate in rates:
            before = time.time()
            await cell.shape(state(rate))
            moments.append((float(rate), before))
            await asyncio.sleep(max(0.0, before + every - time.time()))
        arrived = await traffic
    return {"sent": count, "train": train, "packet_bits": 8 * MTU, "changes": moments, "arrived": arrived}


def main() -> None:
    implementation, scene, arguments = sys.argv[1:]
    module, kind = implementation.split(":")
    links = getattr(importlib.import_module(module), kind)()
    act = globals()[scene]
    wanted = {
        name: msgspec.convert(value, act.__annotations__[name], dec_hook=decode_quantity)
        for name, value in json.loads(arguments).items()
    }
    enter_hub()
    print(json.dumps(asyncio.run(act(links, **wanted))))


if __name__ == "__main__":
    main()
