"""Checks the record that ``make demo`` leaves: ``python tests/demo/check_record.py RUN_FOLDER``."""

import sys
from pathlib import Path

from PIL import Image

from experiments.scenario import load_scenario
from semct.runs import load_run


def check(folder: Path) -> None:
    """Raise ``AssertionError`` where the record is not that of a whole quickstart."""
    run = load_run(folder)
    scenario = load_scenario(folder / "scenario.yaml")
    assert run.info.status == "finished", run.info
    assert run.requests.height == scenario.users * len(scenario.frameworks)
    assert set(run.requests["framework"]) == set(scenario.frameworks)
    assert set(run.requests["outcome"]) == {"answered"}
    for column in ("quality", "latency_s", "energy_j", "tflop", "utility", "predicted_utility"):
        assert run.requests[column].is_finite().all(), column
    for path in run.requests["image"]:
        assert Image.open(folder / path).size == (64, 64)
    assert max(run.info.device_memory_mib) <= 40
    steps = run.requests.select("shared_steps", "edge_steps", "device_steps").sum_horizontal()
    assert set(steps) == {scenario.steps}
    report = (folder / "report.html").read_text()
    assert all(f in report for f in scenario.frameworks)
    assert (folder / "summary.csv").read_text().count("\n") == 1 + len(scenario.frameworks)
    took = (run.info.finished - run.info.started).total_seconds()
    print(f"{folder.name}: {run.requests.height} requests answered in {took:.0f} s, {run.info.overruns} overruns")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        check(Path(argument))
