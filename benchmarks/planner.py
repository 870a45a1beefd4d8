"""The planner against its limits: brute force, SLSQP and the time it is to keep.

Run as ``python benchmarks/planner.py``. Times are CPU time of this process on one thread, so that other work on the
machine changes them little. The limits: within 0.1 % of brute force on each of 200 small instances, 50 users in under
50 ms, 10,000 users in under 5 s; for the learned planner, within 2 % of the exact one.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

from semct.cost import Link, Network, NodeState, Weights
from semct.planner import two_tier
from semct.planner.learned import Policy
from semct.planner.learning import gap, judge
from semct.planner.shares import shares
from semct.planner.splits import Costs, costs
from semct.public_prompt import PublicPrompt
from semct.quality import load_quality_model
from semct.routes import Plan, Request

QUALITY = load_quality_model("sd3-medium")
WEIGHTS = Weights(quality=0.4, latency=0.3, energy=0.3)

Instance = tuple[tuple[Request, ...], list[tuple[int, ...]], list[NDArray[np.float64]], Network]


def instance(seed: int, users: int, clusters: int, *, steps: int = 28) -> Instance:
    """Users in random clusters, with devices from 3090 Ti to boards, on an edge that grows with them."""
    rng = np.random.default_rng(seed)
    names = [f"d{i}" for i in range(users)]
    pace, watts = rng.uniform(0.15, 0.6, users), rng.uniform(60, 450, users)
    devices = {
        n: NodeState(step_seconds=s, step_joules=s * w, decode_seconds=0.26, decode_joules=0.26 * w)
        for n, s, w in zip(names, pace.tolist(), watts.tolist(), strict=True)
    }
    edge = NodeState(step_seconds=12 / 156 * 50 / users * rng.uniform(0.3, 1.5), step_joules=400 * 12 / 156)
    network = Network(
        edge="edge",
        nodes={"edge": edge, **devices},
        uplinks={n: Link(rate=20e6, delay=0.005, watts=0.2) for n in names},
        downlinks={n: Link(rate=float(rng.uniform(5e6, 1e8)), delay=0.005, watts=1.0) for n in names},
        latent_bytes=524_288,
    )
    label = np.concatenate([np.arange(clusters), rng.integers(0, clusters, users - clusters)])
    groups = [tuple(np.flatnonzero(label == k).tolist()) for k in range(clusters)]
    requests = tuple(Request(id=f"r{n}", device=n, prompt=f"wish of {n}", seed=1, steps=steps) for n in names)
    return requests, groups, [rng.uniform(0.25, 0.75, len(g)) for g in groups], network


def plan(made: Instance, *, sharing: bool = True, uniform: bool = False) -> Plan:
    """The exact planner on an instance."""
    requests, groups, similarity, network = made
    public = [PublicPrompt(f"public {m}", "medoid", 1.0, 1) for m in range(len(groups))]
    return two_tier.plan(
        requests,
        groups,
        public,
        similarity,
        model="m",
        network=network,
        weights=WEIGHTS,
        quality=QUALITY,
        most_shared=13,
        sharing=sharing,
        uniform=uniform,
    )


def brute_force(tables: Sequence[Costs]) -> float:
    """The least cost of all splits of all users, each joint choice with its closed-form shares."""
    outlines = []
    for table in tables:
        users, bounds, size = table.own.shape
        choices = [(x, y) for x in range(bounds if users > 1 else 1) for y in range(size - x)]
        least: dict[int, float] = {}
        for picked in itertools.product(choices, repeat=users):
            shared = max(x for x, _ in picked)
            work = shared + sum(y for _, y in picked)
            own = sum(float(table.own[n, x, y]) for n, (x, y) in enumerate(picked)) + shared * table.joules
            least[work] = min(own, least.get(work, np.inf))
        outlines.append([(own, np.sqrt(table.second * table.step * work)) for work, own in least.items()])
    return min(
        sum(own for own, _ in picked) + sum(root for _, root in picked) ** 2 for picked in itertools.product(*outlines)
    )


def worst_against_brute_force(instances: int) -> float:
    """The largest relative excess over brute force."""
    worst = 0.0
    for seed in range(instances):
        rng = np.random.default_rng(seed)
        users = int(rng.integers(1, 5))
        requests, groups, similarity, network = instance(
            seed, users, int(rng.integers(1, users + 1)), steps=int(rng.integers(2, 5))
        )
        tables = costs(requests, groups, similarity, network=network, weights=WEIGHTS, quality=QUALITY, most_shared=13)
        best = brute_force(tables)
        worst = max(worst, (two_tier.solve(tables).cost - best) / abs(best))
    return worst


def worst_against_solver(instances: int) -> float:
    """The largest relative difference of the closed form's cost to SLSQP's constrained optimum."""
    worst = 0.0
    for seed in range(instances):
        rng = np.random.default_rng(seed)
        cost = rng.uniform(0.05, 20, int(rng.integers(2, 9)))
        n = len(cost)
        solved = minimize(
            lambda f, c=cost: float((c / f).sum()),
            np.full(n, 1 / n),
            jac=lambda f, c=cost: -c / f**2,
            bounds=[(1e-4, 1)] * n,
            constraints={"type": "ineq", "fun": lambda f: 1 - f.sum(), "jac": lambda f: -np.ones_like(f)},
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-13},
        )
        found = float((cost / shares(cost, np.ones(n))).sum())
        worst = max(worst, abs(found / float(solved.fun) - 1))
    return worst


def seconds(call: Callable[[], Plan], repeats: int) -> tuple[float, Plan]:
    """The least CPU time of a call, and what it returned."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        found = call()
        times.append(time.process_time() - start)
    return min(times), found


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    console = Console()
    small, solver = worst_against_brute_force(200), worst_against_solver(200)
    console.print(f"200 small instances: at most {100 * small:.2e} % above brute force (limit 0.1 %)")
    console.print(f"200 closed-form shares: at most {100 * solver:.1e} % from SLSQP's optimum")
    table = Table(title="plans, CPU time")
    for title in ("users", "clusters", "framework's kind", "seconds", "of the limit", "proven gap (utility)"):
        table.add_column(title, justify="right")
    cases = [(50, 3), (50, 50), (1000, 10), (10_000, 3), (10_000, 30), (10_000, 100), (10_000, 10_000)]
    for users, clusters in cases:
        alone = users == clusters
        for uniform in (False, True) if users == 10_000 and clusters == 30 else (False,):
            made = instance(0, users, clusters)
            taken, found = seconds(
                lambda m=made, a=alone, u=uniform: plan(m, sharing=not a, uniform=u), 5 if users < 1000 else 1
            )
            limit = {50: 0.05, 10_000: 5.0}.get(users)
            kind = "no sharing" if alone else "one split per cluster" if uniform else "own splits"
            of = "" if limit is None else f"{taken / limit:.2f}"
            table.add_row(str(users), str(clusters), kind, f"{taken:.3f}", of, f"{found.gap:.1e}")
    console.print(table)
    policy, models = Policy.load(), [QUALITY, load_quality_model("embedded")]
    gaps = [gap(policy, judge(np.random.default_rng(1000 + seed), models, 25, 4)) for seed in range(5)]
    console.print(
        f"learned planner, 5 seeds of 100 batches: {100 * np.mean(gaps):.2f} % (from {100 * min(gaps):.2f} to "
        f"{100 * max(gaps):.2f} %) below the exact planner's utility (limit 2 %)"
    )


if __name__ == "__main__":
    main()
