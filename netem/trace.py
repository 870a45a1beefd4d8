"""Recorded links: what a link did, as CSV, and when it could deliver packets, as Mahimahi writes it.

CSV, with the columns in any order and all but ``time`` optional:

    time, direction, rate,   delay, jitter, loss
    0,    down,      20mbit, 15ms,  2ms,    0.1%
    0,    up,        5mbit,  25ms,  2ms,    0.1%
    10,   down,      2mbit

Cells are written as in a scenario: with a unit, or in seconds, bit/s and fractions of 1. An empty cell keeps what
was there before. Without a direction a row is for both. Every row holds until the next of its direction, the
first also before its time, and the last one for good, unless the trace starts again.

Mahimahi, one file for a direction: every line is a time in whole milliseconds at which 1500 bytes can be
delivered, repeated for more. The last one is the trace's length; then it starts again (mm-link(1), and the README
of its traces).
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from netem.link import OUTAGE, BadLink, Duration, Link, LinkState, Part, Probability, Rate, decode_quantity
from netem.motion import SHORTEST, Moment, block

_PACKET: Final = 1500 * 8  # bits of one delivery
_LONGEST: Final = 2**31  # ms
_QUANTITIES: Final[dict[str, type[float]]] = {"rate": Rate, "delay": Duration, "jitter": Duration, "loss": Probability}
_DIRECTIONS: Final = {"up": ("up",), "down": ("down",), "both": ("up", "down"), "": ("up", "down")}


class CsvTrace(Part, frozen=True, kw_only=True, tag_field="format", tag="csv"):
    """A CSV file of link states; with ``period`` it starts again after that time.

    ``{device}`` in the file's name stands for the device's number.
    """

    file: str
    period: Moment | None = None


class MahimahiTrace(Part, frozen=True, kw_only=True, tag_field="format", tag="mahimahi"):
    """Mahimahi's delivery times for one direction or both; a direction without a file has no limit.

    The rate of each ``interval`` is what could be delivered in it; an interval without a delivery loses what is
    sent (Mahimahi would keep it, but no queue of a link can be stopped). Mahimahi has no delay or loss in
    its traces: they come from here. ``{device}`` in a file's name stands for the device's number.
    """

    up: str | None = None
    down: str | None = None
    interval: Moment = msgspec.field(default_factory=lambda: Moment(0.5))
    delay: Duration = msgspec.field(default_factory=Duration)
    loss: Probability = msgspec.field(default_factory=Probability)

    def __post_init__(self) -> None:
        if self.up is None and self.down is None:
            raise BadLink("a Mahimahi trace needs a file for `up` or `down`, or both")
        if self.interval < SHORTEST:
            raise BadLink(f"a link changes at most ten times a second: an `interval` of {self.interval} is too short")


class States(NamedTuple):
    """One direction's states and the seconds at which they begin, the first at 0."""

    times: tuple[float, ...]
    states: tuple[LinkState, ...]

    def at(self, seconds: float) -> LinkState:
        """The state at that time."""
        return self.states[bisect_right(self.times, seconds) - 1]


class Replay(NamedTuple):
    """A link from a CSV trace."""

    up: States
    down: States
    period: float | None = None

    def at(self, seconds: float) -> Link:
        """The link at that time."""
        within = seconds - self._start(seconds)
        return Link(up=self.up.at(within), down=self.down.at(within))

    def after(self, seconds: float) -> float:
        """When the next row begins."""
        start = self._start(seconds)
        coming = [
            start + times[next_row]
            for times in (self.up.times, self.down.times)
            if (next_row := bisect_right(times, seconds - start)) < len(times)
        ]
        if self.period:
            coming.append(start + self.period)
        return min((time for time in coming if time > seconds), default=math.inf)

    def _start(self, seconds: float) -> float:
        return block(seconds, self.period) * self.period if self.period else 0.0


def read_csv(path: Path, period: float | None = None) -> Replay:
    """The link that a CSV file describes; raises ``BadLink`` naming the file and line."""
    begun: dict[str, dict[float, LinkState]] = {"up": {}, "down": {}}
    last = -math.inf
    for where, cells in _rows(path):
        time, directions, fields = _row(where, cells)
        if time < last:
            raise BadLink(f"{where}: times do not decrease, but {time:g} s comes after {last:g} s")
        last = time
        for direction in directions:
            states = begun[direction]
            try:
                states[time] = msgspec.structs.replace(next(reversed(states.values()), LinkState()), **fields)
            except BadLink as error:
                raise BadLink(f"{where}: {error}") from error
    if last == -math.inf:
        raise BadLink(f"{path} has no rows below its header")
    if period is not None and period <= last:
        raise BadLink(f"{path} goes on until {last:g} s, so its `period` is longer than that, not {period:g} s")
    return Replay(_states(begun["up"]), _states(begun["down"]), period)


def _states(begun: dict[float, LinkState]) -> States:
    times = list(begun) or [0.0]
    return States((0.0, *times[1:]), tuple(begun.values()) or (LinkState(),))


def _rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Where each row stands, and its cells by column."""
    allowed = ("time", "direction", *_QUANTITIES)
    found = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file, skipinitialspace=True)
            header = [name.strip() for name in next(rows, [])]
            if "time" not in header or not set(header) <= set(allowed) or len(set(header)) < len(header):
                raise BadLink(
                    f"{path}, line 1: a link trace has `time` and some of the columns {', '.join(allowed[1:])}, "
                    f"each once, not {','.join(header)!r}"
                )
            for row in filter(None, rows):
                where = f"{path}, line {rows.line_num}"
                if len(row) > len(header):
                    raise BadLink(f"{where}: the header has {len(header)} columns, this row has {len(row)}")
                found.append((where, dict(zip(header, map(str.strip, row), strict=False))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadLink(f"{path} cannot be read as a link trace: {error}") from error
    return found


def _row(where: str, cells: dict[str, str]) -> tuple[float, tuple[str, ...], dict[str, Any]]:
    """Time, directions and the fields of a link state that a row sets."""
    direction = cells.get("direction", "")
    if direction not in _DIRECTIONS:
        raise BadLink(f"{where}: a direction is up, down or both, not {direction!r}")
    try:
        time = _quantity(Moment, cells["time"])
        fields = {name: _quantity(kind, cells[name]) for name, kind in _QUANTITIES.items() if cells.get(name)}
    except BadLink as error:
        raise BadLink(f"{where}: {error}") from error
    return time, _DIRECTIONS[direction], fields


def _quantity(kind: type[float], cell: str) -> Any:
    """A cell with a unit, or a bare number."""
    try:
        number = float(cell)
    except ValueError:
        return decode_quantity(kind, cell)
    return decode_quantity(kind, number)


class Deliveries(NamedTuple):
    """The delivery times of a Mahimahi file, in milliseconds; the last is the length after which it starts again."""

    times: tuple[int, ...]

    def until(self, milliseconds: int) -> int:
        """How many deliveries there have been at that time since before 0."""
        turns, within = divmod(milliseconds, self.times[-1])
        return turns * len(self.times) + bisect_right(self.times, within)

    def rate(self, start: int, stop: int) -> float:
        """Bit/s over the milliseconds from just after ``start`` to ``stop``."""
        return (self.until(stop) - self.until(start)) * _PACKET * 1000 / (stop - start)


class DeliveryReplay(NamedTuple):
    """A link from Mahimahi files."""

    up: Deliveries | None
    down: Deliveries | None
    interval: float
    passing: LinkState

    def at(self, seconds: float) -> Link:
        """The link at that time: the rate of the interval that it falls into."""
        return Link(up=self._state(self.up, seconds), down=self._state(self.down, seconds))

    def after(self, seconds: float) -> float:
        """When the next interval begins."""
        return (block(seconds, self.interval) + 1) * self.interval

    def _state(self, deliveries: Deliveries | None, seconds: float) -> LinkState:
        if deliveries is None:
            return self.passing
        number = block(seconds, self.interval)
        rate = deliveries.rate(round(number * self.interval * 1000), round((number + 1) * self.interval * 1000))
        return msgspec.structs.replace(self.passing, rate=Rate(rate)) if rate else OUTAGE


def read_deliveries(path: Path) -> Deliveries:
    """The delivery times of a Mahimahi file; raises ``BadLink`` naming the file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadLink(f"{path} cannot be read as a Mahimahi trace: {error}") from error
    times: list[int] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not (text.isascii() and text.isdigit()) or int(text) > _LONGEST:
            raise BadLink(f"{path}, line {number}: here stands a time in whole milliseconds, not {line!r}")
        times.append(int(text))
        if len(times) > 1 and times[-1] < times[-2]:
            raise BadLink(f"{path}, line {number}: delivery times do not decrease, but {text} comes after {times[-2]}")
    if not times or times[-1] == 0:
        raise BadLink(f"{path} is no Mahimahi trace: it has no delivery after 0 ms")
    return Deliveries(tuple(times))


def read_mahimahi(trace: MahimahiTrace, *, up: Path | None, down: Path | None) -> DeliveryReplay:
    """The link that Mahimahi files describe."""
    return DeliveryReplay(
        up=read_deliveries(up) if up else None,
        down=read_deliveries(down) if down else None,
        interval=trace.interval,
        passing=LinkState(delay=trace.delay, loss=trace.loss),
    )
