"""The numbers of the summary, checked against ones worked out by hand."""

import csv
import io
import math
import re
from typing import Any

import msgspec
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from experiments.summary import (
    ENERGY,
    MEASURES,
    QUALITY,
    best,
    compared,
    decimals,
    paired,
    prediction_errors,
    render,
    render_errors,
    summarise,
    write_csv,
)
from semct.runs import RequestRow, schema

ROW = RequestRow(
    round="r", framework="semct", repetition=0, request="u", device="d", prompt="a cat", seed=7, steps=28,
    outcome="answered",
)  # fmt: skip


def requests(*rows: dict[str, Any]) -> pl.DataFrame:
    structs = [msgspec.structs.replace(ROW, request=f"u{i}", **row) for i, row in enumerate(rows)]
    return pl.DataFrame([msgspec.structs.astuple(row) for row in structs], schema=schema(RequestRow), orient="row")


def row(framework: str, device: str, quality: float, tflop: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"framework": framework, "device": device, "quality": quality, "tflop": tflop, **more}


def test_mean_and_spread_are_over_users() -> None:
    table = summarise(requests(row("a", "d1", 0.2), row("a", "d2", 0.4), row("a", "d3", 0.6)))
    found = table.row(0, named=True)
    assert (found["asked"], found["answered"]) == (3, 3)
    assert found["quality"] == pytest.approx(0.4)
    assert found["quality_std"] == pytest.approx(0.2)  # sqrt((0.04 + 0 + 0.04) / 2)
    assert found["quality_ci95"] == pytest.approx(4.302653 * 0.2 / math.sqrt(3), rel=1e-6)  # t(0.975, 2)


def test_what_few_runs_have_is_a_column_where_they_do() -> None:
    without = summarise(requests(row("a", "d1", 0.2)))
    assert not {"fidelity", "pixel_difference"} & set(without.columns)
    assert compared(without) == MEASURES
    table = summarise(requests(row("a", "d1", 0.2, pixel_difference=3.0), row("a", "d2", 0.2, pixel_difference=5.0)))
    assert table["pixel_difference"].to_list() == [4.0]
    assert [m.column for m in compared(table)] == [*(m.column for m in MEASURES), "pixel_difference"]
    older = requests(row("a", "d1", 0.2)).drop("fidelity", "pixel_difference")  # of a run before there were any
    assert summarise(older).equals(without)


def test_each_users_mean_comes_first() -> None:
    frame = requests(
        row("a", "d1", 0.1, repetition=0),
        row("a", "d1", 0.3, repetition=1),
        row("a", "d2", 0.6, repetition=0),
        {**row("a", "d2", 0.0, repetition=1), "quality": None, "outcome": "failed"},
    )
    found = summarise(frame).row(0, named=True)
    assert (found["asked"], found["answered"]) == (4, 3)
    assert found["quality"] == pytest.approx((0.2 + 0.6) / 2)
    assert found["quality_std"] == pytest.approx(0.4 / math.sqrt(2))


def test_tflops_are_totals_of_a_repetition() -> None:
    frame = requests(
        row("a", "d1", 0.3, 100, repetition=0),
        row("a", "d2", 0.3, 200, repetition=0),
        row("a", "d1", 0.3, 140, repetition=1),
        row("a", "d2", 0.3, 200, repetition=1),
    )
    found = summarise(frame).row(0, named=True)
    assert found["tflop"] == pytest.approx(320)
    assert found["tflop_std"] == pytest.approx(40 / math.sqrt(2))


def test_one_user_has_no_spread() -> None:
    found = summarise(requests(row("a", "d1", 0.3))).row(0, named=True)
    assert found["quality"] == 0.3
    assert found["quality_std"] is None
    assert found["quality_ci95"] is None


def test_frameworks_stand_in_the_scenarios_order_also_those_not_run() -> None:
    frame = requests(row("b", "d1", 0.3), row("a", "d1", 0.3))
    assert summarise(frame)["framework"].to_list() == ["b", "a"]
    table = summarise(frame, frameworks=("a", "b", "c"))
    assert table["framework"].to_list() == ["a", "b", "c"]
    assert table.row(2, named=True)["asked"] == 0
    assert table.row(2, named=True)["quality"] is None


def test_no_request_at_all() -> None:
    assert summarise(requests()).is_empty()
    table = summarise(requests(), frameworks=["semct"])
    assert table.row(0)[:3] == ("semct", 0, 0)
    assert "not run" in shown(table)


def test_paired_differences_compare_the_same_user_and_noise() -> None:
    frame = requests(
        row("semct", "d1", 0.3, seed=1),
        row("semct", "d2", 0.5, seed=2),
        row("semct", "d3", 0.9, seed=3),
        row("other", "d1", 0.2, seed=1),
        row("other", "d2", 0.1, seed=2),
        row("other", "d3", 0.9, seed=99),  # other noise: no pair
    )
    table = paired(frame, "semct")
    found = table.row(0, named=True)
    assert table.height == 1
    assert (found["framework"], found["users"]) == ("other", 2)
    assert found["quality"] == pytest.approx((-0.1 - 0.4) / 2)
    deviation = 0.3 / math.sqrt(2)
    assert found["quality_ci95"] == pytest.approx(12.706205 * deviation / math.sqrt(2), rel=1e-6)  # t(0.975, 1)


def test_paired_needs_a_framework_that_ran() -> None:
    with pytest.raises(ValueError, match="no request ran under 'c'; there is a"):
        paired(requests(row("a", "d1", 0.3)), "c")


def test_only_frameworks_that_answered_everyone_compete() -> None:
    frame = requests(
        row("a", "d1", 0.3, energy_j=10.0),
        row("b", "d1", 0.2, energy_j=5.0),
        row("c", "d1", 0.9, energy_j=1.0),
        {**row("c", "d2", 0.0), "quality": None, "outcome": "failed"},
    )
    table = summarise(frame)
    assert best(table, QUALITY) == [True, False, False]
    assert best(table, ENERGY) == [False, True, False]
    assert best(summarise(frame.head(1)), QUALITY) == [False]
    assert best(summarise(requests(row("a", "d1", 0.3), row("b", "d1", 0.3))), QUALITY) == [False, False]


def test_a_degraded_answer_is_an_answer_that_is_counted_apart() -> None:
    frame = requests(
        row("a", "d1", 0.3),
        row("a", "d2", 0.5, outcome="degraded", predicted_quality=0.9),
        row("a", "d3", 0.0, outcome="failed"),
    )
    found = summarise(frame).row(0, named=True)
    assert (found["asked"], found["answered"], found["degraded"]) == (3, 2, 1)
    assert found["quality"] == pytest.approx(0.4)
    assert re.search(r"a +2/3 .*\n +1 degraded", shown(summarise(frame)))


@pytest.mark.parametrize(
    ("values", "places"), [([0.31, 0.28], 3), ([4.2, None], 2), ([31.4], 1), ([3900.0], 0), ([0.0], 0), ([], 0)]
)
def test_three_significant_digits(values: list[float | None], places: int) -> None:
    assert decimals(values) == places


def shown(table: pl.DataFrame, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(render(table))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_fits_80_columns_and_stars_the_best() -> None:
    measures = {"latency_s": 12.3, "energy_j": 3900.0, "utility": 0.5}
    frame = requests(
        row("hierarchical-long", "d1", 0.31, 2688.0, **measures),
        row("hierarchical-long", "d2", 0.33, 2688.0, **measures),
        row("device-only", "d1", 0.25, 2688.0, **measures),
        row("device-only", "d2", 0.25, 2688.0, **measures),
    )
    lines = shown(summarise(frame)).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "hierarchical-long" in text
    assert "*0.320" in text
    assert "±0.014" in text
    assert "2/2" in text


def test_prediction_errors_are_medians_over_requests() -> None:
    def both(framework: str, measured: float, predicted: float, joules: float = 0.0) -> dict[str, Any]:
        told = {"latency_s": measured, "predicted_latency_s": predicted, "energy_j": joules, "predicted_energy_j": 1.0}
        return row(framework, "d1", 0.5, **told)

    frame = requests(both("a", 10, 9), both("a", 10, 14), both("a", 4, 5), both("b", 2, 2, joules=2), row("c", "d1", 1))
    found = prediction_errors(frame)
    assert found["framework"].to_list() == ["a", "b"]
    assert found["latency_s"].to_list() == pytest.approx([0.25, 0.0])
    assert found["energy_j"].to_list() == [None, 0.5]  # nobody metered a
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_errors(found))
    text = console.export_text()
    assert [line.split() for line in text.splitlines() if line.split()[:1] in (["a"], ["b"])] == [
        ["a", "-", "25.0", "-", "-"],
        ["b", "-", "0.0", "50.0", "-"],
    ]


def test_markup_in_a_name_is_text() -> None:
    assert "[red]x[/]" in shown(summarise(requests(row("[red]x[/]", "d1", 0.3))))


def test_the_csv_has_six_significant_digits() -> None:
    (line,) = csv.DictReader(io.StringIO(write_csv(summarise(requests(row("a", "d1", 1 / 3))))))
    assert (line["framework"], line["asked"], line["quality"]) == ("a", "1", "0.333333")


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.floats(-10, 10))
def test_a_constant_shift_is_its_own_paired_difference(values: list[float], shift: float) -> None:
    frame = requests(
        *(row("a", f"d{i}", v) for i, v in enumerate(values)),
        *(row("b", f"d{i}", v + shift) for i, v in enumerate(values)),
    )
    found = paired(frame, "a").row(0, named=True)
    assert found["users"] == len(values)
    assert found["quality"] == pytest.approx(shift, abs=1e-9)
    assert found["quality_ci95"] == pytest.approx(0, abs=1e-9)
