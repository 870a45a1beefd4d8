"""Scenes for test_one_end.py, each in a process of its own that enters a hub: python -m ... SCENE prints JSON."""

import asyncio
import json
import os
import socket
import sys

from pyroute2 import IPRoute

from netem.hosts import LinksUnavailable, enter_hub
from netem.kernel import OneEnd
from netem.link import Link, LinkState, Rate
from tests.kernel.variants import OneEndLinks
from tests.netem.measuring import Cell, traffic


def interfaces() -> list[str]:
    return sorted(name for _, name in socket.if_nameindex())


def qdiscs(interface: str) -> list[str]:
    index = socket.if_nametoindex(interface)
    with IPRoute() as kernel:
        return sorted(qdisc.get_attr("TCA_KIND") for qdisc in kernel.get_qdiscs(index))


def add(interface: str) -> None:
    with IPRoute() as kernel:
        kernel.link("add", kind="veth", ifname=interface, peer={"ifname": f"{interface}-peer"})
        kernel.link("set", index=socket.if_nametoindex(interface), state="up")


def shape_and_die(interface: str) -> None:
    pid = os.fork()
    if pid == 0:
        OneEnd(interface).__enter__().apply(Link(up=LinkState(rate=Rate("1mbit"))))
        os._exit(0)
    os.waitpid(pid, 0)


def bundles() -> dict[str, float]:
    """The mean size of packets from the device where they have been shaped."""

    async def measure() -> dict[str, float]:
        state = LinkState(rate=Rate("50mbit"))
        async with Cell(OneEndLinks(), link=Link(up=state, down=state)) as cell:
            await cell.goodput("up", 1.0, settle=0.5)
            way_round = next(name for name in interfaces() if name.startswith("semct-"))
            _, _, sent, packets = await cell.homes[0].call(traffic, way_round)
        return {"way round": sent / packets}

    return asyncio.run(measure())


def leftovers() -> dict[str, list[str]]:
    """What is there before, while and after, and what happens to what killed processes left."""
    add("container")
    before = qdiscs("container")
    with OneEnd("container"):
        during = qdiscs("container")
    after = qdiscs("container")
    shape_and_die("container")
    killed = qdiscs("container")
    with OneEnd("container"):
        pass
    again = qdiscs("container")
    left = interfaces()
    add("gone")
    shape_and_die("gone")
    with IPRoute() as kernel:
        kernel.link("del", ifname="gone")
    orphaned = interfaces()
    with OneEnd("container"):
        pass
    return {
        "before": before,
        "during": during,
        "after": after,
        "killed": killed,
        "again": again,
        "left": left,
        "orphaned": orphaned,
        "at last": interfaces(),
    }


def nothing_there() -> dict[str, str]:
    try:
        with OneEnd("nothing"):
            return {}
    except LinksUnavailable as error:
        return {"sentence": str(error)}


if __name__ == "__main__":
    enter_hub()
    print(json.dumps(globals()[sys.argv[1]]()))
