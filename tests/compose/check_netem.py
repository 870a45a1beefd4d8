"""Checks the record of ``netem.yaml``: ``python tests/compose/check_netem.py RUN_FOLDER``."""

import sys
from pathlib import Path

from semct.runs import load_run


def check(folder: Path) -> None:
    """Raise ``AssertionError`` where netem did not shape the links of containers, or somebody has no picture."""
    run = load_run(folder)
    assert run.info.status == "finished", run.info
    assert (run.info.hosts, run.info.link) == ("containers", "netem")
    assert set(run.requests["outcome"]) == {"answered"}
    assert run.requests.height == 2
    print(f"{run.requests.height} of 2 requests answered over {run.links.height} links shaped by netem")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
