"""A device on a real broker, with this test in the roles of edge and runner."""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from broker.messages import Ask, Birth, Close, Picture, Request, Result, Segment, Spent, Stage, Work
from broker.topics import Topics
from device_node.node import DeviceNode, DeviceSettings
from node.latents import pack
from node.worker import make_worker
from semct.diffusion import Denoiser

STEPS = 6
TOPICS = Topics("t")
INBOX = TOPICS.inbox("phone", "work")
CONTROL = TOPICS.inbox("phone", "control")


@pytest.fixture
async def device(bus: tuple[str, int], tiny: Denoiser) -> AsyncIterator[asyncio.Task[None]]:
    settings = DeviceSettings(testbed="t", name="phone", host=bus[0], port=bus[1], latent_dtype="float32")
    node = DeviceNode(settings, make_worker(settings, {tiny.name: tiny}))
    running = asyncio.create_task(node.run())
    yield running
    running.cancel()
    await asyncio.wait({running})
    if not running.cancelled():
        running.result()  # what it failed with, if it did


@pytest.fixture
async def world(device: asyncio.Task[None], ear: Callable[..., AbstractAsyncContextManager[Any]]) -> AsyncIterator[Any]:
    """All that the device says, and a session to talk to it with, when it is there."""
    whats = ("birth", "request", "result", "picture", "spent")
    topics = [TOPICS.every(w) for w in whats]  # type: ignore[arg-type]
    async with ear("edge", *topics, *TOPICS.to_node("edge")) as heard:
        await heard.until(Birth, name="phone", state="ready")
        yield heard


def leg(denoiser: Denoiser, start: int, stop: int, node: str = "phone") -> Segment:
    return Segment(node=node, model=denoiser.name, prompt="a cat", start=start, stop=stop)


def work(*route: Segment, request: str = "q", **change: Any) -> Work:
    now = time.time()
    fields: dict[str, Any] = {"round": "1", "reply": "phone", "seed": 4, "steps": STEPS, "sender": "edge", "sent": now}
    return Work(**{**fields, "request": request, "route": route, "deadline": now + 60, **change})


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.png)))


async def test_it_asks_for_its_user(world: Any) -> None:
    ask = Ask(round="1", request="q", prompt="a cat", seed=5, steps=STEPS, deadline=time.time() + 60)
    await world.session.publish(CONTROL, ask)
    (request,) = await world.until(Request)
    assert (request.round, request.request, request.reply) == ("1", "q", "phone")
    assert (request.prompt, request.seed, request.steps, request.deadline) == ("a cat", 5, STEPS, ask.deadline)
    assert request.sent <= time.time()


async def test_it_finishes_what_the_edge_began(world: Any, tiny: Denoiser) -> None:
    (half,) = tiny.run([tiny.noise(4)], 0, 3, STEPS, ["a cat"])
    await world.session.publish(INBOX, work(leg(tiny, 3, STEPS), latent=pack(half, "float32")))
    (result,), (picture,) = await world.until(Result), await world.until(Picture)
    assert (result.outcome, result.device, result.request) == ("answered", "phone", "q")
    assert [s.name for s in result.stages] == ["transfer", "queue", "denoise", "decode"]
    transfer, *own = result.stages
    assert (transfer.node, transfer.to) == ("edge", "phone")
    assert transfer.size > half.numel() * 4
    assert {s.node for s in own} == {"phone"}
    assert result.finished >= own[-1].stop
    whole = tiny.run([tiny.noise(4)], 0, STEPS, STEPS, ["a cat"])
    assert np.array_equal(pixels(picture), tiny.decode(whole)[0])


async def test_it_can_do_all_by_itself(world: Any, tiny: Denoiser) -> None:
    await world.session.publish(INBOX, work(leg(tiny, 0, STEPS)))
    (picture,) = await world.until(Picture)
    whole = tiny.run([tiny.noise(4)], 0, STEPS, STEPS, ["a cat"])
    assert np.array_equal(pixels(picture), tiny.decode(whole)[0])


async def test_a_finished_picture_is_shown_as_it_is(world: Any) -> None:
    await world.session.publish(INBOX, work(picture=b"a picture"))
    (picture,) = await world.until(Picture)
    assert picture.png == b"a picture"
    assert [s.name for s in (await world.until(Result))[0].stages] == ["transfer"]


async def test_work_that_goes_on_elsewhere_is_forwarded(world: Any, tiny: Denoiser) -> None:
    await world.session.publish(INBOX, work(leg(tiny, 0, 2), leg(tiny, 2, STEPS, node="edge")))
    (onward,) = await world.until(Work)
    assert onward.route == (leg(tiny, 2, STEPS, node="edge"),)
    assert onward.latent is not None
    assert onward.sender == "phone"
    # The same request may come back for a later part of its route.
    back = msgspec.structs.replace(onward, route=(leg(tiny, 2, STEPS),))
    await world.session.publish(INBOX, back)
    assert (await world.until(Result))[0].outcome == "answered"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"latent": pack(torch.zeros(1, 2, 3), "float32")}, "the model works on"),
        ({"failure": "the edge is out of cats"}, "the edge is out of cats"),
        ({"deadline": 1.0}, "the deadline passed before phone began"),
        ({"model": "other"}, "wants model 'other'"),
        ({"start": 1}, "without a latent"),
        ({"stop": 99}, "do not follow each other"),
        ({"route": ()}, "no latent to decode"),
        ({"sender": None}, "does not say who sent it"),
    ],
)
async def test_what_cannot_be_done_fails_with_the_reason_and_the_device_goes_on(
    world: Any, tiny: Denoiser, change: dict[str, Any], reason: str
) -> None:
    part = {k: change[k] for k in ("model", "start", "stop") if k in change}
    rest = {k: v for k, v in change.items() if k not in part}
    route = (msgspec.structs.replace(leg(tiny, 0, STEPS), **part),)
    await world.session.publish(INBOX, work(**{"route": route, **rest}))
    (failed,) = await world.until(Result, request="q")
    assert failed.outcome == "failed"
    assert reason in failed.reason
    await world.session.publish(INBOX, work(leg(tiny, 0, STEPS), request="next"))
    assert (await world.until(Result, request="next"))[0].outcome == "answered"
    assert not world.all(Picture, request="q")


async def test_what_comes_twice_is_answered_once(world: Any, tiny: Denoiser, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    ask = Ask(round="1", request="q", prompt="a cat", seed=4, steps=STEPS, deadline=time.time() + 60)
    todo = work(leg(tiny, 0, STEPS))
    for message, topic in ((ask, CONTROL), (ask, CONTROL), (todo, INBOX), (todo, INBOX)):
        await world.session.publish(topic, message)
    await world.until(Picture)
    await world.session.publish(INBOX, todo)  # and once more when it is done
    await world.session.publish(INBOX, work(leg(tiny, 0, STEPS), request="next"))
    await world.until(Picture, request="next")
    assert len(world.all(Request)) == len(world.all(Result, request="q")) == len(world.all(Picture, request="q")) == 1
    assert world.all(Result, request="q")[0].outcome == "answered"
    assert caplog.text.count("came again") == 3


def ask(**change: Any) -> Ask:
    fields: dict[str, Any] = {"round": "1", "request": "q", "prompt": "a cat", "seed": 4, "steps": STEPS}
    return Ask(**{**fields, "deadline": time.time() + 60, **change})


async def test_where_the_edge_does_not_answer_in_time_it_does_it_alone_and_says_so(world: Any, tiny: Denoiser) -> None:
    await world.session.publish(CONTROL, ask(patience=0.3, waited=5.0))
    (result,), (picture,) = await world.until(Result), await world.until(Picture)
    assert (result.outcome, result.reason) == ("degraded", "edge did not answer within 5.3 s")
    assert [s.name for s in result.stages] == ["queue", "denoise", "decode"]
    assert result.finished - result.asked == pytest.approx(5.3, abs=2)
    whole = tiny.run([tiny.noise(4)], 0, STEPS, STEPS, ["a cat"])
    assert np.array_equal(pixels(picture), tiny.decode(whole)[0])
    # What comes late, or is asked again, changes nothing.
    await world.session.publish(INBOX, work(leg(tiny, 0, STEPS)))
    await world.session.publish(CONTROL, ask(attempt=1))
    await world.session.publish(INBOX, work(leg(tiny, 0, STEPS), request="next"))
    await world.until(Picture, request="next")
    assert len(world.all(Result, request="q")) == len(world.all(Picture, request="q")) == 1


async def test_without_the_time_to_do_it_alone_it_fails_at_the_deadline(world: Any) -> None:
    deadline = time.time() + 0.4
    await world.session.publish(CONTROL, ask(steps=1000, deadline=deadline))
    (failed,) = await world.until(Result)
    assert failed.outcome == "failed"
    assert failed.reason.startswith("edge did not answer within 0.")
    assert failed.finished == pytest.approx(deadline, abs=2)


async def test_it_waits_again_for_what_it_has_passed_on(world: Any, tiny: Denoiser) -> None:
    await world.session.publish(CONTROL, ask(patience=1.0))
    await world.session.publish(INBOX, work(leg(tiny, 0, 2), leg(tiny, 2, STEPS, node="edge")))
    await world.until(Work)
    (result,) = await world.until(Result)
    assert result.outcome == "degraded"


async def test_it_asks_again_when_told_that_others_may_have_forgotten(world: Any, tiny: Denoiser) -> None:
    for attempt in (0, 0, 1, 2):
        await world.session.publish(CONTROL, ask(attempt=attempt))
    requests = await world.until(Request, 3)
    assert [r.attempt for r in requests] == [0, 1, 2]
    await world.session.publish(INBOX, work(leg(tiny, 0, STEPS)))
    assert (await world.until(Result))[0].outcome == "answered"
    assert len(world.all(Request)) == 3


async def test_work_that_waited_for_a_device_that_came_back_is_timed_from_its_first_stage(
    world: Any, tiny: Denoiser
) -> None:
    before = time.time() - 7
    sent = Stage(name="transfer", node="phone", to="edge", start=before, stop=before + 1)
    await world.session.publish(INBOX, work(leg(tiny, 0, STEPS), stages=(sent,)))
    (result,) = await world.until(Result)
    assert result.asked == before


async def test_a_closed_round_is_waited_for_no_longer(world: Any, tiny: Denoiser) -> None:
    await world.session.publish(CONTROL, ask(patience=0.5))
    await world.session.publish(CONTROL, Close(round="1"))
    await world.until(Spent)
    await asyncio.sleep(1.0)
    assert not world.all(Result)


async def test_it_reports_a_round_and_leaves_when_told(world: Any, tiny: Denoiser, device: asyncio.Task[None]) -> None:
    await world.session.publish(INBOX, work(leg(tiny, 0, STEPS)))
    await world.until(Picture)
    await world.session.publish(CONTROL, Close(round="1"))
    (spent,) = await world.until(Spent)
    assert (spent.node, spent.rows, spent.denoiser_calls) == ("phone", STEPS, STEPS)
    await world.session.publish(CONTROL, Close())
    await world.until(Birth, name="phone", state="gone")
    async with asyncio.timeout(5):
        await device


async def test_it_leaves_at_once_with_work_under_way(world: Any, tiny: Denoiser, device: asyncio.Task[None]) -> None:
    long = msgspec.structs.replace(work(leg(tiny, 0, 1000)), steps=1000)
    await world.session.publish(INBOX, long)
    await world.session.publish(CONTROL, Close())
    async with asyncio.timeout(5):
        await device
    await world.until(Birth, name="phone", state="gone")
    assert not world.all(Result)
