"""Keeps a testbed's links as the scenario wants them, round by round, and answers those who ask or interfere.

Time on a link begins anew with every round, so that all frameworks meet the same links. In a slower world links
are slower too (``slowdown``): everything in here is in the scenario's own units, and only what goes to the place
and comes back from it is converted.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.box import SIMPLE_HEAD
from rich.table import Table

from broker.messages import LinkNow, Way
from experiments.places import Place, PlaceFailed
from experiments.scenario import BadScenario, Radio
from netem.control import Counters
from netem.course import Course, Setting, StateChange, changes, resolve
from netem.hosts import AttachError
from netem.link import BadLink, Link, LinkState, decode_quantity, encode_quantity
from netem.trace import read_csv

SOCKET: Final = "links.sock"
"""In the run folder: where a running testbed takes questions about its links."""

_PEEK: Final = 1.0  # seconds for which traffic is counted when somebody asks
_LONGEST: Final = 2**20  # bytes of a question or an answer


def courses(settings: Mapping[str, Setting], seed: int, beside: Path) -> dict[str, Course]:
    """The course of every node's link, devices first; ``beside`` is where trace files lie. Raises ``BadScenario``."""
    try:
        return {node: resolve(setting, n, seed, beside) for n, (node, setting) in enumerate(settings.items(), 1)}
    except (BadLink, OSError) as error:
        raise BadScenario(f"the links of this scenario cannot be made: {error}") from error


class Show(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How are the links?"""


class Set(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From now on these fields of a node's link are these, whatever the scenario says; none: as it says again."""

    node: str
    up: StateChange | None = None
    down: StateChange | None = None


class Replay(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A node's link follows a CSV trace from now on, for the rest of the round."""

    node: str
    trace: str


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """One link now: what was asked for, what shapes it, and what is measured.

    Rates are bit/s of the traffic in the last second, ``round_trip_s`` is a ping's (none: no answer).
    """

    node: str
    requested: Link
    applied: Link
    up_bps: float
    down_bps: float
    round_trip_s: float | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What comes back: the links, or one sentence about what went wrong."""

    links: tuple[Condition, ...] = ()
    error: str = ""


class LinkControl:
    """The links of one running testbed."""

    def __init__(self, place: Place, *, slowdown: float, journal: Callable[..., None]) -> None:
        self._place = place
        self._slowdown = slowdown
        self._journal = journal
        self._by_hand: dict[str, Set] = {}
        self._broken: dict[str, StateChange] = {}
        self._wanted: dict[str, Link] = {}
        self._history: dict[str, list[tuple[float, Link]]] = {}
        self._following: dict[str, asyncio.Task[None]] = {}
        self._tasks: asyncio.TaskGroup | None = None  # of the round that goes on

    @asynccontextmanager
    async def played(self, wanted: Mapping[str, Course]) -> AsyncIterator[None]:
        """Bring all links to their start, and let them follow their courses while the block lasts."""
        self._history = {}
        for node, course in wanted.items():
            await self._want(node, course.at(0.0))
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for node, course in wanted.items():
                if course.after(0.0) < math.inf:
                    self._following[node] = tasks.create_task(self._follow(node, course))
            try:
                yield
            finally:
                for task in self._following.values():
                    task.cancel()
                self._following = {}
                self._tasks = None

    def during(self, node: str, at: float) -> Link | None:
        """What was asked of a node's link at that time (seconds of the epoch); none for a node without a link."""
        past = self._history.get(node)
        if not past:
            return None
        return past[max(0, bisect_right(past, at, key=lambda entry: entry[0]) - 1)][1]

    def now(self, node: str) -> Link | None:
        """What is asked of a node's link now; none for a node without a link."""
        past = self._history.get(node)
        return past[-1][1] if past else None

    def start(self, node: str) -> Link:
        """What was asked of a node's link when the round began."""
        return self._history[node][0][1]

    def changes(self, node: str) -> int:
        """How often a node's link has changed in this round."""
        return len(self._history[node]) - 1

    def told(self, radio: Radio) -> dict[str, LinkNow]:
        """What the edge is told of the links now."""
        found = {}
        for node, past in self._history.items():
            link = past[-1][1]
            up = Way(rate=link.up.goodput, delay=float(link.up.delay), watts=radio.device_watts)
            down = Way(rate=link.down.goodput, delay=float(link.down.delay), watts=radio.edge_watts)
            found[node] = LinkNow(up=up, down=down)
        return found

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that have a link."""
        return tuple(self._history)

    async def applied(self) -> dict[str, Link]:
        """What shapes the nodes' links, read back; those of nodes that have ended are left out."""
        found = {}
        for node in self._history:
            with suppress(AttachError):
                found[node] = await self._read(node)
        return found

    async def counted(self) -> dict[str, Counters]:
        """What has happened on the links, where what shapes them counts it."""
        found = {}
        for node in self._history:
            with suppress(AttachError):
                counters = await self._place.counters(node)
                if counters is not None:
                    found[node] = counters
        return found

    @asynccontextmanager
    async def served(self, folder: Path) -> AsyncIterator[None]:
        """Answer questions on a socket in the run folder while the block lasts."""
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        path = f"/proc/self/fd/{directory}/{SOCKET}"  # short, wherever the folder is
        try:
            server = await asyncio.start_unix_server(self._serve, path, limit=_LONGEST)
            (folder / SOCKET).chmod(0o600)
            async with server:
                yield
        finally:
            with suppress(FileNotFoundError):
                (folder / SOCKET).unlink()
            os.close(directory)

    async def _read(self, node: str) -> Link:
        found = (await self._place.read(node)).slowed(1 / self._slowdown)
        asked = self._history[node][-1][1]
        return Link(up=_derived(found.up, asked.up), down=_derived(found.down, asked.down))

    async def _follow(self, node: str, course: Course) -> None:
        begin = time.monotonic()
        try:
            for at, link in changes(course, math.inf):
                await asyncio.sleep(begin + at * self._slowdown - time.monotonic())
                if at > 0:
                    await self._want(node, link)
        except AttachError as error:  # its device has ended, as the place tells the runner
            self._journal("link", node=node, error=str(error))

    async def break_link(self, node: str, change: StateChange | None) -> None:
        """Change a node's link in both directions, whatever else is wanted of it; none: no longer."""
        if change is None:
            self._broken.pop(node, None)
        else:
            self._broken[node] = change
        await self._shape(node)

    async def renew(self, node: str) -> None:
        """Shape the link of a node that was started anew; a node that has none has none now, either."""
        if node in self._wanted:
            await self._shape(node)

    async def _want(self, node: str, link: Link) -> None:
        self._wanted[node] = link
        await self._shape(node)

    async def _shape(self, node: str) -> None:
        hand = self._by_hand.get(node)
        link = self._wanted[node]
        if hand is not None:
            link = Link(
                up=hand.up.apply(link.up) if hand.up else link.up,
                down=hand.down.apply(link.down) if hand.down else link.down,
            )
        if broken := self._broken.get(node):
            link = Link(up=broken.apply(link.up), down=broken.apply(link.down))
        try:
            await self._place.shape(node, link.slowed(self._slowdown))
        except AttachError:
            if node not in self._place.ended:
                raise
            return
        self._history.setdefault(node, []).append((time.time(), link))
        self._journal("link", node=node, up=str(link.up), down=str(link.down))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            question = msgspec.json.decode(await reader.readline(), type=Show | Set | Replay, dec_hook=decode_quantity)
            answer = await self._answer(question)
        except (msgspec.DecodeError, UnicodeDecodeError, AttachError, PlaceFailed, BadLink, OSError) as error:
            answer = Answer(error=str(error))
        writer.write(msgspec.json.encode(answer, enc_hook=encode_quantity) + b"\n")
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()

    async def _answer(self, question: Show | Set | Replay) -> Answer:
        if not isinstance(question, Show) and question.node not in self._wanted:
            have = ", ".join(self._wanted) or "no link yet"
            raise BadLink(f"{question.node!r} has no link here; there is {have}")
        match question:
            case Set(node=node):
                if question.up is None and question.down is None:
                    self._by_hand.pop(node, None)
                else:
                    self._by_hand[node] = question
                await self._shape(node)
            case Replay(node=node, trace=trace):
                if self._tasks is None:
                    raise BadLink("no round is going on: a trace is followed until the end of a round")
                course = read_csv(Path(trace))
                if node in self._following:
                    self._following[node].cancel()
                self._by_hand.pop(node, None)
                await self._want(node, course.at(0.0))
                self._following[node] = self._tasks.create_task(self._follow(node, course))
        return Answer(links=await self._conditions(question.node if not isinstance(question, Show) else None))

    async def _conditions(self, only: str | None) -> tuple[Condition, ...]:
        nodes = [only] if only else list(self._wanted)
        before, since = await self._place.traffic(), time.monotonic()
        pings = await asyncio.gather(*(self._place.round_trip(n, _PEEK) for n in nodes))
        await asyncio.sleep(max(0.0, since + _PEEK - time.monotonic()))
        after, seconds = await self._place.traffic(), time.monotonic() - since
        found = []
        for node, ping in zip(nodes, pings, strict=True):
            with suppress(AttachError, KeyError):  # its device has just ended
                found.append(
                    Condition(
                        node=node,
                        requested=self._history[node][-1][1],
                        applied=await self._read(node),
                        up_bps=8 * (after[node].up - before[node].up) / seconds * self._slowdown,
                        down_bps=8 * (after[node].down - before[node].down) / seconds * self._slowdown,
                        round_trip_s=None if ping is None else ping / self._slowdown,
                    )
                )
        return tuple(found)


def _derived(found: LinkState, asked: LinkState) -> LinkState:
    """The state that was found, without the length of a queue that was left to be derived and was."""
    if asked.limit is None and found.limit == asked.queue:
        return msgspec.structs.replace(found, limit=None)
    return found


def ask(folder: Path, question: Show | Set | Replay) -> Answer:
    """Put a question to the testbed that runs into ``folder``; raises ``PlaceFailed`` when none does."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10 * _PEEK)
            connection.connect(f"/proc/self/fd/{directory}/{SOCKET}")
            connection.sendall(msgspec.json.encode(question, enc_hook=encode_quantity) + b"\n")
            with connection.makefile("rb") as stream:
                return msgspec.json.decode(stream.readline(), type=Answer, dec_hook=decode_quantity)
    except OSError as error:
        raise PlaceFailed(f"no testbed runs into {folder} ({error.strerror or error})") from error
    finally:
        os.close(directory)


def newest_running(runs: Path) -> Path:
    """The newest folder of runs whose testbed takes questions; raises ``PlaceFailed``."""
    found = sorted(runs.glob(f"*/{SOCKET}"))
    if not found:
        raise PlaceFailed(f"no testbed is running into a folder of {runs}: name another with --runs")
    return found[-1].parent


def parse_change(text: str) -> StateChange:
    """A change as tc users write states, such as ``rate 2mbit delay 50ms loss 1%``; raises ``BadLink``."""
    words = text.replace(",", " ").replace("=", " ").split()
    if not words or len(words) % 2:
        raise BadLink(f"{text!r} is no state: write names and values in turn, such as rate 2mbit delay 50ms loss 1%")
    try:
        return msgspec.convert(
            {name: _number(value) for name, value in zip(words[::2], words[1::2], strict=True)},
            StateChange,
            dec_hook=decode_quantity,
        )
    except msgspec.ValidationError as error:
        raise BadLink(f"{text!r} is no state: {error}") from error


def _number(value: str) -> Any:
    return int(value) if value.isdigit() else value


def render(links: Sequence[Condition]) -> Table:
    """The links for a terminal; what shapes a link is shown where it is not what was asked for."""
    table = Table(box=SIMPLE_HEAD, header_style="bold")
    table.add_column("node", no_wrap=True)
    table.add_column("")
    table.add_column("asked for", overflow="fold")
    table.add_column("traffic now", justify="right", no_wrap=True)
    table.add_column("round trip now", justify="right", no_wrap=True)
    for link in links:
        ping = "no answer" if link.round_trip_s is None else f"{1e3 * link.round_trip_s:.1f} ms"
        for way, asked, applied, bps in (
            ("up", link.requested.up, link.applied.up, link.up_bps),
            ("down", link.requested.down, link.applied.down, link.down_bps),
        ):
            said = str(asked) if str(asked) == str(applied) else f"{asked}; shaped as {applied}"
            first = way == "up"
            table.add_row(link.node if first else "", way, said, f"{bps / 1e6:.2f} Mbit/s", ping if first else "")
    return table
