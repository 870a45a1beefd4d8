"""Where a testbed runs. All places offer the same: a broker, nodes, and word of who has ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, Protocol, Self, runtime_checkable

import msgspec

from netem.control import Counters
from netem.link import Link
from netem.probe import Traffic


class PlaceFailed(RuntimeError):
    """The testbed could not be set up here, or lost a part that it cannot do without."""


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """What the record says of the place: the broker's and the links' implementation, and what hosts are."""

    broker: str
    links: str
    hosts: str


class Place(Protocol):
    """A running testbed while its ``async with`` block lasts."""

    host: str
    port: int

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: Any) -> None: ...

    @property
    def described(self) -> Placed:
        """What runs here."""
        ...

    @property
    def ended(self) -> Mapping[str, str]:
        """Nodes that have ended and were not started anew, and how, in a few words."""
        ...

    async def shape(self, node: str, link: Link) -> None:
        """Bring a node's link into a state; raises ``AttachError`` where it has none or that cannot be done."""
        ...

    async def read(self, node: str) -> Link:
        """The state of a node's link, read back from what shapes it; raises ``AttachError``."""
        ...

    async def counters(self, node: str) -> Counters | None:
        """What has happened on a node's link, where what shapes it counts that; raises ``AttachError``."""
        ...

    async def traffic(self) -> Mapping[str, Traffic]:
        """The bytes that have passed each node's link so far."""
        ...

    async def round_trip(self, node: str, patience: float) -> float | None:
        """Seconds of a ping from the hub to a node and back; none where no answer comes in time."""
        ...

    async def memory(self) -> Mapping[str, float]:
        """Private memory (USS) of each node in MiB, as far as it can be seen from here."""
        ...

    async def watch(self) -> NoReturn:
        """Keep ``ended`` true; raises ``PlaceFailed`` when the broker, an edge or the cloud ends on its own."""
        ...


@runtime_checkable
class Breakable(Protocol):
    """A place that can break what runs in it, and mend it, as faults of a scenario have it."""

    async def kill(self, node: str) -> None:
        """End a node as a crash would, and return when it has ended; raises ``PlaceFailed``."""
        ...

    async def start(self, node: str) -> None:
        """Start a node anew that has ended, with a link that lets everything pass; raises ``PlaceFailed``."""
        ...

    async def pause(self, node: str) -> None:
        """Let a node stand still until ``resume``: it does nothing, and keeps what it has."""
        ...

    async def resume(self, node: str) -> None:
        """Let a node go on after ``pause``."""
        ...

    async def stop_broker(self) -> None:
        """End the broker in order, for a while; it keeps what it can keep."""
        ...

    async def start_broker(self) -> None:
        """Bring the broker back after ``stop_broker``; raises ``PlaceFailed``."""
        ...
