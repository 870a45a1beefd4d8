"""Independent inference in the cloud: what most services do today.

Kept: no sharing, no splitting, all requests in a distant data centre behind a wide-area link. Simplified: one node
of the profile that the scenario names, where a data centre has many; the finished latent, not the picture, travels
to the device, as it does for all frameworks here.
"""

from semct.frameworks import Batch, Needs, framework
from semct.routes import Plan, route


@framework("cloud-only", needs=Needs(cloud=True))
def plan(batch: Batch) -> Plan:
    """All steps of each request in the cloud, with the personal prompt."""
    with batch.timed("plan"):
        cloud = batch.network.of_kind("cloud")[0]
        routes = [route(r, (cloud, batch.model, r.prompt, r.steps)) for r in batch.requests]
        return batch.predicted(routes, {r.id: batch.alone for r in batch.requests})
