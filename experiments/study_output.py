"""What a study shows: printed tables, and figures as SVG and PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import msgspec
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.figures import COLUMN, INK, STYLE, colour, marker
from experiments.simulation import Encoder, Simulator
from experiments.study import (
    BASE,
    ORDER,
    PUBLISHED,
    Budget,
    Comparison,
    Curves,
    Grid,
    averages,
    budget_averages,
    curve_table,
    find_study,
    leave,
    load_study,
    numbers,
    order_verdict,
    run_budget,
    run_comparison,
    verdicts,
)
from experiments.summary import ENERGY, LATENCY, QUALITY, TFLOP, UTILITY, decimals

_MEASURES = {m.column: m for m in (QUALITY, LATENCY, ENERGY, TFLOP, UTILITY)}


def play(name: str, console: Console, *, seeds: int | None, axes: Sequence[str], runs: Path) -> Path:
    """Run a study that comes with the package, or a file; print its tables and return the folder that it leaves.

    ``seeds`` and ``axes`` replace the study's where they are given; the axes named in ``axes`` alone ask for no budget.

    Raises what ``load_study``, ``Grid`` and ``Simulator.play`` raise.
    """
    path = find_study(name)
    study = load_study(path)
    if isinstance(study, Curves):
        return _play_curves(study, console, runs)
    if seeds is not None:
        study = msgspec.structs.replace(study, seeds=seeds)
    if axes:
        study = msgspec.structs.replace(study, axes=tuple(axes), budget=None)
    grid = Grid(study, path.parent / study.case)
    with console.status("loading") as status:
        simulator = Simulator(Encoder())
        rounds, requests = run_comparison(grid, simulator, watch=status.update)
        best = run_budget(grid, simulator, study.budget, watch=status.update) if study.budget else None
    table, claims = averages(rounds), verdicts(rounds)
    tables = {"frameworks": table, "claims": claims, "rounds": rounds, "requests": requests}
    console.print(base_table(study, table))
    for axis, title in grid.titles.items():
        along = overhead_table if study.show[-1] == "tflop" else utility_table
        console.print(along(axis, title, table, claims))
    if study.budget and best is not None:
        tables["budget"] = budget_averages(best, [point.label for point in study.budget.points])
        console.print(budget_table(study.budget, tables["budget"]))
    if study.paper.note:
        console.print(f"The paper: {study.paper.note}.", highlight=False)
    figures = {"base": _bars(study, table), **({"axes": _panels(study, grid.titles, table)} if study.axes else {})}
    files = {f"{stem}.{kind}": _drawn(figure, kind) for stem, figure in figures.items() for kind in ("svg", "png")}
    folder = leave(runs, study, tables, files)
    console.print(f"tables and figures: {folder}", highlight=False, soft_wrap=True)
    return folder


def base_table(study: Comparison, table: pl.DataFrame) -> Table:
    """The case as it stands: each framework's means over the seeds, and the paper's numbers where it prints any."""
    shown = Table(
        box=SIMPLE_HEAD,
        title=study.description,
        caption=f"Mean ± 95 % confidence interval over {study.seeds} seeds; in brackets what the paper prints.",
        caption_justify="left",
        title_justify="left",
    )
    shown.add_column("framework", no_wrap=True)
    columns = [QUALITY, LATENCY, ENERGY, TFLOP, UTILITY]
    for measure in columns:
        shown.add_column(measure.label, justify="right", min_width=7)
    shown.add_column("gain of semct", justify="right")
    shown.add_column("above device-only", justify="right")
    rows = table.filter(axis=BASE)
    places = {m.column: decimals(rows[m.column].to_list()) for m in columns}
    for row in rows.iter_rows(named=True):
        framework = row["framework"]
        cells = [_with_half(row, m.column, places[m.column]) for m in columns]
        if framework in study.paper.tflop:
            cells[3] += f"\n[{study.paper.tflop[framework]:.0f}]"
        gain = "" if framework == "semct" else _percent(row["gain"], row["gain_ci95"])
        above = "" if framework == "semct" else _percent(row["gain_above"], row["gain_above_ci95"])
        if framework in study.paper.gain:
            gain += f"\n[{100 * study.paper.gain[framework]:.1f} %]"
        shown.add_row(framework, *(c.replace("[", r"\[") for c in [*cells, gain, above]))
    return shown


def overhead_table(axis: str, title: str, table: pl.DataFrame, claims: pl.DataFrame) -> Table:
    """Along an axis: required TFLOPs, whether their order is the paper's, and what SemCT's quality is."""
    shown, rows, frameworks = _begun(title, table.filter(axis=axis))
    for framework in frameworks:
        shown.add_column(framework, justify="right")
    shown.add_column("paper's order", justify="right")
    shown.add_column("quality of semct", justify="right")
    shown.add_column("implied", justify="right")
    for point, at in rows.items():
        implied = at["semct"]["implied"]
        shown.add_row(
            point,
            *(f"{at[f]['tflop']:.0f}" for f in frameworks),
            order_verdict(claims, axis, point, "tflop") or "-",
            f"{at['semct']['quality']:.4f}",
            "-" if implied is None else f"{implied:.4f}",
        )
    return shown


def utility_table(axis: str, title: str, table: pl.DataFrame, claims: pl.DataFrame) -> Table:
    """Along an axis: SemCT's utility, its gain over the others, and whether the order of utilities is the paper's."""
    shown, rows, frameworks = _begun(title, table.filter(axis=axis))
    shown.add_column("utility of semct", justify="right")
    for framework in frameworks[1:]:
        shown.add_column(f"gain over {framework}", justify="right")
    if len(frameworks) > 1:
        shown.add_column("paper's order", justify="right")
    for point, at in rows.items():
        shown.add_row(
            point,
            _with_half(at["semct"], "utility", 3),
            *(_percent(at[f]["gain"], at[f]["gain_ci95"]) for f in frameworks[1:]),
            *([order_verdict(claims, axis, point, "utility") or "-"] if len(frameworks) > 1 else []),
        )
    return shown


def budget_table(budget: Budget, table: pl.DataFrame) -> Table:
    """What quality SemCT keeps within a budget, beside the one that equal sharing would have there."""
    shown = Table(
        box=SIMPLE_HEAD,
        title=f"SemCT within {budget.tflop:.0f} TFLOPs: for each seed the plan of highest quality along {budget.axis}",
        caption="Implied: the quality of the same clusters if all shared as many steps as spend the budget.",
        title_justify="left",
        caption_justify="left",
    )
    for title in ("", "TFLOPs", "shared steps", "quality", "implied", "margin", "seeds that reach it"):
        shown.add_column(title, justify="right" if title else "left")
    for row in table.iter_rows(named=True):
        if row["seeds"]:
            shown.add_row(
                row["point"],
                f"{row['tflop']:.0f}",
                f"{row['shared_steps']:.2f}",
                f"{row['quality']:.4f}",
                f"{row['implied']:.4f}",
                _with_half(row, "margin", 5),
                f"{row['met']} of {row['seeds']}",
            )
        else:
            shown.add_row(row["point"], *["-"] * 5, "0 of 0")
    return shown


def _begun(title: str, rows: pl.DataFrame) -> tuple[Table, dict[str, dict[str, dict[str, Any]]], list[str]]:
    """A table without columns but the first, its rows by point and framework, and the frameworks that it compares."""
    shown = Table(box=SIMPLE_HEAD, title=f"Along: {title}", title_justify="left")
    shown.add_column("", no_wrap=True)
    by_point: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows.iter_rows(named=True):
        by_point.setdefault(row["point"], {})[row["framework"]] = row
    return shown, by_point, [f for f in ORDER if f in rows["framework"]]


def _play_curves(study: Curves, console: Console, runs: Path) -> Path:
    table = curve_table(study)
    shown = Table(box=SIMPLE_HEAD, title=study.description, title_justify="left")
    shown.add_column("model", no_wrap=True)
    shown.add_column("phi", justify="right")
    steps = [0, 4, 8, 12, 16, 20, 24, 28]
    for k in steps:
        shown.add_column(f"{k}", justify="right")
    for (model, similarity), group in table.group_by("model", "similarity", maintain_order=True):
        quality = dict(group.select("shared", "quality").iter_rows())
        shown.add_row(str(model), f"{similarity}", *(f"{quality[k]:.2f}" if k in quality else "" for k in steps))
    console.print(shown)
    console.print(f"The paper: {study.paper.note}.", highlight=False)
    figure = _curves(study, table)
    files = {f"curves.{kind}": _drawn(figure, kind) for kind in ("svg", "png")}
    folder = leave(runs, study, {"curves": table}, files)
    console.print(f"table and figure: {folder}", highlight=False, soft_wrap=True)
    return folder


def _bars(study: Comparison, table: pl.DataFrame) -> Figure:
    """A panel for each measure: frameworks of the base with confidence intervals, the paper's TFLOPs as diamonds."""
    rows = table.filter(axis=BASE)
    names = rows["framework"].to_list()
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(COLUMN * min(2, len(study.show)), 1.9 * -(-len(study.show) // 2)), layout="constrained"
        )
        grid = figure.subplots(-(-len(study.show) // 2), min(2, len(study.show)), squeeze=False)
        for axes, column in zip(grid.flat, study.show, strict=False):
            halves = [half or 0.0 for half in rows[f"{column}_ci95"]]
            axes.barh(range(len(names)), rows[column], xerr=halves, color=[colour(i) for i in range(len(names))])
            if column == "tflop":
                known = [(study.paper.tflop[n], i) for i, n in enumerate(names) if n in study.paper.tflop]
                axes.scatter([x for x, _ in known], [y for _, y in known], color=INK, marker="D", s=14, zorder=3)
                axes.set_title("diamonds: the paper" if known else "")
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
            axes.set_xlabel(_MEASURES[column].label)
        for axes in list(grid.flat)[len(study.show) :]:
            axes.set_visible(False)
        return figure


def _panels(study: Comparison, titles: Mapping[str, str], table: pl.DataFrame) -> Figure:
    """A panel for each axis: the last measure shown, a line per framework with its confidence band."""
    column = study.show[-1]
    wide = min(2, len(titles))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN * wide, 2.3 * -(-len(titles) // wide)), layout="constrained")
        grid = figure.subplots(-(-len(titles) // wide), wide, squeeze=False)
        for axes, (axis, title) in zip(grid.flat, titles.items(), strict=False):
            _lines(axes, table.filter(axis=axis), column)
            axes.set_xlabel(title)
            axes.set_ylabel(_MEASURES[column].label)
        for axes in list(grid.flat)[len(titles) :]:
            axes.set_visible(False)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return figure


def _lines(axes: Axes, rows: pl.DataFrame, column: str) -> None:
    labels = list(dict.fromkeys(rows["point"]))
    places: Sequence[float] = numbers(labels) or range(len(labels))
    for index, framework in enumerate(dict.fromkeys(rows["framework"])):
        own = rows.filter(framework=framework)
        mean, half = own[column].to_numpy(), own[f"{column}_ci95"].fill_null(0.0).to_numpy()
        axes.plot(places, mean, color=colour(index), marker=marker(index), markersize=3, linewidth=1, label=framework)
        axes.fill_between(places, mean - half, mean + half, color=colour(index), alpha=0.2, linewidth=0)
    if numbers(labels) is None:
        axes.set_xticks(places, labels, rotation=30, ha="right")


def _curves(study: Curves, table: pl.DataFrame) -> Figure:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN * len(study.models), 2.6), layout="constrained")
        grid = figure.subplots(1, len(study.models), squeeze=False)
        for axes, model in zip(grid.flat, study.models, strict=True):
            for index, similarity in enumerate(study.similarities):
                own = table.filter(model=model, similarity=similarity)
                axes.plot(own["shared"], own["quality"], color=colour(index), linewidth=1, label=f"{similarity}")
                theirs = table.filter(model=PUBLISHED, similarity=similarity)
                if model == study.models[0]:
                    axes.plot(theirs["shared"], theirs["quality"], color=colour(index), linewidth=1, linestyle=":")
            axes.set_title(model)
            axes.set_xlabel("shared steps")
            axes.set_ylabel("content quality")
        handles, labels = grid.flat[0].get_legend_handles_labels()
        legend = "similarity" + (" (dotted: the published curves)" if study.paper.curves else "")
        figure.legend(handles, labels, loc="outside lower center", ncols=6, title=legend)
        return figure


def _drawn(figure: Figure, kind: str) -> bytes:
    with mpl.rc_context(STYLE):
        buffer = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
        return buffer.getvalue()


def _with_half(row: Mapping[str, Any], column: str, places: int) -> str:
    half = row[f"{column}_ci95"]
    return f"{row[column]:.{places}f}" + ("" if half is None else f" ± {half:.{places}f}")


def _percent(mean: float | None, half: float | None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:+.1f}" + ("" if half is None else f" ± {100 * half:.1f}") + " %"
