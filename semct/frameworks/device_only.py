"""Independent inference on the device: every step where the user is. The reference of the utility."""

from semct.cost import Weights, device_only
from semct.frameworks import Batch, framework
from semct.routes import Plan, Prediction, Request, route


@framework("device-only")
def plan(batch: Batch) -> Plan:
    """All steps of each request on its own device, with the personal prompt."""
    with batch.timed("plan"):
        routes = [route(r, (r.device, batch.model, r.prompt, r.steps)) for r in batch.requests]
        predictions = {r.id: _predict(batch, r, batch.weights) for r in batch.requests}
        return Plan(clusters=(), routes=tuple(routes), predictions=predictions)


def _predict(batch: Batch, request: Request, weights: Weights) -> Prediction:
    alone = float(batch.quality.quality(1.0, 0.0))
    outcome = device_only(batch.network, request.device, request.steps, alone)
    return Prediction(quality=alone, latency=outcome.latency, energy=outcome.energy, utility=weights.quality)
