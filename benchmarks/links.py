"""What links cost: setting up a cell beside a shell script of ``ip`` and ``tc``, and carrying packets.

    python -m benchmarks.links [--hosts 50 200] [--devices 1 8] [--seconds 5]

Needs root. Set-up is from nothing to hosts that can be reached over links of 20 Mbit/s: for us, processes that enter
namespaces of their own and are attached to a hub (in the userspace kind's case, including the start of its scheduler);
for the script, the same namespaces, pairs of interfaces, addresses, routes and, where the kernel has it, netem. Then
TCP goes over unlimited links as fast as it can, down to all devices at once. CPU time is that of all processes
taking part, of which the packet scheduler is one. Seconds are wall-clock; on a busy machine look at the CPU times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from typing import Any, ClassVar

import psutil
from rich.console import Console
from rich.table import Table

from netem.hosts import HUB_ADDRESS, Hub, Links, LinksUnavailable, enter_host, enter_hub
from netem.kernel import NetemLinks, PlainLinks
from netem.link import MTU, Duration, Link, LinkState, Rate
from netem.userspace import UserspaceLinks
from tests.netem.measuring import Cell


class SinglePackets(PlainLinks):
    """Virtual Ethernet that nothing shapes, but that passes no bundles of packets, as links that are shaped."""

    _options: ClassVar = {"gso_max_segs": 1}


KINDS: dict[str, type[Links]] = {"unshaped": SinglePackets, "netem": NetemLinks, "userspace": UserspaceLinks}
DIRECTION = LinkState(rate=Rate("20mbit"), delay=Duration("10ms"))
SHAPED = Link(up=DIRECTION, down=DIRECTION)
NETEM = f"netem rate 20mbit delay 10ms limit {DIRECTION.queue}"

Result = dict[str, float]


def cpu_s() -> float:
    """Of this process and its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


# Each in a process of its own, which enters the hub ---------------------------------------------------------


async def set_up(links: Links, hosts: int) -> Result:
    began = time.perf_counter()
    pids = [sleeper() for _ in range(hosts)]
    try:
        async with Hub(links) as hub:
            for number, pid in enumerate(pids):
                await hub.attach(f"d{number}", pid, Link() if isinstance(links, PlainLinks) else SHAPED)
            elapsed = time.perf_counter() - began
    finally:
        end(pids)
    return {"seconds": elapsed, "cpu_s": cpu_s()}


def sleeper() -> int:
    """A device that does nothing."""
    entered, enter = os.pipe()
    pid = os.fork()
    if pid == 0:
        enter_host()
        os.write(enter, b"\0")
        signal.pause()
    os.read(entered, 1)
    os.close(entered)
    os.close(enter)
    return pid


def end(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


async def carry(links: Links, devices: int, seconds: float) -> Result:
    settle = 1.0
    began = cpu_s()
    async with Cell(links, devices=devices) as cell:
        start = scheduler_cpu_s()
        rates = await cell.goodput("down", seconds, settle=settle, numbers=range(devices))
        scheduler = scheduler_cpu_s() - start
    gbit = sum(rates) * (seconds + settle) / 1e9
    return {"gbit_per_s": sum(rates) / 1e9, "cpu_s": (cpu_s() - began) / gbit, "scheduler_cpu_s": scheduler / gbit}


def scheduler_cpu_s() -> float:
    children = psutil.Process().children()
    return sum(sum(child.cpu_times()[:2]) for child in children if "netem.scheduler" in child.cmdline())


# The script ---------------------------------------------------------------------------------------------------


def script(hosts: int, *, netem: bool) -> str:
    lines = ["set -e", "mount -t tmpfs none /run", "ip link set lo up", f"ip addr add {HUB_ADDRESS}/32 dev lo"]
    for number in range(1, hosts + 1):
        name, high, low = f"device{number}", 1 + number // 250, 1 + number % 250
        address, inside = f"10.83.{high}.{low}", f"ip -n d{number}"
        lines += [
            f"ip netns add d{number}",
            f"ip link add {name} mtu {MTU} type veth peer name uplink mtu {MTU} netns d{number}",
            f"ip addr add {HUB_ADDRESS} peer {address} dev {name}",
            f"ip link set {name} up",
            f"{inside} link set lo up",
            f"{inside} addr add {address} peer {HUB_ADDRESS} dev uplink",
            f"{inside} link set uplink up",
            f"{inside} route add default via {HUB_ADDRESS}",
        ]
        if netem:
            lines += [f"tc qdisc add dev {name} root {NETEM}", f"tc -n d{number} qdisc add dev uplink root {NETEM}"]
    return "\n".join(lines)


def set_up_by_script(hosts: int, *, netem: bool) -> Result:
    before, began = cpu_s(), time.perf_counter()
    # What it makes goes with its own namespaces.
    subprocess.run(["unshare", "--net", "--mount", "sh"], input=script(hosts, netem=netem), text=True, check=True)
    return {"seconds": time.perf_counter() - began, "cpu_s": cpu_s() - before}


# All of it ------------------------------------------------------------------------------------------------------


def measured(kind: str, what: str, *arguments: float) -> Result | str:
    """The result, or why these links cannot be had."""
    command = [sys.executable, "-m", "benchmarks.links", "--measure", json.dumps([kind, what, *arguments])]
    answer: Result | str = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return answer


def measure(kind: str, what: str, *arguments: Any) -> None:
    enter_hub()
    scene = {"set_up": set_up, "carry": carry}[what]
    try:
        print(json.dumps(asyncio.run(scene(KINDS[kind](), *arguments))))
    except LinksUnavailable as error:
        print(json.dumps(str(error)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(*json.loads(given.measure))
        return
    console = Console()
    load = os.getloadavg()[0]
    console.print(f"{os.cpu_count()} cores, load {load:.1f}{': a busy machine' if load > 1 else ''}")
    kinds = available(console)
    setting_up = Table("set-up", "hosts", "seconds", "CPU s", "of the script's seconds", "of its CPU s")
    for hosts in given.hosts:
        scripted = set_up_by_script(hosts, netem="netem" in kinds)
        setting_up.add_row("script", str(hosts), f"{scripted['seconds']:.2f}", f"{scripted['cpu_s']:.2f}", "1", "1")
        for kind in kinds:
            ours = measured(kind, "set_up", hosts)
            assert isinstance(ours, dict), ours
            figures = (f"{ours[what]:.2f}" for what in ("seconds", "cpu_s"))
            ratios = (f"{ours[what] / scripted[what]:.2f}" for what in ("seconds", "cpu_s"))
            setting_up.add_row(kind, str(hosts), *figures, *ratios)
    console.print(setting_up)
    carrying = Table("carrying", "devices", "Gbit/s", "of unshaped", "CPU s/Gbit", "of unshaped", "of it, scheduler")
    for devices in given.devices:
        plain: Result = {}
        for kind in kinds:
            ours = measured(kind, "carry", devices, given.seconds)
            assert isinstance(ours, dict), ours
            plain = plain or ours
            carrying.add_row(
                kind,
                str(devices),
                f"{ours['gbit_per_s']:.2f}",
                f"{ours['gbit_per_s'] / plain['gbit_per_s']:.2f}",
                f"{ours['cpu_s']:.2f}",
                f"{ours['cpu_s'] / plain['cpu_s']:.1f}",
                f"{ours['scheduler_cpu_s']:.2f}",
            )
    console.print(carrying)


def available(console: Console) -> list[str]:
    """The kinds of links that this machine has; the first is the one that nothing shapes."""
    kinds = []
    for kind in KINDS:
        answer = measured(kind, "set_up", 1)
        if isinstance(answer, str):
            console.print(f"no {kind}: {answer}")
        else:
            kinds.append(kind)
    return kinds


if __name__ == "__main__":
    main()
