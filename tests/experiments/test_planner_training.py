"""``semct train-planner``: what it leaves, and that the checkpoint is one."""

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from experiments.cli import app
from experiments.planner_training import train
from semct.planner.learned import Policy
from semct.planner.learning import Settings
from semct.quality import QualityModelError


def test_training_leaves_a_checkpoint_with_its_learning_curve(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "policy"
    few = Settings(episodes=3, hidden=(16,), scenes=2, batches=4)
    missed = train(folder, few, qualities=["sd3-medium"], every=2, console=Console(file=io.StringIO()))
    policy = Policy.load(folder / "policy.safetensors")
    assert policy.header.gap == missed
    assert (policy.header.episodes, policy.header.hidden) == (3, (16,))
    rows = list(csv.DictReader((folder / "learning.csv").open()))
    assert [row["episode"] for row in rows] == ["2", "3"]
    assert float(rows[-1]["gap"]) == missed > 0
    assert "<svg" in (folder / "learning.svg").read_text()


def test_unknown_curves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QualityModelError, match="no quality model 'nothing'"):
        train(tmp_path, Settings(episodes=1), qualities=["nothing"], every=1, console=Console(file=io.StringIO()))
    result = CliRunner().invoke(app, ["train-planner", str(tmp_path), "--quality", "nothing"])
    assert result.exit_code == 1
    assert "no quality model 'nothing'" in result.output
