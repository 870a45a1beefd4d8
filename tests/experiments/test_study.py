"""Studies: points that move a case, claims judged by their confidence intervals, and files that are left."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.scenario import FOLDER, BadScenario
from experiments.study import (
    BASE,
    MEASURES,
    ORDER,
    Comparison,
    Curves,
    Grid,
    averages,
    curve_table,
    find_study,
    load_study,
    order_verdict,
    per_round,
    shipped_studies,
    verdicts,
)
from semct.quality import load_quality_model

CASE = """
scenario:
  name: tiny
  frameworks: [semct, semantic-free, clustering-free, edge-device, device-only]
  devices: [{count: 6}]
  prompts:
    list: [a cat in the snow, a dog in the snow, a fox in the snow, a bus at night, a car at night, a van at night]
  planning: {writer: medoid, clusters: 2, quality: sd3-medium}
links: {up: {rate: 20mbit}, down: {rate: 20mbit, delay: 5ms}}
axes:
  limit:
    title: limit of shared steps
    points:
      - {label: "4", set: {scenario.planning.most_shared: 4}}
      - {label: "13"}
  links:
    title: link
    points:
      - {label: none, set: {links: {}}}
      - {label: slow, set: {links.down: {rate: 1mbit}}}
"""

STUDY = """
kind: comparison
name: tiny
description: A tiny study.
case: case.yaml
seeds: 2
show: [quality, tflop]
axes: [limit, links]
paper: {tflop: {semct: 1000}, gain: {edge-device: 0.5}, note: more is less}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "case.yaml").write_text(CASE)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path


def grid(folder: Path, **changes: object) -> Grid:
    study = load_study(folder / "study.yaml")
    assert isinstance(study, Comparison)
    fields = {name: getattr(study, name) for name in study.__struct_fields__}
    return Grid(Comparison(**fields | changes), folder / "case.yaml")


def test_points_move_the_case_by_path(folder: Path) -> None:
    points = {(axis, label): case for axis, label, case in grid(folder).points()}
    assert list(points) == [(BASE, BASE), ("limit", "4"), ("limit", "13"), ("links", "none"), ("links", "slow")]
    assert points["limit", "4"].scenario.planning.most_shared == 4
    assert points["limit", "13"] == points[BASE, BASE]
    assert points["links", "none"].links.down is None
    slow = points["links", "slow"].links
    assert slow.down is not None
    assert (slow.down.rate, slow.up) == (1e6, points[BASE, BASE].links.up)
    assert {case.scenario.repetitions for case in points.values()} == {2}


def test_what_a_study_sets_holds_at_every_point(folder: Path) -> None:
    moved = grid(folder, set={"scenario.planning.clusters": 5})
    assert {case.scenario.planning.clusters for *_, case in moved.points()} == {5}


def test_wrong_axes_and_points_are_one_sentence(folder: Path) -> None:
    with pytest.raises(BadScenario, match=r"has no axis 'weather'; it has limit, links"):
        grid(folder, axes=("weather",))
    with pytest.raises(BadScenario, match=r"not right \(scenario.planning.clusters\)"):
        list(grid(folder, set={"scenario.planning.clusters": 0}).points())
    with pytest.raises(BadScenario, match="no study 'paper-table9'"):
        find_study("paper-table9")


@pytest.mark.parametrize("name", shipped_studies())
def test_every_point_of_the_shipped_studies_is_a_case(name: str) -> None:
    path = find_study(name)
    study = load_study(path)
    assert study.name == name
    if isinstance(study, Comparison):
        moved = Grid(study, path.parent / study.case)
        points = list(moved.points())
        assert len(points) == 1 + sum(len(moved.base.axes[axis].points) for axis in study.axes)
        assert all(len(moved.prompts(case)) >= 1 for *_, case in points)
        assert all(sum(g.count for g in case.scenario.devices) == 50 for *_, case in points)


def test_the_studies_of_the_paper_are_there() -> None:
    assert shipped_studies() == ["paper-fig3", "paper-fig4", "paper-fig5", "paper-table1"]
    assert (FOLDER / "studies" / "paper-case.yaml").is_file()


def rounds(utility: dict[str, list[float]], tflop: dict[str, list[float]]) -> pl.DataFrame:
    rows = [
        dict.fromkeys(MEASURES, 1.0)
        | {"axis": "a", "point": "p", "framework": f, "repetition": r, "clusters": 3, "implied": None}
        | {"utility": value, "tflop": tflop[f][r]}
        for f, values in utility.items()
        for r, value in enumerate(values)
    ]
    return pl.DataFrame(rows, schema_overrides={"implied": pl.Float64})


def test_an_order_holds_fails_or_is_open() -> None:
    def judged(*means: float, spread: float = 0.001) -> dict[str, str | None]:
        noise = np.linspace(-spread, spread, 5)
        utility = {f: [m + n for n in noise[::-1] * i] for i, (f, m) in enumerate(zip(ORDER, means, strict=True))}
        tflop = {f: [-m + n for n in noise * i] for i, (f, m) in enumerate(zip(ORDER, means, strict=True))}
        claims = verdicts(rounds(utility, tflop))
        return {m: order_verdict(claims, "a", "p", m) for m in ("utility", "tflop")}

    assert judged(0.6, 0.5, 0.4, 0.3) == {"utility": "holds", "tflop": "holds"}
    assert judged(0.6, 0.3, 0.4, 0.3) == {"utility": "fails", "tflop": "fails"}
    assert judged(0.6, 0.5, 0.5, 0.3, spread=0.1) == {"utility": "open", "tflop": "open"}
    assert order_verdict(verdicts(rounds({"semct": [1.0]}, {"semct": [1.0]})), "a", "p", "utility") is None


def test_gains_and_intervals_are_over_repetitions() -> None:
    table = averages(
        rounds({"semct": [0.6, 0.66], "edge-device": [0.5, 0.5]}, {"semct": [10.0, 14.0], "edge-device": [20.0, 20.0]})
    )
    semct, other = table.iter_rows(named=True)
    assert other["gain"] == pytest.approx(0.26)
    assert other["gain_ci95"] == pytest.approx(12.706 * np.std([0.2, 0.32], ddof=1) / np.sqrt(2), rel=1e-4)
    assert semct["tflop"] == 12
    assert semct["gain"] == 0
    assert semct["gain_above"] is None
    assert other["tflop_ci95"] == 0


def test_gains_above_device_only_do_not_depend_on_the_zero() -> None:
    flat = {"semct": [1.0], "edge-device": [1.0], "device-only": [1.0]}
    for zero in (0.0, 0.3):
        utility = {"semct": [zero + 0.3], "edge-device": [zero + 0.2], "device-only": [zero]}
        semct, other, alone = averages(rounds(utility, flat)).iter_rows(named=True)
        assert other["gain_above"] == pytest.approx(0.5)
        assert semct["gain_above"] == pytest.approx(0)
        assert alone["gain_above"] is None


def test_the_implied_quality_is_that_of_equal_sharing() -> None:
    model = load_quality_model("sd3-medium")
    phi = [0.2, 0.4, 0.6, 0.8]
    requests = pl.DataFrame(
        {
            "framework": "semct",
            "repetition": 0,
            "similarity": phi,
            "cluster": [0, 0, 1, 1],
            "steps": 28,
            **dict.fromkeys([m for m in MEASURES if m != "similarity"], 1.0),
        }
    )
    found = per_round(requests, model, tflop=92 * 12.0, step_tflop=12.0)
    # 4 x 28 - 92 = 20 steps are saved by 4 - 2 users: 10 shared each.
    assert found["implied"][0] == pytest.approx(model.quality(phi, 10.0).mean())
    alone = requests.with_columns(cluster=None, similarity=pl.lit(None, pl.Float64))
    assert per_round(alone, model)["implied"].to_list() == [None]


def test_curves_fall_with_shared_steps_and_rise_with_similarity() -> None:
    study = load_study(find_study("paper-fig3"))
    assert isinstance(study, Curves)
    table = curve_table(study)
    for (_, _), curve in table.group_by("model", "similarity"):
        assert curve.sort("shared")["quality"].diff().drop_nulls().max() <= 0
    for (_, _), across in table.filter(pl.col("shared") >= 8).group_by("model", "shared"):
        values = across.sort("similarity")["quality"].to_list()
        assert all(a <= b + 1e-9 for a, b in pairwise(values))


def test_the_command_leaves_tables_and_figures(folder: Path) -> None:
    done = CliRunner().invoke(app, ["study", str(folder / "study.yaml"), "--runs", str(folder)])
    assert done.exit_code == 0, done.output
    assert "[1000]" in done.output
    assert "more is less" in done.output
    (left,) = folder.glob("*-tiny-*")
    assert {p.name for p in left.iterdir()} == {
        *(f"{t}.csv" for t in ("frameworks", "claims", "rounds", "requests")),
        *(f"{f}.{kind}" for f in ("base", "axes") for kind in ("svg", "png")),
        "study.json",
    }
    table = pl.read_csv(left / "frameworks.csv")
    assert table.filter(axis="limit", point="4", framework="edge-device")["tflop"].item() == 6 * 28 * 12
    assert table.filter(axis="base", framework="device-only")["tflop"].item() == 6 * 28 * 12
    assert (left / "base.svg").read_text().startswith("<?xml")


def test_a_study_of_curves_leaves_them(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["study", "paper-fig3", "--runs", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (left,) = tmp_path.iterdir()
    assert {p.name for p in left.iterdir()} == {"curves.csv", "curves.svg", "curves.png", "study.json"}
