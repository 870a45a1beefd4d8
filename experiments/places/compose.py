"""The compose place: nodes in containers, which enrol at the broker beside them.

A service of its own shapes their links, breaks them and mends them, where there is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, NoReturn, NotRequired, Self, TypedDict, Unpack

from broker.address import Address
from broker.messages import Birth
from broker.session import BrokerRefused, BrokerUnreachable, Session
from broker.topics import Topics
from device_node.node import DeviceSettings
from edge_node.node import EdgeSettings
from experiments.enrolment import Enrolment
from experiments.places import Placed, PlaceFailed
from netem.choice import Wanted
from netem.container_control import BROKER, LinksClient, LinksRefused
from netem.control import Counters
from netem.hosts import AttachError
from netem.link import Link
from netem.probe import Traffic

_OBSERVER = "observer"  # a name of its own beside the runner's
_LOOK = 0.5  # seconds between two looks at a container of whose node the broker heard the last
_START = 15.0  # seconds until a broker that was started again must accept connections
_POLL = 0.1  # seconds between two attempts to connect to it


class Whom(TypedDict):
    """For whom a place in containers is, as `ComposePlace` takes it."""

    testbed: str
    edge: EdgeSettings
    helpers: Sequence[EdgeSettings]
    devices: Sequence[DeviceSettings]
    attached: NotRequired[Sequence[DeviceSettings]]


class ComposePlace:
    """A testbed whose broker and nodes run in containers already, which nobody can shape or break.

    ``edge`` plans, ``helpers`` do not. The containers' nodes are given the scenario's places, and are free again at the
    end. Devices that are ``attached`` come from outside.
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
        self._births: dict[str, Birth] = {}
        self._stack = AsyncExitStack()
        self.ended: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        """Begin to hand out places; raises ``PlaceFailed`` when no broker answers."""
        try:
            async with AsyncExitStack() as stack:
                await self._enter(stack)
                self._stack = stack.pop_all()
        except (BrokerRefused, BrokerUnreachable, LinksRefused) as error:
            raise PlaceFailed(str(error)) from error
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    @property
    def described(self) -> Placed:
        """What runs here."""
        return Placed(broker="mosquitto", links="unshaped", hosts="containers")

    async def shape(self, node: str, link: Link) -> None:
        """Raises ``AttachError`` for any state but that which lets everything pass."""
        if link != Link():
            raise AttachError(
                f"the link of {node} comes from outside and is not shaped: give its group of devices `links: {{}}`"
                if node in self._outside
                else f"the link of {node} is unshaped, it cannot be {link}"
            )

    async def read(self, node: str) -> Link:  # noqa: ARG002
        """Everything passes."""
        return Link()

    async def counters(self, node: str) -> Counters | None:  # noqa: ARG002
        """Nothing counts."""
        return None

    async def traffic(self) -> Mapping[str, Traffic]:
        """Nothing counts."""
        return {}

    async def round_trip(self, node: str, patience: float) -> float | None:  # noqa: ARG002
        """Nobody stands at the hub to ask."""
        return None

    async def memory(self) -> Mapping[str, float]:
        """Nobody sees it from here."""
        return {}

    async def watch(self) -> NoReturn:
        """Keep ``ended`` true; raises ``PlaceFailed`` when an edge or the cloud ends."""
        async with asyncio.TaskGroup() as tasks:
            for watching in self._watches():
                tasks.create_task(watching)
        raise AssertionError("the watchers never return")

    async def _enter(self, stack: AsyncExitStack) -> None:
        await stack.enter_async_context(self._observer)
        await stack.enter_async_context(self._enrolment)

    def _watches(self) -> list[Coroutine[Any, Any, None]]:
        return [self._enrolment.watch(), self._observe()]

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
        elif birth.state == "lost" and before is not None and before.host == birth.host:
            await self._lost(birth)

    async def _lost(self, birth: Birth) -> None:
        """Another node may have the place of one that was lost; raises ``PlaceFailed`` where none can."""
        said = f"the container {birth.host} of {birth.name} has ended, or is cut off"
        if birth.name in self._fixed:
            raise PlaceFailed(said)
        self.ended[birth.name] = said
        await self._enrolment.release(birth.name)


class TendedPlace(ComposePlace):
    """A testbed in containers with a service beside them that shapes their links, and breaks and mends them.

    A node of which the broker has heard the last has ended once its container has: it may be cut off only.
    """

    def __init__(
        self, address: Address, *, links: LinksClient, shaped_by: Wanted = "auto", seed: int = 0, **whom: Unpack[Whom]
    ) -> None:
        super().__init__(address, **whom)
        self._links = links
        self._wish = shaped_by, seed
        self._shaped_by = "unshaped"
        self._wanted: dict[str, Link] = {}
        self._away: dict[str, Birth] = {}
        self._killed: set[str] = set()

    @property
    def described(self) -> Placed:
        """What runs here."""
        return Placed(broker="mosquitto", links=self._shaped_by, hosts="containers")

    async def shape(self, node: str, link: Link) -> None:
        """Bring a node's link into a state; raises ``AttachError`` where it has none or that cannot be done."""
        if node in self._outside:
            await super().shape(node, link)
            return
        self._wanted[node] = link
        async with _reachable(node):
            await self._links.shape(self._container(node), link)

    async def read(self, node: str) -> Link:
        """The state of a node's link, read back from what shapes it; raises ``AttachError``."""
        if node in self._outside:
            return await super().read(node)
        async with _reachable(node):
            return await self._links.read(self._container(node))

    async def counters(self, node: str) -> Counters | None:
        """What has happened on a node's link, where what shapes it counts that; raises ``AttachError``."""
        if node in self._outside:
            return await super().counters(node)
        async with _reachable(node):
            return await self._links.counters(self._container(node))

    async def traffic(self) -> Mapping[str, Traffic]:
        """The bytes that have passed each node's link so far."""
        found: dict[str, Traffic] = {}
        for node in self._wanted:
            with suppress(AttachError):  # its container has ended
                async with _reachable(node):
                    found[node] = await self._links.traffic(self._container(node))
        return found

    async def round_trip(self, node: str, patience: float) -> float | None:
        """Seconds of a ping from the hub to a node and back; none where no answer comes in time."""
        if node in self._outside:
            return await super().round_trip(node, patience)
        with suppress(AttachError):
            async with _reachable(node):
                return await self._links.round_trip(self._container(node), patience)
        return None

    async def memory(self) -> Mapping[str, float]:
        """Memory in MiB that the container of each node has for itself."""
        found: dict[str, float] = {}

        async def look(node: str, container: str) -> None:
            with suppress(LinksRefused):
                seen = await self._links.look(container)
                if seen.memory is not None:
                    found[node] = seen.memory / 2**20

        async with asyncio.TaskGroup() as tasks:
            for node, birth in self._births.items():
                tasks.create_task(look(node, birth.host))
        return found

    async def kill(self, node: str) -> None:
        """End a node as a crash would, and return when it has ended; raises ``PlaceFailed``."""
        async with _breakable(node, "killed"):
            container = self._container(node)
            self._killed.add(node)
            self._away.pop(node, None)
            self.ended[node] = f"{node} was killed by a fault of the scenario"
            await self._links.kill(container)

    async def start(self, node: str) -> None:
        """Start a node anew that has ended, with a link that lets everything pass; raises ``PlaceFailed``."""
        if node in self._wanted:
            self._wanted[node] = Link()
        async with _breakable(node, "started anew"):
            await self._links.start(self._container(node))
        self.ended.pop(node, None)

    async def pause(self, node: str) -> None:
        """Let a node stand still until ``resume``; raises ``PlaceFailed``."""
        async with _breakable(node, "held"):
            await self._links.pause(self._container(node))

    async def resume(self, node: str) -> None:
        """Let a node go on after ``pause``; raises ``PlaceFailed``."""
        async with _breakable(node, "resumed"):
            await self._links.resume(self._container(node))

    async def stop_broker(self) -> None:
        """End the broker in order, for a while; it keeps sessions and messages. Raises ``PlaceFailed``."""
        async with _breakable("the broker", "stopped"):
            await self._links.stop(BROKER)

    async def start_broker(self) -> None:
        """Bring the broker back after ``stop_broker``; raises ``PlaceFailed``."""
        async with _breakable("the broker", "started again"):
            await self._links.start(BROKER)
        try:
            async with asyncio.timeout(_START):
                while not await self._accepts():  # noqa: ASYNC110  nothing tells
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            raise PlaceFailed(f"the broker was started again and accepts no connections for {_START:g} s") from None

    async def _accepts(self) -> bool:
        with suppress(OSError):
            _, writer = await asyncio.open_connection(self.host, self.port)
            writer.close()
            return True
        return False

    async def _enter(self, stack: AsyncExitStack) -> None:
        stack.push_async_callback(self._links.close)
        self._shaped_by = await self._links.open(*self._wish)
        await super()._enter(stack)

    def _watches(self) -> list[Coroutine[Any, Any, None]]:
        return [*super()._watches(), self._look_after()]

    async def _note(self, birth: Birth) -> None:
        before = self._births.get(birth.name)
        if birth.name in self._killed and not (birth.state == "ready" and before and birth.started > before.started):
            return  # the last word of the node that was killed
        await super()._note(birth)
        if birth.state == "ready":
            self._killed.discard(birth.name)
            self._away.pop(birth.name, None)
            if before is not None and birth.name in self._wanted:  # in another container, or started again
                try:
                    await self.shape(birth.name, self._wanted[birth.name])
                except AttachError:
                    if birth.name not in self.ended:  # else it was killed again meanwhile
                        raise

    async def _lost(self, birth: Birth) -> None:
        self._away[birth.name] = birth

    async def _look_after(self) -> NoReturn:
        while True:
            await asyncio.sleep(_LOOK)
            for name, birth in list(self._away.items()):
                try:
                    seen = await self._links.look(birth.host)
                except LinksRefused as error:
                    raise PlaceFailed(str(error)) from error
                if not seen.runs and self._away.pop(name, None) is not None:
                    await super()._lost(birth)

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


@asynccontextmanager
async def _breakable(what: str, done: str) -> AsyncIterator[None]:
    """What the links service refuses to break or to mend is a ``PlaceFailed``."""
    try:
        yield
    except (LinksRefused, AttachError) as error:
        raise PlaceFailed(f"{what} cannot be {done}: {error}") from error
