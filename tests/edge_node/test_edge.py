"""The edge on a real broker: whole rounds with devices, and what comes instead of a good request."""

import asyncio
import io
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from broker.messages import (
    Ask,
    Birth,
    CacheCounts,
    Close,
    Compute,
    Picture,
    Planned,
    Request,
    Result,
    Round,
    Segment,
    Spent,
    Work,
)
from broker.topics import Topics
from device_node.node import DeviceNode, DeviceSettings
from edge_node.node import EdgeNode, EdgeSettings
from edge_node.planning import Planner
from node.latents import pack
from node.worker import Worker
from semct import frameworks
from semct.cache import CacheSettings
from semct.compute import Emulated, EmulatedModel, Profile
from semct.cost import Backlog, Weights
from semct.diffusion import Denoiser
from semct.prompts import load_sentence_encoder
from semct.public_prompt import MedoidWriter
from semct.quality import load_quality_model
from semct.routes import Plan, steps_by_node

STEPS = 6
TOPICS = Topics("t")
PROMPTS = ["a white cat in the snow", "a grey cat in the snow", "a lemon on a table"]
MODEL = EmulatedModel(name="small", step_tflop=1.0, decode_tflop=1.0, latent_bytes=2048, source="invented here")
EDGE = Profile(name="quick", tflops=5000.0, watts=100.0, source="invented here")
DEVICE = Profile(name="slow", tflops=500.0, watts=100.0, source="invented here")


class Cell:
    """An edge, devices, and a runner's ear that also talks."""

    def __init__(
        self, ear: Any, denoiser: Denoiser, edge: asyncio.Task[None], devices: list[asyncio.Task[None]]
    ) -> None:
        self.ear = ear
        self.denoiser = denoiser
        self.edge = edge
        self.devices = devices

    async def order(self, framework: str = "semct", *, requests: int, window: float = 20.0, name: str = "1") -> None:
        order = Round(round=name, framework=framework, seed=3, requests=requests, window=window)
        await self.ear.session.publish(TOPICS.inbox("edge", "control"), order)

    async def ask(self, number: int, *, request: str | None = None, name: str = "1") -> None:
        ask = Ask(
            round=name,
            request=request or f"r{number}",
            prompt=PROMPTS[number],
            seed=3,
            steps=STEPS,
            deadline=time.time() + 60,
        )
        await self.ear.session.publish(TOPICS.inbox(f"d{number}", "control"), ask)

    async def forward(self, sender: str, work: Work) -> None:
        await self.ear.session.publish(TOPICS.forward(sender, "edge"), work)

    async def serves(self) -> None:
        """The edge still serves a round as it should."""
        await self.order("device-only", requests=1, name="still there")
        await self.ask(0, request="still there", name="still there")
        (result,) = await self.ear.until(Result, request="still there")
        assert result.outcome == "answered"

    def route_alone(self, plan: Plan, request: str) -> np.ndarray:
        """The picture of a request's route, run by itself."""
        route = next(r for r in plan.routes if r.request == request)
        latent = [self.denoiser.noise(route.seed)]
        for s in route.segments:
            latent = self.denoiser.run(latent, s.start, s.stop, STEPS, [s.prompt])
        return self.denoiser.decode(latent)[0]


@pytest.fixture
async def cell(
    bus: tuple[str, int], tiny: Denoiser, ear: Callable[..., AbstractAsyncContextManager[Any]]
) -> AsyncIterator[Cell]:
    host, port = bus
    common = {"testbed": "t", "host": host, "port": port}

    def worker(name: str, profile: Profile) -> Worker:
        return Worker(
            name=name,
            denoisers={tiny.name: tiny},
            pace=Emulated(profile, {tiny.name: MODEL}),
            rows=4,
            latent_dtype="float32",
        )

    own, encoder = worker("edge", EDGE), load_sentence_encoder()
    planner = Planner(
        edge="edge",
        compute=own.compute,
        latent_bytes=own.latent_bytes,
        links={},
        weights=Weights(),
        clusters=2,
        most_shared=3,
        model=tiny.name,
        small_model="",
        quality=load_quality_model("sd3-medium"),
        encoder=encoder,
        writer=MedoidWriter(encoder),
        cache=CacheSettings(),
    )
    whats = ("birth", "request", "result", "picture", "planned", "spent")
    topics = [TOPICS.every(w) for w in whats]  # type: ignore[arg-type]
    async with ear("runner", *topics) as heard:
        settings = EdgeSettings(name="edge", models=(tiny.name,), **common)  # type: ignore[arg-type]
        edge = asyncio.create_task(EdgeNode(settings, own, planner).run())
        devices = [
            asyncio.create_task(
                DeviceNode(DeviceSettings(name=n, **common), worker(n, DEVICE)).run()  # type: ignore[arg-type]
            )
            for n in ("d0", "d1", "d2")
        ]
        await heard.until(Birth, 4, state="ready")
        yield Cell(heard, tiny, edge, devices)
        for task in (edge, *devices):
            task.cancel()
        await asyncio.wait({edge, *devices})
    for task in (edge, *devices):
        if not task.cancelled():
            task.result()  # what it failed with, if it did


FRAMEWORKS = ["semct", "semantic-free", "clustering-free", "edge-device", "device-only"]


@pytest.mark.parametrize("framework", [*FRAMEWORKS, "hybrid", "semct-tree", "hierarchical"])
async def test_a_round_ends_with_the_pictures_of_its_plan(cell: Cell, framework: str) -> None:
    await cell.order(framework, requests=3)
    for number in range(3):
        await cell.ask(number)
    results = await cell.ear.until(Result, 3)
    pictures = await cell.ear.until(Picture, 3)
    (planned,) = await cell.ear.until(Planned)
    assert {r.request: (r.outcome, r.device) for r in results} == {f"r{i}": ("answered", f"d{i}") for i in range(3)}
    assert planned.framework == framework
    assert planned.error == ""
    assert planned.seconds["total"] > 0
    plan = msgspec.msgpack.decode(planned.plan, type=Plan)
    assert sorted(r.request for r in plan.routes) == ["r0", "r1", "r2"]
    for picture in pictures:
        shown = np.asarray(Image.open(io.BytesIO(picture.png))).astype(int)
        assert np.abs(shown - cell.route_alone(plan, picture.request)).max() <= 2
    for result in results:
        route = next(r for r in plan.routes if r.request == result.request)
        stages = [(s.name, s.node) for s in result.stages]
        assert stages[:3] == [("transfer", result.device), ("collect", "edge"), ("plan", "edge")]
        assert [n for name, n in stages if name == "denoise"] == list(route.nodes)
        assert stages[-1] == ("decode", result.device)
        assert all(s.start <= s.stop for s in result.stages)
        assert result.asked <= result.stages[0].start + 0.01
        assert result.stages[-1].stop <= result.finished
    # The parts of shared steps add up to the steps that were run.
    done = sum(s.steps for r in results for s in r.stages if s.node == "edge")
    await cell.ear.session.publish(TOPICS.inbox("edge", "control"), Close(round="1"))
    (spent,) = await cell.ear.until(Spent)
    assert spent.rows == pytest.approx(done)
    assert spent.rows == steps_by_node(plan.routes).get("edge", 0)
    assert (spent.rows == 0) is (framework == "device-only")


async def test_what_one_request_leaves_in_the_cache_is_counted_for_the_next(cell: Cell) -> None:
    await cell.order("cached", requests=3)
    await cell.ask(0, request="first")
    (first,) = await cell.ear.until(Result, request="first")
    await cell.ask(1, request="second")
    await cell.ask(2, request="third")
    await cell.ear.until(Result, 2)
    await cell.ear.session.publish(TOPICS.inbox("edge", "control"), Close(round="1"))
    (spent,) = await cell.ear.until(Spent)
    assert first.outcome == "answered"
    assert spent.cache is not None
    assert spent.cache.hits + spent.cache.misses == 3
    assert spent.cache.misses >= 1
    # The edge reports what happened in this round alone.
    await cell.order("cached", requests=1, name="2")
    await cell.ask(0, request="again", name="2")
    await cell.ear.until(Result, request="again")
    await cell.ear.session.publish(TOPICS.inbox("edge", "control"), Close(round="2"))
    (spent,) = await cell.ear.until(Spent, round="2")
    assert spent.cache == CacheCounts(misses=1, bytes=spent.cache.bytes if spent.cache else -1)


async def test_an_online_framework_plans_requests_as_they_come(cell: Cell) -> None:
    await cell.order("semct-async", requests=3)
    for number in range(3):
        await cell.ask(number)
        (result,) = await cell.ear.until(Result, request=f"r{number}")
        assert result.outcome == "answered"
    plans = await cell.ear.until(Planned, 3)
    assert [[r.request for r in msgspec.msgpack.decode(p.plan, type=Plan).routes] for p in plans] == [
        ["r0"],
        ["r1"],
        ["r2"],
    ]
    # When the round is over, each is told again, with what was to be expected where it met the others.
    await cell.ear.session.publish(TOPICS.inbox("edge", "control"), Close(round="1"))
    await cell.ear.until(Spent)
    told = await cell.ear.until(Planned, 6)
    assert [p.began for p in told[3:]] == [p.began for p in told[:3]]
    for before, after in zip(told[:3], told[3:], strict=True):
        one, other = (msgspec.msgpack.decode(p.plan, type=Plan) for p in (before, after))
        assert msgspec.structs.replace(one, predictions={}) == msgspec.structs.replace(other, predictions={})
        assert one.predictions.keys() == other.predictions.keys()
        assert one.predictions != other.predictions


async def test_requests_of_later_windows_make_later_batches(cell: Cell) -> None:
    await cell.order("edge-device", requests=3, window=0.2)
    await cell.ask(0)
    await cell.ear.until(Result, request="r0")
    await cell.ask(1)
    await cell.ask(2)
    results = await cell.ear.until(Result, 3)
    assert {r.outcome for r in results} == {"answered"}
    plans = [msgspec.msgpack.decode(p.plan, type=Plan) for p in await cell.ear.until(Planned, 2)]
    assert [r.request for r in plans[0].routes] == ["r0"]
    assert sorted(r.request for p in plans[1:] for r in p.routes) == ["r1", "r2"]


async def test_a_later_window_is_planned_on_what_earlier_ones_left_to_do(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second request comes while the first is planned, and its turn is as soon as that is over."""
    planning, may_go_on, seen = threading.Event(), threading.Event(), []

    def watch(batch: frameworks.Batch) -> Plan:
        seen.append(batch.network.nodes["edge"].backlog)
        planning.set()
        may_go_on.wait(20)
        return frameworks.load("edge-only")(batch)

    monkeypatch.setitem(frameworks._registered, "watching", watch)
    await cell.order("watching", requests=2, window=0.05)
    await cell.ask(0)
    await asyncio.to_thread(planning.wait, 20)
    await cell.ask(1)
    await cell.ear.until(Request, 2)
    await asyncio.sleep(0.2)
    may_go_on.set()
    await cell.ear.until(Result, 2)
    first, second = seen
    assert first == ()
    assert second == (Backlog(steps={cell.denoiser.name: STEPS}, requests=1),)


def crash(batch: frameworks.Batch) -> Plan:
    raise RuntimeError("out of ideas")


def forget(batch: frameworks.Batch) -> Plan:
    plan = frameworks.load("device-only")(batch)
    return msgspec.structs.replace(plan, routes=plan.routes[1:])


def stray(batch: frameworks.Batch) -> Plan:
    plan = frameworks.load("device-only")(batch)
    legs = [tuple(msgspec.structs.replace(s, node="moon") for s in r.segments) for r in plan.routes]
    routes = tuple(msgspec.structs.replace(r, segments=s) for r, s in zip(plan.routes, legs, strict=True))
    return msgspec.structs.replace(plan, routes=routes)


@pytest.mark.parametrize(
    ("framework", "reason"),
    [
        (None, "framework 'broken' is not known"),
        (crash, "out of ideas"),
        (forget, "2 routes, not one for each of 3"),
        (stray, "moon, which nobody knows"),
    ],
)
async def test_where_planning_fails_everybody_hears_why(
    cell: Cell, monkeypatch: pytest.MonkeyPatch, framework: Any, reason: str
) -> None:
    if framework is not None:
        monkeypatch.setitem(frameworks._registered, "broken", framework)
    await cell.order("broken", requests=3)
    for number in range(3):
        await cell.ask(number)
    results = await cell.ear.until(Result, 3)
    assert {r.outcome for r in results} == {"failed"}
    assert all(r.reason.startswith("broken could not plan: ") and reason in r.reason for r in results)
    assert reason in (await cell.ear.until(Planned))[0].error
    await cell.serves()


def request(number: int, **change: Any) -> Request:
    now = time.time()
    fields: dict[str, Any] = {"round": "1", "request": f"r{number}", "reply": f"d{number}", "prompt": PROMPTS[number]}
    return Request(**{**fields, "seed": 3, "steps": STEPS, "sent": now, "deadline": now + 60, **change})


async def test_nobody_asks_in_anothers_name(cell: Cell, caplog: pytest.LogCaptureFixture) -> None:
    await cell.order(requests=1)
    await cell.ear.session.publish(TOPICS.own("d1", "request"), request(0, request="forged"))
    await cell.ask(0)
    await cell.ear.until(Result, request="r0")
    plan = msgspec.msgpack.decode((await cell.ear.until(Planned))[0].plan, type=Plan)
    assert [r.request for r in plan.routes] == ["r0"]
    assert "dropped a message on semct/t/d1/request (misplaced" in caplog.text


async def test_a_request_that_comes_twice_is_planned_once(cell: Cell, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    await cell.order("edge-device", requests=2)
    for number in (0, 0, 1):
        await cell.ear.session.publish(TOPICS.own(f"d{number}", "request"), request(number))
    await cell.ear.until(Result, 2)
    await cell.ear.session.publish(TOPICS.own("d0", "request"), request(0))  # and again when all is over
    await cell.serves()
    assert len(cell.ear.all(Planned, round="1")) == 1
    assert sorted(r.request for r in cell.ear.all(Result, round="1")) == ["r0", "r1"]
    assert caplog.text.count("came again") == 2


async def test_who_asks_again_is_served_again_but_not_while_the_answer_is_coming(cell: Cell) -> None:
    await cell.order("device-only", requests=2, window=60)
    await cell.ear.session.publish(TOPICS.own("d0", "request"), request(0))
    await cell.ear.session.publish(TOPICS.own("d0", "request"), request(0, attempt=1))  # it still waits for the second
    await cell.ear.session.publish(TOPICS.own("d1", "request"), request(1))
    await cell.ear.until(Planned, 1)
    await cell.ear.until(Result, 2)
    await cell.ear.session.publish(TOPICS.own("d0", "request"), request(0, attempt=2))
    plans = [msgspec.msgpack.decode(p.plan, type=Plan) for p in await cell.ear.until(Planned, 2)]
    assert [sorted(r.request for r in p.routes) for p in plans] == [["r0", "r1"], ["r0"]]
    await cell.order("device-only", requests=2)  # and so does the order
    await cell.ear.session.publish(TOPICS.own("d2", "request"), request(2))  # one more than there are
    await cell.serves()
    assert not cell.ear.all(Result, request="r2")


async def test_a_round_does_not_wait_for_a_device_that_was_lost_in_it(cell: Cell) -> None:
    await cell.order("device-only", requests=3, window=60)
    for number in (0, 1):
        await cell.ask(number)
    await cell.ear.until(Request, 2)
    lost = Birth(name="d2", role="device", state="lost")
    await cell.ear.session.publish(TOPICS.own("d2", "birth"), lost)
    results = await cell.ear.until(Result, 2)
    assert {r.request: r.outcome for r in results} == {"r0": "answered", "r1": "answered"}
    # Nobody loses another node by speaking in its name.
    await cell.order("device-only", requests=2, window=60, name="2")
    await cell.ask(0, request="s0", name="2")
    forged = msgspec.structs.replace(lost, name="d1")
    await cell.ear.session.publish(TOPICS.own("d2", "birth"), forged)
    await cell.ask(1, request="s1", name="2")
    await cell.ear.until(Result, 4)
    assert len(cell.ear.all(Planned, round="2")) == 1


async def test_work_whose_deadline_has_passed_is_not_begun(cell: Cell, tiny: Denoiser) -> None:
    await cell.forward("d0", forwarded(tiny, 0, STEPS, deadline=1.0))
    (result,) = await cell.ear.until(Result, request="q")
    assert (result.outcome, result.reason) == ("failed", "the deadline passed before edge began")


async def test_when_the_window_ends_those_that_came_are_served(cell: Cell) -> None:
    await cell.order(requests=3, window=0.2)
    await cell.ask(0)
    await cell.ask(1)
    results = await cell.ear.until(Result, 2)
    assert {r.request: r.outcome for r in results} == {"r0": "answered", "r1": "answered"}
    assert all(s.stop - s.start <= 1.0 for r in results for s in r.stages if s.name == "collect")
    # Who comes late is not forgotten: the next window is theirs.
    await cell.ask(2)
    (late,) = await cell.ear.until(Result, request="r2")
    assert late.outcome == "answered"
    assert len(cell.ear.all(Planned)) == 2


async def test_a_request_of_no_open_round_is_ignored(cell: Cell, caplog: pytest.LogCaptureFixture) -> None:
    await cell.order(requests=1)
    await cell.ear.session.publish(TOPICS.inbox("edge", "control"), Close(round="1"))
    await cell.ear.until(Spent)
    await cell.ask(0)
    await cell.serves()
    assert not cell.ear.all(Result, request="r0")
    assert "belongs to no open round" in caplog.text


async def test_a_device_that_never_announced_itself_cannot_be_planned_for(cell: Cell, ear: Any) -> None:
    async with ear("ghost", *TOPICS.to_node("ghost")) as ghost:
        await cell.order(requests=1)
        await ghost.session.publish(TOPICS.own("ghost", "request"), request(0, reply="ghost"))
        (answer,) = await ghost.until(Work)
    assert "device ghost asks for a picture but has not announced how it computes" in answer.failure
    await cell.serves()


async def test_a_device_without_the_model_gets_a_picture(cell: Cell, ear: Any) -> None:
    feeble = Compute(profile="native", step_seconds=1e4, step_joules=1e4, decode_seconds=1.0)
    birth = Birth(name="phone", role="device", state="ready", compute=feeble)
    async with ear("phone", *TOPICS.to_node("phone"), birth=birth) as phone:
        await cell.ear.until(Birth, name="phone")
        await cell.order("edge-device", requests=1)
        await phone.session.publish(TOPICS.own("phone", "request"), request(0, reply="phone"))
        (answer,) = await phone.until(Work)
    assert answer.failure == ""
    assert answer.route == ()
    assert answer.latent is None
    latent = cell.denoiser.run([cell.denoiser.noise(3)], 0, STEPS, STEPS, [PROMPTS[0]])
    shown = np.asarray(Image.open(io.BytesIO(answer.picture or b"")))
    assert np.array_equal(shown, cell.denoiser.decode(latent)[0])
    assert answer.stages[-1].name == "decode"
    assert answer.stages[-1].node == "edge"


def forwarded(denoiser: Denoiser, start: int, stop: int, **change: Any) -> Work:
    now = time.time()
    leg = Segment(node="edge", model=denoiser.name, prompt=PROMPTS[0], start=start, stop=stop)
    fields: dict[str, Any] = {"round": "1", "request": "q", "reply": "d0", "seed": 3, "steps": STEPS}
    return Work(**{**fields, "route": (leg,), "sent": now, "deadline": now + 60, **change})


async def test_work_from_a_device_is_finished_and_goes_back_once(cell: Cell, tiny: Denoiser) -> None:
    (half,) = tiny.run([tiny.noise(3)], 0, 2, STEPS, [PROMPTS[0]])
    work = forwarded(tiny, 2, STEPS, latent=pack(half, "float32"))
    await cell.forward("d0", work)
    await cell.forward("d0", work)
    await cell.ear.until(Picture, request="q")
    await cell.forward("d0", work)
    await cell.serves()
    (result,) = cell.ear.all(Result, request="q")
    assert result.outcome == "answered"
    assert [s.node for s in result.stages if s.name == "denoise"] == ["edge"]


@pytest.mark.parametrize(
    ("span", "latent", "reason"),
    [
        ((2, 6), pack(torch.zeros(1, 2, 2), "float32"), "the model works on"),
        ((2, 6), None, "without a latent"),
        ((0, 900), None, "do not follow each other within 6 steps"),
    ],
)
async def test_bad_work_from_a_device_fails_and_the_edge_goes_on(
    cell: Cell, tiny: Denoiser, span: tuple[int, int], latent: Any, reason: str
) -> None:
    await cell.forward("d0", forwarded(tiny, *span, latent=latent))
    (result,) = await cell.ear.until(Result, request="q")
    assert result.outcome == "failed"
    assert reason in result.reason
    await cell.serves()


async def test_all_leave_when_told_also_in_the_middle_of_things(cell: Cell, tiny: Denoiser) -> None:
    await cell.order(requests=3, window=3600)
    await cell.ask(0)  # the edge waits for two more
    await cell.ear.until(Request)
    endless = forwarded(tiny, 0, 1000, steps=1000)
    await cell.forward("d0", endless)
    for node in ("edge", "d0", "d1", "d2"):
        await cell.ear.session.publish(TOPICS.inbox(node, "control"), Close())
    async with asyncio.timeout(10):
        await asyncio.gather(cell.edge, *cell.devices)
    await cell.ear.until(Birth, 4, state="gone")
