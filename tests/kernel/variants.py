"""Kinds of links in the kernel that only tests use."""

import socket

from pyroute2 import IPRoute

from netem.hosts import Host, inside
from netem.kernel import NetemLinks, OneEnd, PlainLinks
from netem.link import Link


class LargePackets(NetemLinks):
    """Packets of four times the usual size, so that a slow processor carries four times as much."""

    _MTU = 5600

    def connect(self, host: Host, namespace: int) -> None:
        super().connect(host, namespace)
        self._enlarge(host.hub_interface)
        with inside(namespace):
            self._enlarge(host.device_interface)

    def _enlarge(self, interface: str) -> None:
        with IPRoute() as kernel:
            kernel.link("set", index=socket.if_nametoindex(interface), mtu=self._MTU)


class OneEndLinks(PlainLinks):
    """Links of which only the hub's end is shaped; the device's passes bundles of packets, as a container's does."""

    implementation = "one end"

    def __init__(self) -> None:
        super().__init__()
        self._ends: dict[str, OneEnd] = {}

    def close(self) -> None:
        for end in self._ends.values():
            end.__exit__(None, None, None)
        super().close()

    def connect(self, host: Host, namespace: int) -> None:
        super().connect(host, namespace)
        self._ends[host.hub_interface] = OneEnd(host.hub_interface).__enter__()

    def disconnect(self, host: Host) -> None:
        self._ends.pop(host.hub_interface).__exit__(None, None, None)
        super().disconnect(host)

    def apply(self, host: Host, namespace: int, link: Link) -> None:  # noqa: ARG002
        self._ends[host.hub_interface].apply(link)

    def read(self, host: Host, namespace: int) -> Link:  # noqa: ARG002
        return self._ends[host.hub_interface].read()
