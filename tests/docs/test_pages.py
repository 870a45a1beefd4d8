"""The pages for people: their commands are ones that exist, their links lead somewhere, their examples work."""

import importlib.util
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import typer
from _pytest.mark import ParameterSet

from experiments.cli import app
from experiments.preview import preview
from experiments.scenario import load_prompts, load_scenario
from experiments.simulation import Simulator
from semct import frameworks
from semct.prompts import load_sentence_encoder

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


def blocks(page: Path, *languages: str) -> Iterator[str]:
    for language, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language in languages:
            yield text


def commands(page: Path) -> Iterator[str]:
    """The command lines of a page: without remarks after two blanks, and without the variables in front."""
    for block in blocks(page, "", "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            said = re.sub(r"^(\$ )?(sudo )?([A-Z_]+=\S+ +)*", "", re.split(r"(?<=\S)(?:   +|  +# )", line)[0]).strip()
            if re.match(r"(semct|python -m|make|docker compose) ", said):
                yield said


def every(find: Callable[[Path], Iterable[str]]) -> list[ParameterSet]:
    return [
        pytest.param(page, found, id=f"{page.name}: {found[:60].splitlines()[0]}")
        for page in PAGES
        for found in find(page)
    ]


@pytest.mark.parametrize(("page", "command"), every(commands))
def test_every_command_exists(page: Path, command: str) -> None:
    words = shlex.split(re.sub(r"\s#.*$|[<>|].*$", "", command) if "show|" not in command else command, comments=True)
    match words:
        case ["make", target, *_]:
            assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None
        case ["docker", "compose", *_]:
            assert (ROOT / "compose.yaml").exists()
        case ["semct", *arguments]:
            parses(arguments)


def parses(arguments: list[str]) -> None:
    """Let the command line take its arguments, and run nothing."""
    command = typer.main.get_command(app)
    context = command.make_context("semct", list(arguments), resilient_parsing=True)
    while hasattr(command, "get_command"):
        for word in arguments[0].split("|"):
            found = command.get_command(context, word)
            assert found is not None, f"there is no {word}"
        command, arguments = found, arguments[1:]
        if not arguments:  # the overview names commands without what they need
            return
        context = command.make_context(word, list(arguments), parent=context, resilient_parsing=True)
    known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    for argument in arguments:
        if argument.startswith("--"):
            assert argument.split("=")[0] in known, f"there is no option {argument}"


@pytest.mark.parametrize(("page", "link"), every(lambda page: _LINK.findall(page.read_text(encoding="utf-8"))))
def test_every_link_leads_somewhere(page: Path, link: str) -> None:
    assert (page.parent / link).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scenarios_and_studies_that_a_page_names_are_there(page: Path) -> None:
    named = set(re.findall(r"experiments/(?:scenarios|studies)/[\w.-]+\.yaml", page.read_text(encoding="utf-8")))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    ("page", "text"),
    every(lambda page: [block for block in blocks(page, "yaml") if block.startswith("name:") and "devices:" in block]),
)
def test_scenarios_of_the_pages_are_right(page: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "scenario.yaml").write_text(text, encoding="utf-8")
    scenario = load_scenario(tmp_path / "scenario.yaml")
    assert load_prompts(scenario, tmp_path)
    assert set(scenario.frameworks) <= set(frameworks.names())


def test_the_framework_of_the_page_works_and_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = next(blocks(ROOT / "docs" / "frameworks.md", "python"))
    assert len(source.splitlines()) <= 30
    (tmp_path / "half_and_half.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(frameworks, "_registered", dict(frameworks._registered))
    importlib.import_module("half_and_half")
    scenario = load_scenario(ROOT / "experiments" / "scenarios" / "quickstart.yaml")
    found = preview(
        ["a red bus", "a blue bus"], scenario, "half-and-half", Simulator(load_sentence_encoder()), tmp_path
    )
    half = scenario.steps // 2
    assert [(r.edge, r.on_device) for cluster in found.clusters for r in cluster.requests] == 2 * [(half, half)]
    assert all(r.latency > 0 and r.energy > 0 for cluster in found.clusters for r in cluster.requests)
