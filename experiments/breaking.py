"""Breaks what a scenario's faults say, round by round, and mends it again; all of it is written down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec

from experiments.faults import BROKER, Fault, Faults
from experiments.links import LinkControl
from experiments.places import Breakable, Place, PlaceFailed
from netem.course import StateChange
from netem.link import Probability
from node.serving import tasks_until_end
from semct.runs import FaultRow


class Breaker:
    """Plays the faults of one running testbed: ``keep`` takes their rows, ``journal`` what happens as it happens.

    Raises ``PlaceFailed`` where the place cannot break what they say.
    """

    def __init__(
        self,
        place: Place,
        control: LinkControl,
        faults: Faults,
        *,
        slowdown: float,
        keep: Callable[[FaultRow], None],
        journal: Callable[..., None],
    ) -> None:
        if faults.on_nodes and not isinstance(place, Breakable):
            raise PlaceFailed("in this place only links can be broken, but the scenario has nodes or the broker fail")
        self._place = place
        self._control = control
        self._slowdown = slowdown
        self._keep = keep
        self._journal = journal
        self._broken: dict[str, Fault] = {}
        self.restarted: dict[str, float] = {}
        """When each node was last started anew, in seconds of the epoch."""

    @property
    def returning(self) -> frozenset[str]:
        """The nodes that are dead and will be started again in this round."""
        return frozenset(n for n, fault in self._broken.items() if fault.what == "dies" and fault.lasts is not None)

    @asynccontextmanager
    async def played(self, faults: Sequence[Fault], *, round_id: str, framework: str) -> AsyncIterator[None]:
        """Let these faults happen while the block lasts; when it ends, all is mended."""
        async with tasks_until_end() as tasks:
            for number, fault in enumerate(faults):
                tasks.create_task(self._play(fault, number, round_id, framework))
            yield

    async def _play(self, fault: Fault, number: int, round_id: str, framework: str) -> None:
        target = fault.node or BROKER
        row = FaultRow(
            round=round_id,
            framework=framework,
            fault=number,
            what=fault.what,
            node=target,
            at_s=float(fault.at),
            lasts_s=None if fault.lasts is None else float(fault.lasts),
            loss=float(fault.loss) if fault.what == "loss" else None,
        )
        try:
            await asyncio.sleep(fault.at * self._slowdown)
        except asyncio.CancelledError:
            self._keep(msgspec.structs.replace(row, note="left out: the round was over"))
            raise
        if target in self._broken:
            self._keep(msgspec.structs.replace(row, note=f"left out: {target} was broken already"))
            return
        self._broken[target] = fault
        row = msgspec.structs.replace(row, began=time.time())
        self._journal("fault", round=round_id, what=fault.what, node=target, state="begins")
        try:
            await self._break(fault, target)
            await asyncio.sleep(3600.0 if fault.lasts is None else fault.lasts * self._slowdown)
        finally:
            await self._mend(fault, target)
            del self._broken[target]
            self._journal("fault", round=round_id, what=fault.what, node=target, state="ends")
            self._keep(msgspec.structs.replace(row, ended=time.time()))

    async def _break(self, fault: Fault, target: str) -> None:
        match fault.what, self._place:
            case "dies", Breakable() as place:
                await place.kill(target)
            case "hangs", Breakable() as place:
                await place.pause(target)
            case "broker-restarts", Breakable() as place:
                await place.stop_broker()
            case "outage", _:
                await self._control.break_link(target, StateChange(loss=Probability(1.0)))
            case "loss", _:
                await self._control.break_link(target, StateChange(loss=fault.loss))

    async def _mend(self, fault: Fault, target: str) -> None:
        match fault.what, self._place:
            case "dies", Breakable() as place:
                self.restarted[target] = time.time()
                await place.start(target)
                await self._control.renew(target)
            case "hangs", Breakable() as place:
                await place.resume(target)
            case "broker-restarts", Breakable() as place:
                await place.start_broker()
            case _:
                await self._control.break_link(target, None)
