"""How a node serves: tasks that end with it, and messages that the bus delivers twice."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

from broker.messages import AnyMessage, MalformedMessage, Ping, Pong, Work
from broker.session import Incoming, Session, Undelivered

_logger = logging.getLogger(__name__)

_KEPT = 4096  # messages; a redelivery follows its first delivery by seconds


class _Over(Exception):
    """The body of ``tasks_until_end`` has ended."""


@asynccontextmanager
async def tasks_until_end() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose tasks are cancelled, not waited for, when its body ends."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
            raise _Over
    except* _Over:
        pass


async def deliver(session: Session, topic: str, message: AnyMessage) -> None:
    """Publish a message. Where the broker stays away for too long it is lost, and the node goes on.

    Whoever waits for it has a deadline.
    """
    try:
        await session.publish(topic, message)
    except (Undelivered, MalformedMessage) as error:
        _logger.warning("a message of type %s is lost: %s", type(message).__name__, error)


async def answer(session: Session, ping: Ping, incoming: Incoming) -> None:
    """Tell the runner what time it is here."""
    pong = Pong(node=session.name, sent=ping.sent, received=incoming.received, replied=time.time())
    await deliver(session, session.topics.own(session.name, "clock"), pong)


class Deliveries:
    """Remembers the latest messages: QoS 1 may deliver one again, which must not be answered again.

    It keeps hashes, of 64 bits: the names in a message would keep the memory around them from being used again, and a
    device would grow by some KB a round.
    """

    def __init__(self, *, kept: int = _KEPT) -> None:
        self._kept = kept
        self._seen: OrderedDict[int, None] = OrderedDict()

    def is_first_work(self, work: Work) -> bool:
        """Whether the work has not been here at this step of its route; it may come back at a later one."""
        at = work.route[0].start if work.route else work.steps
        return self.is_first("work", work.round, work.request, at)

    def has_seen(self, *key: Hashable) -> bool:
        """Whether ``key`` is among the latest messages."""
        return hash(key) in self._seen

    def is_first(self, *key: Hashable) -> bool:
        """Whether ``key`` has not been seen among the latest messages; from now on it has."""
        if hash(key) in self._seen:
            _logger.info("%s came again and is ignored", key)
            return False
        self._seen[hash(key)] = None
        if len(self._seen) > self._kept:
            self._seen.popitem(last=False)
        return True
