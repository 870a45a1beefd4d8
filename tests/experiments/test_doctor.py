"""What the doctor says of this very machine."""

import subprocess
import sys
from pathlib import Path

from experiments.doctor import Finding, examine, render


def test_it_looks_at_everything_and_says_how_to_get_what_is_missing() -> None:
    findings = {f.what: f for f in examine()}
    assert findings["Python"].said.startswith(".".join(map(str, sys.version_info[:2])))
    assert {"network namespaces", "links in the kernel", "links in userspace", "mosquitto", "GPU"} <= set(findings)
    for finding in findings.values():
        assert finding.said
        assert "\n" not in finding.said
        assert "Traceback" not in finding.said
    if findings["links in the kernel"].verdict == "optional":
        assert "sch_netem" in findings["links in the kernel"].said


def test_a_finding_is_a_line_of_the_table() -> None:
    table = render([Finding("GPU", "optional", "none"), Finding("Python", "yes", "3.11")])
    assert table.row_count == 2


def test_the_command_ends_well_where_a_testbed_can_run() -> None:
    command = [sys.executable, "-m", "experiments", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == int("cannot have a network namespace" in " ".join(done.stdout.split())), done.stderr
    assert "links in userspace" in done.stdout
