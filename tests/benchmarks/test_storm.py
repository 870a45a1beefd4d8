"""A short storm of broken messages: a running edge and device live through it, do not grow, and answer others."""

from pathlib import Path

import pytest

from benchmarks.storm import storm
from broker.local import _mosquitto

GROWTH = 1.05
"""The most that a node's memory may be after the storm, in times of that after its first tenth."""


async def test_a_running_edge_and_device_outlive_a_storm(tmp_path: Path) -> None:
    if _mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    seen = await storm(tmp_path, payloads=20_000, calm=2)
    assert seen.stormy, "nobody was answered during the storm"
    for node, mib in seen.grown.items():
        assert mib < GROWTH * seen.settled[node], f"{node} grew from {seen.settled[node]:.1f} to {mib:.1f} MiB"
        log = (tmp_path / f"{node}.log").read_text()
        assert "(malformed," in log, f"the storm did not reach {node}"
        assert "Traceback" not in log
