"""The compose place: nodes in containers, which enrol at the broker beside them; links shaped by their own service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, NoReturn, Self

from broker.address import Address
from broker.messages import Birth
from broker.session import BrokerRefused, BrokerUnreachable, Session
from broker.topics import Topics
from device_node.node import DeviceSettings
from edge_node.node import EdgeSettings
from experiments.enrolment import Enrolment
from experiments.places import Placed, PlaceFailed
from netem.choice import Wanted
from netem.container_control import LinksClient, LinksRefused
from netem.control import Counters
from netem.hosts import AttachError
from netem.link import Link
from netem.probe import Traffic

_OBSERVER = "observer"  # a name of its own beside the runner's


class ComposePlace:
    """A testbed whose broker and nodes run in containers already. ``edge`` plans, ``helpers`` do not.

    The containers' nodes are given the scenario's places, and are free again at the end. Devices that are ``attached``
    come from outside, and nobody shapes their links.
    """

    def __init__(
        self,
        address: Address,
        *,
        testbed: str,
        edge: EdgeSettings,
        helpers: Sequence[EdgeSettings],
        devices: Sequence[DeviceSettings],
        attached: Sequence[DeviceSettings] = (),
        links: LinksClient | None = None,
        shaped_by: Wanted = "auto",
        seed: int = 0,
    ) -> None:
        self.host, self.port = address.host, address.port
        self._fixed = frozenset(node.name for node in (edge, *helpers))
        self._enrolment = Enrolment(
            self.host, self.port, testbed=testbed, places=[edge, *helpers, *devices], attached=attached
        )
        self._outside = frozenset(device.name for device in attached)
        self._observer = Session(
            self.host, self.port, testbed=testbed, name=_OBSERVER, subscriptions=[Topics(testbed).every("birth")]
        )
        self._links = links
        self._wish = shaped_by, seed
        self._shaped_by = "unshaped"
        self._wanted: dict[str, Link] = {}
        self._births: dict[str, Birth] = {}
        self._stack = AsyncExitStack()
        self.ended: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        """Begin to hand out places; raises ``PlaceFailed`` when no broker answers."""
        try:
            async with AsyncExitStack() as stack:
                if self._links is not None:
                    stack.push_async_callback(self._links.close)
                    self._shaped_by = await self._links.open(*self._wish)
                await stack.enter_async_context(self._observer)
                await stack.enter_async_context(self._enrolment)
                self._stack = stack.pop_all()
        except (BrokerRefused, BrokerUnreachable, LinksRefused) as error:
            raise PlaceFailed(str(error)) from error
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    @property
    def described(self) -> Placed:
        """What runs here."""
        return Placed(broker="mosquitto", links=self._shaped_by, hosts="containers")

    async def shape(self, node: str, link: Link) -> None:
        """Bring a node's link into a state; raises ``AttachError`` where it has none or that cannot be done."""
        self._wanted[node] = link
        if (links := self._links_of(node)) is not None:
            async with _reachable(node):
                await links.shape(self._container(node), link)
        elif link != Link():
            raise AttachError(
                f"the link of {node} comes from outside and is not shaped: give its group of devices `links: {{}}`"
                if node in self._outside
                else f"the link of {node} is unshaped, it cannot be {link}"
            )

    async def read(self, node: str) -> Link:
        """The state of a node's link, read back from what shapes it; raises ``AttachError``."""
        if (links := self._links_of(node)) is None:
            return Link()
        async with _reachable(node):
            return await links.read(self._container(node))

    async def counters(self, node: str) -> Counters | None:
        """What has happened on a node's link, where what shapes it counts that; raises ``AttachError``."""
        if (links := self._links_of(node)) is None:
            return None
        async with _reachable(node):
            return await links.counters(self._container(node))

    async def traffic(self) -> dict[str, Traffic]:
        """The bytes that have passed each node's link so far."""
        found: dict[str, Traffic] = {}
        for node in self._wanted:
            if (links := self._links_of(node)) is not None:
                with suppress(AttachError):  # its container has ended
                    async with _reachable(node):
                        found[node] = await links.traffic(self._container(node))
        return found

    async def round_trip(self, node: str, patience: float) -> float | None:
        """Seconds of a ping from the hub to a node and back; none where no answer comes in time."""
        if (links := self._links_of(node)) is None:
            return None
        with suppress(AttachError):
            async with _reachable(node):
                return await links.round_trip(self._container(node), patience)
        return None

    def memory(self) -> dict[str, float]:
        """Private memory of each node in MiB, as far as it can be seen from here."""
        return {}

    async def watch(self) -> NoReturn:
        """Keep ``ended`` true; raises ``PlaceFailed`` when an edge or the cloud ends."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._enrolment.watch())
            tasks.create_task(self._observe())
        raise AssertionError("the watchers never return")

    async def _observe(self) -> NoReturn:
        async for incoming in self._observer:
            match incoming.message:
                case Birth() as birth:
                    await self._note(birth)
        raise AssertionError("a session does not end by itself")

    async def _note(self, birth: Birth) -> None:
        before = self._births.get(birth.name)
        if birth.state == "ready":
            self._births[birth.name] = birth
            self.ended.pop(birth.name, None)
            if before is not None and birth.name in self._wanted:  # in another container, or one that was started again
                await self.shape(birth.name, self._wanted[birth.name])
        elif birth.state == "lost" and before is not None and before.host == birth.host:
            said = f"the container {birth.host} of {birth.name} has ended, or is cut off"
            if birth.name in self._fixed:
                raise PlaceFailed(said)
            self.ended[birth.name] = said

    def _links_of(self, node: str) -> LinksClient | None:
        """What shapes a node's link, if anything does."""
        return None if node in self._outside else self._links

    def _container(self, node: str) -> str:
        birth = self._births.get(node)
        if birth is None:
            raise AttachError(f"{node} is not there yet")
        return birth.host


@asynccontextmanager
async def _reachable(node: str) -> AsyncIterator[None]:
    """What the links service refuses is an ``AttachError``."""
    try:
        yield
    except LinksRefused as error:
        raise AttachError(f"the link of {node} cannot be shaped: {error}") from error
