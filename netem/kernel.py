"""Links made by the kernel: pairs of virtual Ethernet interfaces, shaped at their ends by its netem qdisc."""

from __future__ import annotations

import errno
import os
import platform
import socket
from contextlib import suppress
from types import TracebackType
from typing import Any, ClassVar, Final, Self

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import TC_H_INGRESS, TC_H_ROOT

from netem.hosts import HUB_ADDRESS, Host, LinksUnavailable, inside, mac_address
from netem.link import MTU, BadLink, Link, LinkState, mismatch
from netem.qdisc import Qdiscs

_LINK_GROUP: Final = 83  # all links of a hub, to delete them in one request
_NETEM: Final = 83 << 16  # the handle of every netem here
_SEGMENTS: Final = 84 << 16  # the handle of what cuts up bundles before it
_INGRESS: Final = 0xFFFF0000  # the kernel's handle of an interface's ingress qdisc
_FRAME: Final = 18  # bytes of an Ethernet header with a VLAN's tag
_SCRATCH: Final = "scratch"
_WAY_ROUND: Final = "semct-"  # and the index of the interface whose packets take it


class PlainLinks:
    """Links that nothing shapes: as fast as this machine. See `netem.hosts.Links`."""

    implementation = "unshaped"
    _options: ClassVar[dict[str, int]] = {}
    """What sets the interfaces of a kind of links apart."""

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
            **self._options,
        }
        self._kernel.link(
            "add",
            kind="veth",
            ifname=host.hub_interface,
            address=mac_address(HUB_ADDRESS),
            mtu=MTU,
            group=_LINK_GROUP,
            peer=peer,
            **self._options,
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

    def counters(self, host: Host) -> None:  # noqa: ARG002
        """The kernel's links do not count."""
        return


class NetemLinks(PlainLinks):
    """Links that the kernel's netem shapes, ``up`` at the device's end and ``down`` at the hub's.

    A state is applied as a change of the same qdisc, which keeps the packets in it and when they leave. Interfaces
    pass no bundles of packets, which netem would take for one.
    """

    implementation = "netem"
    _options: ClassVar = {"gso_max_segs": 1}

    def __init__(self) -> None:
        super().__init__()
        self._applied: dict[str, Link] = {}

    def open(self) -> None:
        """Try netem on an interface that nobody uses."""
        super().open()
        try:
            self._kernel.link(
                "add", kind="veth", ifname=_SCRATCH, group=_LINK_GROUP, peer={"ifname": f"{_SCRATCH}-peer"}
            )
            with Qdiscs() as qdiscs:
                qdiscs.shape(_SCRATCH, LinkState(), handle=_NETEM)
            self._kernel.link("del", ifname=_SCRATCH)
        except (OSError, NetlinkError) as error:
            self.close()
            raise LinksUnavailable(_explain(error, "sch_netem")) from error

    def connect(self, host: Host, namespace: int) -> None:
        """Make both ends of a link, with a netem on each from the start: installing one later could lose packets."""
        super().connect(host, namespace)
        self.apply(host, namespace, Link())

    def disconnect(self, host: Host) -> None:
        """Remove both ends; they may be gone already."""
        super().disconnect(host)
        self._applied.pop(host.hub_interface, None)

    def apply(self, host: Host, namespace: int, link: Link) -> None:
        """Change both ends; raises ``BadLink`` when what is read back is something else."""
        with Qdiscs() as qdiscs:
            qdiscs.shape(host.hub_interface, link.down, handle=_NETEM)
        with inside(namespace), Qdiscs() as qdiscs:
            qdiscs.shape(host.device_interface, link.up, handle=_NETEM)
        self._applied[host.hub_interface] = link
        _check(link, self.read(host, namespace))

    def read(self, host: Host, namespace: int) -> Link:
        """The state of both ends; the distributions are those last applied, since the kernel does not tell."""
        applied = self._applied[host.hub_interface]
        with Qdiscs() as qdiscs:
            down = qdiscs.read(host.hub_interface, applied.down.distribution, handle=_NETEM)
        with inside(namespace), Qdiscs() as qdiscs:
            up = qdiscs.read(host.device_interface, applied.up.distribution, handle=_NETEM)
        return Link(up=up, down=down)


class OneEnd:
    """Both directions of a link of which only this end can be touched, such as a container's on the host's side.

    ``down`` is what leaves by the interface; ``up``, what arrives on it, takes a way round through an interface of
    its own (an ifb), whose netem shapes it. The other end may send bundles of packets, so they are cut up first.
    A context manager; what an earlier one left that was killed is replaced or removed when the next one is entered.
    """

    def __init__(self, interface: str) -> None:
        self._interface = interface
        self._applied = Link()
        self._kernel: Any = None
        self._way_round = ""

    def __enter__(self) -> Self:
        """Raises ``LinksUnavailable`` when the interface or something in the kernel is missing."""
        try:
            index = socket.if_nametoindex(self._interface)
        except OSError as error:
            raise LinksUnavailable(f"there is no interface {self._interface} here") from error
        self._way_round = f"{_WAY_ROUND}{index}"
        self._kernel = IPRoute()
        try:
            self._remove_left()
            self._remove()
            self._turn(index)
            self.apply(Link())
        except (OSError, NetlinkError) as error:
            self.__exit__(None, None, None)
            raise LinksUnavailable(
                _explain(error, "sch_netem", "ifb", "sch_ingress", "cls_matchall", "act_mirred", "sch_tbf")
            ) from error
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove every trace; the interface may be gone already."""
        self._remove()
        self._kernel.close()

    def apply(self, link: Link) -> None:
        """Change both directions; raises ``OSError``, or ``BadLink`` when what is read back is something else."""
        with Qdiscs() as qdiscs:
            for interface, state in ((self._interface, link.down), (self._way_round, link.up)):
                qdiscs.shape(interface, state, handle=_NETEM, parent=_SEGMENTS | 1)
        self._applied = link
        _check(link, self.read())

    def read(self) -> Link:
        """The state of both directions, with the distributions last applied, since the kernel does not tell."""
        with Qdiscs() as qdiscs:
            down = qdiscs.read(self._interface, self._applied.down.distribution, handle=_NETEM)
            up = qdiscs.read(self._way_round, self._applied.up.distribution, handle=_NETEM)
        return Link(up=up, down=down)

    def _turn(self, index: int) -> None:
        """Send what arrives on the interface round through an ifb, and have bundles cut up in both directions."""
        self._kernel.link("add", kind="ifb", ifname=self._way_round, group=_LINK_GROUP)
        way_round = socket.if_nametoindex(self._way_round)
        self._kernel.link("set", index=way_round, state="up")
        self._kernel.tc("add", "ingress", index)
        redirect = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": way_round}
        self._kernel.tc("add-filter", "matchall", index, parent=_INGRESS, prio=1, action=redirect)
        packet = self._kernel.get_links(index)[0].get_attr("IFLA_MTU") + _FRAME
        with Qdiscs() as qdiscs:
            for interface in (self._interface, self._way_round):
                qdiscs.segment(interface, packet, handle=_SEGMENTS)

    def _remove(self) -> None:
        with suppress(NetlinkError):
            self._kernel.link("del", ifname=self._way_round)
        with suppress(OSError):  # the interface is gone, and what was on it
            index = socket.if_nametoindex(self._interface)
            for parent, handle in ((TC_H_INGRESS, _INGRESS), (TC_H_ROOT, _SEGMENTS)):
                with suppress(NetlinkError):  # it was not there
                    self._kernel.tc("del", index=index, parent=parent, handle=handle)

    def _remove_left(self) -> None:
        """Remove the ways round of interfaces that are gone."""
        there = {index for index, _ in socket.if_nameindex()}
        for link in self._kernel.get_links(group=_LINK_GROUP):
            turned = link.get_attr("IFLA_IFNAME").removeprefix(_WAY_ROUND)
            if turned.isdigit() and int(turned) not in there:
                self._kernel.link("del", index=link["index"])


def _check(wanted: Link, found: Link) -> None:
    if difference := mismatch(wanted, found):
        raise BadLink(f"the kernel took a state but read back {difference}")


def _explain(error: OSError | NetlinkError, *modules: str) -> str:
    number = error.code if isinstance(error, NetlinkError) else error.errno
    if number not in {errno.ENOENT, errno.EOPNOTSUPP}:
        return f"the kernel refuses to shape an interface: {os.strerror(number or 0)}"
    return (
        f"the running kernel, {platform.release()}, has no {' or '.join(modules)}: load it with `modprobe` (in a"
        " container: on its host), which finds it in the kernel's own package on Debian and in kernel-modules-extra"
        " on Fedora"
    )
