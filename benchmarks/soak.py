"""A long run: does any process of the testbed grow?

    python benchmarks/soak.py [--minutes 20]

One scenario, round after round, until the time is over; then it is interrupted. Ten times a minute every process is
asked for the memory that it alone has and has written to. (A library's pages that are only read belong to one process
or to several by who else has loaded it just then.) The first fifth is for warming up. Of the rest, the first quarter is
compared with the last, which may have 5 % more; the least of each counts, which is what a process holds between two
requests. Processes that did not live through all of it are left out.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from semct import load_run

SCENARIO = """\
name: soak
frameworks: [semct, cached, device-only]
repetitions: 1000
steps: 12
devices: [{count: 4}]
prompts: {list: [a cat in the snow, a dog in the snow, a red car at night, a bus at night]}
planning: {clusters: 2}
links: {up: {rate: 20mbit, delay: 10ms}, down: {rate: 20mbit, delay: 10ms}}
"""
EVERY = 6.0  # seconds
FLAT = 1.05


def watched(run: psutil.Process, seconds: float) -> dict[str, list[float]]:
    """MiB of each process of a run, over so many seconds; empty places where it was not there yet."""
    seen: dict[str, list[float]] = defaultdict(list)
    began, looks = time.monotonic(), 0
    while time.monotonic() < began + seconds:
        for process in (run, *run.children(recursive=True)):
            with suppress(psutil.Error):
                words = " ".join(word for word in process.cmdline()[:4] if not word.startswith("-"))
                own = seen[f"{process.pid} {words[-48:]}"]
                own += [0.0] * (looks - len(own))
                own.append(sum(part.private_dirty + part.swap for part in process.memory_maps()) / 2**20)
        looks += 1
        time.sleep(EVERY)
    return {name: values for name, values in seen.items() if len(values) == looks}


def main(minutes: float, console: Console) -> None:
    """Print the growth of every process; raises where one grew."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "soak.yaml").write_text(SCENARIO)
        command = [sys.executable, "-m", "experiments", "run", str(folder / "soak.yaml"), "--runs", name]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
            try:
                with console.status(f"{minutes:g} minutes"):
                    seen = watched(psutil.Process(run.pid), 60 * minutes)
            finally:
                run.send_signal(signal.SIGINT)
        (made,) = folder.glob("*-soak-*")
        rounds = load_run(made).events.filter(kind="round").height
    table = Table(title=f"{minutes:g} minutes, {rounds} rounds")
    for column in ("process", "then (MiB)", "at last (MiB)", "ratio"):
        table.add_column(column, justify="right")
    grown = 0
    for process, values in seen.items():
        settled = values[len(values) // 5 :]
        quarter = max(1, len(settled) // 4)
        first, last = min(settled[:quarter]), min(settled[-quarter:])
        if not first:
            continue
        grown += last > FLAT * first
        table.add_row(process, f"{first:.1f}", f"{last:.1f}", f"{last / first:.3f}")
    console.print(table)
    if grown:
        raise RuntimeError(f"{grown} processes grew by more than 5 %")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    main(parser.parse_args().minutes, Console(width=120))
