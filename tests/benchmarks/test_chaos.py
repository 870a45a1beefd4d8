"""Two rounds with twenty faults at random: every request has one outcome."""

from pathlib import Path

from benchmarks.chaos import disturbed


def test_every_request_has_one_outcome_whatever_breaks(tmp_path: Path) -> None:
    wild = disturbed(tmp_path / "wild", rounds=2, faults=10, seed=1)
    began = wild.faults["began"].drop_nulls().len()
    assert began >= 10, f"only {began} of 20 faults began before their round was over"
    outcomes = set(wild.requests["outcome"])
    assert outcomes <= {"answered", "degraded", "failed"}
    assert outcomes & {"answered", "degraded"}, "nobody got a picture"
    reasons = wild.requests.filter(outcome="failed")["reason"]
    assert all(reasons), "a request failed without a reason"
