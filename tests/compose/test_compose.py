"""The testbed in real containers: the image is built, the scenario runs, and the record is that of a local run."""

import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from paho.mqtt.client import CallbackAPIVersion, Client

from semct.runs import Run, load_run
from tests.compose.engine import ROOT

pytestmark = pytest.mark.compose

SCENARIO = "tests/compose/links.yaml"
ENVIRONMENT = {**os.environ, "SCENARIO": SCENARIO, "DEVICES": "2", "HF_HUB_OFFLINE": "1"}


def compose(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["docker", "compose", *words]
    surroundings = ENVIRONMENT | environment
    return subprocess.run(
        command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=1800, check=False
    )


def up(*files: str, **environment: str) -> tuple[Run, str]:
    before = set((ROOT / "runs").iterdir())
    done = compose(*files, "up", "--exit-code-from", "experiment", "--no-color", **environment)
    said = done.stdout[-3000:] + done.stderr[-3000:]
    made = set((ROOT / "runs").iterdir()) - before
    assert done.returncode == 0, said
    assert len(made) == 1
    return load_run(made.pop()), said


@pytest.fixture(scope="module", autouse=True)
def image() -> Iterator[None]:
    built = compose("build", "-q", "experiment")
    assert built.returncode == 0, built.stderr[-3000:]
    yield
    compose("down", "--volumes", "--timeout", "1")


def test_a_scenario_runs_in_containers_and_gives_the_pictures_and_plans_of_a_local_run(tmp_path: Path) -> None:
    run, _ = up()
    assert run.info.status == "finished"
    assert run.info.hosts == "containers"
    assert run.info.link in {"netem", "userspace"}
    assert set(run.requests["outcome"]) == {"answered"}
    assert run.path.stat().st_uid == (ROOT / "runs").stat().st_uid
    command = [sys.executable, "-m", "experiments", "run", SCENARIO, "--runs", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300)
    local = load_run(next(tmp_path.iterdir()))
    steps = ["framework", "request", "shared_steps", "edge_steps", "device_steps", "image"]
    ours, theirs = (r.requests.select(steps).sort(steps) for r in (run, local))
    assert ours.equals(theirs)
    for image in ours["image"]:
        assert (run.path / image).read_bytes() == (local.path / image).read_bytes(), image


def test_the_image_and_what_a_further_device_takes_are_small() -> None:
    sizing = [
        "docker",
        "run",
        "--rm",
        "--user",
        "root",
        "semct",
        "du",
        "-sx",
        "--apparent-size",
        "--block-size=1000000",
        "/",
    ]
    size = subprocess.run(sizing, capture_output=True, text=True, check=True).stdout
    assert int(size.split()[0]) <= 1600
    run, _ = up()
    memory = run.nodes.filter(run.nodes["role"] == "device")["memory_mib"] * (1 << 20) / 1e6
    assert len(memory) > 0
    assert 100 < memory.min() <= memory.max() <= 200  # torch alone takes more than 100


def test_what_the_parts_import_is_compiled_already() -> None:
    """A container cannot keep what it compiles, and would do it again at each start."""
    parts = (
        "import device_node.__main__, edge_node.__main__, netem.containers, netem.scheduler, experiments.runner;"
        "from edge_node.process import load_sentence_encoder, load_writer, prepare;"
        "prepare(); load_writer('smollm2', load_sentence_encoder())"
    )
    script = f'touch /tmp/before && python -c "{parts}" && find /opt -name "*.pyc" -newer /tmp/before'
    loading = [
        "docker",
        "run",
        "--rm",
        "--user",
        "root",
        "--env",
        "PYTHONDONTWRITEBYTECODE=",
        "semct",
        "sh",
        "-c",
        script,
    ]
    done = subprocess.run(loading, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""


def test_a_second_up_works_after_all_was_killed() -> None:
    failures: list[BaseException] = []

    def first() -> None:
        try:
            compose("up", "--no-color")
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    deadline = time.monotonic() + 120
    while "is veth" not in compose("logs", "links").stdout:  # a link is shaped
        assert time.monotonic() < deadline, "no link was ever shaped"
        time.sleep(0.5)
    assert compose("kill").returncode == 0
    thread.join(60)
    assert not failures
    run, _ = up()
    assert run.info.status == "finished"


def test_a_device_from_outside_takes_part_and_nobody_else_comes_in(tmp_path: Path) -> None:
    enroll = [sys.executable, "-m", "experiments", "enroll", "--folder", str(tmp_path)]
    subprocess.run([*enroll, "--ca", "127.0.0.1"], cwd=ROOT, check=True)
    subprocess.run([*enroll, "phone"], cwd=ROOT, check=True)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        door, web_door = (f"127.0.0.1:{each.getsockname()[1]}" for each in (one, other))
    environment = {
        "SCENARIO": "tests/compose/attached.yaml",
        "DEVICES": "1",
        "OWNER": str(os.geteuid()),
        "AUTHORITY": str(tmp_path),
        "DOOR": door,
        "WEB_DOOR": web_door,
    }
    answers: list[str] = []
    stranger = Client(CallbackAPIVersion.VERSION2)
    stranger.tls_set_context(ssl.create_default_context(cafile=str(tmp_path / "ca.crt")))
    stranger.on_connect = lambda _client, _data, _flags, reason, _properties: answers.append(str(reason))
    stranger.connect_async("127.0.0.1", int(door.rpartition(":")[2]))
    stranger.loop_start()
    client = [sys.executable, "examples/thin_client.py", "--broker", door, "--name", "phone"]
    with subprocess.Popen([*client, "--credentials", str(tmp_path / "phone.json")], cwd=ROOT) as phone:
        try:
            run, _ = up("-f", "compose.yaml", "-f", "docker/attach.yaml", **environment)
        finally:
            phone.kill()
            stranger.loop_stop()
    assert dict(run.requests.select("device", "outcome").iter_rows()) == {"device-1": "answered", "phone": "answered"}
    assert set(answers) == {"Not authorized"}
