"""Whole runs of the installed command: the real small model, a real broker, processes in namespaces of their own."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import polars as pl
import psutil
import pytest

from semct.runs import Run, load_run

SMALL = """
name: small
seed: 3
frameworks: [{frameworks}]
devices: [{{count: {devices}}}]
steps: 4
prompts: {{list: [a cat in the snow, a dog in the snow, a red car at night]}}
planning: {{clusters: 2, writer: medoid}}
timeout: {timeout}
{more}
"""


def scenario(folder: Path, *, frameworks: str = "semct", devices: int = 2, timeout: int = 60, more: str = "") -> Path:
    path = folder / "small.yaml"
    path.write_text(SMALL.format(frameworks=frameworks, devices=devices, timeout=timeout, more=more))
    return path


def start(path: Path, *, wrapper: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*wrapper, sys.executable, "-m", "experiments", "run", str(path), "--runs", str(path.parent / "runs")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=180)
    return output


def only_run(folder: Path) -> Run:
    (found,) = (folder / "runs").iterdir()
    return load_run(found)


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def descendants(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """The nodes of a run by name: the writers of their logs."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            log = Path(f"/proc/{child.pid}/fd/2").readlink()
        except OSError:
            continue
        found[log.stem] = child
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def journal(folder: Path) -> str:
    return "".join(p.read_text() for p in (folder / "runs").glob("*/events.jsonl"))


def interfaces() -> set[str]:
    return {p.name for p in Path("/sys/class/net").iterdir()}


def network_namespaces() -> set[str]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.add(str((process / "ns/net").readlink()))
        except OSError:
            continue
    return found


def test_a_run_answers_everyone_and_the_same_seed_gives_the_same_pictures_and_plans(tmp_path: Path) -> None:
    seen = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        process = start(scenario(folder, frameworks="semct, edge-device, device-only", devices=3))
        output = finish(process)
        assert process.returncode == 0, output
        assert re.search(r"semct +3/3", output)
        run = only_run(folder)
        assert run.info.status == "finished"
        assert set(run.requests["outcome"]) == {"answered"}
        assert run.requests["utility"].is_finite().all()
        only = run.requests.filter(framework="device-only")
        assert only["utility"].to_list() == pytest.approx([0.4] * 3)
        assert (run.path / "report.html").stat().st_size > 10_000
        trace = msgspec.json.decode((run.path / "trace.json").read_bytes())["traceEvents"]
        assert sum(e.get("cat") == "denoiser" for e in trace) == run.nodes["denoiser_calls"].sum() == run.calls.height
        assert {"embed", "cluster", "LLM: public prompts", "splits and shares"} <= {e["name"] for e in trace}
        pictures = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (run.path / "images").iterdir()}
        assert len(pictures) == 9
        plans = [msgspec.json.decode(line)["plan"] for line in run.events.filter(kind="planned")["data"]]
        # What is predicted counts the seconds that planning took, which are never the same.
        seen.append((pictures, [(plan["clusters"], plan["routes"]) for plan in plans]))
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"frameworks": "nothing"}, "framework 'nothing' is not known; there is "),
        ({"more": "model: nobody/nothing"}, "'nobody/nothing'.* cannot be loaded"),
        ({"more": "scorer: nobody/nothing"}, "'nobody/nothing'"),
        ({"more": "edge: {compute: abacus}"}, "compute profile 'abacus' is not known; there is a100"),
        ({"more": "emulated_model: huge"}, "emulated model 'huge' is not known; there is sd3-800m, sd3-medium"),
        (
            {"frameworks": "semct, cloud-only"},
            "framework 'cloud-only' needs a cloud node: give the scenario a `cloud:`",
        ),
        ({"more": "broker: {port: 1}\nsteps: 2", "devices": 0}, "expected `int` >= 1"),
    ],
)
def test_what_cannot_run_gets_one_sentence_and_keeps_the_record(
    tmp_path: Path, changes: dict[str, object], sentence: str
) -> None:
    path = scenario(tmp_path, **changes)  # type: ignore[arg-type]
    process = start(path)
    output = finish(process)
    assert process.returncode == 1
    assert re.search(sentence, last_line(output)), output
    assert last_line(output).startswith("semct: ")
    assert "Traceback" not in output
    if (tmp_path / "runs").exists():
        run = only_run(tmp_path)
        assert run.info.status == "failed"
        assert run.scenario


def test_a_missing_privilege_gets_one_sentence_and_keeps_the_record(tmp_path: Path) -> None:
    # In a user namespace of its own that may have no network namespaces.
    forbid = 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"'
    wrapper = ("unshare", "-Ur", "sh", "-c", forbid, "sh")
    process = start(scenario(tmp_path, more="links: {cell: {}}"), wrapper=wrapper)
    output = finish(process)
    assert process.returncode == 1
    assert "namespace" in last_line(output)
    assert only_run(tmp_path).info.status == "failed"


def test_without_links_to_shape_a_run_needs_no_namespaces_and_native_nodes_without_meter_name_no_energy(
    tmp_path: Path,
) -> None:
    forbid = 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"'
    native = "edge: {compute: native, torch_device: auto}\nbroker: {port: 18836}"
    process = start(
        scenario(tmp_path, frameworks="semct, device-only", more=native),
        wrapper=("unshare", "-Ur", "sh", "-c", forbid, "sh"),
    )
    output = finish(process)
    assert process.returncode == 0, output
    run = only_run(tmp_path)
    assert run.info.hosts == "processes that share this machine's network"
    assert run.info.link == "unshaped"
    assert set(run.requests["outcome"]) == {"answered"}
    assert run.requests["utility"].is_finite().all()
    nodes = {(r["framework"], r["node"]): r["energy_j"] for r in run.nodes.iter_rows(named=True)}
    metered = "edge" in run.info.meters  # as this machine has it
    assert (nodes["semct", "edge"] is not None) == metered
    assert nodes["device-only", "device-1"] > 0
    on_edge = run.requests.filter(pl.col("energy_edge_j").is_null())
    assert on_edge["energy_j"].is_null().all()
    assert metered or on_edge.height


def test_a_device_that_never_answers_and_one_that_dies_are_named_and_the_others_served(tmp_path: Path) -> None:
    process = start(scenario(tmp_path, frameworks="device-only, semct", devices=4, timeout=12))
    wait_until(lambda: '"kind":"round"' in journal(tmp_path))
    nodes = descendants(process)
    nodes["device-2"].send_signal(signal.SIGSTOP)
    nodes["device-3"].kill()
    output = finish(process)
    assert process.returncode == 1
    assert "requests have no picture" in last_line(output)
    run = only_run(tmp_path)
    rows = {(r["framework"], r["device"]): r for r in run.requests.iter_rows(named=True)}
    assert len(rows) == 8
    for framework in ("device-only", "semct"):
        assert rows[framework, "device-1"]["outcome"] == "answered"
        assert rows[framework, "device-4"]["outcome"] == "answered"
        assert rows[framework, "device-2"]["reason"] == "no answer within 12 s"
        assert "device-3 was killed by signal 9" in rows[framework, "device-3"]["reason"]
    assert run.info.status == "failed"


@pytest.mark.parametrize("victim", ["edge", "broker"])
def test_a_lost_edge_or_broker_ends_the_run_with_a_sentence(tmp_path: Path, victim: str) -> None:
    process = start(scenario(tmp_path, frameworks="device-only", devices=1))
    wait_until(lambda: '"kind":"round"' in journal(tmp_path))
    descendants(process)[victim].kill()
    output = finish(process)
    assert process.returncode == 1
    assert re.search("edge|mosquitto|amqtt", last_line(output)), output
    assert "signal 9" in last_line(output)
    assert only_run(tmp_path).info.status == "failed"


@pytest.mark.parametrize(
    ("moment", "number", "status"),
    [
        ("start", signal.SIGINT, 130),
        ("round", signal.SIGINT, 130),
        ("round", signal.SIGTERM, 143),
        ("round", signal.SIGKILL, -9),
    ],
)
def test_nothing_is_left_of_an_interrupted_run_but_its_record(
    tmp_path: Path, moment: str, number: signal.Signals, status: int
) -> None:
    before = interfaces(), network_namespaces()
    process = start(scenario(tmp_path, frameworks="device-only", devices=2, more="slowdown: 4"))
    if moment == "start":
        wait_until(lambda: "edge" in descendants(process))
    else:
        wait_until(lambda: '"kind":"round"' in journal(tmp_path))
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(number)
    finish(process)
    wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), 15)
    wait_until(lambda: (interfaces(), network_namespaces()) == before, 15)
    run = only_run(tmp_path)
    assert process.returncode == status
    assert run.info.status == ("running" if number == signal.SIGKILL else "interrupted")


def test_users_who_ask_one_by_one_are_served_as_they_come(tmp_path: Path) -> None:
    path = scenario(tmp_path, frameworks="semct, semct-async", devices=3, more="arrivals: [0, 1.5, 1.6]\nwindow: 0.5")
    finish(start(path))
    run = only_run(tmp_path)
    assert run.requests["outcome"].to_list() == ["answered"] * 6
    assert run.info.status == "finished"
    windows = run.requests.filter(pl.col("framework") == "semct")
    online = run.requests.filter(pl.col("framework") == "semct-async")
    # In windows, nobody is planned before half a second has passed since the first of them came.
    assert (windows["collect_s"] > 0.3).any()
    assert online["collect_s"].max() < windows["collect_s"].max()
    edge = run.nodes.filter((pl.col("role") == "edge") & (pl.col("framework") == "semct-async"))
    assert (edge["cache_hits"] + edge["cache_misses"]).to_list() == [3]
    assert run.nodes.filter(pl.col("framework") == "semct")["cache_hits"].is_null().all()


def test_shaped_links_hold_back_what_goes_over_them(tmp_path: Path) -> None:
    links = "links: {up: {rate: 5mbit, delay: 20ms}, down: {rate: 20mbit, delay: 10ms}}"
    process = start(scenario(tmp_path, frameworks="edge-only", more=links))
    output = finish(process)
    assert process.returncode == 0, output
    run = only_run(tmp_path)
    assert run.info.link in {"netem", "userspace"}
    for link in run.links.iter_rows(named=True):
        assert link["applied_up"] == link["requested_up"] == "rate 5mbit, delay 20ms"
        assert link["applied_down"] == link["requested_down"] == "rate 20mbit, delay 10ms"
        assert 0.02 <= link["measured_up_delay_s"] < 0.2
        assert link["measured_down_rate_bps"] <= 20e6
    latents = run.transfers.filter(receiver="device-1")
    assert latents["size"].min() > 512 * 1024
    for latent in latents.iter_rows(named=True):
        assert (latent["limit_bps"], latent["delay_s"]) == (20e6, 0.01)
        assert latent["seconds"] >= 8 * latent["size"] / 20e6


def test_a_run_outlives_its_faults_and_says_what_became_of_every_request(tmp_path: Path) -> None:
    faults = """
edge: {compute: native, rows: 1}
window: 1
repetitions: 2
faults:
  script:
    - {at: 0s, what: dies, node: device-2, lasts: 500ms}
    - {at: 10ms, what: broker-restarts, lasts: 300ms}
    - {at: 100ms, what: hangs, node: device-1, lasts: 300ms}
    - {at: 200ms, what: dies, node: edge}
    - {at: 500ms, what: dies, node: device-3}
    - {at: 1s, what: outage, node: device-1, lasts: 1s}
"""
    process = start(scenario(tmp_path, frameworks="edge-device", devices=4, timeout=15, more=faults + "patience: 4"))
    output = finish(process)
    assert process.returncode == 0, output
    run = only_run(tmp_path)
    rows = {(r["repetition"], r["device"]): r for r in run.requests.iter_rows(named=True)}
    assert len(rows) == 8
    for repetition in range(2):
        assert rows[repetition, "device-3"]["outcome"] == "failed"
        assert rows[repetition, "device-3"]["reason"] == "device-3 was killed by a fault of the scenario"
        for device in ("device-1", "device-2", "device-4"):
            row = rows[repetition, device]
            assert row["outcome"] in {"answered", "degraded"}
            if row["outcome"] == "degraded":
                assert "edge did not answer within" in row["reason"]
                assert row["latency_s"] > 4
            assert row["quality"] is not None
    # Without an edge for the rest of the round, somebody had to do it alone.
    assert "degraded" in run.requests["outcome"]
    assert run.faults["began"].is_not_null().sum() == len(run.faults) == 12
    assert run.nodes["alive"].all()
    assert "12 faults were part of this experiment" in (run.path / "report.html").read_text()
