"""A storm of broken messages against a running edge and device: do they live, grow, or keep others waiting?

    python benchmarks/storm.py [--payloads 1000000] [--rate 1000] [--seed 0]

An edge and a device run as processes of their own, natively, over a real Mosquitto. Valid messages of every type are
cut, lengthened, overwritten and put where they do not belong, and go to all topics that either node reads: both inboxes
of each, and those of a hostile device, which an allowance limits. Meanwhile a user asks the device for pictures, one
after the other. Latency is compared with the same before the storm, memory (USS) with that after the first tenth of it.
A ping to each node after every so many payloads makes sure that all of them have been read. Left out is what happens to
be a right order to leave. The sender is a process of its own at the lowest priority, since an attacker brings its own
processor; without a ``--rate`` (payloads a second) it is as fast as both nodes can read.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import paho.mqtt.client as paho
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from broker.local import LocalBroker
from broker.messages import Ask, Birth, Close, Latent, MalformedMessage, Ping, Pong, Result, Round, Work, decode, encode
from broker.protocol import EXAMPLES
from broker.session import Session
from broker.topics import SPEAKER, Topics
from device_node.node import DeviceSettings
from edge_node.node import EdgeSettings

HOST = "127.0.0.1"
TESTBED = "storm"
TOPICS = Topics(TESTBED)
STEPS = 4
TOGETHER = 500  # payloads between two pings
SENDING = [sys.executable, __file__, "--send"]


class Cell:
    """An edge, a device, and a runner that listens to both."""

    def __init__(self, session: Session, processes: dict[str, psutil.Process]) -> None:
        self.session = session
        self.processes = processes
        self._heard: dict[str, asyncio.Event] = {}
        self._results: dict[str, asyncio.Future[Result]] = {}
        self.complete = asyncio.Event()
        self._ready: set[str] = set()

    async def listen(self) -> None:
        """Take what the nodes say."""
        async for incoming in self.session:
            match incoming.message:
                case Birth(state="ready") as birth:
                    self._ready.add(birth.name)
                    if self._ready == set(self.processes):
                        self.complete.set()
                case Pong() as pong if (event := self._heard.get(pong.node)) is not None:
                    event.set()
                case Result() as result if (waiting := self._results.get(result.request)) and not waiting.done():
                    waiting.set_result(result)

    async def pinged(self) -> None:
        """Until both nodes have answered: what they were sent before, they have read."""
        for node in self.processes:
            self._heard[node] = asyncio.Event()
            await self.session.publish(TOPICS.inbox(node, "control"), Ping(sent=time.time()))
        async with asyncio.timeout(120):
            for event in self._heard.values():
                await event.wait()

    async def latency(self, number: int) -> float:
        """Seconds from a user's wish to the picture, part on the edge and part on the device."""
        name = f"calm-{number}"
        order = Round(round=name, framework="edge-device", seed=1, requests=1, window=30.0)
        await self.session.publish(TOPICS.inbox("edge", "control"), order)
        self._results[name] = asyncio.get_running_loop().create_future()
        ask = Ask(round=name, request=name, prompt="a fox", seed=1, steps=STEPS, deadline=time.time() + 60)
        await self.session.publish(TOPICS.inbox("device", "control"), ask)
        async with asyncio.timeout(90):
            result = await self._results[name]
        if result.outcome != "answered":
            raise RuntimeError(f"a valid request was {result.outcome}: {result.reason}")
        for node in self.processes:
            await self.session.publish(TOPICS.inbox(node, "control"), Close(round=name))
        return result.finished - result.asked

    def memory(self) -> dict[str, float]:
        """MiB of private memory of each node."""
        return {name: process.memory_full_info().uss / 2**20 for name, process in self.processes.items()}


@asynccontextmanager
async def a_cell(folder: Path) -> AsyncIterator[tuple[Cell, int]]:
    """A cell that is up, and its broker's port."""
    with socket.create_server((HOST, 0)) as probe:
        free = probe.getsockname()[1]
    async with LocalBroker(hosts=[HOST], port=free, directory=folder) as broker:
        common = {"testbed": TESTBED, "host": HOST, "port": broker.port, "rows": 1}
        settings = {
            "edge": EdgeSettings(name="edge", writer="medoid", **common),  # type: ignore[arg-type]
            "device": DeviceSettings(name="device", **common),  # type: ignore[arg-type]
        }
        children, processes = [], {}
        try:
            for name, its in settings.items():
                path = folder / f"{name}.json"
                path.write_bytes(msgspec.json.encode(its))
                log = (folder / f"{name}.log").open("wb")
                child = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", f"{name}_node", str(path), stdout=log, stderr=log
                )
                children.append(child)
                processes[name] = psutil.Process(child.pid)
            whats = ("birth", "result", "clock")
            async with (
                Session(
                    HOST,
                    broker.port,
                    testbed=TESTBED,
                    name="runner",
                    subscriptions=[TOPICS.every(w) for w in whats],  # type: ignore[arg-type]
                ) as session,
                asyncio.TaskGroup() as tasks,
            ):
                cell = Cell(session, processes)
                listening = tasks.create_task(cell.listen())
                async with asyncio.timeout(120):
                    await cell.complete.wait()
                yield cell, broker.port
                listening.cancel()
        finally:
            for child in children:
                child.kill()
                await child.wait()


def broken(chance: random.Random, payloads: list[bytes]) -> bytes:
    """One of the payloads with a few bytes of it cut out, overwritten or put in; or two, or a part, or only bytes."""
    while True:
        payload = bytearray(chance.choice(payloads))
        match chance.randrange(12):
            case 0:
                payload = bytearray(chance.randbytes(chance.randrange(200)))
            case 1:
                payload += chance.choice(payloads)
            case 2:
                del payload[chance.randrange(len(payload)) :]
            case _:
                for _ in range(chance.randint(1, 4)):
                    at = chance.randint(0, len(payload))
                    payload[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
        try:
            message = decode(bytes(payload))
        except MalformedMessage:
            return bytes(payload)
        if not (isinstance(message, Close) and message.round is None):
            return bytes(payload)


def send(port: int, seed: int, rate: float) -> None:
    """Send so many broken payloads as each line of stdin asks for, and say so when the broker has them all."""
    os.nice(19)
    chance = random.Random(seed)  # noqa: S311  no secret
    latent = Latent(dtype="float16", shape=(24, 8, 8), data=memoryview(chance.randbytes(2 * 24 * 64)))
    work = next(m for m in EXAMPLES if isinstance(m, Work))
    own = [msgspec.structs.replace(m, **{SPEAKER[type(m)]: "hostile"}) for m in EXAMPLES if type(m) in SPEAKER]
    valid = [encode(m) for m in (*EXAMPLES, *own, msgspec.structs.replace(work, latent=latent))]
    topics = [
        *(TOPICS.inbox(node, what) for node in ("edge", "device") for what in ("control", "work")),  # type: ignore[arg-type]
        TOPICS.own("hostile", "request"),
        TOPICS.own("hostile", "birth"),
        *(TOPICS.forward("hostile", node) for node in ("edge", "device")),
    ]
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="hostile")
    client.connect(HOST, port)
    client.loop_start()
    due = time.monotonic()
    for line in sys.stdin:
        due = max(due, time.monotonic())
        for _ in range(int(line)):
            client.publish(chance.choice(topics), broken(chance, valid), qos=0)
            if rate:
                due += 1 / rate
                time.sleep(max(0.0, due - time.monotonic()))
        client.publish(TOPICS.own("hostile", "result"), b"", qos=1).wait_for_publish()
        print("sent", flush=True)
    client.loop_stop()


@dataclass(frozen=True)
class Seen:
    """Latencies of valid requests (seconds) before and in a storm, the nodes' MiB after its first tenth and its end."""

    calm: list[float]
    stormy: list[float]
    settled: dict[str, float]
    grown: dict[str, float]
    seconds: float

    @property
    def slowdown(self) -> float:
        """How many times as long a valid request took in the storm, by the medians."""
        return statistics.median(self.stormy) / statistics.median(self.calm)


async def storm(folder: Path, *, payloads: int, rate: float = 0.0, seed: int = 0, calm: int = 30) -> Seen:
    """Let a storm loose on a new cell, after so many ``calm`` requests. Raises where one is not answered."""
    latencies: list[float] = []
    settled: dict[str, float] = {}

    async def ask(cell: Cell) -> None:
        while True:
            latencies.append(await cell.latency(len(latencies)))

    async with a_cell(folder) as (cell, port):
        while len(latencies) < calm:
            latencies.append(await cell.latency(len(latencies)))
        pipe = asyncio.subprocess.PIPE
        sender = await asyncio.create_subprocess_exec(
            *SENDING, str(port), str(seed), str(rate), stdin=pipe, stdout=pipe
        )
        assert sender.stdin is not None
        assert sender.stdout is not None
        asking = asyncio.create_task(ask(cell))
        began = time.monotonic()
        try:
            with Progress(console=Console(stderr=True)) as progress:
                bar = progress.add_task("payloads", total=payloads)
                for sent in range(0, payloads, TOGETHER):
                    count = min(TOGETHER, payloads - sent)
                    sender.stdin.write(b"%d\n" % count)
                    if not await sender.stdout.readline():
                        raise RuntimeError("the sender has ended")
                    await cell.pinged()
                    progress.update(bar, advance=count)
                    if not settled and sent >= payloads / 10:
                        settled = cell.memory()
                    if asking.done():
                        asking.result()
        finally:
            asking.cancel()
            sender.kill()
            await sender.wait()
        seconds = time.monotonic() - began
        return Seen(latencies[:calm], latencies[calm:], settled, cell.memory(), seconds)


def report(seen: Seen, title: str, console: Console) -> None:
    """Print what a storm did."""
    table = Table(title=title)
    for column in ("", "before", "during or after", "ratio"):
        table.add_column(column, justify="right")
    before, during = statistics.median(seen.calm), statistics.median(seen.stormy)
    table.add_row("median latency (s)", f"{before:.3f}", f"{during:.3f}", f"{seen.slowdown:.2f}")
    for node, mib in seen.grown.items():
        was = seen.settled[node]
        table.add_row(f"{node} (MiB)", f"{was:.1f}", f"{mib:.1f}", f"{mib / was:.3f}")
    console.print(table)
    console.print(f"{len(seen.stormy)} valid requests during the storm, all answered")


def main(payloads: int, rate: float, seed: int) -> None:
    """Measure one storm."""
    with tempfile.TemporaryDirectory() as name:
        seen = asyncio.run(storm(Path(name), payloads=payloads, rate=rate, seed=seed))
    a_second = payloads / seen.seconds
    report(seen, f"{payloads} broken payloads, {a_second:.0f} a second, seed {seed}", Console())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--send"]:
        send(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payloads", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=0.0, help="payloads a second; 0: as many as the nodes can read")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.payloads, arguments.rate, arguments.seed)
