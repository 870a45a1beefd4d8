"""``trace.json``: who did what when, in Chrome's trace event format, which Perfetto (ui.perfetto.dev) opens.

A process is a node. Its tracks are planning, the denoiser's calls, and lanes of requests: what a request did there, in
slices that a flow connects across nodes. Times are wall-clock microseconds since the first event, so a run with a
slowdown is that much longer here than in its tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import polars as pl

from experiments.record import Unwritable
from semct.runs import Run

Event = dict[str, Any]

_EXPERIMENT = 1  # the process that shows the rounds; nodes follow
_PLANNING, _CALLS, _LANES = 1, 2, 10  # tracks of a node


class _Slice(NamedTuple):
    """A stretch of a request's time; ``flow`` is the request's number and ``phase`` its place in the course."""

    flow: int
    phase: Literal["s", "t", "f", ""]
    row: dict[str, Any]


def write_trace(run: Run) -> Path:
    """Write ``trace.json`` into a run's folder and return its path; raises ``Unwritable``."""
    path = run.path / "trace.json"
    content = msgspec.json.encode(
        {
            "traceEvents": list(events(run)),
            "displayTimeUnit": "ms",
            "otherData": {"scenario": run.info.scenario, "run": run.path.name, "slowdown": f"{run.info.slowdown:g}"},
        }
    )
    try:
        path.write_bytes(content)
    except OSError as error:
        raise Unwritable(f"the trace cannot be written to {path}: {error.strerror or error}") from error
    return path


def events(run: Run) -> Iterator[Event]:
    """All events of a run, metadata first."""
    began = [at for frame, column in _starts(run) for at in frame[column]]
    if not began:
        return
    zero = min(began)
    nodes = {name: _EXPERIMENT + 1 + i for i, name in enumerate(_nodes(run))}
    yield from _named(_EXPERIMENT, "experiment", {1: "rounds"})
    yield from _rounds(run, zero)
    visits = _visits(run.stages)
    for node, pid in nodes.items():
        lanes = _lanes(visits.get(node, []))
        tracks = {_LANES + i: f"requests {i + 1}" for i in range(len(lanes))}
        if node in set(run.planning["node"]):
            tracks[_PLANNING] = "planning"
        if node in set(run.calls["node"]):
            tracks[_CALLS] = "denoiser calls"
        yield from _named(pid, node, tracks)
        yield from _planning(run.planning.filter(pl.col("node") == node), pid, zero)
        yield from _calls(run.calls.filter(pl.col("node") == node), pid, zero)
        for i, lane in enumerate(lanes):
            yield from _requests(lane, pid, _LANES + i, zero)


def _starts(run: Run) -> list[tuple[pl.DataFrame, str]]:
    return [(run.stages, "start"), (run.calls, "start"), (run.planning, "began")]


def _nodes(run: Run) -> list[str]:
    """Edges and clouds before devices, each in their order."""
    roles = dict(run.nodes.select("node", "role").iter_rows())
    found = {*run.stages["node"], *run.calls["node"], *run.planning["node"], *run.stages["to"].drop_nulls()}

    def order(name: str) -> tuple[bool, list[int | str]]:
        parts = [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]
        return roles.get(name, "device") == "device", parts

    return sorted(found, key=order)


def _named(pid: int, name: str, tracks: dict[int, str]) -> Iterator[Event]:
    yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": name}}
    yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_sort_index", "args": {"sort_index": pid}}
    for tid, track in sorted(tracks.items()):
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": track}}
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}


def _rounds(run: Run, zero: float) -> Iterator[Event]:
    spans = run.stages.group_by("round", "framework", maintain_order=True).agg(
        pl.col("start").min(), pl.col("stop").max(), pl.col("request").n_unique()
    )
    stop = zero
    for row in spans.sort("start").iter_rows(named=True):
        start = max(row["start"], stop)
        stop = max(row["stop"], start)
        args = {"round": row["round"], "requests": row["request"]}
        yield _complete(row["framework"], "round", (_EXPERIMENT, 1), at=start - zero, seconds=stop - start, args=args)


def _planning(parts: pl.DataFrame, pid: int, zero: float) -> Iterator[Event]:
    """The parts of planning, end to end from when it began, within their total."""
    for (_, batch), own in parts.group_by("round", "batch", maintain_order=True):
        at = own["began"][0] - zero
        args = {"round": own["round"][0], "batch": batch}
        seconds = {_PARTS.get(part, part): float(s) for part, s in own.select("part", "seconds").iter_rows()}
        total = seconds.pop("total", 0.0)
        total = max(total, sum(seconds.values()))
        yield _complete(f"plan {own['framework'][0]}", "planning", (pid, _PLANNING), at=at, seconds=total, args=args)
        for part, took in seconds.items():
            yield _complete(part, "planning", (pid, _PLANNING), at=at, seconds=took, args={})
            at += took


_PARTS = {"write": "LLM: public prompts", "plan": "splits and shares"}
"""Planning's parts by the names that say more; the others are called as they are."""


def _calls(calls: pl.DataFrame, pid: int, zero: float) -> Iterator[Event]:
    for row in calls.sort("start").iter_rows(named=True):
        name = f"{row['rows']} row{'s' if row['rows'] != 1 else ''}"
        args = {k: row[k] for k in ("model", "rows", "first_step", "last_step", "round")}
        at, seconds = row["start"] - zero, row["stop"] - row["start"]
        yield _complete(name, "denoiser", (pid, _CALLS), at=at, seconds=seconds, args=args)


def _visits(stages: pl.DataFrame) -> dict[str, list[list[_Slice]]]:
    """What requests did on each node: for every stay there, the slices from arrival to departure."""
    found: dict[str, list[list[_Slice]]] = {}
    for flow, (_, own) in enumerate(stages.group_by("round", "request", maintain_order=True), 1):
        rows = list(own.sort("start", "stop", maintain_order=True).iter_rows(named=True))
        last = len(rows) - 1
        course = [_Slice(flow, _phase(i, last), r) for i, r in enumerate(rows)]
        for node, stay in groupby(course, lambda piece: str(piece.row["node"])):
            found.setdefault(node, []).append(list(stay))
    return found


def _phase(number: int, last: int) -> Literal["s", "t", "f", ""]:
    """Whether a flow starts, goes on or finishes at this slice; one of a single slice leads nowhere."""
    if last == 0:
        return ""
    return "s" if number == 0 else "f" if number == last else "t"


def _lanes(visits: Iterable[list[_Slice]]) -> list[list[list[_Slice]]]:
    """The visits on as few lanes as needed for no two to overlap on one."""
    lanes: list[list[list[_Slice]]] = []
    for visit in sorted(visits, key=lambda v: float(v[0].row["start"])):
        start = visit[0].row["start"]
        free = next((lane for lane in lanes if lane[-1][-1].row["stop"] <= start), None)
        if free is None:
            lanes.append(free := [])
        free.append(visit)
    return lanes


def _requests(lane: list[list[_Slice]], pid: int, tid: int, zero: float) -> Iterator[Event]:
    stop = zero
    for piece in chain.from_iterable(lane):
        row = piece.row
        start = max(row["start"], stop)  # clocks of stages that follow each other may differ by microseconds
        stop = max(row["stop"], start)
        name = f"transfer to {row['to']}" if row["to"] else row["name"]
        args = {k: row[k] for k in _TOLD if row[k]}
        yield _complete(name, row["name"], (pid, tid), at=start - zero, seconds=stop - start, args=args)
        if piece.phase:
            flow = {"ph": piece.phase, "cat": "request", "name": "request", "id": piece.flow, "bp": "e"}
            yield {**flow, "pid": pid, "tid": tid, "ts": _micro(start - zero)}


_TOLD = ("request", "round", "seconds", "joules", "tflop", "steps", "size", "overruns", "modelled")


def _complete(
    name: str, category: str, track: tuple[int, int], *, at: float, seconds: float, args: dict[str, Any]
) -> Event:
    """A slice on a track (process, thread), ``at`` so many seconds after the first event."""
    event = {"ph": "X", "name": name, "cat": category, "pid": track[0], "tid": track[1]}
    return {**event, "ts": _micro(at), "dur": _micro(seconds), "args": args}


def _micro(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1e6, 3)
