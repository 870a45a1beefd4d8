"""The local place: this machine, a network namespace for each device where it permits them, a broker of its own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn, Self

import msgspec
import psutil

from broker.local import BrokerFailed, LocalBroker
from device_node.node import DeviceSettings
from edge_node.node import EdgeSettings
from experiments.doors import Doors
from experiments.enrolment import Enrolment
from experiments.forkserver import Exit, ForkServer, ForkServerError
from experiments.places import Placed, PlaceFailed
from netem.control import Counters
from netem.hosts import HUB_ADDRESS, AttachError, Hub, Links, LinksUnavailable, NamespaceError
from netem.link import Link
from netem.loopback import LOOPBACK_ADDRESS, Loopback
from netem.probe import Traffic, ping, traffic
from node.settings import NodeSettings, Settings
from semct.diffusion import NoSuchDevice, place


class LocalPlace:
    """Broker and nodes as processes of this machine. With ``namespaces``, the caller must have entered the hub.

    ``edge`` plans and stands at the hub; ``helpers``, the other edges and the cloud, have links as devices have. A
    device that has one of the ``doors`` is not started here: it comes in there, and enrols. Without ``namespaces`` all
    share the machine's own network, and no link can be shaped.
    """

    def __init__(
        self,
        *,
        edge: EdgeSettings,
        helpers: list[EdgeSettings],
        devices: list[DeviceSettings],
        doors: Doors | None = None,
        links: Links,
        congestion: str,
        implementation: Any,
        logs: Path,
        namespaces: bool = True,
    ) -> None:
        self.host, self.port = edge.host if namespaces else LOOPBACK_ADDRESS, edge.port
        self._edge = self._settled(edge)
        self._helpers = helpers = [self._settled(h) for h in helpers]
        self._doors = doors
        outside = doors.sockets if doors else {}
        self._devices = [self._settled(device) for device in devices if device.name not in outside]
        self._attached = [device for device in devices if device.name in outside]
        self._namespaces = namespaces
        self._logs = logs
        self._stack = AsyncExitStack()
        self._links = links
        self._hub = Hub(links, congestion=congestion) if namespaces else Loopback()
        self._broker = LocalBroker(
            hosts=[self.host],
            port=edge.port,
            directory=logs,
            implementation=implementation,
            more=doors.listeners if doors else (),
        )
        self._enrolment = Enrolment(
            self.host,
            edge.port,
            testbed=edge.testbed,
            attached=self._attached,
            others=[node.name for node in (edge, *helpers, *self._devices)],
        )
        self._servers = {
            "edge": ForkServer(
                "edge_node.process", warm={"models": []}, log=logs / "edge-server.log", own_network=False
            ),
        }
        if self._devices:
            self._servers["devices"] = self._warm_server(
                "device_node.process", self._devices, logs / "device-server.log"
            )
        if helpers:
            self._servers["helpers"] = self._warm_server("edge_node.process", helpers, logs / "helper-server.log")
        if doors:
            files = [door.fileno() for door in doors.sockets.values()]
            self._servers["doors"] = ForkServer("experiments.doors", warm={}, log=logs / "door-server.log", files=files)
        self._pids: dict[str, int] = {}
        self._killed: dict[str, asyncio.Event] = {}
        self.ended: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        """Bring everything up; raises ``PlaceFailed`` with what did not come and why."""
        try:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(self._hub)
                await stack.enter_async_context(self._broker)
                # The edge loads its models while the devices' server warms up.
                await stack.enter_async_context(self._servers["edge"])
                await self._start(self._edge, self._servers["edge"])
                for server, nodes in (("helpers", self._helpers), ("devices", self._devices)):
                    if nodes:
                        await stack.enter_async_context(self._servers[server])
                    for node in nodes:
                        pid = await self._start(node, self._servers[server])
                        await self._hub.attach(node.name, pid)
                if self._doors:
                    await self._open(self._doors, stack)
                self._stack = stack.pop_all()
        except (BrokerFailed, ForkServerError, NamespaceError, AttachError, LinksUnavailable) as error:
            raise PlaceFailed(str(error)) from error
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    @property
    def described(self) -> Placed:
        """What runs here."""
        hosts = "network namespaces" if self._namespaces else "processes that share this machine's network"
        return Placed(broker=self._broker.version, links=self._links.implementation, hosts=hosts)

    async def shape(self, node: str, link: Link) -> None:
        """Bring a node's link into a state; raises ``AttachError`` where it has none or that cannot be done."""
        await self._hub.shape(node, link)

    async def read(self, node: str) -> Link:
        """The state of a node's link, read back from what shapes it; raises ``AttachError``."""
        return await self._hub.read(node)

    async def counters(self, node: str) -> Counters | None:
        """What has happened on a node's link, where what shapes it counts that; raises ``AttachError``."""
        return await self._hub.counters(node)

    async def traffic(self) -> dict[str, Traffic]:
        """The bytes that have passed each node's link so far."""
        found = {}
        for host in self._hub.hosts:
            with suppress(OSError):  # its device has ended
                found[host.name] = traffic(host.hub_interface)
        return found

    async def round_trip(self, node: str, patience: float) -> float | None:
        """Seconds of a ping from the hub to a node and back; none where no answer comes in time."""
        address = next((host.address for host in self._hub.hosts if host.name == node), None)
        return None if address is None else await ping(address, patience)

    async def memory(self) -> dict[str, float]:
        """Private memory (USS) of each living node in MiB."""
        found = {}
        for name, pid in self._pids.items():
            try:
                found[name] = psutil.Process(pid).memory_full_info().uss / 2**20
            except psutil.Error:
                continue
        return found

    async def kill(self, node: str) -> None:
        """End a node as a crash would, and return when it has ended. ``watch`` must run."""
        ended = self._killed[node] = asyncio.Event()
        self._signal(node, signal.SIGKILL)
        await ended.wait()

    async def start(self, node: str) -> None:
        """Start a node anew that has ended, with a link that lets everything pass; raises ``PlaceFailed``."""
        groups = (("edge", [self._edge]), ("helpers", self._helpers), ("devices", self._devices))
        server, settings = next((s, n) for s, nodes in groups for n in nodes if n.name == node)
        try:
            if server != "edge":
                await self._hub.detach(node)
            pid = await self._start(settings, self._servers[server])
            if server != "edge":
                await self._hub.attach(node, pid)
        except (ForkServerError, AttachError) as error:
            raise PlaceFailed(f"{node} cannot be started anew: {error}") from error
        self.ended.pop(node, None)

    async def pause(self, node: str) -> None:
        """Let a node stand still until ``resume``."""
        self._signal(node, signal.SIGSTOP)

    async def resume(self, node: str) -> None:
        """Let a node go on after ``pause``."""
        self._signal(node, signal.SIGCONT)

    async def stop_broker(self) -> None:
        """End the broker in order, for a while; Mosquitto keeps sessions and messages, amqtt nothing."""
        await self._broker.stop()

    async def start_broker(self) -> None:
        """Bring the broker back after ``stop_broker``; raises ``PlaceFailed``."""
        try:
            await self._broker.start()
        except BrokerFailed as error:
            raise PlaceFailed(f"the broker cannot be started again: {error}") from error

    async def watch(self) -> NoReturn:
        """Keep ``ended`` true; raises ``PlaceFailed`` when all others than a device end on their own."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._broker.wait())
                for server in self._servers:
                    if server != "devices":
                        tasks.create_task(self._watch_one(server))
                if self._devices:
                    tasks.create_task(self._watch_devices())
                if self._doors:
                    tasks.create_task(self._enrolment.watch())
        except ExceptionGroup as group:  # not except*: Python 3.11.2 wraps what is raised there
            known = group.subgroup((BrokerFailed, ForkServerError, PlaceFailed))
            if known is None:
                raise
            raise PlaceFailed(str(known.exceptions[0])) from group
        raise AssertionError("the watchers never return")

    async def _open(self, doors: Doors, stack: AsyncExitStack) -> None:
        """Let the devices from outside in."""
        server = await stack.enter_async_context(self._servers["doors"])
        for device in self._attached:
            arguments = doors.stand_in(device.name, self.host, self.port)
            pid = await server.fork(device.name, arguments, log=self._logs / f"{device.name}.log")
            await self._hub.attach(device.name, pid)
        await stack.enter_async_context(self._enrolment)

    async def _start(self, node: NodeSettings, server: ForkServer) -> int:
        pid = await server.fork(node.name, msgspec.to_builtins(node), log=self._logs / f"{node.name}.log")
        self._pids[node.name] = pid
        return pid

    async def _watch_one(self, server: str) -> NoReturn:
        async for event in self._servers[server].exits():
            if self._expected(event):
                continue
            if event.code:  # else it was told to leave
                raise PlaceFailed(f"the {event.name} {self._how(event)}")
        raise PlaceFailed(f"the fork server of {server} was stopped")

    async def _watch_devices(self) -> NoReturn:
        async for event in self._servers["devices"].exits():
            if not self._expected(event):
                self.ended[event.name] = f"{event.name} {self._how(event)}"
        raise PlaceFailed("the devices' fork server was stopped")

    def _expected(self, event: Exit) -> bool:
        """Whether this end is one that ``kill`` waits for."""
        killed = self._killed.pop(event.name, None)
        if killed is None:
            return False
        self.ended[event.name] = f"{event.name} was killed by a fault of the scenario"
        killed.set()
        return True

    def _signal(self, node: str, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it has just ended on its own
            os.kill(self._pids[node], number)

    def _how(self, event: Exit) -> str:
        log = self._logs / f"{event.name}.log"
        try:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            lines = []
        how = f"was killed by signal {-event.code}" if event.code < 0 else f"ended with status {event.code}"
        return f"{how}: {lines[-1].strip()} (see {log})" if lines else f"{how} (see {log})"

    def _settled(self, node: Settings) -> Settings:
        """A node's settings with its way to the broker here, and the device that its models run on.

        What ``auto`` means is found out here: a fork server that asked for GPUs could not fork any longer.
        """
        try:
            return msgspec.structs.replace(node, host=self.host, torch_device=place(node.torch_device))
        except NoSuchDevice as error:
            raise PlaceFailed(f"{node.name} cannot start: {error}") from error

    def _warm_server(self, module: str, nodes: Sequence[NodeSettings], log: Path) -> ForkServer:
        """A server that loads once what its nodes hold, but for nodes on a GPU: each of them loads for itself."""
        models = list(dict.fromkeys(model for node in nodes if node.torch_device == "cpu" for model in node.models))
        return ForkServer(module, warm={"models": models}, log=log, own_network=self._namespaces)


HOST = HUB_ADDRESS
"""Where the broker of a local place listens."""
