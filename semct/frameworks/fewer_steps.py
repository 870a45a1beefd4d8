"""Fewer steps for who is in a hurry [5, 6].

Each request runs whole on the edge, with its own number of steps. Kept: the number of steps is the knob that trades
quality for latency and energy, chosen for each request by its utility. Simplified: [5] schedules communication and
computation jointly and [6] offloads over several servers; here there is one edge, every request reckons with an equal
part of it, and what fewer steps cost in quality is the curve measured on the embedded model.
"""

import msgspec
import numpy as np

from semct.frameworks import Batch, framework
from semct.planner.choice import best_options
from semct.routes import Plan, route
from semct.tradeoffs import load_tradeoffs


@framework("fewer-steps")
def plan(batch: Batch) -> Plan:
    """All steps of each request on the edge, as many as pay for it."""
    with batch.timed("plan"):
        curves, edge = load_tradeoffs(), batch.network.nodes[batch.network.edge]
        most = max(r.steps for r in batch.requests)
        options = np.arange(min(curves.fewest, most), most + 1)
        quality = batch.alone * curves.steps_factor(options * (curves.full / most))
        chosen = best_options(
            batch.requests,
            quality=quality,
            seconds=options * edge.full_seconds * len(batch.requests),
            joules=options * edge.full_joules,
            alone=batch.alone,
            network=batch.network,
            weights=batch.weights,
        )
        steps = [min(int(options[i]), r.steps) for i, r in zip(chosen, batch.requests, strict=True)]
        routes = [
            route(msgspec.structs.replace(r, steps=n), (batch.network.edge, batch.model, r.prompt, n))
            for r, n in zip(batch.requests, steps, strict=True)
        ]
        return batch.predicted(routes, {r.id: float(quality[i]) for r, i in zip(batch.requests, chosen, strict=True)})
