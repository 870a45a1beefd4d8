"""SC-TSDRL's cache of intermediate results [14], with the rules of NIRVANA (NSDI 2024, arXiv 2312.04429).

The edge keeps latents of earlier prompts at every few steps; a request starts from one of them and goes on with its
own prompt. Kept: one request at a time, in the order of arrival; retrieval by the similarity of embeddings; how many
steps can be skipped follows from that similarity; a bounded cache with NIRVANA's eviction policy among others.
Simplified: the rule for the steps is the fitted quality curve weighed by the utility, where NIRVANA learned a table; a
request may also start from steps that an earlier one is only about to run; only runs from noise are kept, not those
that began in the cache; [14] fills its cache ahead and learns by reinforcement what is retrieved and where the rest
runs, while here the first of its kind runs ``most_shared`` steps on the edge, and the rest goes where it costs less.
"""

from semct.frameworks import Batch, framework
from semct.routes import Plan


@framework("cached", online=True)
def plan(batch: Batch) -> Plan:
    """Each request from the cached latent that serves it best, or else from its own noise, into the cache."""
    return batch.plan_online(foresee=False)
