"""How a link changes in the course of a run, from what a scenario says of it.

A `Course` is the link as a function of time; `changes` turns it into the steps that are to be applied. `resolve`
makes the course of one device from its `Setting`. Courses are built on one another: a cell, a trace or a fixed
link below, scheduled changes over it, interruptions on top.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Protocol

import msgspec
from msgspec import UNSET, Meta, UnsetType

from netem.access import ACCESS
from netem.channel import Channel, Reception
from netem.link import BadLink, Duration, FourState, GilbertElliott, Link, LinkState, Part, Probability, Rate
from netem.motion import (
    SHORTEST,
    Moment,
    Motion,
    Placement,
    RandomWaypoint,
    Rayleigh,
    Recorded,
    Rician,
    Still,
    block,
    draws,
    field,
)
from netem.trace import CsvTrace, MahimahiTrace, read_csv, read_mahimahi

_SIGHT_CORRELATION: Final = 50.0  # m; TR 38.901, Table 7.6.3.1-2: LOS/NLOS state of UMi


class Course(Protocol):
    """A link in the course of a run. Times are in seconds from its start."""

    def at(self, seconds: float) -> Link:
        """The link at that time."""

    def after(self, seconds: float) -> float:
        """When the link may next be another, later than ``seconds``; infinity for never."""


def changes(course: Course, until: float, start: float = 0.0) -> Iterator[tuple[float, Link]]:
    """The links from ``start`` until before ``until`` and when each begins: the first at once, then the changes.

    There are at most ten a second: a change that comes sooner after the one before is put off.
    """
    now = last = start
    link = course.at(start)
    yield start, link
    while (now := max(course.after(now), last + SHORTEST)) < until:
        changed = course.at(now)
        if changed != link:
            last, link = now, changed
            yield now, link


class Constant(NamedTuple):
    """A link that stays as it is."""

    link: Link

    def at(self, seconds: float) -> Link:  # noqa: ARG002
        """Always the same."""
        return self.link

    def after(self, seconds: float) -> float:  # noqa: ARG002
        """Never."""
        return math.inf


class Cell(Channel, frozen=True, kw_only=True):
    """A channel, and where the device is in the cell.

    Without ``mobility`` a device stays where the seed puts it in the ``placement``. Line of sight (``auto``:
    by the model's chance) and shadowing are landscapes of the cell, so two devices at one place meet the same.
    A link in a cell is looked at again every ``update`` while the device moves, and for each block of ``fading``.
    """

    placement: Placement = Placement()
    mobility: RandomWaypoint | Recorded | None = None
    update: Moment = msgspec.field(default_factory=lambda: Moment(0.5))
    los: Literal["auto"] | bool = "auto"
    shadowing: bool = True
    fading: Rayleigh | Rician | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update < SHORTEST:
            raise BadLink(f"a link changes at most ten times a second: an `update` of {self.update} is too short")


class CellCourse:
    """The link of one device in a cell."""

    def __init__(self, cell: Cell, motion: Motion, device: int, seed: int) -> None:
        self._cell = cell
        self._motion = motion
        self._device = device
        self._seed = seed
        steps = [cell.update] if cell.mobility else []
        self._steps = [*steps, cell.fading.coherence] if cell.fading else steps

    def at(self, seconds: float) -> Link:
        """The link at that time."""
        return self._cell.link(self.reception(seconds))

    def after(self, seconds: float) -> float:
        """The next update of the place, or block of fading."""
        return min(((block(seconds, step) + 1) * step for step in self._steps), default=math.inf)

    def reception(self, seconds: float) -> Reception:
        """Where the device is at that time, as of the last update, and how it is received."""
        cell, seed = self._cell, self._seed
        place = self._motion.at(block(seconds, cell.update) * cell.update)
        if cell.los == "auto":
            chance = cell.path_loss.los_probability(place.distance)
            los = chance >= 1 or field(seed, "sight", _SIGHT_CORRELATION).rank_at(place) < chance
        else:
            los = cell.los
        shadowing_db = 0.0
        if cell.shadowing:
            sigma, correlation = cell.path_loss.shadowing(los=los)
            shadowing_db = sigma * field(seed, f"shadowing/{los}", correlation).at(place) if sigma else 0.0
        fading_db = 0.0
        if cell.fading:
            fading_db = cell.fading.gain_db(block(seconds, cell.fading.coherence), seed, self._device)
        return cell.reception(place.distance, los=los, shadowing_db=shadowing_db, fading_db=fading_db)


class StateChange(Part, frozen=True, kw_only=True):
    """Some fields of a ``LinkState``; the others stay as they are.

    Where another field would contradict one that is given, it gives way: a ``delay`` bounds the jitter and a
    ``jitter`` raises the delay, ``loss`` ends ``bursts`` and the other way round. What has nothing to act on is
    left out: a correlation without jitter or loss, reordering without a delay.
    """

    rate: Rate | UnsetType | None = UNSET
    delay: Duration | UnsetType = UNSET
    jitter: Duration | UnsetType = UNSET
    distribution: Literal["uniform", "normal", "pareto"] | UnsetType = UNSET
    delay_correlation: Probability | UnsetType = UNSET
    loss: Probability | UnsetType = UNSET
    loss_correlation: Probability | UnsetType = UNSET
    bursts: GilbertElliott | FourState | UnsetType | None = UNSET
    duplicate: Probability | UnsetType = UNSET
    reorder: Probability | UnsetType = UNSET
    corrupt: Probability | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, lt=2**32)] | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        given = self._given()
        if given.get("jitter", 0.0) > given.get("delay", math.inf):
            raise BadLink(f"a change to a delay of {self.delay} has no room for its jitter of {self.jitter}")
        if given.get("loss") and given.get("bursts"):
            raise BadLink("`loss` and `bursts` are two models of the same losses: change one of them")

    def apply(self, state: LinkState) -> LinkState:
        """The state with the given fields."""
        given = self._given()
        fields = msgspec.structs.asdict(state) | given
        if fields["jitter"] > fields["delay"]:
            fields |= {"delay": fields["jitter"]} if "jitter" in given else {"jitter": fields["delay"]}
        if fields["loss"] and fields["bursts"]:
            fields |= {"loss": Probability()} if "bursts" in given else {"bursts": None}
        for name, acts_on in (("delay_correlation", "jitter"), ("loss_correlation", "loss"), ("reorder", "delay")):
            if not fields[acts_on]:
                fields[name] = Probability()
        return LinkState(**fields)

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not UNSET}


class Change(Part, frozen=True, kw_only=True):
    """From ``at`` on, some fields of a device's link are these; without a ``device``, of every device's."""

    at: Moment
    device: Annotated[int, Meta(ge=1)] | None = None
    up: StateChange | None = None
    down: StateChange | None = None

    def __post_init__(self) -> None:
        if self.up is None and self.down is None:
            raise BadLink(f"the change at {self.at} says nothing of `up` or `down`")

    def apply(self, link: Link) -> Link:
        """The link with this change."""
        return Link(
            up=self.up.apply(link.up) if self.up else link.up,
            down=self.down.apply(link.down) if self.down else link.down,
        )


class Scheduled(NamedTuple):
    """A course with changes over it, in the order of their times; each holds until a later one of the same field."""

    course: Course
    changes: tuple[Change, ...]

    def at(self, seconds: float) -> Link:
        """The link at that time."""
        link = self.course.at(seconds)
        for change in self.changes:
            if change.at <= seconds:
                link = change.apply(link)
        return link

    def after(self, seconds: float) -> float:
        """The next scheduled change, or change of the course below."""
        return min([self.course.after(seconds), *(change.at for change in self.changes if change.at > seconds)])


class Interruption(Part, frozen=True, kw_only=True):
    """A link that breaks off for a time: once ``at``, or by chance, ``every`` so often in the mean.

    An ``outage`` loses all packets in both directions. In a ``handover`` none is lost: the old base station
    passes on what has come, so packets are late by as long as the handover lasts; the last of them by more
    than in reality, where they would wait for its end only. By chance, the times in between are exponential.
    """

    lasting: Moment
    kind: Literal["outage", "handover"] = "outage"
    at: Moment | None = None
    every: Moment | None = None

    def __post_init__(self) -> None:
        if (self.at is None) == (self.every is None):
            raise BadLink(f"the {self.kind} of {self.lasting} happens either once `at` a time or `every` so often")
        if self.lasting < SHORTEST:
            raise BadLink(f"a link changes at most ten times a second: this {self.kind} of {self.lasting} is too short")
        if self.every is not None and self.every <= 0:
            raise BadLink(f"this {self.kind} happens `every` so often: that is longer than 0s")
        if self.kind == "handover" and self.lasting > 60:
            raise BadLink(f"a handover of {self.lasting} would keep packets for that long: up to 60s")

    def apply(self, link: Link) -> Link:
        """The link while it is interrupted."""
        return Link(up=self._interrupted(link.up), down=self._interrupted(link.down))

    def _interrupted(self, state: LinkState) -> LinkState:
        if self.kind == "outage":
            return StateChange(loss=Probability(1.0), loss_correlation=Probability()).apply(state)
        return msgspec.structs.replace(state, delay=Duration(state.delay + self.lasting))


class Interrupted:
    """A course with interruptions on top; where several happen at once, an outage is one."""

    def __init__(self, course: Course, interruptions: Iterable[tuple[Interruption, str]]) -> None:
        """With each interruption comes the name of its random numbers."""
        self._course = course
        self._all = [_Happenings(interruption, name) for interruption, name in interruptions]

    def at(self, seconds: float) -> Link:
        """The link at that time."""
        link = self._course.at(seconds)
        for happenings in self._all:
            if happenings.now(seconds):
                link = happenings.interruption.apply(link)
        return link

    def after(self, seconds: float) -> float:
        """The next beginning or end of an interruption, or change of the course below."""
        return min([self._course.after(seconds), *(happenings.after(seconds) for happenings in self._all)])


class _Happenings:
    """When an interruption begins and ends, in turns; drawn when a time first needs it."""

    def __init__(self, interruption: Interruption, name: str) -> None:
        self.interruption = interruption
        self._random = draws(name)
        self._turns: list[float] = []
        if interruption.at is not None:
            self._turns = [interruption.at, interruption.at + interruption.lasting]

    def now(self, seconds: float) -> bool:
        self._draw(seconds)
        return bisect_right(self._turns, seconds) % 2 == 1

    def after(self, seconds: float) -> float:
        self._draw(seconds)
        coming = bisect_right(self._turns, seconds)
        return self._turns[coming] if coming < len(self._turns) else math.inf

    def _draw(self, seconds: float) -> None:
        mean = self.interruption.every
        while mean is not None and (not self._turns or self._turns[-1] <= seconds):
            # An end and the next beginning at least as far apart as two changes of a link are.
            begin = (self._turns[-1] if self._turns else 0.0) + SHORTEST + self._random.expovariate(1 / mean)
            self._turns += [begin, begin + self.interruption.lasting]


class Setting(Part, frozen=True, kw_only=True):
    """What a scenario says of links. One of these says what they are:

    ``access``, the name of a usual kind of access; ``up`` and ``down``, in so many words; a ``cell``; or a
    ``trace``. ``changes`` and ``interruptions`` come on top. With none of them nothing limits a link.
    """

    access: str | None = None
    up: LinkState | None = None
    down: LinkState | None = None
    cell: Cell | None = None
    trace: CsvTrace | MahimahiTrace | None = None
    changes: tuple[Change, ...] = ()
    interruptions: tuple[Interruption, ...] = ()

    def __post_init__(self) -> None:
        stated = "up" if self.up is not None else "down" if self.down is not None else None
        given = [name for name in ("access", stated, "cell", "trace") if name and getattr(self, name) is not None]
        if len(given) > 1:
            raise BadLink(f"`{given[0]}` and `{given[1]}` both say what the links are: give one of them")
        if self.access is not None and self.access not in ACCESS:
            raise BadLink(f"there is no access {self.access!r}; there is {', '.join(ACCESS)}")


def resolve(setting: Setting, device: int, seed: int, folder: Path = Path()) -> Course:
    """The course of the link of a device, the first being number 1.

    Files are looked for in ``folder``. Equal seeds give equal courses. Raises ``BadLink`` if a file is not right, or
    a ring has no room for those who walk in it.
    """
    course = _base(setting, device, seed, folder)
    mine = sorted((c for c in setting.changes if c.device in (None, device)), key=lambda change: change.at)
    if mine:
        course = Scheduled(course, tuple(mine))
    if setting.interruptions:
        # Outages last, so that a handover at the same time does not undo them.
        kinds = sorted(enumerate(setting.interruptions), key=lambda numbered: numbered[1].kind == "outage")
        course = Interrupted(course, [(i, f"{seed}/{device}/interruption/{number}") for number, i in kinds])
    return course


def walk(setting: Setting, device: int, seed: int, folder: Path = Path()) -> Motion | None:
    """Where a device is in its cell in the course of a run, as ``resolve`` has it; none where its link has no place."""
    return _motion(setting.cell, device, seed, folder) if setting.cell is not None else None


def _base(setting: Setting, device: int, seed: int, folder: Path) -> Course:
    if setting.access is not None:
        return Constant(ACCESS[setting.access].link)
    if setting.cell is not None:
        return CellCourse(setting.cell, _motion(setting.cell, device, seed, folder), device, seed)
    if isinstance(setting.trace, CsvTrace):
        return read_csv(_file(setting.trace.file, device, folder), setting.trace.period)
    if isinstance(setting.trace, MahimahiTrace):
        up, down = (_file(name, device, folder) if name else None for name in (setting.trace.up, setting.trace.down))
        return read_mahimahi(setting.trace, up=up, down=down)
    return Constant(Link(up=setting.up or LinkState(), down=setting.down or LinkState()))


def _motion(cell: Cell, device: int, seed: int, folder: Path) -> Motion:
    random = draws(seed, device, "motion")
    if isinstance(cell.mobility, RandomWaypoint):
        return cell.mobility.start(cell.placement, random)
    if isinstance(cell.mobility, Recorded):
        return cell.mobility.read(_file(cell.mobility.file, device, folder))
    return Still(cell.placement.draw(random))


def _file(name: str, device: int, folder: Path) -> Path:
    return folder / name.replace("{device}", str(device))
