"""Several runs on one page: what each framework gave in each of them, and what else they differ in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

import polars as pl
import yaml

from experiments import figures
from experiments.drawings import comparisons
from experiments.record import Unwritable
from experiments.report import (
    Line,
    differences_of,
    facts_of,
    keep_figures,
    render_page,
    results_of,
    warnings_of,
)
from experiments.summary import MEASURES, compared, summarise
from semct.runs import Run, load_run

_SAME = ["framework", "repetition", "device", "seed", "prompt", "steps"]
"""Requests that agree in these differ in nothing but the runs."""


class Difference(NamedTuple):
    """Something that is not the same in all runs, and what it is in each."""

    what: str
    values: list[str]


def write_comparison(folders: Sequence[Path], to: Path) -> Path:
    """Write ``report.html`` and ``figures/`` about several runs into a folder, and return the page's path.

    Raises ``NotARun`` where one is none, ``Unwritable`` where the folder cannot be written.
    """
    runs = {_letter(number): load_run(folder) for number, folder in enumerate(folders)}
    page = to / "report.html"
    rows = _rows(runs)
    summary = summarise(_requests(runs), frameworks=[f"{name} ({letter})" for name, letter in rows])
    found = list(comparisons(summary, _looks(rows))) if summary["answered"].sum() else []
    differences, apart = _differences(runs)
    try:
        to.mkdir(parents=True, exist_ok=True)
        keep_figures(to, found)
        page.write_text(
            render_page(
                "comparison.html.jinja",
                runs=[(letter, run.path.resolve().name, run.info) for letter, run in runs.items()],
                warnings=[f"{letter}: {said}" for letter, run in runs.items() for said in warnings_of(run)],
                measures=[m.label for m in compared(summary)],
                results=results_of(summary),
                paired=[m.label for m in MEASURES],
                differences=differences,
                apart=apart,
                drawings={d.name: d for d in found},
                scenarios=_unlike({letter: dict(_leaves(_scenario(run))) for letter, run in runs.items()}),
                facts=_unlike({letter: facts_of(run.info) for letter, run in runs.items()}),
            ),
            encoding="utf-8",
        )
    except OSError as error:
        raise Unwritable(f"the comparison cannot be written to {page}: {error.strerror or error}") from error
    return page


def _letter(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    before, last = divmod(number, len(ascii_uppercase))
    return (_letter(before - 1) if before else "") + ascii_uppercase[last]


def _rows(runs: Mapping[str, Run]) -> list[tuple[str, str]]:
    """Every framework with every run that has it, those of the same name beside each other."""
    there = {letter: dict.fromkeys([*run.info.frameworks, *run.requests["framework"]]) for letter, run in runs.items()}
    names = dict.fromkeys(name for each in there.values() for name in each)
    return [(name, letter) for name in names for letter in runs if name in there[letter]]


def _requests(runs: Mapping[str, Run]) -> pl.DataFrame:
    """All requests, their frameworks told apart by run."""
    return pl.concat(
        [run.requests.with_columns(pl.format("{} ({})", "framework", pl.lit(letter))) for letter, run in runs.items()],
        how="diagonal_relaxed",
    )


def _looks(rows: Sequence[tuple[str, str]]) -> list[figures.Look]:
    """A colour for each framework, a marker for each run."""
    names, letters = (list(dict.fromkeys(column)) for column in zip(*rows, strict=True))
    return [
        figures.Look(figures.colour(names.index(name)), figures.marker(letters.index(letter))) for name, letter in rows
    ]


def _differences(runs: Mapping[str, Run]) -> tuple[list[Line], list[str]]:
    """Each framework's difference to the first run, over requests that only differ in the run, and who has none."""
    (first, reference), *others = runs.items()
    lines, apart = [], []
    for letter, run in others:
        for framework in dict.fromkeys(run.requests["framework"]):
            ours = run.requests.filter(pl.col("framework") == framework)
            shared = ours.join(reference.requests, on=_SAME, how="semi", nulls_equal=True)
            if not shared.height:
                apart.append(f"{framework} ({letter})")
                continue
            theirs = reference.requests.join(shared, on=_SAME, how="semi", nulls_equal=True)
            both = pl.concat(
                [theirs.with_columns(framework=pl.lit(first)), shared.with_columns(framework=pl.lit(letter))],
                how="diagonal_relaxed",
            )
            lines += [
                line._replace(framework=f"{framework} ({letter} \N{MINUS SIGN} {first})")
                for line in differences_of(both, first)
            ]
    return lines, apart


def _scenario(run: Run) -> Any:
    return yaml.safe_load(run.scenario) if run.scenario else {}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """What stands in a scenario, by its path."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        for number, part in enumerate(value):
            yield from _leaves(part, f"{path}[{number}]")
    else:
        yield path, yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def _unlike(told: Mapping[str, Mapping[str, str]]) -> list[Difference]:
    """What is not the same in all runs."""
    keys = dict.fromkeys(key for each in told.values() for key in each)
    found = (Difference(key, [each.get(key, "-") for each in told.values()]) for key in keys)
    return [each for each in found if len(set(each.values)) > 1]
