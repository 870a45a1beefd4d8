"""Compose files for GPUs and swarms: who computes where, and what each of the two formats does without."""

from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from experiments.cli import app
from experiments.composing import CannotCompose, as_stack, parse_gpus, pin, read_compose, to_yaml, with_gpus

ROOT = Path(__file__).parents[2]
QUICKSTART = Path("experiments/scenarios/quickstart.yaml")
COMPOSE = ROOT / "compose.yaml"


@given(devices=st.integers(1, 60), count=st.integers(1, 9))
def test_gpus_are_shared_evenly_and_the_edge_has_one_alone_where_there_are_two(devices: int, count: int) -> None:
    pinning = pin(devices, [str(n) for n in range(count)])
    assert len(pinning.devices) == devices
    load = Counter(pinning.devices)
    assert max(load.values()) - min(load[str(n)] for n in range(min(1, count - 1), count)) <= 1
    assert (pinning.edge in load) == (count == 1)
    assert sum(pinning.sharers.values()) == devices + 1


@pytest.mark.parametrize(
    ("text", "gpus"),
    [("1", ("0",)), ("3", ("0", "1", "2")), ("2,0", ("2", "0")), ("GPU-8308ad1b-ad45, 1", ("GPU-8308ad1b-ad45", "1"))],
)
def test_gpus_are_counted_or_named(text: str, gpus: tuple[str, ...]) -> None:
    assert parse_gpus(text, present=("H200",) * 4) == gpus


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0", "0 GPUs were asked for"),
        ("5", "there is no GPU 4 here: this machine has 4"),
        ("0,4", "there is no GPU 4 here"),
        ("0,0", "named twice"),
        ("-1", "names no GPU"),
        ("all", "names no GPU"),
    ],
)
def test_gpus_that_are_not_there_are_refused_in_one_sentence(text: str, said: str) -> None:
    with pytest.raises(CannotCompose, match=said):
        parse_gpus(text, present=("H200",) * 4)


def test_each_device_is_a_service_with_its_gpu_and_its_name() -> None:
    made = with_gpus(read_compose(COMPOSE, QUICKSTART), pin(5, ["0", "1", "2"]))
    services = made["services"]
    assert "device" not in services
    reserved = {
        name: services[name]["deploy"]["resources"]["reservations"]["devices"]
        for name in services
        if name == "edge" or name.startswith("device-")
    }
    assert {name: device["device_ids"] for name, (device,) in reserved.items()} == {
        "edge": ["0"],
        "device-1": ["1"],
        "device-2": ["2"],
        "device-3": ["1"],
        "device-4": ["2"],
        "device-5": ["1"],
    }
    assert all(device["capabilities"] == ["gpu"] for (device,) in reserved.values())
    assert services["device-4"]["command"][-2:] == ["--name", "device-4"]
    assert services["edge"]["build"]["args"]["TORCH"] == "cuda"
    waited_for = services["experiment"]["depends_on"]
    assert {f"device-{n}" for n in range(1, 6)} < set(waited_for)
    assert "device" not in waited_for


def test_a_stack_has_nothing_that_swarms_refuse() -> None:
    stack = as_stack(read_compose(COMPOSE, QUICKSTART), devices=40, gpus=True)
    assert stack["version"]
    assert "name" not in stack
    for name, service in stack["services"].items():
        assert not {"build", "depends_on", "restart", "profiles", "network_mode"} & set(service)
        assert service["deploy"]["endpoint_mode"] == "dnsrr"
        assert all(port["mode"] == "host" for port in service.get("ports", []))
        once = name == "experiment"
        assert service["deploy"]["restart_policy"]["condition"] == ("none" if once else "any")
    assert stack["services"]["device"]["deploy"]["replicas"] == 40
    wanted = stack["services"]["device"]["deploy"]["resources"]["reservations"]["generic_resources"]
    assert wanted == [{"discrete_resource_spec": {"kind": "NVIDIA-GPU", "value": 1}}]
    assert {network["driver"] for network in stack["networks"].values()} == {"overlay"}
    assert "links" not in stack["services"]
    assert all(v.startswith(".") for service in stack["services"].values() for v in service.get("volumes", []))


def test_a_file_is_complete_text_again() -> None:
    made = with_gpus(read_compose(COMPOSE, QUICKSTART), pin(2, ["0"]))
    text = to_yaml(made, "for two\non one")
    assert text.startswith("# for two\n# on one\n")
    assert yaml.safe_load(text) == made
    assert "&" not in text.replace("&&", "")


def test_the_command_writes_a_file_for_the_scenarios_devices(tmp_path: Path) -> None:
    out = tmp_path / "compose.gpu.yaml"
    arguments = ["compose", "render", str(ROOT / QUICKSTART), "--file", str(COMPOSE), "--gpus", "2", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    services = yaml.safe_load(out.read_text())["services"]
    assert sum(name.startswith("device-") for name in services) == 8
    assert services["experiment"]["environment"]["SCENARIO"].startswith("${SCENARIO:-")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--file", "absent.yaml", "--swarm"], "absent.yaml cannot be read"),
        (["--file", str(COMPOSE)], "give --gpus or --swarm"),
        (["--file", str(ROOT / QUICKSTART), "--swarm"], "is no compose file"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_sentence(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["compose", "render", str(ROOT / QUICKSTART), *arguments])
    assert done.exit_code == 1
    assert said in done.stderr
