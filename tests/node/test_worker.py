"""The worker: its own segments and no others, with stages that add up, whatever else comes in."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from broker.messages import Pace, Segment, Stage, Work
from broker.session import Incoming
from broker.topics import Topic
from node.latents import pack, unpack
from node.worker import Worker, received
from semct.compute import EMULATED_MODELS, Emulated, Native, Profile
from semct.cost import Backlog
from semct.diffusion import Denoiser

STEPS = 6


def leg(denoiser: Denoiser, start: int, stop: int, *, node: str = "me", prompt: str = "a cat") -> Segment:
    return Segment(node=node, model=denoiser.name, prompt=prompt, start=start, stop=stop)


def work(*route: Segment, **change: object) -> Work:
    fields: dict[str, object] = {"round": "1", "request": "r", "reply": "you", "seed": 4, "steps": STEPS}
    return Work(**{**fields, "route": route, "sent": 0.0, "deadline": 1e12, **change})  # type: ignore[arg-type]


class Impatient(Worker):
    """Nothing here takes long; a worker that has stopped must not stop the tests."""

    async def carry(self, work: Work, **options: Any) -> Work:
        async with asyncio.timeout(20):
            return await super().carry(work, **options)


@pytest.fixture
async def worker(tiny: Denoiser) -> AsyncIterator[Worker]:
    made = Impatient(name="me", denoisers={tiny.name: tiny}, pace=Native(), rows=8, latent_dtype="float32")
    driving = asyncio.create_task(made.drive())
    yield made
    driving.cancel()
    await asyncio.wait({driving})
    assert driving.cancelled()  # it drove all along, whatever came in


def expected(denoiser: Denoiser, *spans: tuple[str, int, int]) -> torch.Tensor:
    latent = [denoiser.noise(4)]
    for prompt, start, stop in spans:
        latent = denoiser.run(latent, start, stop, STEPS, [prompt])
    return latent[0]


async def test_it_runs_its_own_segments_only(worker: Worker, tiny: Denoiser) -> None:
    route = (leg(tiny, 0, 2, prompt="public"), leg(tiny, 2, 4), leg(tiny, 4, 5, node="you"), leg(tiny, 5, 6))
    left = await worker.carry(work(*route))
    assert left.route == route[2:]
    assert left.latent is not None
    found = unpack(left.latent, tiny.latent_shape)
    assert torch.equal(found, expected(tiny, ("public", 0, 2), ("a cat", 2, 4)))


async def test_its_stages_say_what_it_did(worker: Worker, tiny: Denoiser) -> None:
    left = await worker.carry(work(leg(tiny, 0, 4), leg(tiny, 4, 6, node="you")))
    queue, denoise = left.stages
    assert (queue.name, denoise.name) == ("queue", "denoise")
    assert {queue.node, denoise.node} == {"me"}
    assert queue.start <= queue.stop == denoise.start < denoise.stop
    assert denoise.steps == 4
    assert denoise.flops == 4 * tiny.flops_per_step
    assert not denoise.modelled
    spent = worker.spent("1")
    assert (spent.rows, spent.denoiser_calls, spent.flops) == (4, 4, denoise.flops)
    assert worker.spent("1").rows == 0  # since the last report


async def test_its_backlog_is_what_it_has_been_given_and_not_done(worker: Worker, tiny: Denoiser) -> None:
    assert worker.backlog == ()
    carried = [
        asyncio.create_task(
            worker.carry(
                work(leg(tiny, 0, 4, prompt="public"), leg(tiny, 4, 6, prompt=prompt), request=prompt),
                group="cluster",
                weight=0.5,
            )
        )
        for prompt in ("a cat", "a dog")
    ]
    await asyncio.sleep(0)
    assert worker.backlog == (Backlog(steps={tiny.name: 4 + 2 * 2}, requests=2, weight=0.5),)
    left = []
    while not all(task.done() for task in carried):
        left.append(sum(b.steps[tiny.name] for b in worker.backlog))
        await asyncio.sleep(0.001)
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > 2
    assert worker.backlog == ()


async def test_work_for_others_passes_through_untouched(worker: Worker, tiny: Denoiser) -> None:
    for route in ((), (leg(tiny, 0, 6, node="you"),)):
        assert await worker.carry(work(*route)) == work(*route)


async def test_it_goes_on_from_the_latent_that_came(worker: Worker, tiny: Denoiser) -> None:
    half = expected(tiny, ("a cat", 0, 3))
    left = await worker.carry(work(leg(tiny, 3, 6), latent=pack(half, "float32")))
    assert left.latent is not None
    assert torch.equal(unpack(left.latent, tiny.latent_shape), expected(tiny, ("a cat", 0, 6)))


async def test_requests_with_a_common_beginning_share_it(worker: Worker, tiny: Denoiser) -> None:
    async with asyncio.TaskGroup() as tasks:
        both = [
            tasks.create_task(
                worker.carry(
                    work(leg(tiny, 0, 4, prompt="public"), leg(tiny, 4, 6, prompt=prompt), request=prompt),
                    group="cluster",
                    weight=0.5,
                )
            )
            for prompt in ("a cat", "a dog")
        ]
    for prompt, task in zip(("a cat", "a dog"), both, strict=True):
        left = task.result()
        assert left.latent is not None
        torch.testing.assert_close(
            unpack(left.latent, tiny.latent_shape),
            expected(tiny, ("public", 0, 4), (prompt, 4, 6)),
            rtol=1e-3,
            atol=1e-3,
        )
        assert left.stages[-1].steps == pytest.approx(4 / 2 + 2)
    assert worker.spent("1").rows == 4 + 2 * 2


async def test_work_that_cannot_be_done_is_refused_and_the_worker_goes_on(worker: Worker, tiny: Denoiser) -> None:
    wrong = pack(torch.zeros(1, 2, 2), "float32")
    other = Segment(node="me", model="other", prompt="p", start=0, stop=2)
    for bad, sentence in (
        (work(other), "wants model 'other'"),
        (work(leg(tiny, 2, 4)), "without a latent"),
        (work(leg(tiny, 2, 4), latent=wrong), "the model works on"),
        (work(leg(tiny, 0, STEPS + 1)), "do not follow each other"),
        (work(leg(tiny, 2, 2)), "do not follow each other"),
        (work(leg(tiny, 0, 2), leg(tiny, 3, 6)), "do not follow each other"),
    ):
        with pytest.raises(ValueError, match=sentence):
            await worker.carry(bad)
    assert (await worker.carry(work(leg(tiny, 0, 1)))).latent is not None


async def test_the_same_request_twice_at_once_is_refused(worker: Worker, tiny: Denoiser) -> None:
    first = asyncio.create_task(worker.carry(work(leg(tiny, 0, 6))))
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="already under way"):
        await worker.carry(work(leg(tiny, 0, 6)))
    assert (await first).latent is not None


async def test_a_caller_that_gives_up_does_not_stop_the_others(worker: Worker, tiny: Denoiser) -> None:
    leaving = asyncio.create_task(worker.carry(work(leg(tiny, 0, 6), request="leaving")))
    bad = asyncio.create_task(worker.carry(work(leg(tiny, 2, 4), request="bad")))
    await asyncio.sleep(0)
    leaving.cancel()
    bad.cancel()
    staying = await worker.carry(work(leg(tiny, 0, 6), request="staying"))
    assert staying.latent is not None


async def test_a_finished_latent_becomes_a_png(worker: Worker, tiny: Denoiser) -> None:
    latent = expected(tiny, ("a cat", 0, 6))
    shown = await worker.decode(work(latent=pack(latent, "float32")))
    assert shown.latent is None
    pixels = np.asarray(Image.open(io.BytesIO(shown.picture or b"")))
    assert np.array_equal(pixels, tiny.decode([latent])[0])
    assert shown.stages[-1].name == "decode"
    assert shown.stages[-1].flops == tiny.flops_per_decode
    with pytest.raises(ValueError, match="no latent"):
        await worker.decode(work())
    with pytest.raises(ValueError, match="the model works on"):
        await worker.decode(work(latent=pack(torch.zeros(2), "float32")))


async def test_an_emulated_worker_pads_and_says_that_it_models(tiny: Denoiser) -> None:
    fast = Profile(name="fast", tflops=1e5, watts=100.0, source="invented here")
    pace = Emulated(fast, {tiny.name: EMULATED_MODELS["sd3-medium"]})
    made = Impatient(name="me", denoisers={tiny.name: tiny}, pace=pace, rows=2, latent_dtype="float16")
    assert made.latent_bytes == 512 * 1024
    assert made.compute.profile == "fast"
    driving = asyncio.create_task(made.drive())
    left = await made.carry(work(leg(tiny, 0, 3), leg(tiny, 3, 6, node="you")))
    driving.cancel()
    assert left.latent is not None
    assert len(left.latent.data) + len(left.latent.padding) == 512 * 1024
    denoise = left.stages[-1]
    assert denoise.modelled
    assert denoise.flops == pytest.approx(3 * 12e12)
    assert denoise.joules == pytest.approx(100 * 3 * 12 / 1e5)


def test_a_transfer_is_a_stage_of_its_own() -> None:
    def coming(work: Work, topic: str) -> Incoming:
        return Incoming(topic=Topic.parse(topic), message=work, received=7.0, size=1000)

    sent = work(sent=5.0, sender="edge")
    (stage,) = received(sent, coming(sent, "semct/t/me/work"), "me").stages
    assert stage == Stage(name="transfer", node="edge", to="me", start=5.0, stop=7.0, size=1000)
    # Who forwards is known by the topic, whatever the message says.
    (stage,) = received(sent, coming(sent, "semct/t/phone/forward/me"), "me").stages
    assert stage.node == "phone"
    # Clocks of two machines may disagree: the runner corrects that, who alone knows them both.
    late = work(sent=9.0, sender="edge")
    assert received(late, coming(late, "semct/t/me/work"), "me").stages[-1].stop == 7.0
    with pytest.raises(ValueError, match="does not say who sent it"):
        received(work(), coming(work(), "semct/t/me/work"), "me")


async def test_it_switches_between_models_and_says_what_each_takes(
    tiny: Denoiser, make_tiny: Callable[..., Denoiser]
) -> None:
    other = make_tiny(seed=1)
    pair = {d.name: d for d in (tiny, other)}
    pace = Emulated(
        Profile(name="fast", tflops=1e5, watts=100.0, source="invented here"),
        {tiny.name: EMULATED_MODELS["sd3-medium"], other.name: EMULATED_MODELS["sd3-800m"]},
    )
    made = Impatient(name="me", denoisers=pair, pace=pace, rows=2, latent_dtype="float32")
    assert made.models == (tiny.name, other.name)
    assert made.compute.step_seconds == pytest.approx(12 / 1e5)
    assert made.compute.others == {other.name: Pace(step_seconds=5.6 / 1e5, step_joules=560 / 1e5)}
    driving = asyncio.create_task(made.drive())
    left = await made.carry(work(leg(tiny, 0, 2), leg(other, 2, STEPS)))
    driving.cancel()
    whole = other.run(tiny.run([tiny.noise(4)], 0, 2, STEPS, ["a cat"]), 2, STEPS, STEPS, ["a cat"])
    assert left.latent is not None
    assert torch.equal(unpack(left.latent, tiny.latent_shape), whole[0])
    assert left.stages[-1].flops == pytest.approx((2 * 12 + (STEPS - 2) * 5.6) * 1e12)


def test_models_of_different_latents_cannot_share_a_node(tiny: Denoiser, make_tiny: Callable[..., Denoiser]) -> None:
    larger = make_tiny(latent=8)
    with pytest.raises(ValueError, match="latents differ in shape"):
        Worker(name="me", denoisers={"a": tiny, "b": larger}, pace=Native(), rows=1, latent_dtype="float32")


class Cramped(Native):
    """A GPU without any memory left."""

    def step(self, *_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def decode(self, *_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")


async def test_where_memory_does_not_suffice_work_is_refused_in_one_sentence(tiny: Denoiser) -> None:
    worker = Worker(name="me", denoisers={tiny.name: tiny}, pace=Cramped(), rows=4, latent_dtype="float32")
    driving = asyncio.create_task(worker.drive())
    for _ in range(2):
        with pytest.raises(ValueError, match="me cannot do its part: memory does not suffice for a single row"):
            await worker.carry(work(leg(tiny, 0, STEPS)))
    with pytest.raises(ValueError, match="me cannot decode: memory does not suffice"):
        await worker.decode(work(latent=pack(tiny.noise(1), "float32")))
    assert worker.spent("1").shortages == 2
    driving.cancel()
    await asyncio.wait({driving})


async def test_its_report_tells_every_call(worker: Worker, tiny: Denoiser) -> None:
    await asyncio.gather(*(worker.carry(work(leg(tiny, 0, STEPS), request=r)) for r in ("a", "b")))
    spent = worker.spent("1")
    assert sum(len(c.steps) for c in spent.calls) == spent.rows
    assert len(spent.calls) == spent.denoiser_calls
    assert {c.model for c in spent.calls} == {tiny.name}
    assert worker.spent("2").calls == ()
