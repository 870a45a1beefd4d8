"""Independent inference on the edge: every request is served whole by the planning edge.

Kept: no sharing, no splitting, one node. The edge serves all requests at once, each with an equal part of its
compute. The device only decodes.
"""

from semct.frameworks import Batch, framework
from semct.routes import Plan, route


@framework("edge-only")
def plan(batch: Batch) -> Plan:
    """All steps of each request on the edge, with the personal prompt."""
    with batch.timed("plan"):
        routes = [route(r, (batch.network.edge, batch.model, r.prompt, r.steps)) for r in batch.requests]
        return batch.predicted(routes, {r.id: batch.alone for r in batch.requests})
