"""What the bus costs: round trips, and latents handed out to many devices, beside Mosquitto's own clients.

    python benchmarks/bus.py [--broker mosquitto|amqtt] [--devices 8 50] [--rounds 10]

A round hands one 512 KiB latent to each device at once, each on its own topic and with QoS 1, as an edge does
when the shared steps of a cluster end. Delivery is the time from the start of a round to the receipt of a
latent, the rate is all bytes of a round by the time of its last receipt. The devices are sessions in four
child processes, so that one interpreter does not do all the receiving; the sender is one session. The
comparison is one running ``mosquitto_pub`` and one ``mosquitto_sub`` for each device, C programs that get the
same bytes through pipes large enough to take a latent in one write. All share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from broker.local import LocalBroker
from broker.messages import Latent, Work
from broker.session import Session
from broker.topics import Topics

LATENT = 512 * 1024  # bytes: SD3 Medium, 16 x 128 x 128 float16
RECEIVERS = 4  # processes that hold the devices' sessions
HOST = "127.0.0.1"
topics = Topics("bench")

Round = tuple[float, list[float]]
"""When a round started and when each latent was received, seconds of the epoch."""


def work(size: int) -> Work:
    latent = Latent(dtype="float16", shape=(size // 128, 64), data=memoryview(secrets.token_bytes(size)))
    return Work(round="r1", request="q1", reply="d0", seed=1, steps=28, route=(), latent=latent, sent=0.0, deadline=2e9)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# The child processes of this file -------------------------------------------------------------------------


async def echo(port: int) -> None:
    """A device that sends back what it gets."""
    async with Session(HOST, port, testbed="bench", name="d0", subscriptions=topics.to_node("d0")) as device:
        print("ready", flush=True)
        async for incoming in device:
            await device.publish(topics.forward("d0", "edge"), incoming.message)


async def receive(port: int, names: list[str]) -> None:
    """Devices that print the time of each receipt."""

    async def one(name: str) -> None:
        async with Session(HOST, port, testbed="bench", name=name, subscriptions=topics.to_node(name)) as device:
            print("ready", flush=True)
            async for incoming in device:
                print(incoming.received, flush=True)

    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(one(name))


# Measuring ------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def children(*commands: list[str], stdin: bool = False) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    pipe = asyncio.subprocess.PIPE
    running = [
        await asyncio.create_subprocess_exec(*command, stdin=pipe if stdin else None, stdout=None if stdin else pipe)
        for command in commands
    ]
    try:
        yield running
    finally:
        for child in running:
            child.kill()
            await child.wait()


async def lines(children: list[asyncio.subprocess.Process], each: list[int]) -> list[str]:
    """So many lines of each child's output."""

    async def some(child: asyncio.subprocess.Process, count: int) -> list[str]:
        assert child.stdout is not None
        return [(await child.stdout.readline()).decode() for _ in range(count)]

    return [line for part in await asyncio.gather(*map(some, children, each)) for line in part]


async def round_trips(port: int, size: int, count: int) -> list[float]:
    """Seconds from publishing to an echoing device until its answer is read."""
    message = work(size)
    times = []
    async with (
        children([sys.executable, __file__, "--echo", str(port)]) as echoing,
        Session(HOST, port, testbed="bench", name="edge", subscriptions=topics.to_node("edge")) as edge,
    ):
        await lines(echoing, [1])
        for _ in range(count + 5):
            began = time.perf_counter()
            await edge.publish(topics.inbox("d0", "work"), message)
            await anext(edge)
            times.append(time.perf_counter() - began)
    return times[5:]


async def hand_out(port: int, devices: int, rounds: int) -> list[Round]:
    """Rounds through sessions."""
    names = [f"d{n}" for n in range(devices)]
    shares = [names[n::RECEIVERS] for n in range(RECEIVERS)]
    each = [len(share) for share in shares]
    message = work(LATENT)
    async with (
        children(*([sys.executable, __file__, "--receive", str(port), *share] for share in shares)) as receivers,
        Session(HOST, port, testbed="bench", name="edge") as edge,
    ):
        await lines(receivers, each)

        async def send() -> None:
            await asyncio.gather(*(edge.publish(topics.inbox(name, "work"), message) for name in names))

        return await measure(rounds, send, lambda: lines(receivers, each))


async def hand_out_by_mosquitto(port: int, devices: int, rounds: int) -> list[Round]:
    """The same rounds through ``mosquitto_pub`` and ``mosquitto_sub``."""
    address = ["-h", HOST, "-p", str(port), "--nodelay", "-q", "1", "-t"]
    names = [topics.inbox(f"d{n}", "work") for n in range(devices)]
    line = secrets.token_hex(LATENT // 2).encode()[:-1] + b"\n"
    async with (
        children(*(["mosquitto_sub", *address, name, "-F", "%U"] for name in names)) as receivers,
        children(*(["mosquitto_pub", *address, name, "-l"] for name in names), stdin=True) as senders,
    ):
        await asyncio.sleep(1.0)  # they do not say when they are connected
        inputs = []
        for sender in senders:
            assert sender.stdin is not None
            inputs.append(sender.stdin.get_extra_info("pipe").fileno())
            fcntl.fcntl(inputs[-1], fcntl.F_SETPIPE_SZ, 2 * LATENT)

        async def send() -> None:
            for stdin in inputs:
                assert os.write(stdin, line) == len(line)

        return await measure(rounds, send, lambda: lines(receivers, [1] * devices))


async def measure(
    rounds: int, send: Callable[[], Awaitable[None]], received: Callable[[], Awaitable[list[str]]]
) -> list[Round]:
    results = []
    for _ in range(rounds + 1):
        began = time.time()
        sending = asyncio.ensure_future(send())
        results.append((began, [float(line) for line in await received()]))
        await sending
    return results[1:]


async def main(implementation: str | None, counts: list[int], rounds: int) -> None:
    console = Console()
    with socket.socket() as probe, tempfile.TemporaryDirectory() as directory:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
        probe.close()
        async with LocalBroker(
            hosts=[HOST],
            port=port,
            directory=Path(directory),
            implementation=implementation,  # type: ignore[arg-type]
        ) as broker:
            load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
            table = Table(title=f"round trip over {broker.version} ({load})")
            for title in ("bytes", "p50 ms", "p99 ms"):
                table.add_column(title, justify="right")
            for size, count in ((128, 500), (LATENT, 100)):
                times = await round_trips(port, size, count)
                table.add_row(str(size), f"{1e3 * statistics.median(times):.2f}", f"{1e3 * quantile(times, 0.99):.2f}")
            console.print(table)

            table = Table(title=f"one latent of 512 KiB to each device at once over {broker.version}")
            for title in ("devices", "through", "MiB/s", "p50 ms", "p99 ms"):
                table.add_column(title, justify="right")
            ways = {"sessions": hand_out}
            if shutil.which("mosquitto_pub"):
                ways["mosquitto_pub, _sub"] = hand_out_by_mosquitto
            for devices in counts:
                figures = []
                for way, run in ways.items():
                    results = await run(port, devices, rounds)
                    rate = statistics.median(
                        devices * LATENT / 2**20 / (max(times) - began) for began, times in results
                    )
                    delivery = [1e3 * (at - began) for began, times in results for at in times]
                    figures.append((rate, statistics.median(delivery), quantile(delivery, 0.99)))
                    table.add_row(str(devices), way, *(f"{figure:.1f}" for figure in figures[-1]))
                if len(figures) == 2:
                    ratios = (ours / theirs for ours, theirs in zip(*figures, strict=True))
                    table.add_row("", "ratio", *(f"{ratio:.2f}" for ratio in ratios), end_section=True)
            console.print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--echo"]:
        asyncio.run(echo(int(sys.argv[2])))
    elif sys.argv[1:2] == ["--receive"]:
        asyncio.run(receive(int(sys.argv[2]), sys.argv[3:]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--broker", choices=["mosquitto", "amqtt"], help="default: what a local run takes")
        parser.add_argument("--devices", type=int, nargs="+", default=[8, 50], metavar="N")
        parser.add_argument("--rounds", type=int, default=10)
        arguments = parser.parse_args()
        asyncio.run(main(arguments.broker, arguments.devices, arguments.rounds))
