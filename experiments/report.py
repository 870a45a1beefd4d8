"""``report.html``: one file that says what a run did, with its figures and pictures, light and dark.

It needs nothing beside itself: styles, figures (SVG) and pictures stand inline, and it holds no script. The
figures are also written to ``figures/``, as SVG and PDF. A failed or interrupted run gets a report of what it left.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined

from experiments import figures
from experiments.drawings import SOURCES, STAGES, Drawing, drawings, read_picture, sources, stages
from experiments.record import Unwritable
from experiments.summary import (
    MEASURES,
    PREDICTED,
    Measure,
    best,
    compared,
    decimals,
    paired,
    prediction_errors,
    summarise,
)
from semct.runs import Run, RunInfo, load_run


class Cell(NamedTuple):
    """A number of a table: mean, confidence interval below it, whether it is to stand out, and its spread."""

    text: str
    below: str = ""
    strong: bool = False
    spread: str = ""


class Line(NamedTuple):
    """A row of a table: a framework, how many requests its numbers come from, and the numbers."""

    framework: str
    served: str
    complete: bool
    cells: list[Cell]


class Member(NamedTuple):
    """A request in its cluster; ``split`` is x / y / z."""

    prompt: str
    similarity: str
    split: str


class Group(NamedTuple):
    """A cluster, or the requests of a framework that belong to none."""

    title: str
    public_prompt: str
    source: str
    members: list[Member]


class Tile(NamedTuple):
    """A picture of the grid, or why there is none."""

    source: str
    alt: str
    quality: str
    missing: str
    strong: bool


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``figures/*.svg`` into a run's folder and return the report's path.

    Raises ``NotARun`` where the folder is none, ``Unwritable`` where it cannot be written.
    """
    run = load_run(folder)
    page = folder / "report.html"
    try:
        found = list(drawings(run))
        keep_figures(folder, found)
        page.write_text(_page(run, found), encoding="utf-8")
    except OSError as error:
        raise Unwritable(f"the report cannot be written to {page}: {error.strerror or error}") from error
    return page


def keep_figures(folder: Path, found: Sequence[Drawing]) -> None:
    """Write figures as SVG and PDF below the folder; raises ``OSError``."""
    (folder / "figures").mkdir(exist_ok=True)
    for drawing in found:
        (folder / "figures" / f"{drawing.name}.svg").write_bytes(drawing.svg)
        (folder / "figures" / f"{drawing.name}.pdf").write_bytes(figures.saved(drawing.figure, "pdf"))


def render_page(template: str, **values: Any) -> str:
    """A page from one of the templates beside this file, in the colours of the figures."""
    environment = Environment(
        loader=PackageLoader("experiments", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    light = {name: light for light, (name, _) in figures.PALETTE.items()}
    return environment.get_template(template).render(light=light, dark=dict(figures.PALETTE.values()), **values)


def _page(run: Run, found: Sequence[Drawing]) -> str:
    first = _first_repetition(run.requests)
    frameworks = _frameworks(run)
    summary = summarise(run.requests, frameworks=run.info.frameworks)
    against = _against(run.requests)
    modelled, measured = _provenance(run)
    return render_page(
        "report.html.jinja",
        info=run.info,
        folder=run.path.resolve().name,
        brief=_brief(run),
        facts=facts_of(run.info),
        warnings=list(warnings_of(run)),
        modelled=modelled,
        measured=measured,
        measures=[m.label for m in compared(summary)],
        results=results_of(summary),
        against=against,
        differences=differences_of(run.requests, against) if against else [],
        drawings={d.name: d for d in found if d.shown},
        waterfalls=[d.name for d in found if d.name.startswith("waterfall-")],
        bars=[m.column for m in compared(summary)],
        stages=_parts_table(stages(run.requests), STAGES),
        sources=_parts_table(sources(run.requests), SOURCES),
        deviations=_deviations(run.requests),
        repetitions=run.requests["repetition"].n_unique(),
        clusters=[(name, _groups(first.filter(pl.col("framework") == name))) for name in frameworks],
        frameworks=frameworks,
        users=_grid(run.path, first, frameworks),
        same_noise=_same_noise(first),
        nodes=_nodes(run.nodes),
        links=run.links.to_dicts(),
        scenario=run.scenario,
    )


def _frameworks(run: Run) -> list[str]:
    """Those that were asked anything, in the order of the summary."""
    asked = set(run.requests["framework"])
    order = dict.fromkeys([*run.info.frameworks, *run.requests["framework"]])
    return [name for name in order if name in asked]


def _first_repetition(requests: pl.DataFrame) -> pl.DataFrame:
    return requests.filter(pl.col("repetition") == pl.col("repetition").min())


def _against(requests: pl.DataFrame) -> str:
    """What differences are stated against: SemCT where it ran, else the first framework; none if alone."""
    names = list(dict.fromkeys(requests["framework"]))
    if len(names) < 2:
        return ""
    return "semct" if "semct" in names else names[0]


def _brief(run: Run) -> dict[str, str]:
    """What was run, for the top of the page."""
    facts, requests = facts_of(run.info), run.requests
    reached, repetitions = requests["framework"].n_unique(), requests["repetition"].n_unique()
    of = f" of {len(run.info.frameworks)}" if reached < len(run.info.frameworks) else ""
    asked = f"{requests['device'].n_unique()} users, {reached}{of} frameworks"
    if repetitions > 1:
        asked += f", {repetitions} repetitions"
    wanted = ("started", "seed", "compute", "machine", "GPUs", "code")
    return {"asked": asked} | {label: facts[label] for label in wanted if label in facts}


def facts_of(info: RunInfo) -> dict[str, str]:
    """What was run, on what, as label and value; what is not known is left out."""
    hardware, commit = info.hardware, info.commit
    took = f", {(info.finished - info.started).total_seconds():.0f} s" if info.finished else ""
    profiles: dict[str, list[str]] = {}
    for node, profile in info.profiles.items():
        profiles.setdefault(profile, []).append(node)
    known = {
        "started": f"{info.started:%Y-%m-%d %H:%M:%S} UTC{took}",
        "seed": "" if info.seed is None else str(info.seed),
        "model": info.model or "",
        "compute": info.compute or "",
        "profiles": "; ".join(f"{name}: {_listed(nodes)}" for name, nodes in profiles.items()),
        "slowdown": f"{info.slowdown:g}" if info.slowdown != 1 else "",
        "broker": info.broker or "",
        "links": info.link or "",
        "hosts": info.hosts or "",
        "machine": f"{hardware.cpu}, {hardware.cores} cores, {hardware.memory_bytes / 2**30:.0f} GiB"
        if hardware
        else "",
        "GPUs": ", ".join(hardware.gpus) if hardware else "",
        "kernel": info.kernel,
        "code": f"{commit.id[:12]}{' with local changes' if commit.dirty else ''}" if commit else "",
        "versions": ", ".join(f"{name} {version}" for name, version in info.versions.items()),
        "device memory": _memory(info.device_memory_mib),
    }
    return {label: value for label, value in known.items() if value}


def _listed(nodes: Sequence[str]) -> str:
    return ", ".join(nodes) if len(nodes) <= 3 else f"{nodes[0]} ... {nodes[-1]} ({len(nodes)})"


def _memory(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{min(values):.1f} to {max(values):.1f} MiB private (USS) per device process"


def warnings_of(run: Run) -> Iterator[str]:
    """What a reader must know before any number."""
    info = run.info
    if info.status == "running":
        yield "This run has not ended, or was killed: what follows is what it left so far."
    if info.status in {"failed", "interrupted"}:
        yield f"This run {'failed' if info.status == 'failed' else 'was interrupted'}: {info.reason}"
    # Requests that shared a call each count its overrun, so theirs is the last resort.
    overruns = max(info.overruns, run.nodes["overruns"].sum()) or run.requests["overruns"].sum()
    if overruns:
        counts = run.nodes.group_by("framework", maintain_order=True).agg(pl.col("overruns").sum())
        where = ", ".join(f"{name} {count}" for name, count in counts.iter_rows() if count)
        yield (
            f"{overruns} calls took longer than the hardware they emulate{f' ({where})' if where else ''}, "
            "so emulated times are not right. Raise the scenario's slowdown and run again."
        )
    broken = run.faults.filter(pl.col("began").is_not_null())
    if broken.height:
        counts = broken.group_by("what", maintain_order=True).len().sort("len", descending=True)
        kinds = ", ".join(f"{what} {count}" for what, count in counts.iter_rows())
        nodes = ", ".join(broken["node"].unique().sort())
        yield f"{broken.height} faults were part of this experiment ({kinds}), on {nodes}."
    for outcome, happened in (("failed", "failed"), ("degraded", "were done by the device alone")):
        some = run.requests.filter(pl.col("outcome") == outcome)
        if some.height:
            reasons = some["reason"].filter(some["reason"] != "").unique(maintain_order=True).to_list()
            said = f": {'; '.join(reasons[:3])}{' ...' if len(reasons) > 3 else ''}" if reasons else "."
            where = ", ".join(some["framework"].unique(maintain_order=True))
            yield f"{some.height} of {run.requests.height} requests {happened} ({where}){said}"
    short = run.nodes.filter(pl.col("shortages") > 0)["node"].unique(maintain_order=True).to_list()
    if short:
        yield f"Memory did not suffice for calls of the usual size on {', '.join(short)}: smaller ones took longer."
    late = run.links.filter(pl.max_horizontal("up_late_s", "down_late_s") > _LATE)
    if late.height:
        worst = late.select(pl.max_horizontal("up_late_s", "down_late_s")).max().item()
        yield (
            f"Packets left {late['node'].n_unique()} links up to {1e3 * worst:.0f} ms late (99th percentile): the "
            "machine was too busy for its links. Raise the scenario's slowdown and run again."
        )
    dead = run.nodes.filter(~pl.col("alive"))["node"].unique(maintain_order=True).to_list()
    if dead:
        yield f"Nodes that did not live to the end: {', '.join(dead)}."


_LATE = 0.01  # seconds behind their time that packets may leave before a report says so


def _provenance(run: Run) -> tuple[list[str], list[str]]:
    """What of the numbers is modelled and what is measured, a sentence each."""
    info, requests = run.info, run.requests
    modelled, measured = [], []
    emulated = info.compute in {"emulated", "mixed"} or bool(requests["modelled"].any())
    native = info.compute in {"native", "mixed"} or (info.compute is None and not emulated)
    if emulated:
        modelled += [
            "Compute time of emulated nodes: every call really ran and was then held for the time that the "
            "compute profile gives for the emulated model.",
            "Compute energy of emulated nodes: the profile's power times busy time.",
            "Required TFLOPs of emulated nodes: those of the emulated model.",
        ]
    if native:
        measured.append("Compute time of native nodes, on this machine's clock.")
        if info.meters:
            measured.append(
                "Compute energy of native nodes, all that their meters count while they compute, divided by busy time "
                f"among nodes with the same meter ({', '.join(sorted(set(info.meters.values())))})."
            )
        if unknown := sorted(n for n, p in info.profiles.items() if p == "native" and n not in info.meters):
            measured.append(f"No energy where nothing meters it: {', '.join(unknown)}.")
    if requests["energy_radio_j"].sum():
        modelled.append("Radio energy: transmission power times transfer time.")
    modelled.append("Predicted values: the planner's models of quality, latency and energy.")
    measured += [
        "Content quality, scored on the pictures that the devices decoded.",
        "Planning and waiting, on this machine's clock.",
    ]
    if info.link in {None, "unshaped"}:
        measured.append(
            "Transfers, over unshaped links: they ran at this machine's speed and stand for no wireless cell."
        )
    else:
        measured.append(f"Transfers, over links shaped by {info.link}.")
    if info.slowdown != 1:
        measured.append(
            f"The emulated world ran {info.slowdown:g} times slower, and durations are divided by that; planning, "
            "this machine's own work, was not slowed down and counts in full."
        )
    return modelled, measured


def results_of(summary: pl.DataFrame) -> list[Line]:
    columns = [_means(summary, m, best(summary, m)) for m in compared(summary)]
    return [
        Line(
            framework=row["framework"],
            served=f"{row['answered']}/{row['asked']}" if row["asked"] else "not run",
            complete=row["asked"] == row["answered"],
            cells=list(cells),
        )
        for row, cells in zip(summary.iter_rows(named=True), zip(*columns, strict=True), strict=True)
    ]


def _means(summary: pl.DataFrame, measure: Measure, strong: Sequence[bool]) -> list[Cell]:
    means = summary[measure.column].to_list()
    halves, spreads = summary[f"{measure.column}_ci95"].to_list(), summary[f"{measure.column}_std"].to_list()
    places = decimals(means)
    return [
        Cell(
            _number(mean, places),
            f"± {half:.{places}f}" if half is not None else "",
            wins,
            f"sd {spread:.{places}f}" if spread is not None else "",
        )
        for mean, half, spread, wins in zip(means, halves, spreads, strong, strict=True)
    ]


def differences_of(requests: pl.DataFrame, against: str) -> list[Line]:
    table = paired(requests, against)
    columns = []
    for measure in MEASURES:
        means, halves = table[measure.column].to_list(), table[f"{measure.column}_ci95"].to_list()
        places = min(decimals(means) + 1, 3)
        columns.append(
            [
                Cell(
                    _number(mean, places, sign=True),
                    f"± {half:.{places}f}" if half is not None else "",
                    mean is not None and half is not None and abs(mean) > half,
                )
                for mean, half in zip(means, halves, strict=True)
            ]
        )
    return [
        Line(row["framework"], str(row["users"]), complete=True, cells=list(cells))
        for row, cells in zip(table.iter_rows(named=True), zip(*columns, strict=True), strict=True)
    ]


def _number(value: float | None, places: int, *, sign: bool = False) -> str:
    """A typeset number, with a true minus sign."""
    if value is None:
        return "-"
    return f"{value:{'+' if sign else ''}.{places}f}".replace("-", "\N{MINUS SIGN}")


def _parts_table(parts: pl.DataFrame, columns: dict[str, tuple[str, str]]) -> tuple[list[str], list[Line]]:
    """The numbers behind a stacked figure: the parts that are not all zero, and a row per framework."""
    used = [c for c in columns if parts[c].sum()]
    places = decimals([v for c in used for v in parts[c]])
    lines = [
        Line(row["framework"], "", complete=True, cells=[Cell(_number(row[c], places)) for c in used])
        for row in parts.iter_rows(named=True)
    ]
    return [columns[c][0] for c in used], lines


def _deviations(requests: pl.DataFrame) -> list[Line]:
    """Per framework the typical error of its predictions, in per cent."""
    return [
        Line(
            row["framework"],
            "",
            complete=True,
            cells=[Cell("-" if row[m.column] is None else _number(100 * row[m.column], 1)) for m in PREDICTED],
        )
        for row in prediction_errors(requests).iter_rows(named=True)
    ]


def _groups(requests: pl.DataFrame) -> list[Group]:
    """The clusters of one framework, and its requests that share nothing."""
    groups = []
    for (cluster,), members in requests.sort("cluster", nulls_last=True, maintain_order=True).group_by(
        "cluster", maintain_order=True
    ):
        first = members.row(0, named=True)
        groups.append(
            Group(
                title="no cluster" if cluster is None else f"cluster {cluster + 1}",
                public_prompt=first["public_prompt"] or "",
                source=first["public_source"] or "",
                members=[_member(row) for row in members.iter_rows(named=True)],
            )
        )
    return groups


def _member(row: dict[str, Any]) -> Member:
    split = [row["shared_steps"], row["edge_steps"], row["device_steps"]]
    return Member(
        prompt=row["prompt"],
        similarity=_number(row["similarity"], 2),
        split=" / ".join("-" if steps is None else str(steps) for steps in split),
    )


def _grid(folder: Path, requests: pl.DataFrame, frameworks: Sequence[str]) -> list[tuple[str, str, list[Tile]]]:
    """Users down, frameworks across: the user's device, the personal prompt, a tile for each framework."""
    rows = []
    places = decimals(requests["quality"].to_list())
    for (device, prompt, _), own in requests.group_by("device", "prompt", "seed", maintain_order=True):
        by_framework = {row["framework"]: row for row in own.iter_rows(named=True)}
        scores = {row["quality"] for row in by_framework.values() if row["quality"] is not None}
        top = max(scores) if len(scores) > 1 else None
        tiles = [_tile(folder, by_framework.get(name), places, top) for name in frameworks]
        rows.append((str(device), str(prompt), tiles))
    return rows


def _tile(folder: Path, row: dict[str, Any] | None, places: int, top: float | None) -> Tile:
    if row is None:
        return Tile("", "", "", "not asked", strong=False)
    quality = _number(row["quality"], places) if row["quality"] is not None else ""
    if row["image"] is None:
        said = f"{row['outcome']}: {row['reason']}" if row["reason"] else row["outcome"]
        return Tile("", "", quality, "no picture kept" if row["outcome"] != "failed" else said, strong=False)
    source = _data_uri(folder, row["image"])
    strong = top is not None and row["quality"] == top
    return Tile(source, f"{row['framework']}: {row['prompt']}", quality, "" if source else "unreadable", strong)


def _data_uri(folder: Path, image: str) -> str:
    """A picture of the run as data URI; empty if there is none to be read."""
    picture = read_picture(folder, image)
    if picture is None:
        return ""
    buffer = io.BytesIO()
    if max(picture.size) <= _SMALL:
        picture.save(buffer, "PNG", optimize=True)
        return _uri("png", buffer.getvalue())
    picture.save(buffer, "WEBP", quality=85)
    return _uri("webp", buffer.getvalue())


_SMALL = 128  # pixels: pictures up to this size lose nothing in the report


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _same_noise(requests: pl.DataFrame) -> bool:
    return bool((requests.group_by("device").agg(pl.col("seed").n_unique())["seed"] == 1).all())


class NodeTotals(msgspec.Struct, frozen=True):
    """What a node spent on a framework over all repetitions."""

    framework: str
    node: str
    calls: int
    rows_per_call: str
    tflop: str
    busy: str
    energy: str
    overruns: int
    memory: str


def _nodes(nodes: pl.DataFrame) -> list[NodeTotals]:
    totals = nodes.group_by("framework", "node", maintain_order=True).agg(
        pl.col("denoiser_calls", "rows", "tflop", "busy_s", "energy_j", "overruns").sum(),
        pl.col("memory_mib").max(),
    )
    return [
        NodeTotals(
            framework=row["framework"],
            node=row["node"],
            calls=row["denoiser_calls"],
            rows_per_call=f"{row['rows'] / row['denoiser_calls']:.1f}" if row["denoiser_calls"] else "-",
            tflop=_number(row["tflop"], decimals(totals["tflop"].to_list())),
            busy=_number(row["busy_s"], decimals(totals["busy_s"].to_list())),
            energy=_number(row["energy_j"], decimals(totals["energy_j"].to_list())),
            overruns=row["overruns"],
            memory=_number(row["memory_mib"], 1),
        )
        for row in totals.iter_rows(named=True)
    ]
