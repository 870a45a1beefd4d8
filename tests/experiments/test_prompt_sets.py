"""The prompt sets hold what they say: how many, how close in meaning, and nothing the model cannot draw."""

from pathlib import Path

import msgspec
import pytest

import experiments
from semct.clustering import dendrogram, mean_similarity
from semct.prompts import load_sentence_encoder
from semct.training.scenes import BACKGROUNDS, THINGS

FOLDER = Path(experiments.__path__[0]) / "prompts"
BANDS = {
    "near-duplicates": (0.70, 1.0),
    "close": (0.50, 0.70),
    "related": (0.35, 0.50),
    "loose": (0.22, 0.35),
    "unrelated": (-1.0, 0.22),
}


class Group(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    closeness: str
    prompts: list[str]


class PromptSet(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    description: str
    domain: str
    groups: list[Group]


def load(name: str) -> PromptSet:
    return msgspec.yaml.decode((FOLDER / f"{name}.yaml").read_bytes(), type=PromptSet)


@pytest.mark.parametrize(("name", "least"), [("embedded", 200), ("full", 100)])
def test_there_are_enough_prompts_of_every_closeness(name: str, least: int) -> None:
    prompts = load(name)
    assert prompts.name == prompts.domain == name
    assert sum(len(group.prompts) for group in prompts.groups) >= least
    assert {group.closeness for group in prompts.groups} == set(BANDS)
    assert len({group.name for group in prompts.groups}) == len(prompts.groups)
    assert all(len(set(group.prompts)) == len(group.prompts) for group in prompts.groups)


@pytest.mark.parametrize("name", ["embedded", "full", "three-animals"])
def test_groups_are_as_close_as_their_label_says(name: str) -> None:
    encoder = load_sentence_encoder()
    measured = {group.name: mean_similarity(encoder.embed(group.prompts)) for group in load(name).groups}
    wrong = {
        group.name: measured[group.name]
        for group in load(name).groups
        if not BANDS[group.closeness][0] <= measured[group.name] < BANDS[group.closeness][1]
    }
    assert not wrong


def test_the_embedded_model_knows_every_thing_and_place() -> None:
    nouns = [noun for thing in THINGS for noun in thing.nouns]
    places = [place for background in BACKGROUNDS for place in background.places]
    for group in load("embedded").groups:
        for prompt in group.prompts:
            assert any(noun in prompt for noun in nouns), prompt
            assert any(place in prompt for place in places), prompt


def test_eight_users_of_a_first_run_have_three_themes() -> None:
    groups = [group for group in load("embedded").groups if group.name.startswith("quickstart-")]
    prompts = [prompt for group in groups for prompt in group.prompts]
    themes = [tuple(prompts.index(prompt) for prompt in group.prompts) for group in groups]
    assert len(prompts) == 8
    assert dendrogram(load_sentence_encoder().embed(prompts)).cut(3) == tuple(themes)
