"""The page that compares runs: what it puts side by side, what it takes for the same request, and what differs."""

import re
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.comparison import write_comparison
from experiments.figures import _whisker
from experiments.record import RunFolder
from experiments.summary import LATENCY, QUALITY, UTILITY
from semct.runs import NotARun
from tests.experiments.test_report import read, request

SCENARIO = "name: {name}\nseed: 7\nedge: {{compute: {edge}, rows: 8}}\ndevices:\n- {{count: 3}}\n- {{count: {more}}}\n"


def run(root: Path, name: str, *, edge: str = "a100", more: int = 1, slower: float = 0.0, seeds: int = 0) -> Path:
    with RunFolder.create(root, name) as folder:
        folder.update(frameworks=("semct", "device-only"), compute="emulated", link="unshaped", seed=7)
        (folder.path / "scenario.yaml").write_text(SCENARIO.format(name=name, edge=edge, more=more))
        for framework in ("semct", "device-only"):
            for user in range(3):
                row = request(framework, user, seed=user + seeds)
                late = slower if framework == "semct" else 0.0
                folder.add(msgspec.structs.replace(row, latency_s=(row.latency_s or 0.0) + late * (1 + user / 100)))
    return folder.path


def test_frameworks_of_all_runs_stand_side_by_side_with_paired_differences(tmp_path: Path) -> None:
    first, second = run(tmp_path, "near"), run(tmp_path, "far", edge="h100", more=2, slower=1.5)
    page = read(write_comparison([first, second], tmp_path / "both").parent)
    for words in ("A: near", "B: far", "semct (A)", "semct (B)", "semct (B \N{MINUS SIGN} A)", first.name, second.name):
        assert words in page.text, words
    assert re.search(r"semct \(B . A\)\s*3\s*\+0\.0\s*± 0\.0\s*\+1\.515\s*± 0\.037", page.text), page.text
    assert re.search(r"edge\.compute\s*a100\s*h100", page.text)
    assert re.search(r"devices\[1\]\.count\s*1\s*2", page.text)
    assert "edge.rows" not in page.text
    assert {p.suffix for p in (tmp_path / "both" / "figures").iterdir()} == {".svg", ".pdf"}
    assert not any(source.startswith("http") for source in page.attributes("img", "src"))


def test_requests_from_another_noise_are_not_paired(tmp_path: Path) -> None:
    page = read(write_comparison([run(tmp_path, "a"), run(tmp_path, "b", seeds=100)], tmp_path / "both").parent)
    assert "Without such requests in A: semct (B), device-only (B)." in page.text
    assert "\N{MINUS SIGN} A)" not in page.text


def test_the_command_takes_one_run_or_several(tmp_path: Path) -> None:
    folders = [str(run(tmp_path, name)) for name in ("a", "b")]
    result = CliRunner().invoke(app, ["report", *folders, "--to", str(tmp_path / "here")])
    assert result.exit_code == 0, result.output
    assert Path(result.output.strip()) == tmp_path / "here" / "report.html"
    result = CliRunner().invoke(app, ["report", folders[0]])
    assert result.output.strip().endswith(str(Path(folders[0]) / "report.html"))
    with pytest.raises(NotARun):
        write_comparison([Path(folders[0]), tmp_path], tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_whiskers_end_at_what_is_possible() -> None:
    assert _whisker(QUALITY, 0.95, 0.2) == pytest.approx((0.2, 0.05))
    assert _whisker(LATENCY, 2.0, 5.0) == (2.0, 5.0)
    assert _whisker(UTILITY, 0.1, 0.5) == (0.5, 0.5)
    assert _whisker(QUALITY, 0.5, None) == (0.0, 0.0)
