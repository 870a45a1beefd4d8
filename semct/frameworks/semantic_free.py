"""SFIF, the semantic-free inference framework [10, 12].

Prompts that name the same main entity form a cluster, and a random member's prompt is its public prompt; all
members reuse the same intermediate result. Kept: entity-level clusters, random public prompt, one split per
cluster. Simplified: the entity is the head noun of the first noun phrase, where [12] trains a classifier; the
split comes from the same planner that SemCT uses, so that only clusters and public prompts differ.
"""

from semct.clustering import by_entity
from semct.frameworks import Batch, framework
from semct.public_prompt import RandomMemberWriter
from semct.routes import Plan


@framework("semantic-free")
def plan(batch: Batch) -> Plan:
    """Cluster by entity, take a random member's prompt, one split per cluster."""
    with batch.timed("cluster"):
        groups = by_entity(batch.prompts)
    public = batch.write(RandomMemberWriter(batch.encoder), groups)
    return batch.plan(groups, public, uniform=True)
