"""A device without a model in a real run beside an emulated one: through a guarded door, over TLS, its clock wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from broker.authority import enroll, make_authority
from experiments.cli import app
from semct import load_run

ROOT = Path(__file__).parents[2]
SCENARIO = """\
name: beside
frameworks: [edge-device]
devices:
  - {compute: rtx-3090-ti}
  - {attached: phone, links: {up: {rate: 20mbit, delay: 20ms}, down: {rate: 20mbit, delay: 20ms}}}
prompts: {list: [a cat on a beach, a dog on a beach]}
planning: {writer: medoid}
"""
AHEAD = 3600.0
CLIENT = f"""\
import runpy, sys, time
right = time.time
time.time = lambda: right() + {AHEAD}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_thin_client_beside_an_emulated_device(tmp_path: Path, unused_tcp_port: int) -> None:
    (tmp_path / "beside.yaml").write_text(SCENARIO)
    make_authority(tmp_path / "authority", ["127.0.0.1"])
    shown = enroll(tmp_path / "authority", "phone")
    door = f"127.0.0.1:{unused_tcp_port}"
    run = [sys.executable, "-m", "experiments", "run", "beside.yaml", "--listen", door, "--authority", "authority"]
    thin = [
        sys.executable,
        "-c",
        CLIENT,
        str(ROOT / "examples" / "thin_client.py"),
        "--broker",
        door,
        "--name",
        "phone",
    ]
    thin += ["--credentials", str(shown), "--pictures", str(tmp_path / "got")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(thin, stderr=subprocess.PIPE, text=True) as client:
        try:
            done = subprocess.run(
                run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert client.wait(20) == 0
        finally:
            client.kill()
            assert client.stderr is not None
            print(client.stderr.read())
    (folder,) = (tmp_path / "runs").iterdir()
    found = load_run(folder)
    requests = {row["device"]: row for row in found.requests.iter_rows(named=True)}
    assert set(requests) == {"device-1", "phone"}
    assert all(row["outcome"] == "answered" for row in requests.values())
    assert (tmp_path / "got" / "edge-device-0-phone.png").read_bytes().startswith(b"\x89PNG")
    assert 0 < requests["phone"]["latency_s"] < 60
    nodes = {row["node"]: row for row in found.nodes.iter_rows(named=True)}
    clock = nodes["phone"]
    assert abs(clock["clock_ahead_s"] - AHEAD) <= clock["clock_uncertainty_s"] + 0.001
    assert clock["clock_uncertainty_s"] < 1
    assert abs(nodes["device-1"]["clock_ahead_s"]) <= nodes["device-1"]["clock_uncertainty_s"] + 0.001
    for transfer in found.transfers.iter_rows(named=True):
        assert 0 <= transfer["seconds"] < 30
        if transfer["sender"] == "phone":  # 20 ms on its link, each way
            assert transfer["seconds"] > 0.02 - clock["clock_uncertainty_s"]
    password = shown.read_text().split('"password":"')[1].split('"')[0]
    assert not [p for p in folder.rglob("*") if p.is_file() and password.encode() in p.read_bytes()]


def test_a_device_that_is_to_compute_where_it_cannot_says_so() -> None:
    arguments = ["device", "--broker", "mqtt://127.0.0.1:1", "--name", "laptop", "--device", "cuda:7"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert done.output.startswith("semct: torch ")
    assert "'cuda:7'" in done.output
