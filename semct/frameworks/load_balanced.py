"""Load balancing over several edges: each request is served whole by one of them [4].

Kept: many edge services, one of which is selected for each task as it comes, by the load that it has. Simplified: the
choice is the edge on which the request would be finished first by what is predicted, where [4] learns to choose by
diffusion-based reinforcement learning. The load that counts is that of the same batch.
"""

from semct.frameworks import Batch, Needs, framework
from semct.routes import Plan, route


@framework("load-balanced", needs=Needs(edges=2))
def plan(batch: Batch) -> Plan:
    """All steps of each request on the edge that would finish it first."""
    with batch.timed("plan"):
        network = batch.network
        backlog = dict.fromkeys(network.of_kind("edge"), 0.0)
        routes = []
        for r in batch.requests:
            ready = {
                edge: backlog[edge]
                + r.steps * network.nodes[edge].full_seconds
                + network.seconds(network.edge, edge, network.request_bytes)
                + network.seconds(edge, r.device, network.latent_bytes)
                for edge in backlog
            }
            chosen = min(ready, key=ready.__getitem__)
            backlog[chosen] += r.steps * network.nodes[chosen].full_seconds
            routes.append(route(r, (chosen, batch.model, r.prompt, r.steps)))
        return batch.predicted(routes, {r.id: batch.alone for r in batch.requests})
