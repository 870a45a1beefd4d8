"""In place of a hub where a machine permits no network namespaces: all on its loopback interface, nothing shaped."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from netem.hosts import AttachError, Host
from netem.link import Link

LOOPBACK_ADDRESS = "127.0.0.1"


class Loopback:
    """Does what `netem.hosts.Hub` does for devices that share the machine's own network: nothing."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._names.clear()

    @property
    def hosts(self) -> tuple[Host, ...]:
        """None has an address or an interface of its own."""
        return ()

    async def attach(self, name: str, pid: int) -> None:  # noqa: ARG002
        """The device is there already. Raises `AttachError` when the name is taken."""
        if name in self._names:
            raise AttachError(f"a device named {name!r} is attached already")
        self._names.add(name)

    async def detach(self, name: str) -> None:
        """Its name is free again. Raises `AttachError` when nobody has it."""
        if name not in self._names:
            raise AttachError(f"no device named {name!r} is attached")
        self._names.discard(name)

    async def shape(self, name: str, link: Link) -> None:
        """Only the state that lets everything pass. Raises `AttachError` for any other."""
        if link != Link():
            raise AttachError(f"the link of {name!r} cannot be {link}: this machine permits no network namespaces")

    async def read(self, name: str) -> Link:  # noqa: ARG002
        """Everything passes."""
        return Link()

    async def counters(self, name: str) -> None:
        """Nothing counts."""
