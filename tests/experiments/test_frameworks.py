"""Every framework on one small cell of devices, edges and a cloud: everybody gets a picture from each of them."""

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

from experiments.scenario import FOLDER, load_scenario
from semct import frameworks
from semct.runs import Run, load_run

SCENARIO = FOLDER / "scenarios" / "frameworks.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The shipped scenario in four steps, with public prompts that need no language model."""
    folder = tmp_path_factory.mktemp("frameworks")
    document = yaml.safe_load(SCENARIO.read_text())
    document |= {
        "steps": 4,
        "prompts": {"list": ["a cat in the snow", "a dog in the snow", "a red car at night", "a bus at night"]},
        "window": 20,
        "slowdown": 1,
    }
    document["planning"] |= {"writer": "medoid"}
    (folder / "frameworks.yaml").write_text(yaml.safe_dump(document))
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "run", str(folder / "frameworks.yaml"), "--runs", str(folder / "runs")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (folder / "runs").iterdir()
    return load_run(found)


def test_the_scenario_names_every_framework_there_is() -> None:
    assert sorted(load_scenario(SCENARIO).frameworks) == frameworks.names()


def test_every_framework_answers_every_request(run: Run) -> None:
    answered = run.requests.filter(pl.col("outcome") == "answered").group_by("framework").len()
    assert dict(answered.iter_rows()) == dict.fromkeys(load_scenario(SCENARIO).frameworks, 4)
    assert run.requests["utility"].is_finite().all()
    assert (
        run.requests.select(
            (
                pl.col("energy_j")
                - pl.sum_horizontal("energy_edge_j", "energy_cloud_j", "energy_device_j", "energy_radio_j")
            )
            .abs()
            .max()
        ).item()
        < 1e-6
    )


def test_each_node_does_what_its_framework_asks_of_it(run: Run) -> None:
    rows = {(node, framework): n for framework, node, n in run.nodes.select("framework", "node", "rows").iter_rows()}
    helpers = ("edge-2", "cloud")
    assert {framework: [rows[node, framework] for node in helpers] for framework in ("edge-only", "device-only")} == {
        "edge-only": [0, 0],
        "device-only": [0, 0],
    }
    assert rows["edge", "edge-only"] == rows["cloud", "cloud-only"] == 16
    assert rows["edge", "cloud-only"] == rows["edge", "device-only"] == 0
    assert rows["edge", "load-balanced"] + rows["edge-2", "load-balanced"] == 16
    assert rows["edge-2", "load-balanced"] > 0
    assert rows["cloud", "cloud-edge"] >= 4
    assert rows["edge", "cloud-edge"] >= 4
    assert rows["cloud", "cloud-edge"] + rows["edge", "cloud-edge"] == rows["edge", "stage-wise"] == 16
    roles = dict(run.nodes.select("node", "role").unique().iter_rows())
    assert (roles["edge"], roles["edge-2"], roles["cloud"], roles["device-1"]) == ("edge", "edge", "cloud", "device")
    far = run.requests.filter(framework="cloud-only")
    assert (far["cloud_denoise_s"] > 0).all()
    assert far["energy_edge_j"].sum() == 0
    assert (far["energy_cloud_j"] > 0).all()
    assert (far["cloud_steps"] == 4).all()
    # The order goes to the cloud over the edge, the latent from there to the device.
    assert (far["bytes_relayed"] > 0).all()
    assert (far["bytes_down"] > 512 * 1024).all()
