"""The notebook that shows how to read a run works on one, and is stored without what it printed."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.test_report import recorded

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "reading-a-run.ipynb"


def test_the_notebook_reads_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recorded(tmp_path / "runs")
    (tmp_path / "docs" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "docs" / "notebooks")
    cells = [c for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells:
        assert cell["outputs"] == []
        exec("".join(cell["source"]), names)  # noqa: S102  the repository's own notebook
    said = capsys.readouterr().out
    assert folder.name in said
    assert names["means"]["requests"].to_list() == [3] * len(names["run"].info.frameworks)
    assert names["paired"].height == 3
    assert "denoise" in said
    assert names["off"].columns == ["framework", "latency off by (s)", "energy off by (J)"]
