"""Experiments: scenarios, the runner, the places a testbed can run, the record of a run and its report."""
