"""Stage-wise inference: a model of another size for another stage of denoising [3].

The edge runs the first steps of each request with the large model and the rest with the small one. Kept: not every
step needs the large network, and a search decides which do. Simplified: [3] searches a size for every single step
among slices of one network; here there are two networks and one point of change, early steps being those that decide
what a picture shows, and each has at least one step. What the change costs in quality is the curve measured on the
embedded models.
"""

import numpy as np

from semct.frameworks import Batch, Needs, framework
from semct.planner.choice import best_options
from semct.routes import Plan, route
from semct.tradeoffs import load_tradeoffs


@framework("stage-wise", needs=Needs(small=True))
def plan(batch: Batch) -> Plan:
    """a steps with the large model and the rest with the small one, all on the edge."""
    with batch.timed("plan"):
        name, edge = batch.network.edge, batch.network.nodes[batch.network.edge]
        steps, small = batch.steps, edge.pace(batch.small_model)
        large = np.arange(1, max(steps, 2))  # both models have a part, or it would be edge-only with one of them
        seconds = large * edge.full_seconds + (steps - large) * (small.step_seconds + edge.call_seconds / edge.rows)
        joules = large * edge.full_joules + (steps - large) * (small.step_joules + edge.call_joules / edge.rows)
        quality = batch.alone * load_tradeoffs().switch_factor(large, steps)
        chosen = best_options(
            batch.requests,
            quality=quality,
            seconds=seconds * len(batch.requests),
            joules=joules,
            alone=batch.alone,
            network=batch.network,
            weights=batch.weights,
        )
        routes = [
            route(r, (name, batch.model, r.prompt, a), (name, batch.small_model, r.prompt, steps - a))
            for r, a in zip(batch.requests, large[chosen].tolist(), strict=True)
        ]
        return batch.predicted(routes, {r.id: float(quality[i]) for r, i in zip(batch.requests, chosen, strict=True)})
