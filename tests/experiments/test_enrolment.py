"""Enrolment over a real broker: the runner's side, real sessions, and a device program that goes through two runs."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import msgspec

from broker.address import Address
from broker.messages import Assign, Birth, Close, Enrol, Segment, Work
from broker.session import Session
from broker.topics import Topics
from device_node.node import DeviceSettings
from edge_node.node import EdgeSettings
from experiments.enrolment import Enrolment
from node.enrolment import Door, enrol

TOPICS = Topics("t")
Ears = Callable[..., AbstractAsyncContextManager[Any]]


def places(bus: tuple[str, int]) -> list[EdgeSettings | DeviceSettings]:
    common: dict[str, Any] = {"testbed": "t", "host": "elsewhere", "port": bus[1]}
    edges = [EdgeSettings(name=name, **common) for name in ("edge", "edge-2")]
    return [*edges, *(DeviceSettings(name=name, **common) for name in ("device-1", "device-2"))]


def laptop(bus: tuple[str, int]) -> DeviceSettings:
    return DeviceSettings(testbed="t", name="laptop", host="elsewhere", port=bus[1])


def door(bus: tuple[str, int], *, wants: str | None = None, role: Any = "device") -> Door:
    return Door(address=Address(*bus), role=role, testbed="t", wants=wants)


async def named(place: Assign | None, kind: type[Any] = DeviceSettings) -> str:
    assert place is not None
    return str(msgspec.msgpack.decode(place.settings, type=kind).name)


async def test_places_go_out_in_order_and_by_name(bus: tuple[str, int], ear: Ears) -> None:
    async with (
        Enrolment(*bus, testbed="t", places=places(bus), attached=[laptop(bus)]) as enrolment,
        ear("watcher", TOPICS.every("enrol")) as heard,
    ):
        wish = Enrol(name="c0ffee", role="device", state="ready")
        for name, wants, role in [
            ("c0ffee", None, "device"),
            ("laptop", "laptop", "device"),
            ("decade", None, "device"),
            ("facade", None, "edge"),
            ("second", "edge-2", "edge"),
        ]:
            asked = msgspec.structs.replace(wish, name=name, wants=wants, role=role)
            async with ear(name, TOPICS.inbox(name, "control"), birth=asked) as node:
                (assign,) = await node.until(Assign)
            kind = EdgeSettings if role == "edge" else DeviceSettings
            got = await named(assign, kind)
            expected = {"c0ffee": "device-1", "decade": "device-2", "facade": "edge", "second": "edge-2"}
            assert got == expected.get(name, name)
        assert enrolment.free == ()
        # A cell that is full lets the next one wait, until a node has ended.
        late = msgspec.structs.replace(wish, name="late")
        async with ear("late", TOPICS.inbox("late", "control"), birth=late) as node:
            await heard.until(Enrol, name="late")
            await enrolment.release("device-2")
            (assign,) = await node.until(Assign)
            assert await named(assign) == "device-2"


async def test_a_node_that_comes_again_gets_its_place_again(bus: tuple[str, int]) -> None:
    async with Enrolment(*bus, testbed="t", places=places(bus)):
        asked = door(bus)
        first = await enrol(asked)
        assert await named(first) == await named(await enrol(asked)) == "device-1"
        assert first is not None
        # Dismissed by this run, it waits for another one, here until the testbed ends.
        waiting = asyncio.create_task(enrol(asked, left=first.run))
        async with Session(*bus, testbed="t", name="runner") as runner:
            while not waiting.done():
                await runner.publish(TOPICS.inbox(asked.name, "control"), Close(ends=True))
                await asyncio.sleep(0.1)
        assert await waiting is None


async def test_a_device_program_serves_one_run_after_the_other(
    bus: tuple[str, int], ear: Ears, tiny_folder: Path, unused_tcp_port: int
) -> None:
    settings = msgspec.structs.replace(laptop(bus), name="device-1", models=(str(tiny_folder),))
    command = [sys.executable, "-m", "device_node", "--broker", f"{bus[0]}:{bus[1]}", "--testbed", "t"]
    command += ["--metrics", str(unused_tcp_port)]
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: ASYNC220
    listening = [TOPICS.every(what) for what in ("birth", "enrol", "spent", "request")]
    try:
        async with ear("runner", *listening, *TOPICS.to_node("edge")) as heard:
            async with asyncio.timeout(120):  # a busy machine takes long to import torch
                while not heard.all(Enrol):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            for run in (1, 2):
                async with Enrolment(*bus, testbed="t", places=[settings]):
                    birth = (await heard.until(Birth, run, name="device-1", state="ready"))[-1]
                    assert (birth.host, birth.role) == (socket.gethostname(), "device")
                    now = time.time()
                    leg = Segment(node="device-1", model=birth.models[0], prompt="a cat", start=0, stop=1)
                    onward = msgspec.structs.replace(leg, node="edge", start=1, stop=2)
                    todo = Work(
                        round=str(run), request=f"q{run}", reply="device-1", seed=1, steps=2,
                        route=(leg, onward), sender="edge", sent=now, deadline=now + 60,
                    )  # fmt: skip
                    await heard.session.publish(TOPICS.inbox("device-1", "work"), todo)
                    await heard.until(Work, request=f"q{run}")
                    shown = await asyncio.to_thread(urlopen, f"http://127.0.0.1:{unused_tcp_port}/metrics", timeout=10)
                    assert b'semct_denoiser_calls_total{node="device-1",role="device"} 1\n' in shown.read()
                    if run == 1:  # this run forgets to dismiss it; the next one's enrolment fetches it
                        continue
                    await heard.session.publish(TOPICS.inbox("device-1", "control"), Close(ends=True))
                    await heard.until(Birth, 2, name="device-1", state="gone")
        assert program.wait(10) == 0
    finally:
        program.kill()
        print(program.communicate()[1])
