"""Continuous batching of denoising steps: many routes, one denoiser call at a time.

The engine keeps *tracks*: trajectories of one prompt from one origin. Requests whose routes begin alike ride
on the same track, so shared steps run once; at its split, each request takes the latent with it, onto the
track of its next prompt or out of the engine. Rows of different clusters and steps ride in one call, and
clusters get rows in proportion to their weights (stride scheduling: the cluster with the smallest pass goes
next, a row costs it 1 / weight).
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec
import torch
from torch import Tensor

from semct.cache import LatentCache, Prefix
from semct.compute import Cost, Processor
from semct.cost import Backlog
from semct.diffusion import Denoiser
from semct.routes import Prompt, Segment

_logger = logging.getLogger(__name__)


CALLS_KEPT = 10_000
"""Denoiser calls that an engine remembers until it is asked for them: of more, the latest."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One request's consecutive segments on this node.

    ``latent`` is where the first segment starts from; none means the noise of ``seed`` (and a start at 0).
    ``group`` is the request's cluster and ``weight`` the cluster's share of this node's compute, above 0. A first
    segment that starts from noise takes from the ``cache`` what is there, and leaves there what it makes.
    """

    request: str
    seed: int
    steps: int
    segments: tuple[Segment, ...]
    latent: Tensor | None = None
    group: Hashable = None
    weight: float = 1.0
    cache: LatentCache | None = None


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A finished job: the latent at its last split, and what this request's part of the work was.

    ``started`` and ``finished`` are clock times of its first and last denoiser call. A step that n requests
    share counts 1/n for each of them in ``steps``, ``seconds``, ``joules`` and ``flops``.
    """

    job: Job
    latent: Tensor
    started: float
    finished: float
    steps: float
    seconds: float
    joules: float
    flops: float
    overruns: int
    modelled: bool


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """A job that cannot be done here, and one sentence why."""

    job: Job
    reason: str


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One denoiser call: when it began and ended by the engine's clock, and the step of each of its rows."""

    model: str
    start: float
    stop: float
    steps: tuple[int, ...]


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine has done since it was made; ``shortages`` are calls for which memory did not suffice."""

    calls: int = 0
    rows: int = 0
    seconds: float = 0.0
    joules: float = 0.0
    flops: float = 0.0
    overruns: int = 0
    shortages: int = 0


@dataclass(eq=False)
class _Rider:
    job: Job
    segment: int = 0
    started: float | None = None
    steps: float = 0.0
    seconds: float = 0.0
    joules: float = 0.0
    flops: float = 0.0
    overruns: int = 0
    modelled: bool = False

    @property
    def stop(self) -> int:
        return self.job.segments[self.segment].stop

    @property
    def is_last(self) -> bool:
        return self.segment == len(self.job.segments) - 1

    @property
    def prefix(self) -> Prefix | None:
        """What the cache knows of this segment."""
        first = self.job.segments[0]
        if self.job.cache is None or self.segment > 0 or first.start > 0:
            return None
        return Prefix(seed=self.job.seed, steps=self.job.steps, model=first.model, prompt=first.prompt)


@dataclass(eq=False)
class _Track:
    key: tuple[Hashable, ...]
    model: str
    prompt: Prompt
    step: int
    steps: int
    group: Hashable
    latents: dict[int, Tensor]  # every step's, as long as the track lives: later riders may split earlier
    riders: list[_Rider] = field(default_factory=list)
    cache: LatentCache | None = None


class Engine:
    """Runs jobs on one node's denoisers. Synchronous: each ``call`` is one denoiser call.

    ``rows`` bounds a call; ``clock`` gives the times in the reports. Not thread-safe: one thread submits
    and calls. Where memory does not suffice for a call, calls get half as many rows from then on; a row for which
    it does not suffice alone is refused.
    """

    def __init__(
        self,
        denoisers: Mapping[str, Denoiser],
        processor: Processor,
        *,
        rows: int = 8,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if rows < 1:
            raise ValueError(f"a denoiser call needs at least one row, not {rows}")
        self._denoisers = denoisers
        self._processor = processor
        self._rows = rows
        self._clock = clock
        self._tracks: dict[tuple[Hashable, ...], _Track] = {}
        self._passes: dict[Hashable, float] = {}
        self._weights: dict[Hashable, float] = {}
        self._done: list[Done] = []
        self._refused: list[Refused] = []
        self._calls: deque[Call] = deque(maxlen=CALLS_KEPT)
        self.totals = Totals()

    @property
    def idle(self) -> bool:
        """Whether a call would have nothing to do."""
        return not self._tracks and not self._done

    def submit(self, job: Job) -> None:
        """Take a job in; it joins a running track where its route begins alike.

        Raises ``ValueError`` for a job without segments or with gaps between them, of an unknown model or with
        no positive weight.
        """
        if not job.segments:
            raise ValueError(f"the job of {job.request} has no segments")
        unknown = sorted({s.model for s in job.segments} - set(self._denoisers))
        if unknown:
            raise ValueError(f"{job.request} wants model {unknown[0]!r}; this node holds {sorted(self._denoisers)}")
        if not job.weight > 0:
            raise ValueError(f"the weight of {job.request} must be above 0, not {job.weight}")
        if not _follow(job.segments, job.steps):
            spans = ", ".join(f"[{s.start}, {s.stop})" for s in job.segments)
            raise ValueError(
                f"the segments of {job.request} do not follow each other within {job.steps} steps: {spans}"
            )
        if job.latent is None and job.segments[0].start != 0:
            raise ValueError(f"{job.request} starts at step {job.segments[0].start} without a latent")
        active = {t.group for t in self._tracks.values()}
        if job.group not in active:
            # Who comes (back) starts level with the hindmost at work: no credit for having been away.
            level = min((self._passes[g] for g in active), default=0.0)
            self._passes[job.group] = max(level, self._passes.get(job.group, 0.0))
        self._weights[job.group] = job.weight
        origin = _origin(job)
        denoiser = self._denoisers[job.segments[0].model]
        start = denoiser.noise(job.seed) if job.latent is None else job.latent
        self._board(_Rider(job), origin, start)

    def call(self) -> list[Done]:
        """Run one denoiser call (if there is any work) and return the jobs that are finished."""
        rows = self._pick()
        if rows and not self._advance(rows):
            self._make_do(rows)
        done, self._done = self._done, []
        if not self._tracks:
            self._passes.clear()
            self._weights.clear()
        return done

    def reached(self) -> dict[str, int]:
        """How many steps the requests under way have behind them."""
        return {rider.job.request: track.step for track in self._tracks.values() for rider in track.riders}

    def refused(self) -> list[Refused]:
        """The jobs that had to be given up since this was asked last."""
        refused, self._refused = self._refused, []
        return refused

    def calls(self) -> list[Call]:
        """The latest calls since this was asked last, at most ``CALLS_KEPT``."""
        calls = list(self._calls)
        self._calls.clear()
        return calls

    def _board(self, rider: _Rider, origin: tuple[Hashable, ...], latent: Tensor) -> None:
        """Put a rider on the track of its current segment, which starts from ``latent``."""
        segment = rider.job.segments[rider.segment]
        key: tuple[Hashable, ...] = (origin, rider.job.steps, segment.start, segment.model, segment.prompt)
        track = self._tracks.get(key)
        if track is not None and rider.stop not in track.latents and rider.stop < track.step:
            key = (*key, rider.job.request)  # the track began from the cache behind this rider's split
            track = None
        if track is None:
            track = self._lay(rider, key, latent)
        if rider.stop <= track.step:  # a latecomer whose split this track has already passed
            self._alight(rider, track)
        else:
            self._tracks[track.key] = track
            track.riders.append(rider)

    @staticmethod
    def _lay(rider: _Rider, key: tuple[Hashable, ...], latent: Tensor) -> _Track:
        """A new track for a rider's current segment, from ``latent`` or from what the cache has nearer to its split."""
        segment, prefix, cache = rider.job.segments[rider.segment], rider.prefix, rider.job.cache
        found = cache.find(prefix, segment.stop) if cache is not None and prefix is not None else None
        step, start = found or (segment.start, latent)
        return _Track(
            key=key,
            model=segment.model,
            prompt=segment.prompt,
            step=step,
            steps=rider.job.steps,
            group=rider.job.group,
            latents={segment.start: latent, step: start},
            cache=cache if prefix is not None else None,
        )

    def _alight(self, rider: _Rider, track: _Track) -> None:
        """Take a rider off at its split, with the latent there: out, or onto its next segment's track."""
        latent = track.latents[rider.stop]
        if rider.job.cache is not None and rider.prefix is not None:
            rider.job.cache.reached(rider.prefix, rider.stop)
        if rider.is_last:
            if rider.job.cache is not None:
                rider.job.cache.end()
            now = self._clock()
            self._done.append(
                Done(
                    job=rider.job,
                    latent=latent,
                    started=now if rider.started is None else rider.started,
                    finished=now,
                    steps=rider.steps,
                    seconds=rider.seconds,
                    joules=rider.joules,
                    flops=rider.flops,
                    overruns=rider.overruns,
                    modelled=rider.modelled,
                )
            )
            return
        origin = (track.key, rider.stop)
        rider.segment += 1
        self._board(rider, origin, latent)

    def _pick(self) -> list[_Track]:
        """The rows of the next call: by smallest pass, all of one model, at most ``rows``.

        A cluster may lead the hindmost by one full call of the heaviest cluster's rows, no more: that keeps
        calls full at first and the weights true in the long run, also where all rows would fit in one call.
        """
        if not self._tracks:
            return []
        waiting: dict[Hashable, list[_Track]] = {}
        for track in self._tracks.values():
            waiting.setdefault(track.group, []).append(track)
        active = tuple(waiting)
        lead = self._rows * min(1 / self._weights[g] for g in active)
        picked: list[_Track] = []
        while waiting and len(picked) < self._rows:
            group = min(waiting, key=self._passes.__getitem__)
            if self._passes[group] > lead + min(self._passes[g] for g in active):
                break
            track = waiting[group].pop(0)
            if not waiting[group]:
                del waiting[group]
            if picked and track.model != picked[0].model:
                continue
            picked.append(track)
            self._passes[group] += 1 / self._weights[group]
        return picked

    def _advance(self, tracks: Sequence[_Track]) -> bool:
        """One step of these tracks in one call; whether memory sufficed for it. If not, nothing has changed."""
        started = self._clock()
        denoiser = self._denoisers[tracks[0].model]
        try:
            latents, cost = self._processor.step(
                denoiser,
                [t.latents[t.step] for t in tracks],
                [t.step for t in tracks],
                [t.steps for t in tracks],
                [denoiser.encode(t.prompt) for t in tracks],
            )
        except torch.OutOfMemoryError:
            return False
        self._count(cost, len(tracks))
        steps = tuple(t.step for t in tracks)
        self._calls.append(Call(model=tracks[0].model, start=started, stop=self._clock(), steps=steps))
        for track, latent in zip(tracks, latents, strict=True):
            self._charge(track, started, cost, 1 / len(tracks))
            track.step += 1
            track.latents[track.step] = latent
            if track.cache is not None and (prefix := track.riders[0].prefix) is not None:
                track.cache.keep(prefix, track.step, latent)
        for track in tracks:
            leaving = [r for r in track.riders if r.stop == track.step]
            track.riders = [r for r in track.riders if r.stop > track.step]
            if track.riders:
                # A track that goes on gives way to its cluster's other tracks.
                self._tracks[track.key] = self._tracks.pop(track.key)
            else:
                del self._tracks[track.key]
            for rider in leaving:
                self._alight(rider, track)
        return True

    def _make_do(self, tracks: Sequence[_Track]) -> None:
        """After a call for which memory did not suffice: smaller ones from now on, or none for what does not fit."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.totals = msgspec.structs.replace(self.totals, shortages=self.totals.shortages + 1)
        for track in tracks:
            self._passes[track.group] -= 1 / self._weights[track.group]
        if len(tracks) > 1:
            self._rows = len(tracks) // 2
            _logger.warning("memory does not suffice for %d rows in one call: now %d", len(tracks), self._rows)
            return
        (track,) = tracks
        del self._tracks[track.key]
        for rider in track.riders:
            if rider.job.cache is not None:
                if rider.prefix is not None:
                    rider.job.cache.reached(rider.prefix, rider.stop)
                rider.job.cache.end()
            reason = f"memory does not suffice for a single row of {track.model!r}: take a smaller model or picture"
            self._refused.append(Refused(job=rider.job, reason=reason))

    @staticmethod
    def _charge(track: _Track, started: float, cost: Cost, part: float) -> None:
        part /= len(track.riders)
        for rider in track.riders:
            rider.started = started if rider.started is None else rider.started
            rider.steps += 1 / len(track.riders)
            rider.seconds += cost.seconds * part
            rider.joules += cost.joules * part
            rider.flops += cost.flops * part
            rider.overruns += cost.overrun
            rider.modelled |= cost.modelled

    def _count(self, cost: Cost, rows: int) -> None:
        t = self.totals
        self.totals = msgspec.structs.replace(
            t,
            calls=t.calls + 1,
            rows=t.rows + rows,
            seconds=t.seconds + cost.seconds,
            joules=t.joules + cost.joules,
            flops=t.flops + cost.flops,
            overruns=t.overruns + cost.overrun,
        )


def backlog(jobs: Iterable[Job], reached: Mapping[str, int]) -> tuple[Backlog, ...]:
    """What jobs under way have left to do, by group; ``reached`` is what ``Engine.reached`` says of those taken in.

    Where several ride on one track its steps count once, for the group of the first.
    """
    left: dict[Hashable, tuple[Hashable, str, int, int]] = {}  # by track: group, model, present step, last stop
    groups: dict[Hashable, list[Job]] = defaultdict(list)
    for job in jobs:
        groups[job.group].append(job)
        origin: Hashable = (_origin(job), job.steps)
        for s in job.segments:
            track = (origin, s.start, s.model, s.prompt)
            group, _, at, stop = left.get(track, (job.group, s.model, s.start, s.start))
            at = max(at, min(reached.get(job.request, 0), s.stop))
            left[track] = group, s.model, at, max(stop, s.stop)
            origin = (track, s.stop)
    steps: dict[Hashable, Counter[str]] = defaultdict(Counter)
    for group, model, at, stop in left.values():
        steps[group][model] += stop - at
    return tuple(
        Backlog(steps=dict(+steps[group]), requests=len(members), weight=members[-1].weight)
        for group, members in groups.items()
        if steps[group].total()
    )


def _origin(job: Job) -> tuple[Hashable, ...]:
    """What a job starts from: noise that others of its seed start from, too, or a latent of its own."""
    return ("noise", job.seed) if job.latent is None else ("latent", job.request)


def _follow(segments: Sequence[Segment], steps: int) -> bool:
    """Whether the segments lie end to end within the steps."""
    joined = all(a.stop == b.start for a, b in pairwise(segments))
    return joined and all(0 <= s.start < s.stop <= steps for s in segments)
