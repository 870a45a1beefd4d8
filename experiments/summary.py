"""From the requests of a run to the table that compares its frameworks.

A user is a device: with several repetitions each user's mean comes first, then the mean and the spread over
users. Required TFLOPs are a total: the sum over the requests of a repetition, then mean and spread over the
repetitions. Failed requests count as asked and have no other part in the means. Degraded ones, which the device did
alone because the edge did not answer in time, count as answered and as degraded: their users have a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from scipy.special import stdtrit


class Measure(NamedTuple):
    """A column that frameworks are compared by: its title, its unit, and whether more is better."""

    column: str
    title: str
    unit: str
    more_is_better: bool

    @property
    def label(self) -> str:
        """Title and unit, as at an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


QUALITY = Measure("quality", "content quality", "", more_is_better=True)
LATENCY = Measure("latency_s", "service latency", "s", more_is_better=False)
ENERGY = Measure("energy_j", "energy", "J", more_is_better=False)
TFLOP = Measure("tflop", "required TFLOPs", "", more_is_better=False)
UTILITY = Measure("utility", "utility", "", more_is_better=True)
MEASURES = (QUALITY, LATENCY, ENERGY, TFLOP, UTILITY)
FIDELITY = Measure("fidelity", "fidelity", "CLIP-IQA", more_is_better=True)
DIFFERENCE = Measure("pixel_difference", "difference to device-only", "of 255", more_is_better=False)
SOMETIMES = (FIDELITY, DIFFERENCE)
"""What pictures are compared by, too, where a run has it."""
PREDICTED = (QUALITY, LATENCY, ENERGY, UTILITY)
"""What a plan predicts of every request."""

_COLUMNS = [m.column for m in MEASURES]
SUMMARISED = ("framework", "repetition", "device", "outcome", *_COLUMNS)
"""The columns of a table of requests that `summarise` needs."""
_ANSWERED = pl.col("outcome").is_in(["answered", "degraded"])
_DEGRADED = pl.col("outcome") == "degraded"


def compared(table: pl.DataFrame) -> tuple[Measure, ...]:
    """The measures that a table of requests or their summary holds: ``MEASURES``, and others where there are values."""
    there = (m for m in SOMETIMES if m.column in table.columns and table[m.column].count())
    return (*MEASURES, *there)


def summarise(requests: pl.DataFrame, *, frameworks: Sequence[str] = ()) -> pl.DataFrame:
    """One row per framework: ``asked``, ``answered``, ``degraded`` of these, and for each measure its mean, ``_std``
    and ``_ci95``.

    ``_std`` is the sample standard deviation over users, ``_ci95`` half the width of Student's 95 %
    confidence interval of the mean; both are null where there is but one user (``tflop``: one repetition).
    ``frameworks`` fixes the order and adds rows for those that have no request yet; without it they stand in
    order of appearance.
    """
    names = list(dict.fromkeys([*frameworks, *requests["framework"]]))
    order = pl.DataFrame({"framework": names}, schema={"framework": pl.String})
    counts = requests.group_by("framework").agg(asked=pl.len(), answered=_ANSWERED.sum(), degraded=_DEGRADED.sum())
    columns = [m.column for m in compared(requests)]
    users = requests.filter(_ANSWERED).group_by("framework", "device").agg(pl.col(columns).mean())
    totals = requests.group_by("framework", "repetition").agg(pl.col("tflop").sum())
    per_user = users.group_by("framework").agg(_spread([c for c in columns if c != "tflop"]))
    per_repetition = totals.group_by("framework").agg(_spread(["tflop"]))
    spread = [f"{column}{suffix}" for column in columns for suffix in ("", "_std", "_ci95")]
    return (
        order.join(counts, on="framework", how="left", maintain_order="left")
        .join(per_user, on="framework", how="left", maintain_order="left")
        .join(per_repetition, on="framework", how="left", maintain_order="left")
        .with_columns(pl.col("asked", "answered", "degraded").fill_null(0).cast(pl.Int64))
        .select("framework", "asked", "answered", "degraded", *spread)
    )


def paired(requests: pl.DataFrame, against: str) -> pl.DataFrame:
    """Differences to the framework ``against``, request by request: same user, same repetition, same noise.

    One row per other framework: ``users`` that both answered, and for each measure the mean difference and
    the ``_ci95`` half-width of its confidence interval over users. ``tflop`` is per request here. Raises
    ``ValueError`` where no request ran under ``against``.
    """
    names = list(dict.fromkeys(requests["framework"]))
    if against not in names:
        raise ValueError(f"no request ran under {against!r}; there is {', '.join(names) or 'none'}")
    pair = ["repetition", "device", "seed"]
    each = requests.filter(_ANSWERED).group_by("framework", *pair).agg(pl.col(_COLUMNS).mean())
    reference = each.filter(pl.col("framework") == against).drop("framework")
    return (
        each.filter(pl.col("framework") != against)
        .join(reference, on=pair, suffix="_ref")
        .group_by("framework", "device")
        .agg((pl.col(c) - pl.col(f"{c}_ref")).mean().alias(c) for c in _COLUMNS)
        .group_by("framework")
        .agg(pl.len().cast(pl.Int64).alias("users"), *_spread(_COLUMNS))
        .select("framework", "users", *(f"{c}{suffix}" for c in _COLUMNS for suffix in ("", "_ci95")))
        .sort(pl.col("framework").replace_strict(names, range(len(names)), return_dtype=pl.Int64))
    )


def prediction_errors(requests: pl.DataFrame) -> pl.DataFrame:
    """One row per framework with predictions: the median over requests of |measured - predicted| / |measured|.

    A column for each of ``PREDICTED``; null where nothing was predicted or measured, or only zero was.
    """
    return (
        requests.filter(pl.any_horizontal(pl.col(f"predicted_{m.column}").is_not_null() for m in PREDICTED))
        .group_by("framework", maintain_order=True)
        .agg(
            ((pl.col(m.column) - pl.col(f"predicted_{m.column}")).abs() / pl.col(m.column).abs())
            .filter(pl.col(m.column) != 0)
            .median()
            .alias(m.column)
            for m in PREDICTED
        )
    )


def best(summary: pl.DataFrame, measure: Measure) -> list[bool]:
    """For each row, whether its value is the best of those that answered everyone; none if all are equal."""
    values = [
        value if asked and asked == answered else None
        for value, asked, answered in summary.select(measure.column, "asked", "answered").iter_rows()
    ]
    known = {v for v in values if v is not None}
    if len(known) < 2:
        return [False] * len(values)
    winner = max(known) if measure.more_is_better else min(known)
    return [value == winner for value in values]


def decimals(values: Sequence[float | None]) -> int:
    """Decimal places that give the largest of a column's values three significant digits, at most three."""
    largest = max((abs(v) for v in values if v is not None), default=0.0)
    return int(np.clip(2 - np.floor(np.log10(largest)), 0, 3)) if largest > 0 else 0


def render(summary: pl.DataFrame) -> Table:
    """The summary for a terminal of 80 columns: mean above spread, the best mean of a column starred."""
    table = Table(
        box=SIMPLE_HEAD,
        caption="Mean ± standard deviation over users; TFLOPs: total of a repetition.\n"
        "* best of the frameworks that answered everyone.",
        caption_justify="left",
        header_style="bold",
    )
    table.add_column("framework", no_wrap=True, overflow="ellipsis")
    table.add_column("answered", justify="right", no_wrap=True)
    columns: list[list[Text]] = []
    for measure in MEASURES:
        table.add_column(measure.label, justify="right", min_width=max(map(len, measure.label.split())))
        columns.append(_cells(summary, measure))
    for row, cells in zip(summary.iter_rows(named=True), zip(*columns, strict=True), strict=True):
        asked, answered = row["asked"], row["answered"]
        count = Text(f"{answered}/{asked}" if asked else "not run", "" if answered == asked else "bold red")
        if row["degraded"]:
            count.append(f"\n{row['degraded']} degraded", "yellow not bold")
        table.add_row(Text(row["framework"]), count, *cells)
    return table


def render_errors(errors: pl.DataFrame) -> Table:
    """The prediction errors for a terminal, in per cent."""
    table = Table(
        box=SIMPLE_HEAD,
        title="Prediction error (%)",
        title_justify="left",
        caption="Median over requests of |measured - predicted| / |measured|.",
        caption_justify="left",
        header_style="bold",
    )
    table.add_column("framework", no_wrap=True, overflow="ellipsis")
    for measure in PREDICTED:
        table.add_column(measure.title, justify="right")
    for row in errors.iter_rows(named=True):
        values = (row[m.column] for m in PREDICTED)
        table.add_row(Text(row["framework"]), *("-" if v is None else f"{100 * v:.1f}" for v in values))
    return table


def write_csv(summary: pl.DataFrame) -> str:
    """The summary as CSV, with six significant digits."""
    return summary.with_columns(pl.col(pl.Float64).round_sig_figs(6)).write_csv()


def _spread(columns: Sequence[str]) -> list[pl.Expr]:
    return [
        expression
        for column in columns
        for expression in (
            pl.col(column).mean(),
            pl.col(column).std().alias(f"{column}_std"),
            (pl.col(column).std() / pl.col(column).count().sqrt() * _student(column)).alias(f"{column}_ci95"),
        )
    ]


def _student(column: str) -> pl.Expr:
    """Student's t at 97.5 % for as many values as the column has."""
    degrees = pl.col(column).count().cast(pl.Float64) - 1
    return degrees.map_batches(
        lambda n: pl.Series(stdtrit(n.to_numpy(), 0.975)), return_dtype=pl.Float64, returns_scalar=True
    )


def _cells(summary: pl.DataFrame, measure: Measure) -> list[Text]:
    means, spreads = summary[measure.column].to_list(), summary[f"{measure.column}_std"].to_list()
    places = decimals(means)
    cells = []
    for mean, spread, wins in zip(means, spreads, best(summary, measure), strict=True):
        if mean is None:
            cells.append(Text("-", "dim"))
            continue
        cell = Text(f"{'*' if wins else ''}{mean:.{places}f}", "bold green" if wins else "")
        if spread is not None:
            cell.append(f"\n±{spread:.{places}f}", "dim not bold")
        cells.append(cell)
    return cells
