"""CLIF from the device to the edge [9].

The device starts each request with its personal prompt and the edge finishes it. Kept: the tunable split point; early
steps stay with the user, so that the edge never starts from a bare prompt, and the latent takes both ways over the
air. Simplified: each request chooses its split by utility with an equal part of the edge, where [9] learns splits and
offloading together.
"""

import numpy as np

from semct.cost import Users
from semct.frameworks import Batch, framework
from semct.planner.choice import best_options
from semct.routes import Plan, route


@framework("device-edge")
def plan(batch: Batch) -> Plan:
    """z steps on the device, the rest on the edge."""
    with batch.timed("plan"):
        network, steps = batch.network, batch.steps
        edge, users = network.nodes[network.edge], Users.of(network, [r.device for r in batch.requests])
        z = np.arange(1, steps + 1)
        up = [network.seconds(r.device, network.edge, network.latent_bytes) for r in batch.requests]
        sent = [network.joules(r.device, network.edge, network.latent_bytes) for r in batch.requests]
        handed = z < steps
        seconds = (steps - z) * edge.full_seconds * len(batch.requests) + np.multiply.outer(users.step_seconds, z)
        joules = (steps - z) * edge.full_joules + np.multiply.outer(users.step_joules, z)
        chosen = best_options(
            batch.requests,
            quality=np.full(len(z), batch.alone),
            seconds=seconds + np.multiply.outer(np.array(up) + users.latent_seconds(), handed),
            joules=joules + np.multiply.outer(np.array(sent) + users.latent_joules(), handed),
            alone=batch.alone,
            network=network,
            weights=batch.weights,
        )
        routes = [
            route(r, (r.device, batch.model, r.prompt, n), (network.edge, batch.model, r.prompt, steps - n))
            for r, n in zip(batch.requests, z[chosen].tolist(), strict=True)
        ]
        return batch.predicted(routes, {r.id: batch.alone for r in batch.requests})
