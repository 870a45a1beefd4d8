"""SemCT for requests that come one by one, beyond the paper: its first open challenge.

There is no batch to cluster. Public prompts that are running, and the latents that recent ones left in the cache, are
what a request can join; where none is close enough, it founds a new one. Clusters so form while requests come, and what
stays in the cache is decided by its gain (uses times steps saved), size and age. Kept of SemCT: similarity of
embeddings, own splits, compute shares, the division of the rest between edge and device. Not kept: words, since a
language model takes longer than a request waits; a new public prompt is the mean of the request's prompt and of
recent ones like it, as many as promise to save later requests more than they cost this one.
"""

from semct.frameworks import Batch, framework
from semct.routes import Plan


@framework("semct-async", online=True)
def plan(batch: Batch) -> Plan:
    """Each request onto the running or cached public prompt that serves it best, or onto a new one."""
    return batch.plan_online(foresee=True)
