"""Where devices are and how that changes, and the two kinds of chance a moving device meets: shadowing and fading.

Everything is a function of time or of place and a seed: asking twice, or in another order, gives the same.
Places are in metres with the edge at the origin.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Annotated, Final, Literal, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from netem.link import BadLink, Duration, Part

Metres = Annotated[float, Meta(ge=0, le=1e6)]
Speed = Annotated[float, Meta(gt=0, le=1000)]

_WAVES: Final = 256  # of a random field; their sum is Gaussian enough (excess kurtosis -1.5 / 256)


SHORTEST: Final = 0.1
"""Seconds between two changes of a link: at most ten a second."""


class Moment(Duration):
    """Seconds in the course of a run, which may be more than a time on a link."""

    example = "12s"

    @classmethod
    def _checked(cls, value: float) -> float:
        if not (math.isfinite(value) and value >= 0):
            raise BadLink(f"a time is a number of seconds from 0 on, not {value:g}")
        return value


def block(seconds: float, length: float) -> int:
    """The number of the block of that length that a time falls into; a time that should be its start is."""
    return math.floor(seconds / length + 1e-9)


class Place(NamedTuple):
    """Metres from the edge."""

    x: float
    y: float

    @property
    def distance(self) -> float:
        """Metres to the edge."""
        return math.hypot(self.x, self.y)


class Motion(Protocol):
    """Where a device is."""

    def at(self, seconds: float) -> Place:
        """Its place at that time."""


def draws(*names: object) -> Random:
    """The random numbers that belong to ``names``, the first of them the scenario's seed."""
    return Random("/".join(map(str, names)))  # noqa: S311  no secret


class Placement(Part, frozen=True, kw_only=True):
    """A ring around the edge.

    The paper's users are "uniformly distributed within a radius of 50 to 300 meters". That reads as uniform
    over the ring's ``area``, the default; ``radius`` makes the distance itself uniform, which puts more
    of them near the edge.
    """

    inner_m: Metres = 50.0
    outer_m: Metres = 300.0
    uniform: Literal["area", "radius"] = "area"

    def __post_init__(self) -> None:
        if self.inner_m > self.outer_m:
            raise BadLink(f"a ring's `inner_m` is at most its `outer_m`, not {self.inner_m:g} of {self.outer_m:g}")

    def draw(self, random: Random) -> Place:
        """A place in the ring."""
        part, angle = random.random(), random.uniform(-math.pi, math.pi)
        if self.uniform == "area":
            radius = math.sqrt(self.inner_m**2 + part * (self.outer_m**2 - self.inner_m**2))
        else:
            radius = self.inner_m + part * (self.outer_m - self.inner_m)
        return Place(radius * math.cos(angle), radius * math.sin(angle))


class Still(NamedTuple):
    """A device that stays where it is."""

    place: Place

    def at(self, seconds: float) -> Place:  # noqa: ARG002
        """Always the same."""
        return self.place


class RandomWaypoint(Part, frozen=True, kw_only=True, tag_field="model", tag="random-waypoint"):
    """A device walks to a random place, rests there, and walks on (Johnson and Maltz 1996).

    Speeds and rests are uniform between their bounds; m/s and seconds. The places are drawn as devices are
    placed, and the way leads around the inner circle of the ring, never through it. By default a person on
    foot: TR 38.901, Table 7.2-1 has 3 km/h.
    """

    slowest: Speed = 0.5
    fastest: Speed = 1.5
    shortest_rest: Moment = msgspec.field(default_factory=Moment)
    longest_rest: Moment = msgspec.field(default_factory=lambda: Moment(10.0))

    def __post_init__(self) -> None:
        if self.slowest > self.fastest or self.shortest_rest > self.longest_rest:
            raise BadLink("a walk's `slowest` is at most its `fastest`, and its `shortest_rest` its `longest_rest`")

    def start(self, placement: Placement, random: Random) -> Walk:
        """A walk in ``placement`` from time 0."""
        if placement.inner_m == placement.outer_m:
            raise BadLink("devices that walk need a ring with some width: set `inner_m` below `outer_m`")
        return Walk(self, placement, random)


class Walk:
    """A random-waypoint walk; its stretches are drawn when a time first needs them."""

    def __init__(self, rules: RandomWaypoint, placement: Placement, random: Random) -> None:
        self._rules = rules
        self._placement = placement
        self._random = random
        self._times = [0.0]
        self._places = [placement.draw(random)]

    def at(self, seconds: float) -> Place:
        """The place at that time, from 0 on."""
        while self._times[-1] <= seconds:
            self._walk_on()
        return _between(self._times, self._places, seconds)

    def _walk_on(self) -> None:
        rules, random = self._rules, self._random
        here, there = self._places[-1], self._placement.draw(random)
        speed = random.uniform(rules.slowest, rules.fastest)
        for step in _way(here, there, self._placement.inner_m, self._placement.outer_m):
            self._times.append(self._times[-1] + math.dist(self._places[-1], step) / speed)
            self._places.append(step)
        rest = random.uniform(rules.shortest_rest, rules.longest_rest)
        self._times.append(self._times[-1] + rest + 1e-6)  # some time passes, whatever the bounds
        self._places.append(there)


def _way(start: Place, end: Place, inner: float, outer: float) -> list[Place]:
    """The corners of the shortest way that does not enter the inner circle, ``end`` last.

    Around the circle it follows a polygon of tangents that stays within the ring.
    """
    across = _nearest_to_origin(start, end)
    if across >= inner * (1 - 1e-9):
        return [end]
    first, last = math.atan2(start.y, start.x), math.atan2(end.y, end.x)
    turn = (last - first + math.pi) % (2 * math.pi) - math.pi
    side = math.copysign(1.0, turn)
    leave = first + side * math.acos(min(1.0, inner / start.distance))
    arc = abs(turn) - math.acos(min(1.0, inner / start.distance)) - math.acos(min(1.0, inner / end.distance))
    corners = max(1, math.ceil(arc / min(math.pi / 9, 2 * math.acos(inner / outer))))
    half = arc / corners / 2
    radius = inner / math.cos(half)
    angles = [leave + side * half * (2 * corner + 1) for corner in range(corners)]
    return [*(Place(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles), end]


def _nearest_to_origin(start: Place, end: Place) -> float:
    """How near the straight way comes to the origin."""
    dx, dy = end.x - start.x, end.y - start.y
    length = dx * dx + dy * dy
    part = 0.0 if length == 0 else min(1.0, max(0.0, -(start.x * dx + start.y * dy) / length))
    return math.hypot(start.x + part * dx, start.y + part * dy)


def _between(times: list[float], places: list[Place], seconds: float) -> Place:
    """The place on the way at that time; before the first and after the last time, those."""
    after = bisect_right(times, seconds)
    if after == 0 or after == len(times):
        return places[max(after - 1, 0)]
    part = (seconds - times[after - 1]) / (times[after] - times[after - 1])
    (x0, y0), (x1, y1) = places[after - 1], places[after]
    return Place(x0 + part * (x1 - x0), y0 + part * (y1 - y0))


class Recorded(Part, frozen=True, kw_only=True, tag_field="model", tag="recorded"):
    """A way from a CSV file with the columns ``time,x,y`` or ``time,distance``, in seconds and metres.

    The device moves straight from row to row and stays at the last; with ``period`` it starts again after that
    time. ``{device}`` in the file's name stands for the device's number.
    """

    file: str
    period: Moment | None = None

    def read(self, path: Path) -> Record:
        """The way in ``path``; raises ``BadLink`` naming the line."""
        times, places = read_way(path)
        if self.period is not None and self.period < times[-1]:
            raise BadLink(f"{path} goes on until {times[-1]:g} s, longer than its `period` of {self.period}")
        return Record(times, places, self.period)


class Record(NamedTuple):
    """A recorded way."""

    times: list[float]
    places: list[Place]
    period: float | None = None

    def at(self, seconds: float) -> Place:
        """The place at that time."""
        if self.period:
            seconds -= block(seconds, self.period) * self.period
        return _between(self.times, self.places, seconds)


def read_way(path: Path) -> tuple[list[float], list[Place]]:
    """Times in seconds and places of a CSV file as ``Recorded`` describes it."""
    times: list[float] = []
    places: list[Place] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file, skipinitialspace=True)
            header = [name.strip() for name in next(rows, [])]
            if header not in (["time", "x", "y"], ["time", "distance"]):
                raise BadLink(f"{path}, line 1: the columns are time,x,y or time,distance, not {','.join(header)!r}")
            for row in filter(None, rows):
                time, *place = _numbers(row, len(header), f"{path}, line {rows.line_num}")
                if time < 0 or (times and time <= times[-1]):
                    raise BadLink(f"{path}, line {rows.line_num}: times start at 0 or later and increase, not {time:g}")
                times.append(time)
                places.append(Place(place[0], place[1] if len(place) > 1 else 0.0))
    except (OSError, UnicodeDecodeError) as error:
        raise BadLink(f"{path} cannot be read as a recorded way: {error}") from error
    if not times:
        raise BadLink(f"{path} has no rows below its header")
    return times, places


def _numbers(row: list[str], count: int, where: str) -> list[float]:
    try:
        numbers = [float(cell) for cell in row]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise BadLink(f"{where}: here stand {count} numbers, not {','.join(row)!r}")
    return numbers


class Field:
    """A random landscape: at every place a standard normal value, alike at places near each other.

    The correlation of two places is ``exp(-distance / correlation)``, as TR 38.901, 7.4.4 wants it for
    shadowing: a sum of waves in random directions, their lengths drawn from the spectrum of that correlation
    (the method of Cai and Giannakis, "A two-dimensional channel simulation model for shadowing processes", IEEE
    Transactions on Vehicular Technology 52(6), 2003).
    """

    def __init__(self, correlation_m: float, random: Random) -> None:
        self._waves = [_wave(correlation_m, random) for _ in range(_WAVES)]

    def at(self, place: Place) -> float:
        """The value at a place."""
        x, y = place
        return math.sqrt(2 / _WAVES) * math.fsum(math.cos(a * x + b * y + phase) for a, b, phase in self._waves)

    def rank_at(self, place: Place) -> float:
        """The value at a place as a number that is uniform from 0 to 1."""
        return 0.5 * (1 + math.erf(self.at(place) / math.sqrt(2)))


def _wave(correlation_m: float, random: Random) -> tuple[float, float, float]:
    """Wave vector and phase. The wave number k has the distribution 1 - 1 / sqrt(1 + (k correlation)^2)."""
    number = math.sqrt(1 / (1 - random.random()) ** 2 - 1) / correlation_m
    angle = random.uniform(-math.pi, math.pi)
    return number * math.cos(angle), number * math.sin(angle), random.uniform(-math.pi, math.pi)


@lru_cache(maxsize=32)
def field(seed: int, name: str, correlation_m: float) -> Field:
    """A cell's landscape of that name: all its devices walk through the same."""
    return Field(correlation_m, draws(seed, "field", name))


class Rayleigh(Part, frozen=True, kw_only=True, tag_field="model", tag="rayleigh"):
    """Block fading without a dominant path: a new draw after every ``coherence`` time.

    ``diversity`` independent draws are averaged, for antennas or parts of the band that fade apart. Fading that
    is faster than ten times a second can't be followed on a link; adaptation and retransmission average it
    anyway, so leave fading out for it.
    """

    coherence: Moment = msgspec.field(default_factory=lambda: Moment(0.5))
    diversity: Annotated[int, Meta(ge=1, le=1024)] = 1

    def __post_init__(self) -> None:
        _check_coherence(self.coherence)

    def gain_db(self, number: int, *names: object) -> float:
        """The gain of the block of that number; its mean power is 1."""
        return _fading(self.diversity, 0.0, draws(*names, "fading", number))


class Rician(Part, frozen=True, kw_only=True, tag_field="model", tag="rician"):
    """Block fading with a dominant path, ``k_db`` stronger than all others together; else as ``rayleigh``.

    9 dB is the mean of TR 38.901, Table 7.5-6, for UMi - Street Canyon with a line of sight.
    """

    k_db: Annotated[float, Meta(ge=-30, le=60)] = 9.0
    coherence: Moment = msgspec.field(default_factory=lambda: Moment(0.5))
    diversity: Annotated[int, Meta(ge=1, le=1024)] = 1

    def __post_init__(self) -> None:
        _check_coherence(self.coherence)

    def gain_db(self, number: int, *names: object) -> float:
        """The gain of the block of that number; its mean power is 1."""
        return _fading(self.diversity, 10 ** (self.k_db / 10), draws(*names, "fading", number))


def _check_coherence(coherence: Moment) -> None:
    if coherence < SHORTEST:
        raise BadLink(f"a link changes at most ten times a second: a coherence time of {coherence} is too short")


def _fading(diversity: int, dominant: float, random: Random) -> float:
    """The mean power of complex Gaussian amplitudes around a fixed one, in dB; at least -60 dB."""
    fixed, spread = math.sqrt(dominant / (dominant + 1)), math.sqrt(0.5 / (dominant + 1))
    power = math.fsum((fixed + random.gauss(0, spread)) ** 2 + random.gauss(0, spread) ** 2 for _ in range(diversity))
    return 10 * math.log10(max(power / diversity, 1e-6))
