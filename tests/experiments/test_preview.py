"""``semct plan``: files of prompts, and a plan as it is shown and as JSON."""

import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from experiments.cli import app
from experiments.preview import preview, read_prompts, render
from experiments.scenario import FOLDER, BadScenario, DeviceLinks, Planning, load_scenario
from experiments.simulation import Simulator
from semct.prompts import load_sentence_encoder

PROMPTS = ("a white cat in the snow", "a grey cat in the snow", "a bus at night", "a red bus at night", "a pear")


def test_prompts_stand_a_line_each_or_in_yaml(tmp_path: Path) -> None:
    text, listed, grouped = (tmp_path / name for name in ("p.txt", "p.yaml", "q.yml"))
    text.write_text("a cat\n\n  a dog \n")
    listed.write_text("[a cat, a dog]")
    grouped.write_text("{name: q, groups: [{name: cats, prompts: [a cat]}, {name: dogs, prompts: [a dog]}]}")
    assert read_prompts(text) == read_prompts(listed) == read_prompts(grouped) == ("a cat", "a dog")


@pytest.mark.parametrize("text", ["", "[]", "5", "{name: q}", "[a, [b]]", "{"])
def test_what_holds_no_prompts_is_refused_with_the_files_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(BadScenario, match=r"p\.yaml"):
        read_prompts(path)


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator(load_sentence_encoder())


def test_a_plan_shows_clusters_splits_shares_and_predictions(simulator: Simulator) -> None:
    scenario = load_scenario(FOLDER / "scenarios" / "quickstart.yaml")
    scenario = msgspec.structs.replace(scenario, planning=Planning(clusters=3, writer="medoid"))
    found = preview(PROMPTS, scenario, "semct", simulator, FOLDER)
    assert sorted(r.prompt for c in found.clusters for r in c.requests) == sorted(PROMPTS)
    assert len(found.clusters) == 3
    assert sum(c.share or 0 for c in found.clusters) == pytest.approx(1)
    for cluster in found.clusters:
        assert cluster.source
        for r in cluster.requests:
            assert r.shared + r.edge + r.on_device == scenario.steps
            assert r.latency > 0
            assert r.energy > 0
    assert found.gap is not None
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(render(found))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "a bus at night" in text
    assert "% of the edge" in text
    assert msgspec.json.decode(msgspec.json.encode(found))["framework"] == "semct"


def test_the_scenarios_links_are_planned_for(simulator: Simulator) -> None:
    scenario = load_scenario(FOLDER / "scenarios" / "quickstart.yaml")
    unshaped = msgspec.structs.replace(scenario, links=DeviceLinks())
    without = preview(PROMPTS, unshaped, "edge-only", simulator, FOLDER)
    shaped = preview(PROMPTS, scenario, "edge-only", simulator, FOLDER)
    seconds = [{r.device: r.latency for c in found.clusters for r in c.requests} for found in (without, shaped)]
    assert all(seconds[1][device] > seconds[0][device] for device in seconds[0])


def test_splits_may_come_from_agents_that_learned_to(simulator: Simulator) -> None:
    scenario = load_scenario(FOLDER / "scenarios" / "quickstart.yaml")
    scenario = msgspec.structs.replace(scenario, planning=Planning(clusters=2, writer="medoid", tier="learned"))
    found = preview(PROMPTS, scenario, "semct", simulator, FOLDER)
    assert found.gap is None
    assert sorted(r.prompt for c in found.clusters for r in c.requests) == sorted(PROMPTS)


def test_requests_without_a_cluster_are_shown_too(simulator: Simulator) -> None:
    scenario = load_scenario(FOLDER / "scenarios" / "quickstart.yaml")
    scenario = msgspec.structs.replace(scenario, planning=Planning(writer="medoid"))
    (alone,) = preview(PROMPTS[:2], scenario, "device-only", simulator, FOLDER).clusters
    assert alone.public_prompt is None
    assert [r.on_device for r in alone.requests] == [scenario.steps] * 2


def test_a_missing_file_gets_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "none.txt")])
    assert result.exit_code == 1
    assert "cannot be read" in result.output


def test_the_command_measures_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    result = CliRunner().invoke(app, ["calibrate", str(path), "--rows", "1", "--rows", "2", "--repeats", "1"])
    assert result.exit_code == 0, result.output
    assert "here: embedded" in result.output
    assert "meter" in result.output or "W while denoising" in result.output
    assert msgspec.json.decode(path.read_bytes())["model"] == "embedded"
