"""Simulating 10,000 users under every framework: ``python benchmarks/simulator.py``.

A cell with a second edge, a cloud and the small model, so that all frameworks can serve it; users take the embedded
prompt set in turn. Counted is CPU time on one thread from the drawn requests to the table's rows: clustering, public
prompts (the medoid, since a language model's time is its own), planning and prediction. Not counted: loading, and
embedding the different prompts, which a simulation does once.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from experiments.scenario import Cloud, Devices, Edge, MoreEdges, Planning, Prompts, Scenario, load_prompts
from experiments.simulation import Encoder, SimulationFailed, Simulator
from semct import frameworks

LIMIT = 30.0  # seconds for the frameworks of the paper, together
BEYOND = ("hierarchical", "semct-async", "semct-tree")
"""Frameworks that the paper does not have: shown, and not part of the limit."""


def main() -> None:
    """Print the table; exit with 1 where it takes longer than allowed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--frameworks", nargs="*", default=frameworks.names())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    small = ("embedded-small",)
    scenario = Scenario(
        name="simulator",
        frameworks=("device-only",),
        devices=(Devices(count=arguments.users, models=small),),
        edge=Edge(models=small),
        edges=(MoreEdges(models=small),),
        cloud=Cloud(models=small),
        prompts=Prompts(set="embedded"),
        planning=Planning(writer="medoid"),
    )
    encoder = Encoder()
    prompts = load_prompts(scenario, Path())
    encoder.embed(prompts)
    simulator = Simulator(encoder)
    simulator.play(msgspec.structs.replace(scenario, devices=(Devices(count=10, models=small),)), prompts)
    table = Table(title=f"{arguments.users} users, CPU seconds on one thread")
    table.add_column("framework")
    table.add_column("seconds", justify="right")
    total = 0.0
    own = [name for name in arguments.frameworks if name not in BEYOND]
    for name in (*own, *(name for name in arguments.frameworks if name in BEYOND)):
        start = time.process_time()
        try:
            simulator.play(msgspec.structs.replace(scenario, frameworks=(name,)), prompts)
        except SimulationFailed as error:
            sys.exit(f"benchmarks/simulator.py: {error}")
        seconds = time.process_time() - start
        total += seconds if name in own else 0.0
        table.add_row(name, f"{seconds:.2f}")
    Console().print(table)
    print(f"{total:.1f} s for the {len(own)} frameworks of the paper; at most {LIMIT:.0f} s are allowed")
    if total > LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
