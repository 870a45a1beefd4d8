"""CLIF, the cross-layer inference framework between edge and device [7-9].

No sharing: the edge starts each request with its personal prompt and the device finishes it. Kept: the tunable
split point and the joint choice of splits and compute shares. Simplified: one and the same model on both
sides, where [8] personalises the device's.
"""

import numpy as np

from semct.clustering import alone
from semct.frameworks import Batch, framework
from semct.public_prompt import PublicPrompt
from semct.routes import Plan


@framework("edge-device")
def plan(batch: Batch) -> Plan:
    """Each request for itself: y steps on the edge, the rest on its device."""
    own = [PublicPrompt(text=prompt, source="member", similarity=1.0, candidates=1) for prompt in batch.prompts]
    return batch.plan(alone(len(own)), own, similarity=[np.ones(1)] * len(own), sharing=False)
