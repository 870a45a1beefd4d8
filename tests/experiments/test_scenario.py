"""Scenario files: what comes with the package is right, and what is wrong gets one sentence."""

from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from experiments.scenario import (
    FOLDER,
    BadScenario,
    Scenario,
    arrival_times,
    load_prompts,
    load_scenario,
    schema,
    to_yaml,
)

GOOD = """
name: small
devices:
  - count: 2
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "scenario.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((FOLDER / "scenarios").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_scenarios_of_the_package_are_right(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.name == path.stem
    assert scenario.description
    assert len(load_prompts(scenario, path.parent)) > 0


def test_defaults_are_spelled_out_and_read_back(tmp_path: Path) -> None:
    scenario = load_scenario(written(tmp_path, GOOD))
    assert load_scenario(written(tmp_path, to_yaml(scenario))) == scenario
    assert yaml.safe_load(to_yaml(scenario)).keys() == set(Scenario.__struct_fields__)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: x\ndevices:\n  - count: 0\n", r"line 3, at `devices\[0\].count` '0': expected `int` >= 1"),
        ("name: x\ndevices: []\n", "line 2, at `devices`: expected `array` of length >= 1"),
        ("name: x\ndevices:\n - count: 1\n   colour: red\n", "line 4, .*there is no key 'colour' here; there is count"),
        ("name: x\nfoo: 1\ndevices: [{count: 1}]\n", "line 2: there is no key 'foo' here; there is name, "),
        ("name: x\ndevices: [{count: 1}]\nsteps: many\n", "line 3, at `steps` 'many': expected `int`, got `str`"),
        ("name: Not A Name\ndevices: [{count: 1}]\n", "line 1, at `name`"),
        ("devices: [{count: 1}]\n", "missing required field `name`"),
        ("name: [\n", "line 2: this is no YAML"),
        ("", "expected `object`, got `null`"),
        ("name: x\ndevices: [{count: 2000}]\n", "at most 1000 devices"),
        (
            "name: x\ndevices: [{count: 2}]\ncloud: {}\nlinks: {changes: [{at: 1s, device: 3, up: {rate: 1mbit}}]}\n",
            "`changes` has the link of device 3 change, and there are 2",
        ),
        ("name: x\ndevices: [{count: 2}]\narrivals: [0.5]\n", "each of 2 devices a time, it gives 1"),
        ("name: x\ndevices: [{count: 2}]\narrivals: {poisson: 0}\n", "line 3, at `arrivals.poisson` '0'"),
        ("name: x\ndevices: [{count: 2}]\narrivals: {rate: 2}\n", "there is no key 'rate' here; there is poisson"),
        ("name: x\ndevices: [{count: 2}]\nplanning: {clusters: many}\n", "line 3, at `planning.clusters` 'many'"),
        ("name: x\ndevices: [{count: 2}]\nplanning: {cache: {policy: mru}}\n", "at `planning.cache.policy` 'mru'"),
        ("name: x\ndevices: [{count: 1}]\nframeworks: [semct, semct]\n", "'semct' stands twice"),
        ("name: x\ndevices: [{count: 1}]\nutility: {quality: 1}\n", "must sum to 1"),
    ],
)
def test_what_is_wrong_gets_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(BadScenario, match=sentence) as raised:
        load_scenario(written(tmp_path, text))
    assert "scenario.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


@given(text=st.text(max_size=200))
def test_no_text_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(BadScenario):
        load_scenario(path)


def test_prompts_come_from_a_list_a_set_or_a_file(tmp_path: Path) -> None:
    scenario = load_scenario(written(tmp_path, GOOD + "prompts: {list: [a cat, a dog]}"))
    assert load_prompts(scenario, tmp_path) == ("a cat", "a dog")
    (tmp_path / "mine.yaml").write_text("name: mine\ngroups: [{name: one, prompts: [p, q]}, {name: two, prompts: [r]}]")
    scenario = load_scenario(written(tmp_path, GOOD + "prompts: {set: mine.yaml, groups: [two, one]}"))
    assert load_prompts(scenario, tmp_path) == ("r", "p", "q")


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ("{set: nowhere.yaml}", "there is no prompt set 'nowhere.yaml'.*embedded, full"),
        ("{set: embedded, groups: [nothing]}", "has no group 'nothing'; it has "),
        ("{set: empty.yaml}", "hold no prompts"),
    ],
)
def test_missing_prompts_get_one_sentence(tmp_path: Path, prompts: str, sentence: str) -> None:
    (tmp_path / "empty.yaml").write_text("name: empty\ngroups: [{name: none, prompts: []}]")
    scenario = load_scenario(written(tmp_path, GOOD + f"prompts: {prompts}"))
    with pytest.raises(BadScenario, match=sentence):
        load_prompts(scenario, tmp_path)


def test_the_schema_names_every_key() -> None:
    definitions = schema()["$defs"]
    assert definitions["Scenario"]["properties"].keys() == set(Scenario.__struct_fields__)
    assert msgspec.json.encode(schema())


def test_arrivals_come_all_at_once_at_random_or_as_recorded(tmp_path: Path) -> None:
    def times(text: str, repetition: int = 0) -> list[float]:
        users = "name: x\ndevices: [{count: 400}]\n"
        return arrival_times(load_scenario(written(tmp_path, users + text)), repetition)

    assert times("") == [0.0] * 400
    found = times("arrivals: {poisson: 4}\n")
    assert found == sorted(found) == times("arrivals: {poisson: 4}\n")
    assert found[0] > 0
    assert 400 / found[-1] == pytest.approx(4, rel=0.25)
    assert found != times("arrivals: {poisson: 4}\n", repetition=1)
    recorded = [0.5 * i for i in range(400)]
    assert times(f"arrivals: {recorded}\n") == recorded


@pytest.mark.parametrize(
    ("devices", "more", "sentence"),
    [
        ("{attached: device-1}", "", "must be a name that no other node has"),
        ("{attached: a}, {attached: a}", "", "must be a name that no other node has"),
        ("{attached: a, count: 2}", "", "is a single one"),
        ("{attached: a}", "slowdown: 2", "runs in real time, so `slowdown` must be 1"),
    ],
)
def test_a_place_for_a_real_device_is_for_one_in_real_time(
    tmp_path: Path, devices: str, more: str, sentence: str
) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(f"name: s\ndevices: [{devices}]\n{more}\n")
    with pytest.raises(BadScenario, match=sentence):
        load_scenario(path)
