"""The part of a node that works: an engine driven from asyncio, and the way of a request through it."""

from __future__ import annotations

import asyncio
import ctypes
import io
import logging
import time
from collections.abc import Hashable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from broker.messages import Call, Compute, Pace, Spent, Stage, Work
from broker.session import Incoming
from node.latents import pack, unpack
from node.reporting import Reporter
from node.settings import NodeSettings
from semct.cache import LatentCache
from semct.compute import STANDS_FOR, Native, Processor, processor
from semct.cost import Backlog
from semct.diffusion import Denoiser, place
from semct.energy import find_meter
from semct.engine import Done, Engine, Job, Totals, backlog
from semct.routes import Segment

_MOST = 1024  # requests under way: what is more is refused, or a flood would fill the memory

_MACHINE = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine

_libc = ctypes.CDLL(None)
_logger = logging.getLogger(__name__)


class _Running(NamedTuple):
    job: Job
    done: asyncio.Future[Done]


class Worker:
    """Runs the node's own segments of many requests at once. ``drive`` must run beside its users.

    ``denoisers`` are the models that the node holds, by name, the testbed's main one first. They must share one
    latent space, since a latent goes from one to another: raises ``ValueError`` where they cannot.
    """

    def __init__(
        self,
        *,
        name: str,
        denoisers: Mapping[str, Denoiser],
        pace: Processor,
        rows: int,
        latent_dtype: Literal["float16", "bfloat16", "float32"],
    ) -> None:
        self._name = name
        self._denoisers = denoisers
        self._main = next(iter(denoisers.values()))
        odd = [d.name for d in denoisers.values() if d.latent_shape != self._main.latent_shape]
        if odd:
            raise ValueError(f"{name} cannot hold {odd[0]!r} beside {self._main.name!r}: their latents differ in shape")
        self._pace = pace
        self._latent_dtype = latent_dtype
        self._rows = rows
        self._engine = Engine(denoisers, pace, rows=rows)
        self._waiting: list[Job] = []
        self._running: dict[str, _Running] = {}
        self._reached: dict[str, int] = {}
        self._wake = asyncio.Event()
        self._reported = Totals()

    @property
    def models(self) -> tuple[str, ...]:
        """The models that this node holds."""
        return tuple(self._denoisers)

    @property
    def compute(self) -> Compute:
        """How this node computes, for its birth."""
        steps = {name: self._pace.step_cost(denoiser) for name, denoiser in self._denoisers.items()}
        step, decode = steps.pop(self._main.name), self._pace.decode_cost(self._main)
        call = self._pace.call_cost(self._main)
        return Compute(
            profile=self._pace.profile,
            step_seconds=step.seconds,
            step_joules=step.joules,
            decode_seconds=decode.seconds,
            decode_joules=decode.joules,
            call_seconds=call.seconds,
            call_joules=call.joules,
            rows=self._rows,
            others={n: Pace(step_seconds=s.seconds, step_joules=s.joules) for n, s in steps.items()},
            meter=self._pace.meter,
            machine=_MACHINE.read_text().strip() if self._pace.meter else "",
        )

    @property
    def totals(self) -> Totals:
        """What the engine has done since the node began."""
        return self._engine.totals

    @property
    def under_way(self) -> int:
        """How many requests it works on."""
        return len(self._running)

    @property
    def backlog(self) -> tuple[Backlog, ...]:
        """What it has left to do; steps of the call that is being made count still."""
        return backlog((running.job for running in self._running.values()), self._reached)

    @property
    def latent_bytes(self) -> int:
        """Bytes that an intermediate result takes on the wire."""
        latent = pack(self._main.noise(0), self._latent_dtype, least_bytes=self._pace.latent_bytes)
        return len(latent.data) + len(latent.padding)

    async def drive(self, reporter: Reporter | None = None) -> NoReturn:
        """Make denoiser calls in a thread as long as there is work, and let the reporter know how far they are."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting or not self._engine.idle:
                self._admit()
                finished = await asyncio.to_thread(self._engine.call)
                self._reached = self._engine.reached()
                if reporter is not None and reporter.is_watched:
                    left = {done.job.request: done.job.segments[-1].stop for done in finished}
                    reporter.report(self._reached, left)
                for done in finished:
                    waiter = self._running.pop(done.job.request).done
                    if not waiter.cancelled():
                        waiter.set_result(done)
                for refused in self._engine.refused():
                    self._refuse(refused.job.request, f"{self._name} cannot do its part: {refused.reason}")

    async def carry(
        self, work: Work, *, group: Hashable = None, weight: float = 1.0, cache: LatentCache | None = None
    ) -> Work:
        """Run the segments of the route that are this node's turn, and return the work that is left.

        ``group`` and ``weight`` are the request's cluster and its share of the node; a ``cache`` may hold its first
        steps, and takes them in. Raises ``ValueError`` for work that cannot be done here: another model, a missing or
        misshapen latent, a request that is already under way, too many of them, memory that does not suffice.
        """
        own = tuple(takewhile(lambda s: s.node == self._name, work.route))
        if not own:
            return work
        if work.request in self._running:
            raise ValueError(f"request {work.request} is already under way on {self._name}")
        if len(self._running) >= _MOST:
            raise ValueError(f"{self._name} has {_MOST} requests under way and takes no more")
        arrived = time.time()
        job = Job(
            request=work.request,
            seed=work.seed,
            steps=work.steps,
            segments=tuple(msgspec.convert(s, Segment, from_attributes=True) for s in own),
            latent=None if work.latent is None else unpack(work.latent, self._main.latent_shape),
            group=group,
            weight=weight,
            cache=cache,
        )
        waiter: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._running[work.request] = _Running(job, waiter)
        self._waiting.append(job)
        self._wake.set()
        done = await waiter
        queue = Stage(name="queue", node=self._name, start=arrived, stop=done.started)
        denoise = Stage(
            name="denoise",
            node=self._name,
            start=done.started,
            stop=done.finished,
            joules=done.joules,
            flops=done.flops,
            steps=done.steps,
            busy=done.seconds,
            overruns=done.overruns,
            modelled=done.modelled,
        )
        return msgspec.structs.replace(
            work,
            route=work.route[len(own) :],
            latent=pack(done.latent, self._latent_dtype, least_bytes=self._pace.latent_bytes),
            stages=(*work.stages, queue, denoise),
        )

    async def decode(self, work: Work) -> Work:
        """Turn the latent of a finished route into a picture (PNG)."""
        if work.latent is None:
            raise ValueError(f"request {work.request} has no latent to decode")
        latent = unpack(work.latent, self._main.latent_shape)
        start = time.time()
        try:
            pixels, cost = await asyncio.to_thread(self._pace.decode, self._main, [latent])
        except torch.OutOfMemoryError:
            raise ValueError(f"{self._name} cannot decode: memory does not suffice for one picture") from None
        stage = Stage(
            name="decode",
            node=self._name,
            start=start,
            stop=time.time(),
            joules=cost.joules,
            flops=cost.flops,
            busy=cost.seconds,
            overruns=int(cost.overrun),
            modelled=cost.modelled,
        )
        return msgspec.structs.replace(work, latent=None, picture=_png(pixels[0]), stages=(*work.stages, stage))

    def spent(self, round_id: str) -> Spent:
        """What the engine did since the last report; the round is over, and its prompts are forgotten."""
        for denoiser in self._denoisers.values():
            denoiser.forget()
        if hasattr(_libc, "malloc_trim"):  # what the round needed goes back to the machine, glibc keeps it else
            _libc.malloc_trim(0)
        now, before = self._engine.totals, self._reported
        self._reported = now
        return Spent(
            round=round_id,
            node=self._name,
            denoiser_calls=now.calls - before.calls,
            rows=now.rows - before.rows,
            flops=now.flops - before.flops,
            busy=now.seconds - before.seconds,
            joules=now.joules - before.joules,
            overruns=now.overruns - before.overruns,
            shortages=now.shortages - before.shortages,
            calls=tuple(Call(model=c.model, start=c.start, stop=c.stop, steps=c.steps) for c in self._engine.calls()),
        )

    def _admit(self) -> None:
        waiting, self._waiting = self._waiting, []
        for job in waiting:
            try:
                self._engine.submit(job)
            except ValueError as error:
                self._refuse(job.request, str(error))

    def _refuse(self, request: str, reason: str) -> None:
        waiter = self._running.pop(request).done
        if not waiter.cancelled():
            waiter.set_exception(ValueError(reason))


def received(work: Work, incoming: Incoming, receiver: str) -> Work:
    """The work with the stage of its transfer to ``receiver``, by whom the message says it came.

    Raises ``ValueError`` for work in an inbox that does not say who sent it.
    """
    sender = incoming.topic.node if incoming.topic.to else work.sender
    if sender is None:
        raise ValueError(f"the work of request {work.request} does not say who sent it")
    transfer = Stage(
        name="transfer", node=sender, to=receiver, start=work.sent, stop=incoming.received, size=incoming.size
    )
    return msgspec.structs.replace(work, stages=(*work.stages, transfer))


def make_worker(settings: NodeSettings, denoisers: Mapping[str, Denoiser]) -> Worker:
    """The worker of a node on denoisers that are already loaded."""
    emulated = {model: (STANDS_FOR | settings.emulated_models).get(model, model) for model in denoisers}
    meter = None
    if settings.profile == Native.profile:
        meter, said = find_meter(place(settings.torch_device))
        _logger.info("energy of %s: %s", settings.name, said)
    pace = processor(settings.profile, emulated, slowdown=settings.slowdown, measured=settings.measured, meter=meter)
    return Worker(
        name=settings.name,
        denoisers=denoisers,
        pace=pace,
        rows=settings.rows,
        latent_dtype=settings.latent_dtype,
    )


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
