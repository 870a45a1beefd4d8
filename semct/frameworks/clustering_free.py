"""CFIF, the clustering-free inference framework [11].

All requests are one cluster, a random member's prompt is public, and everybody takes the same intermediate
result. Kept: one cluster, random public prompt, one split. Simplified: [11] fixes the split (step 10, say) or
learns it by reinforcement from a language model's feedback; here the planner chooses it.
"""

from semct.clustering import together
from semct.frameworks import Batch, framework
from semct.public_prompt import RandomMemberWriter
from semct.routes import Plan


@framework("clustering-free")
def plan(batch: Batch) -> Plan:
    """One cluster, a random member's prompt, one split for all."""
    groups = together(len(batch.requests))
    public = batch.write(RandomMemberWriter(batch.encoder), groups)
    return batch.plan(groups, public, uniform=True)
