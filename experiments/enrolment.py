"""The runner's side of enrolment: nodes that ask for a place get those of the scenario, in order."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Collection, Sequence
from typing import Any, Self

import msgspec

from broker.messages import Assign, Birth, Close, Enrol
from broker.session import Session
from broker.topics import Topics
from device_node.node import DeviceSettings
from edge_node.node import EdgeSettings

_REGISTRAR = "registrar"  # a name of its own beside the runner's

_logger = logging.getLogger(__name__)


class _Place:
    """One place of the scenario, and the node that was given it; ``left`` once another may have it instead."""

    def __init__(self, settings: EdgeSettings | DeviceSettings, *, by_name: bool) -> None:
        self.settings = settings
        self.by_name = by_name
        self.holder: str | None = None
        self.left = False

    def suits(self, enrol: Enrol) -> bool:
        """Whether this is such a place as the node asks for."""
        role = "device" if isinstance(self.settings, DeviceSettings) else "edge"
        wanted = enrol.wants == self.settings.name or (enrol.wants is None and not self.by_name)
        return role == enrol.role and wanted


class Enrolment:
    """Hands out places of a scenario while its ``async with`` block lasts.

    ``places`` go to whoever comes, edges in their order and devices in theirs; ``attached`` only to the devices that
    want them by name. ``others`` are nodes of the testbed that did not enrol. A node that comes again gets its place
    again, unless ``release`` gave it up and another node came first. Nodes that an earlier run has left in a place are
    told to leave it, so they enrol here. A node that this run has dismissed waits for another one.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        testbed: str,
        places: Sequence[EdgeSettings | DeviceSettings] = (),
        attached: Sequence[DeviceSettings] = (),
        others: Collection[str] = (),
    ) -> None:
        topics = Topics(testbed)
        filters = [topics.every("enrol"), topics.every("birth")]
        self._session = Session(host, port, testbed=testbed, name=_REGISTRAR, subscriptions=filters)
        self._places = {place.name: _Place(place, by_name=False) for place in places}
        self._places |= {place.name: _Place(place, by_name=True) for place in attached}
        self._others = frozenset(others)
        self._run = uuid.uuid4().hex
        self._waiting: dict[str, Enrol] = {}

    async def __aenter__(self) -> Self:
        """Raises ``BrokerUnreachable`` and ``BrokerRefused``."""
        await self._session.__aenter__()
        self._listening = asyncio.create_task(self._listen(), name="enrolment")
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._listening.cancel()
        await asyncio.wait({self._listening})
        await self._session.__aexit__(*error)

    @property
    def free(self) -> tuple[str, ...]:
        """The places that no node was given yet."""
        return tuple(name for name, place in self._places.items() if place.holder is None)

    async def release(self, name: str) -> None:
        """Give the place of a node that has ended to the next."""
        if name in self._places:
            self._places[name].left = True
            for enrol in list(self._waiting.values()):
                await self._take(enrol)

    async def watch(self) -> None:
        """Runs beside its users, and raises what ends the handing out."""
        await asyncio.shield(self._listening)

    async def _listen(self) -> None:
        async for incoming in self._session:
            match incoming.message:
                case Enrol() as enrol if enrol.name == incoming.topic.node:
                    await self._take(enrol)
                case Birth() as birth if birth.name == incoming.topic.node:
                    await self._note(birth)

    async def _take(self, enrol: Enrol) -> None:
        self._waiting.pop(enrol.name, None)
        if enrol.state != "ready" or enrol.left == self._run:
            return
        place = self._choose(enrol)
        if place is None:
            _logger.info("%s on %s waits: no place is free for it", enrol.name, enrol.host)
            self._waiting[enrol.name] = enrol
            return
        place.holder, place.left = enrol.name, False
        _logger.info("%s on %s is %s", enrol.name, enrol.host, place.settings.name)
        assign = Assign(run=self._run, settings=msgspec.Raw(msgspec.msgpack.encode(place.settings)))
        await self._session.publish(self._session.topics.inbox(enrol.name, "control"), assign)

    def _choose(self, enrol: Enrol) -> _Place | None:
        suitable = [place for place in self._places.values() if place.suits(enrol)]
        own = (place for place in suitable if place.holder == enrol.name)
        free = (place for place in suitable if place.holder is None)
        left = (place for place in suitable if place.left)
        return next(own, None) or next(free, None) or next(left, None)

    async def _note(self, birth: Birth) -> None:
        place = self._places.get(birth.name)
        unknown = birth.name not in self._others and (place is None or place.holder is None)
        if unknown and birth.state == "ready":  # it belongs to an earlier run
            await self._session.publish(self._session.topics.inbox(birth.name, "control"), Close())
