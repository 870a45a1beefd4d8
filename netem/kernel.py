"""Links made by the kernel: pairs of virtual Ethernet interfaces."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from netem.hosts import HUB_ADDRESS, Host, mac_address
from netem.link import MTU, BadLink, Link

_LINK_GROUP = 83  # all links of a hub, to delete them in one request


class PlainLinks:
    """Links that nothing shapes: as fast as this machine. See `netem.hosts.Links`."""

    implementation = "unshaped"

    def __init__(self) -> None:
        self._kernel: Any = None

    def open(self) -> None:
        """Open the socket to the kernel."""
        self._kernel = IPRoute()

    def close(self) -> None:
        """Remove every link that is left."""
        with suppress(NetlinkError):  # no link was left
            self._kernel.link("del", group=_LINK_GROUP)
        self._kernel.close()

    def connect(self, host: Host, namespace: int) -> None:
        """Make both ends of a link."""
        peer = {
            "ifname": host.device_interface,
            "address": mac_address(host.address),
            "mtu": MTU,
            "net_ns_fd": namespace,
        }
        self._kernel.link(
            "add",
            kind="veth",
            ifname=host.hub_interface,
            address=mac_address(HUB_ADDRESS),
            mtu=MTU,
            group=_LINK_GROUP,
            peer=peer,
        )

    def disconnect(self, host: Host) -> None:
        """Remove both ends; they may be gone already."""
        with suppress(NetlinkError):
            self._kernel.link("del", ifname=host.hub_interface)

    def apply(self, host: Host, namespace: int, link: Link) -> None:  # noqa: ARG002
        """Only the state that lets everything pass."""
        if link != Link():
            raise BadLink(f"the link of {host.name} is unshaped, it cannot be {link}")

    def read(self, host: Host, namespace: int) -> Link:  # noqa: ARG002
        """Everything passes."""
        return Link()
