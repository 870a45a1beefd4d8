"""The figures of a report, made for one column of a two-column paper and recoloured for the page.

Text stays text (searchable, and in the page's own font) and has at least 7 points. Colours are those that colour-blind
people tell apart; markers and hatches say the same in grey. Every figure is drawn in the light palette; ``themed``
turns its colours into CSS variables, so that one drawing serves light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from experiments.summary import ENERGY, LATENCY, QUALITY, TFLOP, Measure, decimals

COLUMN = 3.5
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
    "#fdfdfe": ("hatch", "#14171a"),
}
"""Each light colour's name as a CSS variable, and its value on a dark page."""

INK = "#1c2024"
_LIGHT = {name: light for light, (name, _) in PALETTE.items()}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_HATCHES = {
    "upload": "////",
    "collect": "",
    "plan": "xxxx",
    "queue": "----",
    "cloud": "++++",
    "edge": "",
    "relay": "||||",
    "download": "\\\\\\\\",
    "device": "||",
    "decode": "xx",
    "other": "",
}
"""How parts that stand beside each other differ in grey."""
_SEEN = 0.002  # of the whole: parts below it are too thin to be seen, and stand in no legend


_POSSIBLE = {
    QUALITY.column: (-1.0, 1.0),
    LATENCY.column: (0.0, math.inf),
    ENERGY.column: (0.0, math.inf),
    TFLOP.column: (0.0, math.inf),
}
"""What a measure may be: an interval over few users would leave that, and is cut off there."""


class Look(NamedTuple):
    """How a row of a summary is drawn."""

    colour: str
    marker: str
    hatch: str = ""
    filled: bool = True


class Span(NamedTuple):
    """A stretch of a request's time: a key of the parts it belongs to, and seconds since the user's wish."""

    part: str
    start: float
    seconds: float


class Panel(NamedTuple):
    """A framework's clusters in a plane: points (n, 2) with the cluster of each, public prompts (m, 2) with theirs."""

    title: str
    points: NDArray[np.float64]
    clusters: Sequence[int | None]
    public: NDArray[np.float64]
    of: Sequence[int]


STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "semct",
    "pdf.fonttype": 42,
    "hatch.color": "#fdfdfe",
    "hatch.linewidth": 0.7,
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


def looks(summary: pl.DataFrame) -> list[Look]:
    """Each framework in a colour and with a marker of its own, in the order of the summary."""
    return [Look(colour(i), marker(i)) for i in range(summary.height)]


def bars(summary: pl.DataFrame, measure: Measure, drawn_as: Sequence[Look]) -> Figure:
    """One bar per framework, with the 95 % confidence interval as whisker and the mean beside it."""
    names, means = summary["framework"].to_list(), summary[measure.column].to_list()
    spreads = summary[f"{measure.column}_ci95"].to_list()
    places = decimals(means)
    with mpl.rc_context(STYLE):
        figure, axes = _horizontal(names)
        whiskers = [_whisker(measure, mean or 0.0, half) for mean, half in zip(means, spreads, strict=True)]
        # An interval over two users may be many times the mean: it leaves the figure rather than flatten it.
        most = 1.8 * max((abs(mean) for mean in means if mean is not None), default=0.0)
        reach = [min((mean or 0.0) + up, most) for mean, (_, up) in zip(means, whiskers, strict=True)]
        right = max([0.0, *reach]) or 1.0
        for row, (mean, whisker) in enumerate(zip(means, whiskers, strict=True)):
            if mean is None:
                said = "no value" if summary["asked"][row] else "not run"
                axes.text(right * 0.02, row, said, va="center", color=_LIGHT["soft"])
                continue
            look = drawn_as[row]
            axes.barh(row, mean, height=0.62, color=look.colour, hatch=look.hatch)
            if any(whisker):
                ends = [[end] for end in whisker]
                axes.errorbar(mean, row, xerr=ends, fmt="none", color=_LIGHT["ink"], elinewidth=0.8, capsize=2)
            axes.text(max(reach[row], 0.0) + right * 0.03, row, f"{mean:.{places}f}", va="center")
        lowest = [mean - low for mean, (low, _) in zip(means, whiskers, strict=True) if mean is not None and mean < 0]
        axes.set_xlim(max(min([0.0, *lowest]), -most), right * 1.22)
        axes.axvline(0, color=_LIGHT["soft"], linewidth=0.6)
        axes.set_xlabel(measure.label)
        return figure


def tradeoff(summary: pl.DataFrame, drawn_as: Sequence[Look]) -> Figure:
    """Content quality against service latency: better is up and to the left; a line joins what nothing beats in both.

    Whiskers are 95 % confidence intervals.
    """
    with mpl.rc_context(STYLE):
        # The legend below grows by a row with every two frameworks; what is above it keeps its room.
        figure = Figure(figsize=(COLUMN, 2.4 + 0.17 * math.ceil(summary.height / 2)), layout="constrained")
        axes = figure.subplots()
        x, y = summary[LATENCY.column].to_list(), summary[QUALITY.column].to_list()
        known = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
        for index, row in enumerate(summary.iter_rows(named=True)):
            if x[index] is None or y[index] is None:
                continue
            xerr, yerr = (
                [[end] for end in _whisker(m, row[m.column], row[f"{m.column}_ci95"])] for m in (LATENCY, QUALITY)
            )
            look = drawn_as[index]
            axes.errorbar(x[index], y[index], xerr=xerr, yerr=yerr, fmt="none", ecolor=_LIGHT["line"], zorder=1)
            axes.scatter(
                x[index],
                y[index],
                s=34,
                facecolors=look.colour if look.filled else "none",
                edgecolors=look.colour,
                linewidths=1.1,
                marker=look.marker,
                label=_short(row["framework"]),
                zorder=3,
            )
        front = pareto(known)
        axes.plot(*zip(*front, strict=True), color=_LIGHT["soft"], linewidth=0.9, linestyle=(0, (4, 2)), zorder=2)
        axes.set_xlabel(LATENCY.label)
        axes.set_ylabel(QUALITY.label)
        axes.set_xlim(left=0)
        axes.margins(0.08)
        axes.grid()
        axes.set_axisbelow(True)
        _legend_below(figure, axes, columns=2)
        return figure


def _whisker(measure: Measure, mean: float, half: float | None) -> tuple[float, float]:
    """How far an interval of this half-width reaches below and above the mean, within what is possible."""
    least, most = _POSSIBLE.get(measure.column, (-math.inf, math.inf))
    return min(half or 0.0, max(mean - least, 0.0)), min(half or 0.0, max(most - mean, 0.0))


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, worth) points those for which no other costs less or as much and is worth more or as much, by cost."""
    front: list[tuple[float, float]] = []
    for cost, worth in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or worth > front[-1][1]:
            front.append((cost, worth))
    return front


def stacked(parts: pl.DataFrame, columns: Mapping[str, tuple[str, str]], *, unit: str) -> Figure:
    """One bar per row of ``parts``, put together from its columns: each with its label and colour name."""
    names = parts["framework"].to_list()
    totals = [sum(row) for row in parts.select(*columns).fill_null(0.0).iter_rows()]
    places, right = decimals(totals), max([0.0, *totals]) or 1.0
    seen = [label for c, (label, _) in columns.items() if (parts[c].sum() or 0.0) > _SEEN * sum(totals)]
    with mpl.rc_context(STYLE):
        figure, axes = _horizontal(names, extra=_legend_height(len(seen)))
        left = [0.0] * len(names)
        for column, (label, name) in columns.items():
            values = parts[column].fill_null(0.0).to_list()
            rows = range(len(names))
            said = label if label in seen else None
            axes.barh(rows, values, left=left, height=0.62, color=_LIGHT[name], hatch=_HATCHES[name], label=said)
            left = [a + b for a, b in zip(left, values, strict=True)]
        for row, total in enumerate(totals):
            axes.text(total + right * 0.02, row, f"{total:.{places}f}", va="center")
        axes.set_xlim(0, right * 1.18)
        axes.set_xlabel(unit)
        _legend_below(figure, axes, columns=3)
        return figure


def waterfall(rows: Sequence[tuple[str, Sequence[Span]]], parts: Mapping[str, tuple[str, str]]) -> Figure:
    """One row per request: what was done with it when. ``parts`` give each part's label and colour name."""
    took = {part: sum(s.seconds for _, spans in rows for s in spans if s.part == part) for part in parts}
    used = [part for part, seconds in took.items() if seconds > _SEEN * sum(took.values())]
    with mpl.rc_context(STYLE):
        figure, axes = _horizontal([name for name, _ in rows], extra=_legend_height(len(used)), pitch=0.2)
        for part in used:
            label, name = parts[part]
            spans = [(row, span) for row, (_, found) in enumerate(rows) for span in found if span.part == part]
            axes.barh(
                [row for row, _ in spans],
                [span.seconds for _, span in spans],
                left=[span.start for _, span in spans],
                height=0.68,
                color=_LIGHT[name],
                hatch=_HATCHES[name],
                label=label,
            )
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds since the user asked")
        _legend_below(figure, axes, columns=3)
        return figure


def dots(table: pl.DataFrame, names: Sequence[str], *, label: str) -> Figure:
    """A row per ``name`` of the table, a marker per framework at its ``value``."""
    frameworks = list(dict.fromkeys(table["framework"]))
    with mpl.rc_context(STYLE):
        extra = 0.19 * -(-len(frameworks) // 2)
        figure, axes = _horizontal(names, extra=extra)
        for index, framework in enumerate(frameworks):
            own = dict(table.filter(pl.col("framework") == framework).select("name", "value").iter_rows())
            rows = [row for row, name in enumerate(names) if name in own]
            axes.scatter(
                [own[names[row]] for row in rows],
                # side by side within the row, so that equal values stay visible
                [row + 0.56 * ((index + 0.5) / len(frameworks) - 0.5) for row in rows],
                s=20,
                color=colour(index),
                marker=marker(index),
                linewidths=0,
                label=_short(framework),
            )
        axes.grid(axis="y", linewidth=0.3)
        axes.set_xlim(left=0)
        axes.margins(x=0.06)
        axes.set_xlabel(label)
        _legend_below(figure, axes, columns=2)
        return figure


def plane(panels: Sequence[Panel], explained: tuple[float, float]) -> Figure:
    """The prompts of each framework's clusters in the plane of their two principal components.

    A marker and a colour are a cluster, a star with its number the cluster's public prompt; ``explained`` are the
    parts of the variance that the components explain.
    """
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, (2.6 if across == 1 else 1.75) * down + 0.35), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for position, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
            _draw_plane(axes, panel)
            axes.set_title(_short(panel.title))
            axes.set_xlabel(f"component 1 ({explained[0]:.0%})" if position >= len(panels) - across else "")
            axes.set_ylabel(f"component 2 ({explained[1]:.0%})" if position % across == 0 else "")
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        ink = _LIGHT["soft"]
        handles = [
            Line2D([], [], linestyle="none", marker="o", markersize=4.5, color=ink, label="personal prompt"),
            Line2D([], [], linestyle="none", marker="*", markersize=8, color=ink, label="public prompt"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        return figure


def _draw_plane(axes: Axes, panel: Panel) -> None:
    public = dict(zip(panel.of, panel.public, strict=True))
    for point, cluster in zip(panel.points, panel.clusters, strict=True):
        if cluster in public:
            x, y = zip(point, public[cluster], strict=True)
            axes.plot(x, y, color=colour(cluster), linewidth=0.6, alpha=0.6, zorder=1)
    for cluster in sorted({c for c in panel.clusters if c is not None}):
        own = panel.points[[c == cluster for c in panel.clusters]]
        axes.scatter(own[:, 0], own[:, 1], s=16, color=colour(cluster), marker=marker(cluster), linewidths=0, zorder=2)
    alone = panel.points[[c is None for c in panel.clusters]]
    axes.scatter(alone[:, 0], alone[:, 1], s=14, color=_LIGHT["soft"], marker=".", linewidths=0, zorder=2)
    for cluster, (x, y) in public.items():
        axes.scatter(x, y, s=90, color=colour(cluster), marker="*", edgecolors=_LIGHT["ink"], linewidths=0.6, zorder=3)
        axes.annotate(str(cluster + 1), (x, y), (4, 3), textcoords="offset points", fontsize=7.5, zorder=4)
    axes.set(xticks=[], yticks=[])
    axes.margins(0.12)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(_LIGHT["line"])


def links(table: pl.DataFrame) -> Figure:
    """Rate and delay of links, as asked and as measured: a point per node and direction, on the line both agree.

    ``table`` has the columns way (up, down), what (rate_bps, delay_s), asked and measured.
    """
    titles = {"rate_bps": ("rate (Mbit/s)", 1e-6), "delay_s": ("delay (ms)", 1e3)}
    found = [what for what in titles if table.filter(pl.col("what") == what).height]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, 2.25 if len(found) > 1 else 3.2), layout="constrained")
        for axes, what in zip(figure.subplots(1, len(found), squeeze=False).flat, found, strict=True):
            title, factor = titles[what]
            own = table.filter(pl.col("what") == what)
            for index, way in enumerate(("up", "down")):
                some = own.filter(pl.col("way") == way)
                axes.scatter(
                    some["asked"] * factor,
                    some["measured"] * factor,
                    s=14,
                    color=colour(index),
                    marker="^" if way == "up" else "v",
                    alpha=0.8,
                    linewidths=0,
                    label=way,
                )
            values = [v * factor for v in (*own["asked"], *own["measured"])]
            span = (0.0, 1.08 * max(values) or 1.0)
            axes.plot(span, span, color=_LIGHT["soft"], linewidth=0.7, linestyle=(0, (3, 2)), zorder=0)
            axes.set(xlim=span, ylim=span, xlabel="asked", title=title)
            axes.locator_params(nbins=4)
            axes.set_aspect("equal", adjustable="box")
            axes.set_ylabel("measured" if what == found[0] else "")
        _legend_below(figure, figure.axes[0], columns=2)
        return figure


def pictures(rows: Sequence[tuple[str, Sequence[NDArray[np.uint8] | None]]], frameworks: Sequence[str]) -> Figure:
    """Users down, frameworks across: the personal prompt, and a picture (h, w, 3) for each framework or none."""
    with mpl.rc_context(STYLE):
        label = 0.95
        side = (COLUMN - label) / max(len(frameworks), 1)
        top = 0.2 if len(frameworks) <= 3 else 0.75
        height = top + side * len(rows)
        figure = Figure(figsize=(COLUMN, height))
        for row, (prompt, tiles) in enumerate(rows):
            bottom = (height - top - side * (row + 1)) / height
            lines = wrap(prompt, 17)
            text = "\n".join(lines[: max(2, int(side / 0.125))])
            figure.text(0.0, bottom + side / height / 2, text, fontsize=7, va="center", linespacing=1.05)
            for column, tile in enumerate(tiles):
                left = (label + side * column) / COLUMN
                axes = figure.add_axes((left, bottom, 0.96 * side / COLUMN, 0.96 * side / height))
                axes.set_axis_off()
                if tile is None:
                    axes.text(0.5, 0.5, "none", ha="center", va="center", color=_LIGHT["soft"])
                else:
                    axes.imshow(tile, interpolation="lanczos", aspect="equal")
        for column, name in enumerate(frameworks):
            x, y = (label + side * (column + 0.48)) / COLUMN, 1 - (top - 0.05) / height
            turned = {"ha": "center"} if len(frameworks) <= 3 else {"ha": "left", "rotation": 32}
            figure.text(x, y, _short(name), fontsize=7, va="bottom", rotation_mode="anchor", **turned)
        return figure


def predictions(requests: pl.DataFrame, measures: Sequence[Measure], frameworks: Sequence[str]) -> Figure:
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
                    s=11,
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
        return figure


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


def _horizontal(names: Sequence[str], *, extra: float = 0.0, pitch: float = 0.24) -> tuple[Figure, Axes]:
    """A figure with a named row for each, ``pitch`` inches apart; ``extra`` inches are for a legend."""
    figure = Figure(figsize=(COLUMN, 0.55 + pitch * max(len(names), 1) + extra), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=5)
    return figure, axes


def _legend_height(entries: int) -> float:
    """Inches for a legend of three columns."""
    return 0.19 * -(-entries // 3)


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


def saved(figure: Figure, kind: Literal["svg", "pdf"]) -> bytes:
    """The figure as a file, without the time of day."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(
            buffer, format=kind, transparent=True, metadata={"Date" if kind == "svg" else "CreationDate": None}
        )
    return buffer.getvalue()
