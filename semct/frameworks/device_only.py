"""Independent inference on the device: every step where the user is. The reference of the utility."""

import numpy as np

from semct.cost import Splits
from semct.forecast import expect
from semct.frameworks import Batch, framework
from semct.routes import Plan, route


@framework("device-only")
def plan(batch: Batch) -> Plan:
    """All steps of each request on its own device, with the personal prompt."""
    with batch.timed("plan"):
        nobody = np.zeros(len(batch.requests), dtype=np.int64)
        steps = np.array([r.steps for r in batch.requests])
        splits = Splits(cluster=nobody, shared=nobody, edge=nobody, device=steps, share=np.ones(1))
        return Plan(
            clusters=(),
            routes=tuple(route(r, (r.device, batch.model, r.prompt, r.steps)) for r in batch.requests),
            predictions=expect(
                batch.requests,
                splits,
                np.ones(len(steps)),
                network=batch.network,
                weights=batch.weights,
                quality=batch.quality,
            ),
        )
