"""What viewers of a run are shown, part by part: structures that the page reads as msgpack.

Times are seconds of the Unix epoch; durations, rates and the rest are in the scenario's own units.
"""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec
import polars as pl
from PIL import Image

from broker.messages import AnyMessage, Birth, Picture, Planned, Result
from experiments.scenario import Scenario, arrival_times
from experiments.served import Served
from experiments.summary import MEASURES, SUMMARISED, best, summarise
from netem.link import FourState, GilbertElliott, Link, LinkState
from netem.motion import Motion
from semct.routes import Plan, Route, wording
from semct.runs import RequestRow, RunInfo, table_of

_SIDE = 128  # pixels: larger pictures are shown smaller
_NOTES = 100  # the latest that are kept
_NEVER = 1e-12  # a probability that is as good as none


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One part of the scene."""


class RunNow(Part, frozen=True, kw_only=True):
    """The run as a whole. ``round`` counts the rounds up to the present one, of ``rounds`` in all."""

    name: str
    description: str
    frameworks: tuple[str, ...]
    repetitions: int
    users: int
    steps: int
    slowdown: float
    model: str
    emulated_model: str
    compute: str
    links: str
    broker: str
    began: float
    status: str
    reason: str
    round: int
    rounds: int
    overruns: int


class WayNow(Part, frozen=True, kw_only=True):
    """One direction of a link: bit/s (none: no limit), seconds, and the part of packets that get lost."""

    rate: float | None
    delay: float
    loss: float


class NodeNow(Part, frozen=True, kw_only=True):
    """A node of the cell: metres from the edge where it has a place, and its link where it has one."""

    name: str
    role: Literal["edge", "cloud", "device"]
    profile: str = ""
    state: str = ""
    x: float | None = None
    y: float | None = None
    up: WayNow | None = None
    down: WayNow | None = None


class CellNow(Part, frozen=True, kw_only=True):
    """All nodes."""

    nodes: tuple[NodeNow, ...]


class SegmentNow(Part, frozen=True, kw_only=True):
    """A stretch of a route; ``shared``: with other requests."""

    node: str
    start: int
    stop: int
    shared: bool


class RequestNow(Part, frozen=True, kw_only=True):
    """A request of the present round. No ``segments``: it is not planned yet. ``cluster`` is an index."""

    id: str
    device: str
    prompt: str
    asks: float
    segments: tuple[SegmentNow, ...] = ()
    cluster: int | None = None
    similarity: float | None = None
    outcome: str = ""
    finished: float = 0.0


class ClusterNow(Part, frozen=True, kw_only=True):
    """A cluster: what its members have in common, in whose words, and its share of the edge."""

    public_prompt: str
    source: str
    members: tuple[str, ...]
    share: float


class RoundNow(Part, frozen=True, kw_only=True):
    """The present round."""

    round: str
    framework: str
    repetition: int
    began: float
    requests: tuple[RequestNow, ...]
    clusters: tuple[ClusterNow, ...]
    planning: dict[str, float]


class MeasureNow(Part, frozen=True, kw_only=True):
    """A column of the comparison."""

    column: str
    title: str
    unit: str
    more_is_better: bool


class CellOfTable(Part, frozen=True, kw_only=True):
    """Mean and standard deviation of a measure, and whether the mean is the best of all."""

    mean: float | None
    std: float | None
    best: bool


class FrameworkNow(Part, frozen=True, kw_only=True):
    """A row of the comparison; ``values`` in the order of the measures."""

    framework: str
    asked: int
    answered: int
    degraded: int
    values: tuple[CellOfTable, ...]


class TableNow(Part, frozen=True, kw_only=True):
    """The comparison so far."""

    measures: tuple[MeasureNow, ...]
    rows: tuple[FrameworkNow, ...]


class Note(Part, frozen=True, kw_only=True):
    """Something that a viewer should know of."""

    at: float
    kind: Literal["fault", "lost", "degraded", "failed", "overrun", "planning"]
    text: str


class NotesNow(Part, frozen=True, kw_only=True):
    """What went wrong so far, the latest last."""

    notes: tuple[Note, ...]


class PictureNow(Part, frozen=True, kw_only=True):
    """A user's picture (WebP), and what it is worth, once that is known."""

    framework: str
    repetition: int
    prompt: str
    image: bytes
    outcome: str
    quality: float | None = None
    latency: float | None = None
    energy: float | None = None


class PicturesNow(Part, frozen=True, kw_only=True):
    """The latest picture of each framework that one user has."""

    device: str
    pictures: tuple[PictureNow, ...]


class Scene:
    """The state of a run, put together from its journal and from what its nodes say.

    ``info`` gives the record of the run so far, ``links`` a node's link now, ``walks`` where the nodes are in a
    repetition with that seed, and ``rated`` the rows with their utility. ``changed`` are the parts that whoever takes
    them should take again.
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        info: Callable[[], RunInfo],
        links: Callable[[str], Link | None],
        walks: Callable[[int], Mapping[str, Motion | None]],
    ) -> None:
        self._scenario = scenario
        self._info = info
        self._links = links
        self._walks_of = walks
        self._walks: Mapping[str, Motion | None] = walks(scenario.seed)
        self._began = self._round_began = time.time()
        self._round = 0
        self._ending: tuple[str, str] | None = None
        self._births: dict[str, Birth] = {}
        self._served: Served | None = None
        self._repetition = 0
        self._rows: dict[tuple[str, str], RequestRow] = {}
        self._earlier = table_of(RequestRow, []).select(SUMMARISED)
        self._notes: deque[Note] = deque(maxlen=_NOTES)
        self._overruns = 0
        self._pictures: dict[str, dict[str, PictureNow]] = {}
        self.rated: Callable[[Sequence[RequestRow]], Sequence[RequestRow]] = list
        self.changed = {"run", "cell", "round", "table", "notes"}

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Take in an event of the journal."""
        match kind:
            case "round":
                self._round += 1
                self._round_began = time.time()
                if fields["repetition"] != self._repetition:  # nothing is said of the earlier one any more
                    self._repetition, self._earlier = fields["repetition"], self._compared()
                    self._rows.clear()
                self._walks = self._walks_of(self._scenario.seed + fields["repetition"])
                self.changed |= {"run", "cell"}
            case "link":
                self.changed.add("cell")
            case "fault":
                self._note("fault", f"{fields.get('what')} at {fields.get('node')} {fields.get('state')}")
            case "row" if isinstance(row := fields["row"], RequestRow):
                self._rows[row.round, row.request] = row
                self._value(row)
                self.changed.add("table")
            case "planned":
                self._count_overruns()

    def began(self, served: Served) -> None:
        """A round begins."""
        self._served = served
        self.changed |= {"round", "run"}

    def message(self, message: AnyMessage) -> None:
        """Take in what a node says."""
        match message:
            case Birth():
                before = self._births.get(message.name)
                self._births[message.name] = message
                if message.state == "lost":
                    self._note("lost", f"{message.name} is lost")
                elif before is not None and before.state == "lost" and message.state == "ready":
                    self._note("lost", f"{message.name} is back")
                self.changed.add("cell")
            case Planned():
                if message.error:
                    self._note("planning", message.error)
                self.changed.add("round")
            case Result() if self._served is not None and self._served.results.get(message.request) is message:
                if message.outcome != "answered":
                    self._note(message.outcome, f"{message.device}: {message.reason}")
                self.changed.add("round")
            case Picture() if self._served is not None and self._served.pictures.get(message.request) is message.png:
                self._picture(self._served, message)

    def end(self, status: str, reason: str) -> None:
        """The run is over."""
        self._ending = status, reason
        self.changed.add("run")
        self._count_overruns()

    def take(self, part: str) -> Part:
        """A part as it is now."""
        match part:
            case "run":
                return self._run()
            case "cell":
                return CellNow(nodes=tuple(self._node(b) for b in self._births.values()))
            case "round":
                return self._present()
            case "table":
                return self._table()
            case "notes":
                return NotesNow(notes=tuple(self._notes))
        return PicturesNow(device=part, pictures=tuple(self._pictures[part].values()))

    def _run(self) -> RunNow:
        s, info = self._scenario, self._info()
        status, reason = self._ending or ("running" if self._round else "starting", "")
        return RunNow(
            name=s.name,
            description=s.description,
            frameworks=s.frameworks,
            repetitions=s.repetitions,
            users=s.users,
            steps=s.steps,
            slowdown=s.slowdown,
            model=s.model,
            emulated_model=s.emulated_model,
            compute=info.compute or "",
            links=info.link or "",
            broker=info.broker or "",
            began=self._began,
            status=status,
            reason=reason,
            round=self._round,
            rounds=s.repetitions * len(s.frameworks),
            overruns=info.overruns,
        )

    def _node(self, birth: Birth) -> NodeNow:
        walk = self._walks.get(birth.name)
        place = walk.at((time.time() - self._round_began) / self._scenario.slowdown) if walk is not None else None
        link = self._links(birth.name)
        return NodeNow(
            name=birth.name,
            role=birth.role,
            profile=birth.compute.profile if birth.compute else "",
            state=birth.state,
            x=place.x if place else None,
            y=place.y if place else None,
            up=_way(link.up) if link else None,
            down=_way(link.down) if link else None,
        )

    def _present(self) -> Part:
        served = self._served
        if served is None:
            return RoundNow(round="", framework="", repetition=0, began=0.0, requests=(), clusters=(), planning={})
        now = replace(served)  # which remembers no plan that has changed since
        plan = now.plan or Plan(clusters=(), routes=())
        asks = arrival_times(self._scenario, served.repetition)
        routes = {r.request: r for r in plan.routes}
        clusters = {
            m: (i, s) for i, c in enumerate(plan.clusters) for m, s in zip(c.members, c.similarity, strict=True)
        }
        requests = []
        for (request, prompt), at in zip(served.prompts.items(), asks, strict=True):
            cluster, similarity = clusters.get(request, (None, None))
            route, result = routes.get(request), served.results.get(request)
            requests.append(
                RequestNow(
                    id=request,
                    device=served.devices[request],
                    prompt=prompt,
                    asks=self._round_began + at * self._scenario.slowdown,
                    segments=tuple(_stretches(route, now.shared_steps[request])) if route else (),
                    cluster=cluster,
                    similarity=similarity,
                    outcome=result.outcome if result else "",
                    finished=result.finished if result else 0.0,
                )
            )
        return RoundNow(
            round=served.round,
            framework=served.framework,
            repetition=served.repetition,
            began=self._round_began,
            requests=tuple(requests),
            clusters=tuple(
                ClusterNow(public_prompt=wording(c.public_prompt), source=c.source, members=c.members, share=c.share)
                for c in plan.clusters
            ),
            planning=served.seconds,
        )

    def _table(self) -> TableNow:
        summary = summarise(self._compared(), frameworks=self._scenario.frameworks)
        wins = [best(summary, measure) for measure in MEASURES]
        return TableNow(
            measures=tuple(MeasureNow(**m._asdict()) for m in MEASURES),
            rows=tuple(
                FrameworkNow(
                    framework=row["framework"],
                    asked=row["asked"],
                    answered=row["answered"],
                    degraded=row["degraded"],
                    values=tuple(
                        CellOfTable(mean=row[m.column], std=row[f"{m.column}_std"], best=won[number])
                        for m, won in zip(MEASURES, wins, strict=True)
                    ),
                )
                for number, row in enumerate(summary.iter_rows(named=True))
            ),
        )

    def _compared(self) -> pl.DataFrame:
        """What frameworks are compared by: of the present repetition, whose rows may still change, and before it."""
        present = self.rated(list(self._rows.values()))
        return pl.concat([self._earlier, table_of(RequestRow, list(present)).select(SUMMARISED)], rechunk=True)

    def _picture(self, served: Served, message: Picture) -> None:
        device, result = served.devices[message.request], served.results.get(message.request)
        self._pictures.setdefault(device, {})[served.framework] = PictureNow(
            framework=served.framework,
            repetition=served.repetition,
            prompt=served.prompts[message.request],
            image=_small(message.png),
            outcome=result.outcome if result else "answered",
        )
        self.changed.add(device)

    def _value(self, row: RequestRow) -> None:
        """What a picture is worth is known now."""
        shown = self._pictures.get(row.device, {}).get(row.framework)
        if shown is not None and shown.repetition == row.repetition and shown.quality != row.quality:
            self._pictures[row.device][row.framework] = msgspec.structs.replace(
                shown, quality=row.quality, latency=row.latency_s, energy=row.energy_j
            )
            self.changed.add(row.device)

    def _count_overruns(self) -> None:
        now = self._info().overruns
        if now > self._overruns:
            more = now - self._overruns
            self._note("overrun", f"{more} times something took longer than on the hardware that is emulated")
            self._overruns = now
            self.changed.add("run")

    def _note(self, kind: Any, text: str) -> None:
        self._notes.append(Note(at=time.time(), kind=kind, text=text))
        self.changed.add("notes")


def _stretches(route: Route, shared: int) -> Iterator[SegmentNow]:
    """The segments of a route, cut where it parts from the others."""
    for s in route.segments:
        parting = min(max(shared, s.start), s.stop)
        for start, stop in ((s.start, parting), (parting, s.stop)):
            if start < stop:
                yield SegmentNow(node=s.node, start=start, stop=stop, shared=stop <= shared)


def _way(state: LinkState) -> WayNow:
    return WayNow(rate=None if state.rate is None else float(state.rate), delay=float(state.delay), loss=_loss(state))


def _loss(state: LinkState) -> float:
    """The part of packets that get lost in the long run."""
    match state.bursts:
        case GilbertElliott() as b:
            bad = b.to_bad / (b.to_bad + b.to_good) if b.to_bad else 0.0
            return bad * b.loss_bad + (1 - bad) * b.loss_good
        case FourState() as b:
            bursts = b.p13 / max(b.p31, _NEVER)  # time in the lossy part of bursts, for each in the gaps between them
            return (bursts + b.p14) / (1 + b.p14 + bursts * (1 + b.p32 / max(b.p23, _NEVER)))
    return float(state.loss)


def _small(png: bytes) -> bytes:
    """A picture as viewers get it."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.thumbnail((_SIDE, _SIDE))
        picture.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()
