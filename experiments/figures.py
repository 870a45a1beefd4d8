"""The figures of a report: SVG made for one column of a two-column paper, recoloured for the page.

Text stays text (searchable, and in the page's own font). Every figure is drawn in the light palette;
``themed`` turns its colours into CSS variables, so that one drawing serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.summary import LATENCY, QUALITY, Measure, decimals

COLUMN = 3.4
"""Inches: the width of a column of a two-column paper."""

PALETTE = {
    "#1c2024": ("ink", "#e8eaed"),
    "#5f6871": ("soft", "#a0a8b0"),
    "#d5d9dd": ("line", "#3c434a"),
    "#0072b2": ("f0", "#55aee6"),
    "#c8500a": ("f1", "#ff9055"),
    "#00855f": ("f2", "#35c79a"),
    "#b8568f": ("f3", "#e591c5"),
    "#a87000": ("f4", "#e3b34f"),
    "#6a51a3": ("f5", "#b3a1e6"),
    "#2b8a9e": ("f6", "#6cc5d6"),
    "#75706b": ("f7", "#b5afa9"),
    "#7db3d8": ("upload", "#3f7fae"),
    "#c3c9cf": ("collect", "#59616a"),
    "#9a7cc0": ("plan", "#8a6cb5"),
    "#8b949d": ("queue", "#7f8992"),
    "#b04a78": ("cloud", "#d9789f"),
    "#d9641e": ("edge", "#e8854a"),
    "#5c9ea6": ("relay", "#4f8d95"),
    "#3f83b5": ("download", "#6aaedd"),
    "#1f9168": ("device", "#3fb98d"),
    "#8a6d1f": ("decode", "#c4a24a"),
    "#e3e6e9": ("other", "#31373d"),
}
"""Each light colour's name as a CSS variable, and its value on a dark page."""

INK = "#1c2024"
_LIGHT = {name: light for light, (name, _) in PALETTE.items()}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "semct",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 8,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 1.0,
    "legend.columnspacing": 1.2,
    "text.color": _LIGHT["ink"],
    "axes.labelcolor": _LIGHT["ink"],
    "axes.edgecolor": _LIGHT["soft"],
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _LIGHT["soft"],
    "xtick.labelcolor": _LIGHT["ink"],
    "ytick.color": _LIGHT["soft"],
    "ytick.labelcolor": _LIGHT["ink"],
    "grid.color": _LIGHT["line"],
    "grid.linewidth": 0.5,
}


def bars(summary: pl.DataFrame, measure: Measure) -> str:
    """One bar per framework, with the standard deviation as whisker and the mean beside it."""
    names, means = summary["framework"].to_list(), summary[measure.column].to_list()
    spreads = summary[f"{measure.column}_std"].to_list()
    places = decimals(means)
    with mpl.rc_context(STYLE):
        figure, axes = _horizontal(names)
        reach = [(mean or 0.0) + (spread or 0.0) for mean, spread in zip(means, spreads, strict=True)]
        right = max([0.0, *reach]) or 1.0
        for row, (mean, spread) in enumerate(zip(means, spreads, strict=True)):
            if mean is None:
                said = "no value" if summary["asked"][row] else "not run"
                axes.text(right * 0.02, row, said, va="center", color=_LIGHT["soft"])
                continue
            axes.barh(row, mean, height=0.62, color=colour(row))
            if spread:
                axes.errorbar(mean, row, xerr=spread, fmt="none", color=_LIGHT["ink"], elinewidth=0.8, capsize=2)
            axes.text(max(reach[row], 0.0) + right * 0.03, row, f"{mean:.{places}f}", va="center")
        axes.set_xlim(min([0.0, *(2 * (mean or 0) - r for mean, r in zip(means, reach, strict=True))]), right * 1.22)
        axes.axvline(0, color=_LIGHT["soft"], linewidth=0.6)
        axes.set_xlabel(measure.label)
        return _svg(figure)


def tradeoff(summary: pl.DataFrame) -> str:
    """Content quality against service latency: better is up and to the left."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, 2.7), layout="constrained")
        axes = figure.subplots()
        for index, row in enumerate(summary.iter_rows(named=True)):
            x, y = row[LATENCY.column], row[QUALITY.column]
            if x is None or y is None:
                continue
            xerr, yerr = row[f"{LATENCY.column}_std"] or 0.0, row[f"{QUALITY.column}_std"] or 0.0
            axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="none", ecolor=_LIGHT["line"], elinewidth=1.0, zorder=1)
            axes.scatter(
                x, y, s=32, color=colour(index), marker=marker(index), label=_short(row["framework"]), zorder=2
            )
        axes.set_xlabel(LATENCY.label)
        axes.set_ylabel(QUALITY.label)
        axes.set_xlim(left=0)
        axes.margins(0.08)
        _legend_below(figure, axes, columns=2)
        return _svg(figure)


def stacked(parts: pl.DataFrame, columns: Mapping[str, tuple[str, str]], *, unit: str) -> str:
    """One bar per row of ``parts``, put together from its columns: each with its label and colour name."""
    names = parts["framework"].to_list()
    totals = [sum(row) for row in parts.select(*columns).fill_null(0.0).iter_rows()]
    places, right = decimals(totals), max([0.0, *totals]) or 1.0
    rows_of_legend = -(-len(columns) // 3)
    with mpl.rc_context(STYLE):
        figure, axes = _horizontal(names, extra=0.19 * rows_of_legend)
        left = [0.0] * len(names)
        for column, (label, colour) in columns.items():
            values = parts[column].fill_null(0.0).to_list()
            axes.barh(range(len(names)), values, left=left, height=0.62, color=_LIGHT[colour], label=label)
            left = [a + b for a, b in zip(left, values, strict=True)]
        for row, total in enumerate(totals):
            axes.text(total + right * 0.02, row, f"{total:.{places}f}", va="center")
        axes.set_xlim(0, right * 1.18)
        axes.set_xlabel(unit)
        _legend_below(figure, axes, columns=3)
        return _svg(figure)


def predictions(requests: pl.DataFrame, measures: Sequence[Measure], frameworks: Sequence[str]) -> str:
    """A panel for each measure: measured against predicted, a point per request; on the line both agree.

    ``frameworks`` are all of the run, also those without a point, so that colours are those of the other figures.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, 1.75 * -(-len(measures) // 2) + 0.5), layout="constrained")
        grid = figure.subplots(-(-len(measures) // 2), 2, squeeze=False)
        first = None
        for position, (axes, measure) in enumerate(zip(grid.flat, measures, strict=False)):
            first = first or axes
            predicted = f"predicted_{measure.column}"
            both = requests.drop_nulls([measure.column, predicted])
            for index, name in enumerate(frameworks):
                own = both.filter(pl.col("framework") == name)
                if own.is_empty():
                    continue
                axes.scatter(
                    own[predicted],
                    own[measure.column],
                    s=9,
                    color=colour(index),
                    marker=marker(index),
                    alpha=0.75,
                    linewidths=0,
                    label=_short(name),
                )
            if both.height:
                values = [*both[predicted], *both[measure.column]]
                margin = 0.06 * (max(values) - min(values)) or 0.06 * abs(max(values)) or 1.0
                span = (min(values) - margin, max(values) + margin)
                axes.plot(span, span, color=_LIGHT["soft"], linewidth=0.7, linestyle=(0, (3, 2)), zorder=0)
                axes.set(xlim=span, ylim=span)
            axes.set_title(measure.label)
            axes.locator_params(nbins=4)
            axes.set_aspect("equal", adjustable="box")
            axes.set_ylabel("measured" if position % 2 == 0 else "")
            axes.set_xlabel("predicted" if position >= len(measures) - 2 else "")
        for axes in grid.flat[len(measures) :]:
            axes.set_visible(False)
        if first:
            _legend_below(figure, first, columns=2)
        return _svg(figure)


def themed(svg: str, name: str) -> str:
    """The drawing for a page: colours as CSS variables, ids of its own, its size set by the page."""
    svg = svg[svg.index("<svg") :]
    for light, (variable, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{variable})")
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return re.sub(
        r'^<svg ([^>]*?)\s?width="[^"]*"([^>]*?)\s?height="[^"]*"',
        r'<svg aria-hidden="true" \1\2',
        svg,
        count=1,
    )


def _horizontal(names: Sequence[str], *, extra: float = 0.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(COLUMN, 0.55 + 0.24 * max(len(names), 1) + extra), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=5)
    return figure, axes


def _legend_below(figure: Figure, axes: Axes, *, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _short(name: str) -> str:
    """A name that leaves room for the figure."""
    return name if len(name) <= 24 else f"{name[:23]}\N{HORIZONTAL ELLIPSIS}"


def colour(index: int) -> str:
    return _LIGHT[f"f{index % 8}"]


def marker(index: int) -> str:
    """Beyond the eighth framework colours come back with other markers."""
    return _MARKERS[(index + index // 8) % 8]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()
