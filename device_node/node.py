"""One device: from the wish of its user to the picture."""

from __future__ import annotations

import logging
import socket
import time
from typing import Literal

import msgspec

from broker.messages import Ask, Birth, Close, Name, Picture, Request, Result, Work
from broker.session import Incoming, Session
from broker.topics import Topics
from node.serving import Deliveries, tasks_until_end
from node.settings import NodeSettings
from node.worker import Worker, received

_logger = logging.getLogger(__name__)


class DeviceSettings(NodeSettings, frozen=True, kw_only=True):
    """A device's settings; ``edge`` is the node that plans for it."""

    edge: Name = "edge"


class DeviceNode:
    """Serves one user on one device until the runner closes the testbed."""

    def __init__(self, settings: DeviceSettings, worker: Worker) -> None:
        self._settings = settings
        self._worker = worker
        self._asked: dict[str, float] = {}
        self._deliveries = Deliveries()

    async def run(self) -> bool:
        """Connect and serve; returns when told to leave, and whether the testbed ends."""
        s = self._settings
        birth = Birth(
            name=s.name,
            role="device",
            state="ready",
            models=self._worker.models,
            compute=self._worker.compute,
            host=socket.gethostname(),
        )
        filters = Topics(s.testbed).to_node(s.name)
        async with (
            Session(s.host, s.port, testbed=s.testbed, name=s.name, birth=birth, subscriptions=filters) as session,
            tasks_until_end() as tasks,
        ):
            tasks.create_task(self._worker.drive())
            async for incoming in session:
                match incoming.message:
                    case Ask() as ask if self._deliveries.is_first("ask", ask.round, ask.request):
                        tasks.create_task(self._ask(session, ask))
                    case Work() as work if self._deliveries.is_first_work(work):
                        tasks.create_task(self._serve(session, work, incoming))
                    case Close(round=None, ends=ends):
                        return ends
                    case Close(round=str() as round_id) if self._deliveries.is_first("close", round_id):
                        spent = self._worker.spent(round_id)
                        tasks.create_task(session.publish(session.topics.own(s.name, "spent"), spent))
        raise AssertionError("a session does not end by itself")

    async def _ask(self, session: Session, ask: Ask) -> None:
        now = time.time()
        self._asked[ask.request] = now
        request = Request(
            round=ask.round,
            request=ask.request,
            reply=self._settings.name,
            prompt=ask.prompt,
            seed=ask.seed,
            steps=ask.steps,
            sent=now,
            deadline=ask.deadline,
        )
        await session.publish(session.topics.own(self._settings.name, "request"), request)

    async def _serve(self, session: Session, work: Work, incoming: Incoming) -> None:
        try:
            work = received(work, incoming, self._settings.name)
            if work.failure:
                raise ValueError(work.failure)
            if time.time() > work.deadline:
                raise ValueError(f"the deadline passed before {self._settings.name} began")
            work = await self._worker.carry(work)
            if work.route:
                work = msgspec.structs.replace(work, sender=self._settings.name, sent=time.time())
                await session.publish(session.topics.forward(self._settings.name, work.route[0].node), work)
                return
            if work.picture is None:
                work = await self._worker.decode(work)
        except ValueError as error:
            _logger.warning("request %s failed: %s", work.request, error)
            await self._report(session, work, "failed", str(error))
            return
        await self._report(session, work, "answered", "")
        picture = Picture(round=work.round, request=work.request, png=work.picture or b"")
        await session.publish(session.topics.own(self._settings.name, "picture"), picture)

    async def _report(self, session: Session, work: Work, outcome: Literal["answered", "failed"], reason: str) -> None:
        finished = time.time()
        result = Result(
            round=work.round,
            request=work.request,
            device=self._settings.name,
            outcome=outcome,
            reason=reason,
            asked=self._asked.pop(work.request, finished),
            finished=finished,
            stages=work.stages,
        )
        await session.publish(session.topics.own(self._settings.name, "result"), result)
