"""Faults at random, round after round: has every request one outcome, and is every answered picture the right one?

    python benchmarks/chaos.py [--rounds 30] [--faults 8] [--seed 0]

The same scenario runs twice with the command that users have: undisturbed, and with so many faults drawn for each round
(nodes die and come back, stand still, links fail or lose packets, the broker restarts). All nodes compute natively, the
edge one row at a time, so that a route gives the same pixels whoever else is served. A picture is compared with
that of the undisturbed run where the route is the same: the split, the public prompt, and no device that did it alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table

from semct import load_run
from semct.runs import Run

SCENARIO = """\
name: {name}
seed: {seed}
frameworks: [semct]
repetitions: {rounds}
steps: 12
devices: [{{count: 4, compute: native}}]
edge: {{compute: native, rows: 1}}
prompts: {{list: [a cat in the snow, a dog in the snow, a red car at night, a bus at night]}}
planning: {{clusters: 2, writer: medoid}}
links: {{up: {{rate: 10mbit, delay: 20ms}}, down: {{rate: 10mbit, delay: 20ms}}}}
patience: 6
timeout: 30
"""
FAULTS = "faults: {{random: {{count: {faults}, within: 3s, lasts: [300ms, 2s]}}}}\n"
ROUTE = ["shared_steps", "edge_steps", "device_steps", "public_prompt"]
WHO = ["repetition", "device", "prompt", "seed"]


def run(folder: Path, text: str) -> Run:
    """The record of a scenario that was run into a folder of its own; some of its requests may have failed."""
    folder.mkdir()
    (folder / "scenario.yaml").write_text(text)
    command = [sys.executable, "-m", "experiments", "run", str(folder / "scenario.yaml"), "--runs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (made,) = folder.glob("*-*/")
    found = load_run(made)
    if found.info.status != "finished":
        raise RuntimeError(f"the run {found.info.status}: {found.info.reason}\n{done.stderr[-2000:]}")
    return found


def disturbed(folder: Path, *, rounds: int, faults: int, seed: int) -> Run:
    """The record of a run with so many faults drawn a round.

    Raises ``RuntimeError`` where a request has no outcome, or more than one.
    """
    text = SCENARIO.format(name="chaos", seed=seed, rounds=rounds) + FAULTS.format(faults=faults)
    wild = run(folder, text)
    if not wild.requests.height == wild.requests["request"].n_unique() == 4 * rounds:
        raise RuntimeError(f"{4 * rounds} requests have {wild.requests.height} outcomes")
    return wild


def same_pixels(calm: Run, wild: Run) -> tuple[int, int]:
    """How many answered pictures have the route that they have in the undisturbed run, and how many the same pixels."""
    kept = [*WHO, *ROUTE, "image"]
    answered = wild.requests.filter(outcome="answered").select(kept)
    pairs = answered.join(calm.requests.select(kept), on=[*WHO, *ROUTE], nulls_equal=True, suffix="_calm")
    images = pairs["image", "image_calm"].rows()
    same = sum((wild.path / wildly).read_bytes() == (calm.path / calmly).read_bytes() for wildly, calmly in images)
    return pairs.height, same


def main(rounds: int, faults: int, seed: int, console: Console) -> None:
    """Print what became of all requests; raises where one has no outcome or a picture is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with console.status("the undisturbed run"):
            calm = run(folder / "calm", SCENARIO.format(name="calm", seed=seed, rounds=rounds))
        with console.status("the run with faults"):
            wild = disturbed(folder / "wild", rounds=rounds, faults=faults, seed=seed)
        compared, same = same_pixels(calm, wild)
    happened = wild.faults.filter(pl.col("began").is_not_null())
    outcomes = dict(wild.requests.group_by("outcome").len().rows())
    table = Table(title=f"{happened.height} faults in {rounds} rounds, seed {seed}")
    table.add_column("requests")
    table.add_column("", justify="right")
    table.add_row("asked", str(4 * rounds))
    for outcome in ("answered", "degraded", "failed"):
        table.add_row(outcome, str(outcomes.get(outcome, 0)))
    table.add_row("answered by the undisturbed run's route", str(compared))
    table.add_row("of these with the same pixels", str(same))
    console.print(table)
    console.print(", ".join(f"{what}: {count}" for what, count in happened.group_by("what").len().sort("what").rows()))
    for reason, count in wild.requests.filter(outcome="failed").group_by("reason").len().rows():
        console.print(f"{count} failed: {reason}", soft_wrap=True)
    if same < compared:
        raise RuntimeError("a picture is wrong")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--faults", type=int, default=8, help="drawn a round; those after its end are left out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.rounds, arguments.faults, arguments.seed, Console(width=120))
