"""What every node does on the bus, whatever its part: is born, answers the runner, computes, leaves when told."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from broker.messages import Birth, Close, Ping, Watch
from broker.session import Incoming, Session
from broker.topics import Topics
from node.metrics import exposition, metrics_of, shown
from node.reporting import Reporter
from node.serving import answer, tasks_until_end
from node.settings import NodeSettings
from node.worker import Worker


@dataclass(eq=False)
class Service:
    """A node's ``session`` on the bus, and the ``tasks`` that end with it; ``ends`` once the whole testbed does."""

    session: Session
    tasks: asyncio.TaskGroup
    reporter: Reporter
    ends: bool = False

    async def messages(self) -> AsyncIterator[Incoming]:
        """The messages that concern this node's own part, until it is told to leave."""
        async for incoming in self.session:
            match incoming.message:
                case Ping() as ping:
                    self.tasks.create_task(answer(self.session, ping, incoming))
                case Watch() as order:
                    self.reporter.watch(order)
                case Close(round=None, ends=ends):
                    self.ends = ends
                    return
                case _:
                    yield incoming


@asynccontextmanager
async def service(
    settings: NodeSettings, worker: Worker, *, role: Literal["edge", "cloud", "device"], also: Sequence[str] = ()
) -> AsyncIterator[Service]:
    """Connect as this node, with the worker at work; ``also`` are topic filters beside those to the node itself."""
    s = settings
    birth = Birth(
        name=s.name,
        role=role,
        state="ready",
        models=worker.models,
        compute=worker.compute,
        host=socket.gethostname(),
        started=time.time(),
    )
    async with (
        Session(
            s.host,
            s.port,
            testbed=s.testbed,
            name=s.name,
            birth=birth,
            subscriptions=(*Topics(s.testbed).to_node(s.name), *also),
            credentials=s.shown(),
        ) as session,
        tasks_until_end() as tasks,
        shown(s.metrics, lambda: exposition(metrics_of(worker, session), node=s.name, role=role)),
    ):
        reporter = Reporter(session)
        tasks.create_task(worker.drive(reporter))
        yield Service(session, tasks, reporter)
