"""CLIF between cloud and edge, with two sizes of the model: Hybrid SD [2], and [7].

The cloud runs the first steps of each request with the large model, the edge the rest with the small one. Kept: the
large model plans the picture in the cloud, the small one refines it near the user, and what crosses the wide area
is one latent. Simplified: the point of change (each node has at least one step) is chosen by utility with an equal
part of both nodes for each request; [2] fixes it by the quality that is wanted, [7] optimises it together with the
placement of services.
"""

import numpy as np

from semct.frameworks import Batch, Needs, framework
from semct.planner.choice import best_options
from semct.routes import Plan, route
from semct.tradeoffs import load_tradeoffs


@framework("cloud-edge", needs=Needs(cloud=True, small=True))
def plan(batch: Batch) -> Plan:
    """a steps with the large model in the cloud, the rest with the small one on the edge."""
    with batch.timed("plan"):
        network, steps, users = batch.network, batch.steps, len(batch.requests)
        far, near = network.of_kind("cloud")[0], network.edge
        cloud, edge = network.nodes[far], network.nodes[near]
        small, a = edge.pace(batch.small_model), np.arange(1, max(steps, 2))  # both nodes have a part
        seconds = users * (a * cloud.full_seconds + (steps - a) * (small.step_seconds + edge.call_seconds / edge.rows))
        joules = a * cloud.full_joules + (steps - a) * (small.step_joules + edge.call_joules / edge.rows)
        quality = batch.alone * load_tradeoffs().switch_factor(a, steps)
        chosen = best_options(
            batch.requests,
            quality=quality,
            seconds=seconds,
            joules=joules,
            alone=batch.alone,
            network=network,
            weights=batch.weights,
        )
        routes = [
            route(r, (far, batch.model, r.prompt, n), (near, batch.small_model, r.prompt, steps - n))
            for r, n in zip(batch.requests, a[chosen].tolist(), strict=True)
        ]
        return batch.predicted(routes, {r.id: float(quality[i]) for r, i in zip(batch.requests, chosen, strict=True)})
