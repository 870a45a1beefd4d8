"""The live page in a real browser: beside a real run, and in a storm of messages."""

import asyncio
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, expect

from broker.local import LocalBroker
from broker.messages import Progress, View
from broker.session import Session
from experiments.live.gate import Gate, open_gate
from experiments.live.scene import CellNow, NodeNow, Part, RequestNow, RoundNow, RunNow, SegmentNow, WayNow
from tests.browser.conftest import PICTURES

pytestmark = pytest.mark.browser

SCENARIO = """
name: watched
description: Three users in a small cell.
frameworks: [semct, device-only]
devices: [{count: 3}]
steps: 12
prompts: {list: [a cat in the snow, a dog in the snow, a red car at night]}
planning: {clusters: 2, writer: medoid}
links: {cell: {share: 0.25}}
"""

STEPS = 600
WIDTHS = (320, 768, 1440)


async def test_a_run_is_seen_as_it_goes_on(
    tmp_path: Path, browser: Browser, attend: Callable[[Page], None], complaints: list[str]
) -> None:
    """Devices appear, progress moves, pictures arrive, the comparison fills; a late visitor sees the same."""
    (tmp_path / "watched.yaml").write_text(SCENARIO)
    async with a_run(tmp_path) as address:
        page = await browser.new_page(viewport={"width": 1440, "height": 900})
        attend(page)
        await page.goto(address)
        await expect(page.locator("#map .device")).to_have_count(3, timeout=120_000)
        await expect(page.locator("#requests .card")).to_have_count(3, timeout=30_000)
        assert await lengths_of_progress(page) >= 3
        await expect(page.locator("#clusters q")).not_to_have_count(0)
        await expect(page.locator("#pictures img")).to_have_count(3, timeout=60_000)
        await expect(page.locator("#table tbody tr").first).to_contain_text("3 of 3 answered", timeout=60_000)

        late = await browser.new_page(viewport={"width": 1440, "height": 900})
        attend(late)
        await late.goto(address)
        await expect(late.locator("#pictures img")).to_have_count(3, timeout=10_000)
        await expect(late.locator("#table tbody tr").first).to_contain_text("3 of 3 answered")

        await expect(page.locator("#status")).to_have_text("finished", timeout=120_000)
        await expect(late.locator("#status")).to_have_text("finished")
    for row in await page.locator("#table tbody tr").all():
        assert len(re.findall(r"± \d", await row.inner_text())) >= 4  # TFLOPs have no spread in one repetition
    assert await page.evaluate("[...document.querySelectorAll('#pictures img')].every(i => i.naturalWidth >= 64)")
    await look_at_all_sizes(page)
    await go_by_keyboard(page)
    assert complaints == []


async def test_fifty_devices_at_ten_updates_a_second_leave_the_processor_free(
    tmp_path: Path, browser: Browser, attend: Callable[[Page], None], complaints: list[str]
) -> None:
    async with a_cell(tmp_path, devices=50) as cell:
        page = await browser.new_page(viewport={"width": 1440, "height": 900})
        attend(page)
        await page.goto(cell.address)
        await expect(page.locator("#map .device")).to_have_count(50)
        await expect(page.locator("#requests .card")).to_have_count(50)
        await cell.report(seconds=2.0)  # what is compiled once
        before, began = renderer_seconds(), time.monotonic()
        await cell.report(seconds=8.0)
        share = (renderer_seconds() - before) / (time.monotonic() - began)
        print(f"the renderer took {100 * share:.0f} % of a core")
        assert share < 0.6
        await expect(page.locator(".state", has_text=f": 100 of {STEPS}")).to_have_count(50)
        await page.screenshot(path=PICTURES / "fifty-devices.png", full_page=True)

        for step in range(101, STEPS):  # 25,000 messages, as fast as they can be sent
            cell.tell(step)
            await asyncio.sleep(0)
        cell.tell(STEPS)
        asked = time.monotonic()
        await page.evaluate("new Promise(requestAnimationFrame)")
        assert time.monotonic() - asked < 2.0
        await expect(page.locator(".state", has_text="all steps done")).to_have_count(50, timeout=20_000)
    await expect(page.locator("#status")).to_have_text("connection lost")
    assert [c for c in complaints if "ERR_CONNECTION_REFUSED" not in c] == []  # it tries to come back


async def test_nothing_moves_for_those_who_want_it_so(tmp_path: Path, browser: Browser) -> None:
    async with a_cell(tmp_path, devices=2) as cell:
        for wish, seconds in (("no-preference", "0.2s"), ("reduce", "0s")):
            page = await browser.new_page(reduced_motion=wish)  # type: ignore[arg-type]
            await page.goto(cell.address)
            todo = page.locator(".route b").first
            assert await todo.evaluate("b => getComputedStyle(b).transitionDuration") == seconds


@asynccontextmanager
async def a_run(folder: Path) -> AsyncIterator[str]:
    """A run of the command, and the address of its live page; it is over when the block is left."""
    command = [sys.executable, "-m", "experiments", "run", str(folder / "watched.yaml"), "--runs", str(folder / "runs")]
    running = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert running.stdout is not None
    try:
        said = ""
        while (found := re.search(r"http://127\.0\.0\.1:\d+/", said)) is None:
            said = (await running.stdout.readline()).decode()
        yield found[0]
        output, _ = await running.communicate()
        assert running.returncode == 0, output.decode()
    finally:
        if running.returncode is None:
            running.send_signal(signal.SIGINT)
            await running.wait()


async def lengths_of_progress(page: Page) -> int:
    """How many different lengths the bars of a round take before all its users have an answer."""
    seen: set[str] = set()
    until = time.monotonic() + 60
    while time.monotonic() < until and len(seen) < 3:
        seen |= set(await page.locator(".route b").evaluate_all("all => all.map(b => b.style.transform)"))
        await asyncio.sleep(0.1)
    return len(seen)


async def look_at_all_sizes(page: Page) -> None:
    """Nothing sticks out, and no accessibility problem is serious, at any width, light and dark."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for width in WIDTHS:
            await page.set_viewport_size({"width": width, "height": 900})
            await page.screenshot(path=PICTURES / f"{scheme}-{width}.png", full_page=True)
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (scheme, width)
            found = (await Axe().run(page)).response["violations"]
            serious = [v["id"] for v in found if v["impact"] in {"serious", "critical"}]
            assert serious == [], (scheme, width, [n["html"] for v in found for n in v["nodes"]][:5])


async def go_by_keyboard(page: Page) -> None:
    """A device and a framework are chosen without a mouse."""
    card = page.locator("#requests button").first
    await card.focus()
    await page.keyboard.press("Enter")
    await expect(card).to_have_attribute("aria-pressed", "true")
    await expect(page.locator("#link")).to_contain_text("Mbit/s")
    await page.locator("#shown input:checked").focus()
    await page.keyboard.press("ArrowLeft")
    await expect(page.locator("#shown label", has_text="semct")).to_have_css("color", re.compile("."))
    assert await page.locator("#shown input:checked").get_attribute("value") == "semct"


@asynccontextmanager
async def a_cell(folder: Path, *, devices: int) -> AsyncIterator["WatchedCell"]:
    """A broker with a cell to look at and its live page, without the run."""
    gate = Gate(open_gate("0"))
    async with (
        gate,
        LocalBroker(hosts=["127.0.0.1"], port=free_port(), directory=folder) as broker,
        Session("127.0.0.1", broker.port, testbed="local", name="runner") as session,
    ):
        gate.lead_to("127.0.0.1", broker.port)
        way = WayNow(rate=2e7, delay=0.01, loss=0.001)
        edge = NodeNow(name="edge", role="edge", state="ready")
        names = [f"device-{i}" for i in range(1, devices + 1)]
        placed = [
            NodeNow(name=n, role="device", state="ready", x=5.0 * i - 120, y=90.0 - 3 * (i % 50), up=way, down=way)
            for i, n in enumerate(names)
        ]
        requests = [
            RequestNow(
                id=n,
                device=n,
                prompt="a cat in the snow",
                asks=0.0,
                segments=(
                    SegmentNow(node=n, start=0, stop=STEPS // 2, shared=True),
                    SegmentNow(node=n, start=STEPS // 2, stop=STEPS, shared=False),
                ),
                cluster=i % 3,
            )
            for i, n in enumerate(names)
        ]
        run = RunNow(
            name="storm",
            description="",
            frameworks=("f",),
            repetitions=1,
            users=devices,
            steps=STEPS,
            slowdown=1.0,
            model="",
            emulated_model="",
            compute="native",
            links="",
            broker="",
            began=0.0,
            status="running",
            reason="",
            round=1,
            rounds=1,
            overruns=0,
        )
        await publish(session, "run", run)
        present = RoundNow(
            round="r", framework="f", repetition=0, began=0.0, requests=tuple(requests), clusters=(), planning={}
        )
        await publish(session, "cell", CellNow(nodes=(edge, *placed)))
        await publish(session, "round", present)
        yield WatchedCell(session, names, gate.url)


@dataclass
class WatchedCell:
    """What says how far its devices are."""

    session: Session
    devices: list[str]
    address: str
    step: int = 0

    def tell(self, step: int) -> None:
        """Every device's request is so far: a message for each."""
        for name in self.devices:
            self.session.mention(self.session.topics.own(name, "progress"), Progress(node=name, requests={name: step}))

    async def report(self, *, seconds: float) -> None:
        """Ten updates of every device a second."""
        began = time.monotonic()
        for number in range(1, int(10 * seconds) + 1):
            self.step += 1
            self.tell(self.step)
            await asyncio.sleep(max(0.0, began + number / 10 - time.monotonic()))


async def publish(session: Session, part: str, content: Part) -> None:
    view = View(run="run", content=msgspec.Raw(msgspec.msgpack.encode(content)))
    await session.publish(session.topics.view("runner", part), view, retain=True)


def renderer_seconds() -> float:
    """The processor time that the browser's renderers have taken."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "--type=renderer" in child.cmdline():
                times = child.cpu_times()
                total += times.user + times.system
    return total


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
