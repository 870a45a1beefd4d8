"""Studies: a simulated case, moved along the parameters that are open, beside the numbers that a paper prints.

A study file names a case file, which holds a scenario, its links, and axes: parameters and the values to try. The
case itself and every point of every chosen axis is simulated with the same seeds. From that come tables of what the
frameworks get, of how far the paper's claims hold at each point, and figures.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import polars as pl
import yaml
from msgspec import Meta
from numpy.typing import NDArray
from scipy.special import expit, stdtrit

from experiments.record import new_folder, provenance
from experiments.scenario import FOLDER, BadScenario, Count, Part, Scenario, load_part, load_prompts
from experiments.simulation import Simulator
from netem.course import Setting
from netem.link import BadLink, decode_quantity
from semct.quality import QualityModel, load_quality_model

BASE = "base"
"""The name of the axis whose only point is the case as it stands."""

MEASURES = ("quality", "latency_s", "energy_j", "tflop", "utility", "shared_steps", "similarity")
"""What is kept of each framework and seed: means over users, but ``tflop`` their sum."""

Verdict = Literal["holds", "fails", "open"]
"""Whether a claim holds or its contrary does, at 95 % confidence over the seeds; ``open`` is neither."""


class Point(Part, frozen=True, kw_only=True):
    """A value on an axis: what it sets in the case, by dotted path; nothing where it is the case's own."""

    label: str
    set: dict[str, Any] = msgspec.field(default_factory=dict)


class Axis(Part, frozen=True, kw_only=True):
    """A parameter that the paper leaves open, and the values to try."""

    title: str
    points: Annotated[tuple[Point, ...], Meta(min_length=1)]


class Case(Part, frozen=True, kw_only=True):
    """A case file: a scenario, the links of its devices, and the axes along which it can be moved."""

    scenario: Scenario
    links: Setting = Setting()
    axes: dict[str, Axis] = msgspec.field(default_factory=dict)


class PublishedCurve(
    Part, frozen=True, kw_only=True, rename={"fall": "L", "steepness": "K", "middle": "B", "floor": "D"}
):
    """The paper's sigmoid L / (1 + exp(K (k - B))) + D of k shared steps at one similarity."""

    similarity: float
    fall: float
    steepness: float
    middle: float
    floor: float

    def quality(self, shared: NDArray[np.float64]) -> NDArray[np.float64]:
        """The score after ``shared`` steps."""
        lost = expit(self.steepness * (shared - self.middle))
        return np.asarray(self.fall * (1 - lost) + self.floor, dtype=np.float64)


class Paper(Part, frozen=True, kw_only=True):
    """What the paper prints: TFLOPs by framework, SemCT's gain of utility over the others, or a finding in words."""

    tflop: dict[str, float] = msgspec.field(default_factory=dict)
    gain: dict[str, float] = msgspec.field(default_factory=dict)
    curves: tuple[PublishedCurve, ...] = ()
    note: str = ""


class Budget(Part, frozen=True, kw_only=True):
    """A question: what quality SemCT keeps within ``tflop``, if the best point of ``axis`` may be taken for each seed.

    It is asked once for each of ``points``.
    """

    tflop: float
    axis: str
    points: Annotated[tuple[Point, ...], Meta(min_length=1)]


class Comparison(Part, frozen=True, kw_only=True, tag_field="kind", tag="comparison"):
    """A study of frameworks on a case. ``set`` changes the case; ``show`` are the measures of its figures, the last
    that of its tables."""

    name: str
    description: str
    case: str
    set: dict[str, Any] = msgspec.field(default_factory=dict)
    seeds: Count = 20
    show: tuple[Literal["quality", "latency_s", "energy_j", "tflop", "utility"], ...] = ("utility",)
    axes: tuple[str, ...] = ()
    budget: Budget | None = None
    paper: Paper = Paper()


class Curves(Part, frozen=True, kw_only=True, tag_field="kind", tag="curves"):
    """A study of quality curves: content quality against shared steps at some similarities."""

    name: str
    description: str
    models: tuple[str, ...]
    similarities: tuple[float, ...]
    paper: Paper = Paper()


Study = Comparison | Curves


def load_study(path: Path) -> Study:
    """The study in a YAML file; raises ``BadScenario``."""
    study: Study = load_part(path, Study, "study")
    return study


def find_study(name: str) -> Path:
    """The file of a study that comes with the package, or the path itself; raises ``BadScenario``."""
    shipped = FOLDER / "studies" / f"{name}.yaml"
    if shipped.is_file() or Path(name).is_file():
        return shipped if shipped.is_file() else Path(name)
    raise BadScenario(f"there is no study {name!r}: it is no file and none of {', '.join(shipped_studies())}")


def shipped_studies() -> list[str]:
    """The names of the studies that come with the package."""
    files = sorted((FOLDER / "studies").glob("*.yaml"))
    return [path.stem for path in files if "kind" in yaml.safe_load(path.read_text(encoding="utf-8"))]


class Grid:
    """The points of a comparison: the case as it stands, and moved along each of the study's axes."""

    def __init__(self, study: Comparison, case: Path) -> None:
        self._study = study
        self._path = case
        self._case: Case = load_part(case, Case, "case")
        self._raw: dict[str, Any] = yaml.safe_load(case.read_text(encoding="utf-8"))
        wanted = [*study.axes, *([study.budget.axis] if study.budget else [])]
        unknown = [axis for axis in wanted if axis not in self._case.axes]
        if unknown:
            raise BadScenario(f"case {case} has no axis {unknown[0]!r}; it has {', '.join(self._case.axes)}")

    @property
    def titles(self) -> dict[str, str]:
        """The titles of the study's axes."""
        return {name: self._case.axes[name].title for name in self._study.axes}

    @property
    def base(self) -> Case:
        """The case as the study has it."""
        return self._moved({})

    def points(self) -> Iterator[tuple[str, str, Case]]:
        """Each point's axis, label and case; the first is the base."""
        yield BASE, BASE, self.base
        for axis in self._study.axes:
            for point in self._case.axes[axis].points:
                yield axis, point.label, self._moved(point.set)

    def within(self, budget: Budget) -> Iterator[tuple[str, str, Case]]:
        """Each point of a budget, with each of its axis, and SemCT alone: the two labels and the case."""
        for point in budget.points:
            for along in self._case.axes[budget.axis].points:
                yield (
                    point.label,
                    along.label,
                    self._moved({"scenario.frameworks": ["semct"], **point.set, **along.set}),
                )

    def prompts(self, case: Case) -> tuple[str, ...]:
        """The personal prompts of a point."""
        return load_prompts(case.scenario, self._path.parent)

    def _moved(self, changes: Mapping[str, Any]) -> Case:
        raw = copy.deepcopy(self._raw)
        moves = self._study.set | dict(changes)
        for path, value in moves.items():
            *above, last = path.split(".")
            place = raw
            for key in above:
                if not isinstance(place.get(key), dict):
                    place[key] = {}
                place = place[key]
            place[last] = value
        try:
            case: Case = msgspec.convert(raw, Case, dec_hook=decode_quantity)
        except (msgspec.ValidationError, BadLink) as error:
            raise BadScenario(f"a point of case {self._path} is not right ({', '.join(moves)}): {error}") from error
        scenario = msgspec.structs.replace(case.scenario, repetitions=self._study.seeds)
        return msgspec.structs.replace(case, scenario=scenario)


def run_comparison(
    grid: Grid, simulator: Simulator, watch: Callable[[str], None] = lambda _: None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Simulate all points.

    Returns:
        The rounds, one row for each axis, point, framework and repetition, with ``MEASURES`` and ``implied``; and the
        requests of the base.
    """
    rounds = []
    requests = pl.DataFrame()
    for axis, label, case in grid.points():
        watch(f"{axis}: {label}" if axis != BASE else "the case as it stands")
        found = requests if axis != BASE and case == grid.base else _simulated(grid, simulator, case)
        if axis == BASE:
            requests = found
        model = load_quality_model(case.scenario.planning.quality)
        rounds.append(
            per_round(found, model)
            .with_columns(axis=pl.lit(axis), point=pl.lit(label))
            .select("axis", "point", pl.all().exclude("axis", "point"))
        )
    return pl.concat(rounds), requests


def run_budget(
    grid: Grid, simulator: Simulator, budget: Budget, watch: Callable[[str], None] = lambda _: None
) -> pl.DataFrame:
    """For each point of a budget and seed, the plan of highest quality within it.

    Returns:
        Rows of ``per_round`` with ``point`` and ``along``, the point of the budget's axis that was best. A seed without
        any plan within the budget has no row.
    """
    found = []
    for point, along, case in grid.within(budget):
        watch(f"within {budget.tflop:.0f} TFLOP: {point}, {along}")
        model = load_quality_model(case.scenario.planning.quality)
        rounds = per_round(_simulated(grid, simulator, case), model, tflop=budget.tflop)
        found.append(rounds.with_columns(point=pl.lit(point), along=pl.lit(along)))
    within = pl.concat(found).filter(pl.col("tflop") <= budget.tflop + 1e-6)
    return within.sort("quality", descending=True).unique(("point", "repetition"), keep="first", maintain_order=True)


def budget_averages(best: pl.DataFrame, points: Sequence[str]) -> pl.DataFrame:
    """Per point of a budget: ``seeds`` with a plan, means of ``tflop``, ``shared_steps``, ``quality``, ``implied``.

    ``margin`` is the mean of quality less the implied one, with ``margin_ci95``, and ``met`` the seeds where it is at
    least 0.
    """
    found = []
    for point in points:
        own = best.filter(point=point)
        margins = (own["quality"] - own["implied"]).to_numpy()
        row: dict[str, Any] = {"point": point, "seeds": own.height, "met": int((margins >= 0).sum())}
        row |= {m: own[m].mean() for m in ("tflop", "shared_steps", "quality", "implied")}
        row["margin"], row["margin_ci95"] = _mean_and_half(margins)
        found.append(row)
    return pl.DataFrame(found)


def _simulated(grid: Grid, simulator: Simulator, case: Case) -> pl.DataFrame:
    links = simulator.links(case.links, case.scenario)
    # By the closed forms alone: thousands of plans would take long to play through.
    return simulator.play(case.scenario, grid.prompts(case), links=links, played=0).requests


def per_round(
    requests: pl.DataFrame, model: QualityModel, *, tflop: float = 9792.0, step_tflop: float = 12.0
) -> pl.DataFrame:
    """One row per framework and repetition with ``MEASURES``, and ``implied``.

    ``implied`` is the mean quality that the framework's clusters and similarities would have if all shared alike, as
    many steps as bring the overhead to ``tflop``: with N users in K clusters, x = (N T - tflop / step_tflop) / (N - K).
    It is null for who has no clusters.
    """
    means = [pl.col(m).mean() for m in MEASURES if m != "tflop"]
    table = (
        requests.group_by("framework", "repetition", maintain_order=True)
        .agg(*means, pl.col("tflop").sum(), clusters=pl.col("cluster").n_unique())
        .select("framework", "repetition", *MEASURES, "clusters")
    )
    implied: list[float | None] = []
    for _, group in requests.group_by("framework", "repetition", maintain_order=True):
        phi = group["similarity"].to_numpy()
        users, clusters = len(phi), group["cluster"].n_unique()
        if group["similarity"].null_count() or clusters == users:
            implied.append(None)
            continue
        steps = float(group["steps"][0])
        shared = (users * steps - tflop / step_tflop) / (users - clusters)
        implied.append(float(model.quality(phi, shared * model.steps / steps).mean()))
    return table.with_columns(implied=pl.Series(implied, dtype=pl.Float64))


def averages(rounds: pl.DataFrame) -> pl.DataFrame:
    """Per axis, point and framework: each measure's mean over repetitions and ``_ci95``, and the gain of SemCT.

    ``gain`` is the mean over repetitions of SemCT's utility over the framework's, less 1; ``gain_above`` the same
    with the utility of device-only inference taken off both, which depends on no choice of zero.
    """
    columns = [*MEASURES, "implied"]
    keys = ["axis", "point", "repetition"]
    semct = rounds.filter(framework="semct").select(*keys, semct_utility="utility")
    alone = rounds.filter(framework="device-only").select(*keys, zero="utility")
    above = pl.col("semct_utility") - pl.col("zero"), pl.col("utility") - pl.col("zero")
    joined = (
        rounds.join(semct, on=keys, how="left")
        .join(alone, on=keys, how="left")
        .with_columns(
            gain=pl.col("semct_utility") / pl.col("utility") - 1,
            gain_above=pl.when(above[1] > 0).then(above[0] / above[1] - 1),
        )
    )
    found = []
    for (axis, point, framework), group in joined.group_by("axis", "point", "framework", maintain_order=True):
        row: dict[str, Any] = {"axis": axis, "point": point, "framework": framework}
        for column in (*columns, "gain", "gain_above"):
            row[column], row[f"{column}_ci95"] = _mean_and_half(group[column].drop_nulls().to_numpy())
        found.append(row)
    return pl.DataFrame(found)


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What a paper claims of two frameworks: that ``less`` is below ``more`` in a measure."""

    measure: str
    less: str
    more: str

    def __str__(self) -> str:
        return f"{self.measure}: {self.less} < {self.more}"


ORDER = ("semct", "semantic-free", "clustering-free", "edge-device")
"""The paper's order: overhead rises, utility falls."""

CLAIMS = (
    *(Claim(measure="tflop", less=a, more=b) for a, b in pairwise(ORDER)),
    *(Claim(measure="utility", less=b, more=a) for a, b in pairwise(ORDER)),
)


def verdicts(rounds: pl.DataFrame) -> pl.DataFrame:
    """Per axis, point and claim: the mean paired difference over repetitions, its ``ci95``, and the verdict.

    Points without both frameworks of a claim have no row for it.
    """
    found = []
    for (axis, point), group in rounds.group_by("axis", "point", maintain_order=True):
        values = {name: part.sort("repetition") for (name,), part in group.group_by("framework", maintain_order=True)}
        for claim in CLAIMS:
            if not {claim.less, claim.more} <= set(values):
                continue
            difference = (values[claim.more][claim.measure] - values[claim.less][claim.measure]).to_numpy()
            mean, half = _mean_and_half(difference)
            found.append(
                {
                    "axis": axis,
                    "point": point,
                    "measure": claim.measure,
                    "less": claim.less,
                    "more": claim.more,
                    "difference": mean,
                    "ci95": half,
                    "verdict": _verdict(mean, half),
                }
            )
    schema = ["axis", "point", "measure", "less", "more", "difference", "ci95", "verdict"]
    return pl.DataFrame(found) if found else pl.DataFrame(schema=schema)


def order_verdict(claims: pl.DataFrame, axis: str, point: str, measure: str) -> Verdict | None:
    """Whether the whole order holds at a point: every part of it must; it fails where any part does."""
    parts = claims.filter(axis=axis, point=point, measure=measure)["verdict"].to_list()
    if not parts:
        return None
    return "fails" if "fails" in parts else "holds" if set(parts) == {"holds"} else "open"


PUBLISHED = "published"
"""What stands for a model's name where a curve is the paper's."""


def curve_table(study: Curves) -> pl.DataFrame:
    """The curves of each model, and the paper's: ``model``, ``similarity``, ``shared`` steps, ``quality``."""
    found = []
    for name in study.models:
        model = load_quality_model(name)
        shared = np.arange(model.steps + 1.0)
        found += [_curve(name, phi, shared, model.quality(phi, shared)) for phi in study.similarities]
    shared = np.arange(28.0)
    found += [_curve(PUBLISHED, curve.similarity, shared, curve.quality(shared)) for curve in study.paper.curves]
    return pl.concat(found)


def _curve(model: str, similarity: float, shared: NDArray[np.float64], quality: NDArray[np.float64]) -> pl.DataFrame:
    return pl.DataFrame({"shared": shared.astype(int), "quality": quality}).select(
        pl.lit(model).alias("model"), pl.lit(similarity).alias("similarity"), "shared", "quality"
    )


def leave(root: Path, study: Study, tables: Mapping[str, pl.DataFrame], files: Mapping[str, bytes]) -> Path:
    """A folder of a study's results: tables as CSV, other files as they are, and where it all came from."""
    folder = new_folder(root, study.name, datetime.now(UTC))
    folder.mkdir(parents=True)
    for name, table in tables.items():
        table.with_columns(pl.col(pl.Float64).round_sig_figs(6)).write_csv(folder / f"{name}.csv")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    info = msgspec.json.encode({"study": study.name, "provenance": provenance()})
    (folder / "study.json").write_bytes(msgspec.json.format(info) + b"\n")
    return folder


def _verdict(mean: float | None, half: float | None) -> Verdict:
    if mean is None or half is None or abs(mean) <= half:
        return "open"
    return "holds" if mean > 0 else "fails"


def _mean_and_half(values: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """The mean and half the width of Student's 95 % confidence interval, as far as there are enough values."""
    n = len(values)
    if n == 0:
        return None, None
    half = float(stdtrit(n - 1, 0.975) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return float(values.mean()), half


def numbers(labels: Sequence[str]) -> list[float] | None:
    """The labels as numbers, where all of them are."""
    try:
        return [float(label) for label in labels]
    except ValueError:
        return None
