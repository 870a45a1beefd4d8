"""The trace: valid in Chrome's trace event format, every call and every stretch in it, flows across nodes."""

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import pytest

from experiments.record import RunFolder
from experiments.trace import write_trace
from semct.runs import CallRow, NodeRow, PlanningRow, StageRow, load_run

T = 1_700_000_000.0


def stage(request: str, name: str, node: str, start: float, stop: float, **more: Any) -> StageRow:
    told = {"round": "semct-0", "framework": "semct", "seconds": stop - start, **more}
    return StageRow(request=request, name=name, node=node, start=T + start, stop=T + stop, **told)


def course(device: str, offset: float) -> list[StageRow]:
    request = f"semct-0-{device}"
    return [
        stage(request, "transfer", device, offset, offset + 0.1, to="edge", size=300),
        stage(request, "collect", "edge", offset + 0.1, 1.0),
        stage(request, "plan", "edge", 1.0, 2.0),
        stage(request, "queue", "edge", 2.0, 2.5),
        stage(request, "denoise", "edge", 2.5, 4.0 + offset, joules=5.0, steps=6.0),
        stage(request, "transfer", "edge", 4.0 + offset, 5.0 + offset, to=device, size=500_000),
        stage(request, "denoise", device, 5.0 + offset, 6.0 + offset),
        stage(request, "decode", device, 6.0 + offset, 6.1 + offset),
    ]


@pytest.fixture
def trace(tmp_path: Path) -> list[dict[str, Any]]:
    with RunFolder.create(tmp_path, "traced") as folder:
        for name in ("device-2", "device-10"):
            for row in course(name, 0.2 if name == "device-2" else 0.3):
                folder.add(row)
        for node in ("edge", "device-2", "device-10"):
            folder.add(
                NodeRow(round="semct-0", framework="semct", node=node, role="edge" if node == "edge" else "device",
                        denoiser_calls=1, rows=1, tflop=0, busy_s=0, energy_j=0, overruns=0)
            )  # fmt: skip
        for start, rows in ((2.5, 2), (3.0, 3), (3.6, 1)):
            call = {"round": "semct-0", "framework": "semct", "model": "embedded", "first_step": 0, "last_step": 4}
            folder.add(CallRow(node="edge", start=T + start, stop=T + start + 0.4, rows=rows, **call))
        for part, seconds in (("embed", 0.1), ("cluster", 0.05), ("write", 0.6), ("plan", 0.2), ("total", 0.98)):
            folder.add(
                PlanningRow(round="semct-0", framework="semct", node="edge", batch=0, part=part, began=T + 1,
                            seconds=seconds)
            )  # fmt: skip
    written = msgspec.json.decode(write_trace(load_run(folder.path)).read_bytes())
    assert set(written) == {"traceEvents", "displayTimeUnit", "otherData"}
    return list(written["traceEvents"])


def names(trace: list[dict[str, Any]], kind: str) -> dict[Any, str]:
    """Names of processes by pid, or of tracks by (pid, tid)."""
    found = [e for e in trace if e["ph"] == "M" and e["name"] == kind]
    return {e["pid"] if kind == "process_name" else (e["pid"], e["tid"]): e["args"]["name"] for e in found}


def check_format(trace: list[dict[str, Any]]) -> None:
    """What the format asks for: known phases with their fields, slices that nest, flows that begin, go on and end."""
    processes, tracks = names(trace, "process_name"), names(trace, "thread_name")
    slices: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    flows: dict[int, list[tuple[float, str]]] = defaultdict(list)
    for event in trace:
        assert event["ph"] in {"M", "X", "s", "t", "f"}, event
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            continue
        assert event["pid"] in processes
        assert (event["pid"], event["tid"]) in tracks
        assert event["ts"] >= 0
        assert event["name"]
        assert event["cat"]
        if event["ph"] == "X":
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        else:
            flows[event["id"]].append((event["ts"], event["ph"]))
            starts = [e["ts"] for e in trace if e["ph"] == "X" and (e["pid"], e["tid"]) == (event["pid"], event["tid"])]
            assert event["ts"] in starts  # bound to the slice that begins there
    for own in slices.values():
        for (a, b), (c, d) in itertools.combinations(own, 2):
            assert b <= c + 0.01 or d <= a + 0.01 or (a <= c and d <= b + 0.01) or (c <= a and b <= d + 0.01)
    for points in flows.values():
        order = "".join(phase for _, phase in sorted(points, key=lambda p: p[0]))
        assert order == f"s{'t' * (len(points) - 2)}f"


def test_it_is_valid_and_nothing_is_missing(trace: list[dict[str, Any]]) -> None:
    check_format(trace)
    assert list(names(trace, "process_name").values()) == ["experiment", "edge", "device-2", "device-10"]
    assert set(names(trace, "thread_name").values()) == {
        "rounds", "planning", "denoiser calls", "requests 1", "requests 2",
    }  # fmt: skip
    shown = [e["name"] for e in trace if e["ph"] == "X"]
    assert {"embed", "cluster", "LLM: public prompts", "splits and shares", "transfer to edge", "decode"} <= set(shown)
    assert [e["name"] for e in trace if e.get("cat") == "denoiser"] == ["2 rows", "3 rows", "1 row"]
    assert sum(e.get("cat") in {"transfer", "collect", "plan", "queue", "denoise", "decode"} for e in trace) == 16


def test_a_flow_follows_a_request_over_its_nodes(trace: list[dict[str, Any]]) -> None:
    processes = names(trace, "process_name")
    flows: dict[int, list[str]] = defaultdict(list)
    for event in sorted((e for e in trace if "id" in e), key=lambda e: float(e["ts"])):
        flows[event["id"]].append(processes[event["pid"]])
    ways = [[node for node, _ in itertools.groupby(way)] for way in flows.values()]
    assert sorted(ways) == [["device-10", "edge", "device-10"], ["device-2", "edge", "device-2"]]


def test_parts_of_planning_lie_end_to_end_where_planning_began(trace: list[dict[str, Any]]) -> None:
    parts = [e for e in trace if e.get("cat") == "planning"]
    assert [e["name"] for e in parts[:2]] == ["plan semct", "embed"]
    assert parts[0]["ts"] == pytest.approx(0.8e6)  # the first event is the request of 0.2 s
    ends = [e["ts"] + e["dur"] for e in parts]
    assert [e["ts"] for e in parts[2:]] == pytest.approx(ends[1:-1])
    assert ends[0] == pytest.approx(1.78e6)


def test_a_run_without_requests_has_an_empty_trace(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "empty") as folder:
        pass
    written = msgspec.json.decode(write_trace(load_run(folder.path)).read_bytes())
    assert written["traceEvents"] == []
