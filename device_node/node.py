"""One device: from the wish of its user to the picture."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Literal

import msgspec

from broker.messages import Ask, Close, Name, Picture, Request, Result, Segment, Work
from broker.session import Incoming, Session
from node.service import service
from node.serving import Deliveries, deliver
from node.settings import NodeSettings
from node.worker import Worker, received

_MOST = 64  # wishes of one user at once; what is more is refused, or a flood would fill the memory
_MARGIN = 1.25  # of what a whole inference takes here, and a second more: kept free before the deadline

_logger = logging.getLogger(__name__)


class DeviceSettings(NodeSettings, frozen=True, kw_only=True):
    """A device's settings; ``edge`` is the node that plans for it."""

    edge: Name = "edge"


@dataclass(eq=False)
class _Wish:
    """What the user asked for and has no answer to yet.

    ``waiting`` is the patience with others; it is ``taken`` while this device works on it.
    """

    ask: Ask
    asked: float
    waiting: asyncio.Task[None] | None = None
    taken: bool = False


class DeviceNode:
    """Serves one user on one device until the runner closes the testbed.

    Every wish has one outcome, reported once: answered by the route that the edge planned; degraded, where the edge
    did not answer in time and the device did it alone from the prompt; or failed, with the reason.
    """

    def __init__(self, settings: DeviceSettings, worker: Worker) -> None:
        self._settings = settings
        self._worker = worker
        self._wishes: dict[str, _Wish] = {}
        self._deliveries = Deliveries()

    async def run(self) -> bool:
        """Connect and serve; returns when told to leave, and whether the testbed ends."""
        async with service(self._settings, self._worker, role="device") as bus:
            async for incoming in bus.messages():
                match incoming.message:
                    case Ask() as ask if self._deliveries.is_first("ask", ask.round, ask.request, ask.attempt):
                        self._ask(bus.session, bus.tasks, ask)
                    case Work() as work if self._deliveries.is_first_work(work):
                        bus.tasks.create_task(self._serve(bus.session, bus.tasks, work, incoming))
                    case Close(round=str() as round_id) if self._deliveries.is_first("close", round_id):
                        self._forget(round_id)
                        spent = self._worker.spent(round_id)
                        topic = bus.session.topics.own(self._settings.name, "spent")
                        bus.tasks.create_task(deliver(bus.session, topic, spent))
        return bus.ends

    def _ask(self, session: Session, tasks: asyncio.TaskGroup, ask: Ask) -> None:
        """Ask the edge for a picture, for the first time or because it may have forgotten."""
        if self._deliveries.has_seen("outcome", ask.round, ask.request):
            return
        now = time.time()
        wish = self._wishes.get(ask.request)
        if wish is None:
            if len(self._wishes) >= _MOST:
                _logger.warning("request %s is ignored: %d wishes are open already", ask.request, _MOST)
                return
            wish = self._wishes[ask.request] = _Wish(ask, asked=now - ask.waited)
            self._wait(session, tasks, wish)
        if not wish.taken:
            request = Request(
                round=ask.round,
                request=ask.request,
                attempt=ask.attempt,
                reply=self._settings.name,
                prompt=ask.prompt,
                seed=ask.seed,
                steps=ask.steps,
                sent=now,
                deadline=ask.deadline,
            )
            tasks.create_task(deliver(session, session.topics.own(self._settings.name, "request"), request))

    def _wait(self, session: Session, tasks: asyncio.TaskGroup, wish: _Wish) -> None:
        wish.waiting = tasks.create_task(self._out_of_patience(session, wish))

    async def _out_of_patience(self, session: Session, wish: _Wish) -> None:
        """Wait for the edge as long as the user does, or as the deadline allows; then do it alone, if there is time."""
        ask, now = wish.ask, time.time()
        alone = self._seconds_alone(ask.steps)
        latest = max(ask.deadline - _MARGIN * alone - 1.0, (now + ask.deadline) / 2)
        until = latest if ask.patience is None else min(now + ask.patience, latest)
        if until + alone > ask.deadline:
            until = ask.deadline
        await asyncio.sleep(until - now)
        waited = f"{self._settings.edge} did not answer within {until - wish.asked:.1f} s"
        work = Work(
            round=ask.round,
            request=ask.request,
            reply=self._settings.name,
            seed=ask.seed,
            steps=ask.steps,
            route=(self._whole(ask),),
            sent=time.time(),
            deadline=ask.deadline,
        )
        if until >= ask.deadline:
            await self._report(session, work, "failed", waited)
            return
        _logger.warning("request %s: %s, and %s does it alone", ask.request, waited, self._settings.name)
        wish.taken = True
        await self._finish(session, work, outcome="degraded", reason=waited)

    def _seconds_alone(self, steps: int) -> float:
        """Wall seconds that a whole inference takes on this device."""
        compute = self._worker.compute
        stretch = 1.0 if compute.profile == "native" else self._settings.slowdown
        return stretch * (steps * (compute.call_seconds + compute.step_seconds) + compute.decode_seconds)

    def _whole(self, ask: Ask) -> Segment:
        model = self._worker.models[0]
        return Segment(node=self._settings.name, model=model, prompt=ask.prompt, start=0, stop=ask.steps)

    async def _serve(self, session: Session, tasks: asyncio.TaskGroup, work: Work, incoming: Incoming) -> None:
        """Do this device's part of a route, and report where that was the last."""
        wish = self._wishes.get(work.request)
        if wish is not None:
            if wish.taken:
                _logger.info("request %s is being done here: what came late is ignored", work.request)
                return
            wish.taken = True
            if wish.waiting is not None:
                wish.waiting.cancel()
        try:
            work = received(work, incoming, self._settings.name)
            if work.failure:
                raise ValueError(work.failure)
            if time.time() > work.deadline:
                raise ValueError(f"the deadline passed before {self._settings.name} began")
        except ValueError as error:
            await self._fail(session, work, error)
            return
        onward = await self._finish(session, work, outcome="answered")
        if onward is not None:
            if wish is not None:
                wish.taken = False
                self._wait(session, tasks, wish)
            leaving = msgspec.structs.replace(onward, sender=self._settings.name, sent=time.time())
            await deliver(session, session.topics.forward(self._settings.name, onward.route[0].node), leaving)

    async def _finish(
        self, session: Session, work: Work, *, outcome: Literal["answered", "degraded"], reason: str = ""
    ) -> Work | None:
        """Run this device's segments, decode and report; the work that goes on elsewhere, where this is not its end."""
        try:
            work = await self._worker.carry(work)
            if work.route:
                return work
            if work.picture is None:
                work = await self._worker.decode(work)
        except ValueError as error:
            await self._fail(session, work, error)
            return None
        if await self._report(session, work, outcome, reason):
            picture = Picture(round=work.round, request=work.request, png=work.picture or b"")
            await deliver(session, session.topics.own(self._settings.name, "picture"), picture)
        return None

    async def _fail(self, session: Session, work: Work, error: ValueError) -> None:
        _logger.warning("request %s failed: %s", work.request, error)
        await self._report(session, work, "failed", str(error))

    async def _report(
        self, session: Session, work: Work, outcome: Literal["answered", "degraded", "failed"], reason: str
    ) -> bool:
        """Report a request's outcome, unless it has one already; whether it had none."""
        if not self._deliveries.is_first("outcome", work.round, work.request):
            return False
        finished = time.time()
        wish = self._wishes.pop(work.request, None)
        if wish is not None and wish.waiting is not None and wish.waiting is not asyncio.current_task():
            wish.waiting.cancel()
        # A device that came back does not know when its user asked; the stages of the way say when it sent that on.
        asked = wish.asked if wish else min((s.start for s in work.stages), default=finished)
        result = Result(
            round=work.round,
            request=work.request,
            device=self._settings.name,
            outcome=outcome,
            reason=reason,
            asked=asked,
            finished=finished,
            stages=work.stages,
        )
        await deliver(session, session.topics.own(self._settings.name, "result"), result)
        return True

    def _forget(self, round_id: str) -> None:
        """The round is over: whoever still waits, waits in vain."""
        for request, wish in list(self._wishes.items()):
            if wish.ask.round == round_id:
                del self._wishes[request]
                if wish.waiting is not None:
                    wish.waiting.cancel()
