"""A hub and its devices: network namespaces on one machine that leave nothing behind.

The process that calls `enter_hub` moves into a network namespace of its own, the hub. A device is a process
that moves into another one with `enter_host`. `Hub.attach` joins the two by a link, and `wait_for_link`
tells the device that it stands. No namespace has a name and no interface is on the host, so when the
processes end, by whatever cause, the kernel removes everything.

    hub:     lo 10.83.0.1/32    device1 10.83.0.1 peer 10.83.1.1/32    device2 10.83.0.1 peer 10.83.1.2/32
    device:                     uplink 10.83.1.1 peer 10.83.0.1/32, default route via 10.83.0.1

A device reaches the hub's address and nothing else: the hub does not forward.
"""

import asyncio
import ctypes
import errno
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar, TypeVarTuple

import msgspec
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from netem.control import Counters
from netem.link import BadLink, Link

HUB_ADDRESS: Final = "10.83.0.1"
"""The hub's own address. It is on the hub's loopback interface too, so a server can bind it at once."""

_DEVICE_INTERFACE: Final = "uplink"
_LOOPBACK: Final = 1  # the index of lo in every namespace
_NO_ARP: Final = 0x80  # IFF_NOARP: a tunnel, which has neither neighbours nor an address of its own
_NO_IPV6_ADDRESS: Final = 1  # IN6_ADDR_GEN_MODE_NONE
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_RTMGRP_IPV4_ROUTE: Final = 0x40
_CONGESTION: Final = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
_FORWARDING: Final = Path("/proc/sys/net/ipv4/ip_forward")

# What stops an ordinary user, or root inside a container: the kernel's setting and the value that forbids.
_RESTRICTIONS: Final = {
    "kernel.unprivileged_userns_clone": "0",
    "kernel.apparmor_restrict_unprivileged_userns": "1",
    "user.max_user_namespaces": "0",
    "user.max_net_namespaces": "0",
}

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(Exception):
    """This process may not have a network namespace of its own, or asked for it at the wrong moment."""


class AttachError(Exception):
    """A device could not be joined to the hub or separated from it, or its link not be shaped."""


class LinksUnavailable(Exception):
    """This kind of links cannot be had here: one sentence says what is missing and how to get it."""


class Host(msgspec.Struct, frozen=True):
    """A device as the network sees it."""

    name: str
    pid: int
    """The process that holds the device's namespace."""
    address: str
    hub_interface: str
    """In the hub. At most 15 characters whatever the name is; the interface's alias is the name."""
    device_interface: str
    """In the device's namespace."""


def enter_hub() -> None:
    """Move this process into a fresh namespace, the hub, and set up its loopback interface.

    There is no way back: the host's network is out of reach from here on, except through sockets that were
    open before. Without root, the process also enters a user namespace in which it is root.

    Raises `NamespaceError` when this process has more than one thread, since each thread has a namespace
    of its own, or when the kernel refuses. After a refusal the process should end.
    """
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise NamespaceError(
            f"the hub has to be entered while the process has one thread, but it has {threads}"
            " (importing numpy or torch starts some): enter it first"
        )
    try:
        _unshare_network()
        with IPRoute() as kernel:
            kernel.link("set", index=_LOOPBACK, state="up")
            kernel.addr("add", index=_LOOPBACK, address=HUB_ADDRESS, prefixlen=32)
        if _FORWARDING.read_text().strip() != "0":  # inherited from the host, where Docker sets it
            _FORWARDING.write_text("0")
    except (OSError, NetlinkError) as error:
        raise NamespaceError(_explain("the hub", error)) from error


def enter_host() -> None:
    """Move this process, a device forked in the hub, into a fresh namespace without any link.

    Raises `NamespaceError` when the kernel refuses.
    """
    try:
        _call("unshare", _CLONE_NEWNET)
    except OSError as error:
        raise NamespaceError(_explain("a device", error)) from error


def wait_for_link() -> None:
    """Block until the hub has attached this process."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as changes:
        changes.bind((0, _RTMGRP_IPV4_ROUTE))
        while not _has_default_route():  # attaching sets it last
            changes.recv(65536)


class Links(Protocol):
    """One way to make and shape a hub's links. The hub calls it from one thread, in its own namespace."""

    implementation: str
    """For the record, such as ``netem``."""

    def open(self) -> None:
        """Get ready; raises ``LinksUnavailable`` with what is missing here and how to get it."""
        ...

    def close(self) -> None:
        """Remove every link that is left."""
        ...

    def connect(self, host: Host, namespace: int) -> None:
        """Make both ends of a link that lets everything pass, down and without addresses.

        They are ``host.hub_interface`` here and ``host.device_interface`` in ``namespace`` (an open file).
        """
        ...

    def disconnect(self, host: Host) -> None:
        """Remove both ends; they may be gone already."""
        ...

    def apply(self, host: Host, namespace: int, link: Link) -> None:
        """Bring a link into a state, without losing a packet to the change. Raises ``BadLink`` or ``OSError``."""
        ...

    def read(self, host: Host, namespace: int) -> Link:
        """The state that the link is in, read back from what shapes it."""
        ...

    def counters(self, host: Host) -> Counters | None:
        """What has happened on the link since it was made, where that is counted. Raises ``OSError``."""
        ...


class Hub:
    """The links between this process, which has entered the hub, and its devices.

    ``links`` makes and shapes them; ``congestion`` is TCP's congestion control over them, in both directions.
    One thread does all the work on the kernel's side: it visits the devices' namespaces, and pyroute2 wants
    its sockets used where they were opened, away from a running event loop.
    """

    def __init__(self, links: Links, *, congestion: str = "cubic") -> None:
        self._links = links
        self._congestion = congestion
        self._hosts: dict[int, Host] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub")
        self._kernel: Any = None

    async def __aenter__(self) -> Self:
        """Raises `NamespaceError` when this process has not entered the hub, and `LinksUnavailable`."""
        try:
            await self._in_thread(self._open)
        except BaseException:
            self._thread.shutdown()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._in_thread(self._close)
        finally:
            self._thread.shutdown()

    @property
    def hosts(self) -> tuple[Host, ...]:
        """The attached devices."""
        return tuple(self._hosts.values())

    async def attach(self, name: str, pid: int, link: Link | None = None) -> Host:
        """Join the process `pid`, which has called `enter_host`, to the hub under a name of its own.

        The link is in its state before the device can use it. Raises `AttachError` when the name is taken, the
        process has ended or is not in a namespace of its own, or the kernel refuses; nothing is left of the
        attempt.
        """
        return await self._in_thread(self._attach, name, pid, link or Link())

    async def detach(self, name: str) -> None:
        """Remove a device's link. A device whose process has ended has lost it already; its name is freed.

        Raises `AttachError` when no device has this name or the kernel refuses.
        """
        await self._in_thread(self._detach, name)

    async def shape(self, name: str, link: Link) -> None:
        """Bring a device's link into a state. Raises `AttachError`."""
        await self._in_thread(self._visit, name, lambda host, namespace: self._links.apply(host, namespace, link))

    async def read(self, name: str) -> Link:
        """The state of a device's link, read back from what shapes it. Raises `AttachError`."""
        return await self._in_thread(self._visit, name, self._links.read)

    async def counters(self, name: str) -> Counters | None:
        """What has happened on a device's link, where its kind of links counts that. Raises `AttachError`."""
        return await self._in_thread(self._visit, name, lambda host, _: self._links.counters(host))

    async def _in_thread(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _open(self) -> None:
        kernel = IPRoute()
        try:
            if not any(kernel.get_addr(index=_LOOPBACK, address=HUB_ADDRESS)):
                raise NamespaceError("a Hub needs a process that has called enter_hub(); this one is on the host")
            self._links.open()
        except BaseException:
            kernel.close()
            raise
        self._kernel = kernel

    def _close(self) -> None:
        self._hosts.clear()
        try:
            self._links.close()
        finally:
            self._kernel.close()

    def _attach(self, name: str, pid: int, link: Link) -> Host:
        if any(host.name == name for host in self._hosts.values()):
            raise AttachError(f"a device named {name!r} is attached already")
        number = next(number for number in count(1) if number not in self._hosts)
        host = Host(
            name=name,
            pid=pid,
            address=_device_address(number),
            hub_interface=f"device{number}",
            device_interface=_DEVICE_INTERFACE,
        )
        try:
            with _namespace_of(pid) as namespace:
                if os.path.samestat(os.fstat(namespace), Path("/proc/self/ns/net").stat()):
                    raise AttachError(f"cannot attach {name!r}: process {pid} has not left the hub's namespace")
                try:
                    self._join(host, namespace, link)
                except BaseException:
                    self._links.disconnect(host)
                    raise
        except ProcessLookupError as error:
            raise AttachError(f"cannot attach {name!r}: process {pid} has ended") from error
        except (OSError, NetlinkError, BadLink) as error:
            raise AttachError(f"cannot attach {name!r}: {_sentence(error)}") from error
        self._hosts[number] = host
        return host

    def _join(self, host: Host, namespace: int, link: Link) -> None:
        self._links.connect(host, namespace)
        self._links.apply(host, namespace, link)
        self._kernel.link("set", index=socket.if_nametoindex(host.hub_interface), ifalias=host.name)
        self._configure(self._kernel, host.hub_interface, HUB_ADDRESS, host.address)
        with inside(namespace), IPRoute() as device:
            device.link("set", index=_LOOPBACK, state="up")
            uplink = self._configure(device, host.device_interface, host.address, HUB_ADDRESS)
            device.route("add", dst="default", gateway=HUB_ADDRESS, oif=uplink)

    def _configure(self, kernel: Any, interface: str, address: str, peer: str) -> int:
        """Set up one end of a link in the current namespace and return its index."""
        index = socket.if_nametoindex(interface)
        if Path("/proc/net/if_inet6").exists():
            # No link-local address: its chatter would ride on the measured link.
            inet6 = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _NO_IPV6_ADDRESS)]}
            kernel.link("set", index=index, IFLA_AF_SPEC={"attrs": [("AF_INET6", inet6)]})
        kernel.addr("add", index=index, local=address, address=peer, prefixlen=32)
        if not kernel.get_links(index)[0]["flags"] & _NO_ARP:
            # A permanent neighbour spares the first packet a round trip of ARP over the shaped link, and does
            # not count towards the kernel's limit of 1024 neighbours, which all namespaces share.
            peer_mac = mac_address(peer)
            kernel.neigh("add", family=socket.AF_INET, ifindex=index, dst=peer, lladdr=peer_mac, state="permanent")
        kernel.link("set", index=index, state="up")
        # The route chooses the congestion control of the connections over it: a namespace's own default is
        # limited to what the host permits there.
        metrics = {"cc_algo": self._congestion}
        try:
            kernel.route("replace", dst=f"{peer}/32", oif=index, prefsrc=address, scope="link", metrics=metrics)
        except NetlinkError as error:
            available = _CONGESTION.read_text().split()
            if error.code != errno.EINVAL or self._congestion in available:
                raise
            raise AttachError(
                f"this kernel has no TCP congestion control {self._congestion!r}: choose one of {', '.join(available)},"
                f" or load it with `modprobe tcp_{self._congestion}`"
            ) from error
        return index

    def _visit(self, name: str, work: Callable[[Host, int], Result]) -> Result:
        host = self._hosts[self._number(name)]
        try:
            with _namespace_of(host.pid) as namespace:
                return work(host, namespace)
        except ProcessLookupError as error:
            raise AttachError(f"the link of {name!r} is gone: process {host.pid} has ended") from error
        except (OSError, NetlinkError, BadLink) as error:
            raise AttachError(f"the link of {name!r} cannot be shaped: {_sentence(error)}") from error

    def _detach(self, name: str) -> None:
        number = self._number(name)
        try:
            self._links.disconnect(self._hosts[number])
        except (OSError, NetlinkError) as error:
            raise AttachError(f"cannot detach {name!r}: {_sentence(error)}") from error
        del self._hosts[number]

    def _number(self, name: str) -> int:
        number = next((number for number, host in self._hosts.items() if host.name == name), None)
        if number is None:
            raise AttachError(f"no device named {name!r} is attached")
        return number


@contextmanager
def _namespace_of(pid: int) -> Iterator[int]:
    """The network namespace of a process, kept open; raises ``ProcessLookupError`` when it has ended."""
    try:
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error
    try:
        yield namespace
    finally:
        os.close(namespace)


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Move this thread into a namespace and back; the thread's sockets stay where they were opened."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("setns", namespace, _CLONE_NEWNET)
        try:
            yield
        finally:
            _call("setns", own, _CLONE_NEWNET)
    finally:
        os.close(own)


def _unshare_network() -> None:
    try:
        _call("unshare", _CLONE_NEWNET)
    except PermissionError:
        # Root in a user namespace of our own may do the same, and programs it starts may too.
        user, group = os.geteuid(), os.getegid()
        _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def _call(function: str, *arguments: int) -> None:
    """Call a libc function that returns 0 or sets errno."""
    if _libc[function](*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), function)


def _explain(what: str, error: OSError | NetlinkError) -> str:
    forbidding = [f"{setting} = {value}" for setting, value in _RESTRICTIONS.items() if _read_setting(setting) == value]
    if forbidding:
        cause = f"{' and '.join(forbidding)} forbids it: run as root or change the setting"
    else:
        cause = (
            "usually a container without CAP_SYS_ADMIN or with a seccomp profile forbids it:"
            " run on the host, or in a privileged container"
        )
    return f"{what} cannot have a network namespace ({_sentence(error)}); {cause}"


def _read_setting(setting: str) -> str | None:
    try:
        return Path("/proc/sys", *setting.split(".")).read_text().strip()
    except OSError:
        return None


def _sentence(error: OSError | NetlinkError | BadLink) -> str:
    if isinstance(error, NetlinkError):
        return os.strerror(error.code)
    return str(error.strerror) if isinstance(error, OSError) else str(error)


def _device_address(number: int) -> str:
    high, low = divmod(number - 1, 254)
    return f"10.83.{1 + high}.{1 + low}"


def mac_address(address: str) -> str:
    return "02:00:" + ":".join(f"{int(byte):02x}" for byte in address.split("."))


def _has_default_route() -> bool:
    routes = (line.split() for line in Path("/proc/self/net/route").read_text().splitlines()[1:])
    return any(destination == "00000000" for _, destination, *_ in routes)
