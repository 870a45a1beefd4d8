"""The service that shapes the links of a testbed's containers, and breaks and mends these.

``python -m netem.containers SOCKET PROJECT``, where the project is Compose's name for the testbed. The service works on
the host's ends of the containers' interfaces, in the host's network namespace (``network_mode: host``), with
CAP_NET_ADMIN to shape them and CAP_NET_RAW to ping, and asks Docker's socket which interface is whose.

Where the kernel has netem, `netem.kernel.OneEnd` shapes both directions. Elsewhere the userspace links' packet
scheduler does, between two TAP devices: one takes the interface's place in Docker's bridge, the other exchanges
packets with the interface by a redirection in each direction (mirred). A TAP device can neither segment nor compute
checksums, so the kernel has done both before a packet comes there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal, ParamSpec, Protocol, TypeVar

import docker.errors
import msgspec
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import TC_H_INGRESS

import docker
from netem.choice import Wanted
from netem.container_control import (
    BROKER,
    Answer,
    Break,
    Change,
    Look,
    Pass,
    Passed,
    Ping,
    Question,
    Seen,
    Took,
    Use,
    Using,
    read_question,
    write,
)
from netem.control import Count, Counters, Done, Read, Refused, Shape, State
from netem.hosts import Host, LinksUnavailable
from netem.kernel import NetemLinks, OneEnd
from netem.link import BadLink, Link
from netem.probe import ping, traffic
from netem.userspace import UserspaceLinks, tap

_PROJECT, _SERVICE = "com.docker.compose.project", "com.docker.compose.service"  # Compose's labels
_NODES = re.compile(r"(device|edge)(-\d+)?")  # numbered where each device is a service of its own
_KEEP: Final = "touch /tmp/restarts"  # so that the broker finds what it has kept when it is started
_AT_ONCE: Final = 64  # questions to Docker, which takes a second to say how much memory a container has
_INGRESS: Final = 0xFFFF0000  # the kernel's handle of an interface's ingress qdisc
_ANY: Final = 3  # ETH_P_ALL
_TO_BRIDGE, _TO_CONTAINER = "semctb", "semctc"  # and the interface's index
_NO_IPV6_ADDRESS: Final = 1  # IN6_ADDR_GEN_MODE_NONE
_FIND: Final = "for i in /sys/class/net/*; do echo $(cat $i/address) $(cat $i/iflink); done"

P = ParamSpec("P")
T = TypeVar("T")

_logger = logging.getLogger("links")


class End(msgspec.Struct, frozen=True):
    """The host's end of a container's interface, the bridge that it belongs to, and the container's address."""

    container: str
    interface: str
    bridge: str
    address: str


class NoContainer(LookupError):
    """There is no such container in the testbed, or it has no interface here."""


class Shaper(Protocol):
    """One way to shape the links of containers."""

    implementation: str

    def attach(self, end: End) -> None: ...
    def detach(self, end: End) -> None: ...
    def apply(self, end: End, link: Link) -> None: ...
    def read(self, end: End) -> Link: ...
    def counters(self, end: End) -> Counters | None: ...
    def close(self) -> None: ...


class NetemShaper:
    """The kernel's netem."""

    implementation = "netem"

    def __init__(self) -> None:
        self._ends: dict[str, OneEnd] = {}

    def attach(self, end: End) -> None:
        """Raises ``LinksUnavailable``."""
        self._ends[end.container] = OneEnd(end.interface).__enter__()

    def detach(self, end: End) -> None:
        """Remove every trace."""
        self._ends.pop(end.container).__exit__(None, None, None)

    def apply(self, end: End, link: Link) -> None:
        """Raises ``OSError`` and ``BadLink``."""
        self._ends[end.container].apply(link)

    def read(self, end: End) -> Link:
        """The state, read back."""
        return self._ends[end.container].read()

    def counters(self, end: End) -> None:  # noqa: ARG002
        """netem's are not asked for."""
        return

    def close(self) -> None:
        """Nothing is left but the links."""


class UserspaceShaper:
    """The packet scheduler of userspace links, between two TAP devices."""

    implementation = "userspace"

    def __init__(self, seed: int) -> None:
        self._links = UserspaceLinks(seed=seed)
        self._links.open()

    def attach(self, end: End) -> None:
        """Take the interface out of its bridge, and put the scheduler between the two; raises ``LinksUnavailable``."""
        index = socket.if_nametoindex(end.interface)
        names = f"{_TO_BRIDGE}{index}", f"{_TO_CONTAINER}{index}"
        devices: list[int] = []
        try:
            devices += [tap(name) for name in names]
            with IPRoute() as kernel:
                bridge_side, container_side = (socket.if_nametoindex(name) for name in names)
                inet6 = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _NO_IPV6_ADDRESS)]}
                for one in (bridge_side, container_side):
                    if Path("/proc/net/if_inet6").exists():
                        kernel.link("set", index=one, IFLA_AF_SPEC={"attrs": [("AF_INET6", inet6)]})
                    kernel.link("set", index=one, state="up")
                _redirect(kernel, container_side, index)
                _redirect(kernel, index, container_side)
                kernel.link("set", index=index, master=0)
                kernel.link("set", index=bridge_side, master=socket.if_nametoindex(end.bridge))
            own = os.pidfd_open(os.getpid())  # the container's process is out of sight; Docker tells when it ends
            try:
                self._links.join(end.container, devices[0], devices[1], own)
            finally:
                os.close(own)
        except (OSError, NetlinkError) as error:
            restore(end)
            raise LinksUnavailable(f"the interface {end.interface} cannot be led round: {error}") from error
        finally:
            for descriptor in devices:
                os.close(descriptor)

    def detach(self, end: End) -> None:
        """Put the interface back into its bridge; the TAP devices go with the scheduler's hold on them."""
        self._links.disconnect(_host(end))
        restore(end)

    def apply(self, end: End, link: Link) -> None:
        """Raises ``OSError``."""
        self._links.apply(_host(end), 0, link)

    def read(self, end: End) -> Link:
        """What the scheduler does now."""
        return self._links.read(_host(end), 0)

    def counters(self, end: End) -> Counters:
        """What it has done."""
        return self._links.counters(_host(end))

    def close(self) -> None:
        """End the scheduler."""
        self._links.close()


class PlainShaper:
    """Shapes nothing."""

    implementation = "unshaped"

    def attach(self, end: End) -> None:
        """Nothing to do."""

    def detach(self, end: End) -> None:
        """Nothing to do."""

    def apply(self, end: End, link: Link) -> None:
        """Raises ``BadLink`` for any state but that which lets everything pass."""
        if link != Link():
            raise BadLink(f"the link of {end.container} is unshaped, it cannot be {link}")

    def read(self, end: End) -> Link:  # noqa: ARG002
        """Everything passes."""
        return Link()

    def counters(self, end: End) -> None:  # noqa: ARG002
        """Nothing counts."""
        return

    def close(self) -> None:
        """Nothing is left."""


def restore(end: End) -> None:
    """Undo what any shaper, also one that was killed, has done to an interface."""
    with suppress(OSError), IPRoute() as kernel:  # it may be gone
        index = socket.if_nametoindex(end.interface)
        with suppress(NetlinkError):  # there was none
            kernel.tc("del", index=index, parent=TC_H_INGRESS, handle=_INGRESS)
        with suppress(NetlinkError):
            kernel.tc("del", index=index, parent=0xFFFFFFFF)
        kernel.link("set", index=index, master=socket.if_nametoindex(end.bridge))


def choose(wanted: Wanted, seed: int) -> Shaper:
    """What shapes here as wanted; raises ``LinksUnavailable`` in one sentence."""
    if wanted == "none":
        return PlainShaper()
    if wanted != "userspace":
        try:
            netem = NetemLinks()
            netem.open()
            netem.close()
            return NetemShaper()
        except LinksUnavailable:
            if wanted == "netem":
                raise
    return UserspaceShaper(seed)


class Service:
    """Answers one runner at a time; when it leaves, its links are removed, and what it has broken is mended.

    It touches no containers but those of one Compose project.
    """

    def __init__(self, project: str) -> None:
        self._docker: Any = docker.from_env()
        self._project = project
        self._broken: dict[str, Literal["start", "resume"]] = {}
        self._shaper: Shaper = PlainShaper()
        self._ends: dict[str, End] = {}
        self._each: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._turn = asyncio.Lock()
        self._shaping = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()

    async def run(self, path: Path) -> None:
        """Serve until cancelled; clean what an earlier service left first."""
        await asyncio.to_thread(self._clean)
        path.unlink(missing_ok=True)  # noqa: ASYNC240  before anybody is served
        server = await asyncio.start_unix_server(self._serve, str(path))
        path.chmod(0o666)  # noqa: ASYNC240  only the experiment sees the folder
        # A daemon, since nothing ends its wait for Docker's next event.
        threading.Thread(target=self._watch, args=(asyncio.get_running_loop(),), daemon=True).start()
        try:
            async with server:
                await server.serve_forever()
        finally:
            await self._leave()
            path.unlink(missing_ok=True)  # noqa: ASYNC240  nobody is served any more

    def _clean(self) -> None:
        for container in self._docker.containers.list(filters={"label": f"{_PROJECT}={self._project}"}):
            if _NODES.fullmatch(container.labels[_SERVICE]):
                with suppress(NoContainer):
                    restore(self._find(container.short_id))

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        for event in self._docker.events(decode=True, filters={"type": "container", "event": "die"}):
            loop.call_soon_threadsafe(self._gone, event["id"])

    def _gone(self, identity: str) -> None:
        for name in [name for name in self._ends if identity.startswith(name)]:
            task = asyncio.create_task(self._detach(name))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _detach(self, name: str) -> None:
        end = self._ends.pop(name, None)
        if end is not None:
            with suppress(OSError, NetlinkError, LinksUnavailable):  # it may be gone with its container
                await self._alone(self._shaper.detach, end)

    async def _leave(self) -> None:
        for name in list(self._ends):
            await self._detach(name)
        await self._alone(self._shaper.close)
        self._shaper = PlainShaper()
        for name, cure in list(self._broken.items()):
            try:
                await self._break(name, cure)
            except (NoContainer, docker.errors.DockerException) as error:
                _logger.warning("%s stays broken: %s", name, error)

    async def _alone(self, call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Call a shaper in a thread, since netlink's calls wait, and one at a time, as shapers want it."""
        async with self._shaping:
            return await asyncio.to_thread(call, *arguments, **named)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            question = await read_question(reader)
            if isinstance(question, Use):
                await self._stay(question, reader, writer)
            else:  # a question by itself: what takes long must not hold up the links
                write(writer, await self._answer(question))
        writer.close()

    async def _stay(self, question: Question, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._turn:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    write(writer, await self._answer(question))
                    question = await read_question(reader)
            await self._leave()

    async def _answer(self, question: Question) -> Answer:  # noqa: PLR0911  one for each question
        try:
            if isinstance(question, Use):
                await self._leave()
                self._shaper = await self._alone(choose, question.wanted, question.seed)
                return Using(self._shaper.implementation)
            if isinstance(question, Break):
                await self._break(question.name, question.what)
                return Done()
            if isinstance(question, Look):
                return await asyncio.to_thread(self._look, question.name)
            end = self._ends.get(question.name) or await self._attach(question.name)
            match question:
                case Shape(link=link):
                    await self._alone(self._shaper.apply, end, link)
                    return Done()
                case Read():
                    return State(await self._alone(self._shaper.read, end))
                case Count():
                    return await self._alone(self._shaper.counters, end) or Done()
                case Pass():
                    seen = traffic(end.interface)
                    return Passed(seen.up, seen.down)
                case Ping(patience=patience):
                    return Took(await ping(end.address, patience))
        except (BadLink, LinksUnavailable, NoContainer, docker.errors.APIError, NetlinkError, OSError) as error:
            return Refused(str(error))
        except Exception as error:  # whoever asked waits for an answer
            _logger.exception("a question could not be answered")
            return Refused(f"{type(error).__name__}: {error}")

    async def _attach(self, name: str) -> End:
        end = await asyncio.to_thread(self._find, name)
        await self._alone(self._shaper.attach, end)
        self._ends[name] = end
        _logger.info("the link of %s is %s, %s", name, end.interface, self._shaper.implementation)
        return end

    async def _break(self, name: str, what: Change) -> None:
        """Break a container or mend it, if it is not so already; raises ``NoContainer`` and ``APIError``."""
        async with self._each[name]:
            await self._change(name, what)

    async def _change(self, name: str, what: Change) -> None:
        container = await asyncio.to_thread(self._container, name)
        _logger.info("%s: %s", name, what)
        self._broken.pop(name, None)
        match what, container.status:
            case "kill", "running":
                self._broken[name] = "start"
                await asyncio.to_thread(container.kill)
                await asyncio.to_thread(container.wait)
                await self._detach(name)
            case "stop", "running":
                self._broken[name] = "start"
                await asyncio.to_thread(container.exec_run, _KEEP)
                await asyncio.to_thread(container.stop)
            case "pause", "running":
                self._broken[name] = "resume"
                await asyncio.to_thread(container.pause)
            case "resume", "paused":
                await asyncio.to_thread(container.unpause)
            case "start", "exited":
                await self._detach(name)  # where a link was shaped in the moment of its end
                await asyncio.to_thread(container.start)

    def _look(self, name: str) -> Seen:
        try:
            container = self._container(name)
        except NoContainer:
            return Seen(runs=False)
        if container.status not in {"running", "paused"}:
            return Seen(runs=False)
        try:
            counted = container.stats(stream=False, one_shot=True)["memory_stats"].get("stats", {})
        except docker.errors.APIError:  # it has just ended
            return Seen(runs=False)
        # What the second version of control groups calls anonymous, and the first one resident.
        return Seen(runs=True, memory=counted.get("anon", counted.get("total_rss")))

    def _container(self, name: str) -> Any:
        """A node's container of this testbed, or its broker's; raises ``NoContainer``."""
        try:
            if name == BROKER:
                labels = [f"{_PROJECT}={self._project}", f"{_SERVICE}={BROKER}"]
                return self._docker.containers.list(all=True, filters={"label": labels})[0]
            container = self._docker.containers.get(name)
        except (docker.errors.NotFound, IndexError) as error:
            raise NoContainer(f"there is no container {name}") from error
        labels = container.labels
        if labels.get(_PROJECT) != self._project or not _NODES.fullmatch(labels.get(_SERVICE, "")):
            raise NoContainer(f"{name} is no device and no edge of this testbed")
        return container

    def _find(self, name: str) -> End:
        """The host's end of a container's interface; raises ``NoContainer``."""
        try:
            container = self._container(name)
            networks = container.attrs["NetworkSettings"]["Networks"]
            network = next((n for n in networks.values() if n["MacAddress"]), None)
            if network is None:
                raise NoContainer(f"the container {name} has no network")
            _, output = container.exec_run(["sh", "-c", _FIND])
            pairs = (line.split() for line in output.decode().splitlines())
            index = next(int(pair[1]) for pair in pairs if pair[0] == network["MacAddress"])
            made = self._docker.networks.get(network["NetworkID"]).attrs
        except (docker.errors.APIError, StopIteration, IndexError) as error:
            raise NoContainer(f"there is no container {name} whose interface can be found: {error}") from error
        bridge = made["Options"].get("com.docker.network.bridge.name") or f"br-{made['Id'][:12]}"
        return End(name, socket.if_indextoname(index), bridge, network["IPAddress"])


def _redirect(kernel: Any, source: int, target: int) -> None:
    """Have what arrives on an interface leave by another one."""
    kernel.tc("add", "ingress", source)
    action = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": target}
    # u32, since small kernels lack matchall; pyroute2 wants a target, which the action makes meaningless.
    match = {"protocol": _ANY, "keys": ["0x0/0x0+0"], "target": 0x10001}
    kernel.tc("add-filter", "u32", source, parent=_INGRESS, prio=1, action=action, **match)


def _host(end: End) -> Host:
    return Host(name=end.container, pid=0, address=end.address, hub_interface="", device_interface=end.interface)


def main() -> None:
    """Serve the project at the socket that the command line names."""
    path, project = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    async def serve() -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_AT_ONCE))
        await Service(project).run(Path(path))

    try:
        asyncio.run(serve())
    except asyncio.CancelledError:
        return
    except docker.errors.DockerException as error:
        sys.exit(f"Docker's socket does not answer: {error}")


if __name__ == "__main__":
    main()
