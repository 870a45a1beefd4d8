"""From a run to the figures of its report: what each shows, and the words that say so."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from experiments import figures
from experiments.figures import Panel, Span
from experiments.summary import PREDICTED, Measure, compared, decimals, summarise
from semct.prompts import EncoderNotFound, load_sentence_encoder
from semct.runs import Run

STAGES = {
    "upload_s": ("upload", "upload"),
    "collect_s": ("collect", "collect"),
    "plan_s": ("plan", "plan"),
    "queue_s": ("queue", "queue"),
    "cloud_denoise_s": ("cloud denoising", "cloud"),
    "edge_denoise_s": ("edge denoising", "edge"),
    "relay_s": ("between nodes", "relay"),
    "download_s": ("download", "download"),
    "device_denoise_s": ("device denoising", "device"),
    "decode_s": ("decode", "decode"),
    "other_s": ("other", "other"),
}
"""Where a request's time goes: the stages in their order, with label and colour name."""

SOURCES = {
    "energy_edge_j": ("edge", "edge"),
    "energy_cloud_j": ("cloud", "cloud"),
    "energy_radio_j": ("radio", "download"),
    "energy_device_j": ("device", "device"),
}
"""Where a request's energy goes."""

_WATERFALL = 12  # requests that one waterfall shows
_NODES = 14  # nodes that have a row of their own in the figure of energy
_PICTURED = 6  # users in the figure of pictures


@dataclass(frozen=True)
class Drawing:
    """A figure: its file's name, title, what it shows in words, and the drawing; whether the page has it, too."""

    name: str
    title: str
    alt: str
    figure: Figure
    shown: bool = True

    @cached_property
    def svg(self) -> bytes:
        """The figure as SVG."""
        return figures.saved(self.figure, "svg")

    @property
    def inline(self) -> Markup:
        """The figure for the page; its text was escaped when it was drawn."""
        return Markup(figures.themed(self.svg.decode(), self.name))  # noqa: S704


def drawings(run: Run) -> Iterator[Drawing]:
    """All figures that a run has something for."""
    summary = summarise(run.requests, frameworks=run.info.frameworks)
    if not summary["answered"].sum():
        return
    order = summary["framework"].to_list()
    yield from comparisons(summary, figures.looks(summary))
    yield from _parts(run.requests)
    yield from _waterfalls(run, order)
    yield from _energy_by_node(run.nodes)
    yield from _planes(run.requests, order)
    yield from _links(run.links)
    known = [m for m in PREDICTED if run.requests.drop_nulls([m.column, f"predicted_{m.column}"]).height]
    if known:
        yield Drawing(
            "predictions",
            "Each request, predicted and measured",
            "A point per request; on the dashed line prediction and measurement agree.",
            figures.predictions(run.requests, known, order),
        )
    yield from _pictures(run, order)


def comparisons(summary: pl.DataFrame, drawn_as: Sequence[figures.Look]) -> Iterator[Drawing]:
    """What compares the rows of a summary: bars of each measure, and quality against latency."""
    for measure in compared(summary):
        alt = f"Bars of mean {measure.label} per framework: {_spoken(summary, measure)}"
        title = measure.title[0].upper() + measure.title[1:]
        yield Drawing(measure.column, title, alt, figures.bars(summary, measure, drawn_as))
    if summary.drop_nulls(["quality", "latency_s"]).height:
        yield Drawing(
            "tradeoff",
            "Content quality against service latency",
            "A point per framework, whiskers are 95 % confidence intervals; better is up and to the left. The dashed "
            "line joins the frameworks that no other beats in both. The numbers stand in the table of results.",
            figures.tradeoff(summary, drawn_as),
        )


def stages(requests: pl.DataFrame) -> pl.DataFrame:
    """Mean seconds of each stage over requests that have a picture; ``other_s`` is what no stage claims."""
    named = [c for c in STAGES if c != "other_s"]
    return (
        requests.filter(pl.col("outcome") != "failed")
        .with_columns(other_s=(pl.col("latency_s") - pl.sum_horizontal(named)).clip(lower_bound=0))
        .group_by("framework", maintain_order=True)
        .agg(pl.col([*named, "other_s"]).mean())
    )


def sources(requests: pl.DataFrame) -> pl.DataFrame:
    """Mean joules of each part over requests that have a picture."""
    return (
        requests.filter(pl.col("outcome") != "failed")
        .group_by("framework", maintain_order=True)
        .agg(pl.col(list(SOURCES)).mean())
    )


def _spoken(summary: pl.DataFrame, measure: Measure) -> str:
    places = decimals(summary[measure.column].to_list())
    pairs = summary.select("framework", measure.column).iter_rows()
    return ", ".join(f"{name} {'unknown' if mean is None else f'{mean:.{places}f}'}" for name, mean in pairs)


def _parts(requests: pl.DataFrame) -> Iterator[Drawing]:
    time, energy = ("where-time-went", "time", "mean seconds"), ("where-energy-went", "energy", "mean joules")
    for (name, what, unit), parts, columns in ((time, stages(requests), STAGES), (energy, sources(requests), SOURCES)):
        used = {c: v for c, v in columns.items() if parts[c].sum()}
        if used:
            alt = f"Stacked bars of {unit} per answered request; the numbers stand in the table beside them."
            title = f"Where a request's {what} went"
            yield Drawing(name, title, alt, figures.stacked(parts, used, unit=unit))


def _waterfalls(run: Run, order: Sequence[str]) -> Iterator[Drawing]:
    """For each framework, when the requests of its first round were where; of many, some from fast to slow."""
    roles = dict(run.nodes.select("node", "role").iter_rows())
    first = run.requests.filter(pl.col("repetition") == pl.col("repetition").min())
    for framework in order:
        own = first.filter((pl.col("framework") == framework) & pl.col("latency_s").is_not_null())
        rows = []
        for row in _some(own.sort("latency_s"), _WATERFALL).iter_rows(named=True):
            course = run.stages.filter((pl.col("request") == row["request"]) & (pl.col("round") == row["round"]))
            spans = _spans(course, device=row["device"], roles=roles, slowdown=run.info.slowdown)
            if spans:
                rows.append((str(row["device"]), spans))
        if rows:
            yield Drawing(
                f"waterfall-{_file(framework)}",
                framework,
                f"The course of {len(rows)} requests under {framework}, one bar each, from the user's wish to the "
                "picture; means of each stage stand in the table of seconds.",
                figures.waterfall(rows, STAGES),
            )


def _some(frame: pl.DataFrame, most: int) -> pl.DataFrame:
    """All rows, or so many that are evenly spaced among them."""
    if frame.height <= most:
        return frame
    wanted = np.linspace(0, frame.height - 1, most).round().astype(int)
    return frame.with_row_index("place").filter(pl.col("place").is_in(wanted.tolist())).drop("place")


def _spans(course: pl.DataFrame, *, device: str, roles: Mapping[str, str], slowdown: float) -> list[Span]:
    """A request's stages in seconds of the emulated world, planning in its own: as long together as its latency."""
    spans: list[Span] = []
    at = 0.0
    wall = None
    for row in course.sort("start", "stop", maintain_order=True).iter_rows(named=True):
        if wall is not None:
            at += max(row["start"] - wall, 0.0) / slowdown
        spans.append(Span(_part(row, device, roles), at, row["seconds"]))
        at += row["seconds"]
        wall = row["stop"]
    return spans


def _part(stage: dict[str, str], device: str, roles: Mapping[str, str]) -> str:
    """The column of a request's row that a stage counts for."""
    if stage["name"] == "transfer":
        return "upload_s" if stage["node"] == device else "download_s" if stage["to"] == device else "relay_s"
    if stage["name"] == "denoise":
        return f"{roles.get(stage['node'], 'device')}_denoise_s"
    return f"{stage['name']}_s"


def _energy_by_node(nodes: pl.DataFrame) -> Iterator[Drawing]:
    """What every node spent on a round; of many devices, the mean."""
    if not nodes["energy_j"].sum():
        return
    many = nodes["node"].n_unique() > _NODES
    name = pl.when((pl.col("role") == "device") & many).then(pl.lit("mean device")).otherwise(pl.col("node"))
    table = (
        nodes.with_columns(name=name)
        .group_by("framework", "name", maintain_order=True)
        .agg(value=pl.col("energy_j").mean())
    )
    yield Drawing(
        "energy-by-node",
        "Energy by node",
        "A row per node, a marker per framework: joules of compute in a round. The numbers stand in the table of "
        "nodes.",
        figures.dots(table, list(dict.fromkeys(table["name"])), label="joules of compute in a round"),
    )


def _planes(requests: pl.DataFrame, order: Sequence[str]) -> Iterator[Drawing]:
    """Where clusters and their public prompts lie, by the meaning of the prompts."""
    first = requests.filter(pl.col("repetition") == pl.col("repetition").min())
    sizes = first.drop_nulls("cluster").group_by("framework", "cluster").len()
    together = set(sizes.filter(pl.col("len") > 1)["framework"])  # clusters of one are no clusters
    clustered = [f for f in order if f in together]
    prompts = first["prompt"].unique(maintain_order=True).to_list()
    if not clustered or len(prompts) < 3:
        return
    try:
        encoder = load_sentence_encoder()
    except EncoderNotFound:
        return
    vectors = dict(zip(prompts, encoder.embed(prompts).astype(np.float64), strict=True))
    centre = np.mean(list(vectors.values()), axis=0)
    _, spread, axes = np.linalg.svd(np.stack(list(vectors.values())) - centre, full_matrices=False)
    part = spread**2 / max(float((spread**2).sum()), 1e-12)

    def place(found: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((found - centre) @ axes[:2].T, dtype=np.float64)

    panels = []
    for framework in clustered:
        own = first.filter(pl.col("framework") == framework)
        public: dict[int, NDArray[np.float64]] = {}
        for row in own.drop_nulls(["cluster", "public_prompt"]).iter_rows(named=True):
            if row["cluster"] in public:
                continue
            if row["public_prompt"].startswith(_MEAN):  # of the members' conditionings: no words of its own
                members = own.filter(pl.col("cluster") == row["cluster"])["prompt"]
                public[row["cluster"]] = np.mean([vectors[p] for p in members], axis=0)
            else:
                public[row["cluster"]] = encoder.embed([row["public_prompt"]])[0].astype(np.float64)
        panels.append(
            Panel(
                title=framework,
                points=place(np.stack([vectors[p] for p in own["prompt"]])),
                clusters=own["cluster"].to_list(),
                public=place(np.stack(list(public.values()))) if public else np.empty((0, 2)),
                of=list(public),
            )
        )
    yield Drawing(
        "clusters",
        "Clusters in the plane of the prompts' meaning",
        "Principal components of the prompts' sentence embeddings, a panel per framework: personal prompts in the "
        "colour and marker of their cluster, public prompts as stars with the cluster's number.",
        figures.plane(panels, (float(part[0]), float(part[1]))),
    )


_MEAN = "mean of: "


def _links(links: pl.DataFrame) -> Iterator[Drawing]:
    pieces = [
        links.select(
            pl.lit(way).alias("way"),
            pl.lit(what).alias("what"),
            pl.col(f"requested_{way}_{what}").alias("asked"),
            pl.col(f"measured_{way}_{what}").alias("measured"),
        ).drop_nulls()
        for way in ("up", "down")
        for what in ("rate_bps", "delay_s")
    ]
    table = pl.concat(pieces)
    if table.height:
        yield Drawing(
            "links",
            "Links as asked and as measured",
            "A point per link, round and direction: the rate of large transfers and the time of small ones, as asked "
            "and as measured; on the dashed line both agree. The numbers stand in the table of links.",
            figures.links(table),
        )


def _pictures(run: Run, order: Sequence[str]) -> Iterator[Drawing]:
    """The picture grid for a paper; the page has its own."""
    first = run.requests.filter(pl.col("repetition") == pl.col("repetition").min())
    frameworks = [f for f in order if f in set(first["framework"])]
    rows = []
    for (_, prompt), own in first.group_by("device", "prompt", maintain_order=True):
        by_framework = dict(own.select("framework", "image").iter_rows())
        tiles = [read_picture(run.path, by_framework.get(f)) for f in frameworks]
        if any(tile is not None for tile in tiles):
            rows.append((str(prompt), [None if tile is None else np.asarray(tile) for tile in tiles]))
    if rows:
        alt = "Pictures, users down and frameworks across; every picture of a user starts from the same noise."
        drawn = figures.pictures(rows[:_PICTURED], frameworks)
        yield Drawing("pictures", "Pictures", alt, drawn, shown=False)


_THUMBNAIL = 256  # pixels: larger pictures are scaled down to this


def read_picture(folder: Path, image: str | None) -> Image.Image | None:
    """A picture of the run, scaled down where it is large; none where there is none to be read."""
    if image is None:
        return None
    path = (folder / image).resolve()
    if not path.is_relative_to(folder.resolve()):  # a record may come from anywhere
        return None
    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"]) as picture:
            found = picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # all that Pillow raises on bad files
        return None
    found.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return found


def _file(name: str) -> str:
    """A name as part of a file's."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name)[:64]
