"""HIS, the hybrid inference scheme [13].

Prompts about the same key subject form a cluster, the language model states what they have in common, the edge keeps
every intermediate result of the shared inference, and each request takes the one that suits it; what is left is
divided between edge and device. Kept: subject-level clusters, a generated public prompt, dynamic sharing with each
request's own split, joint choice of splits and compute shares. Simplified: the subject is the head noun that a
part-of-speech tagger finds (``clustering.main_entity``), and splits come from the exact planner instead of IPPO.
"""

from semct.clustering import by_entity
from semct.frameworks import Batch, framework
from semct.routes import Plan


@framework("hybrid")
def plan(batch: Batch) -> Plan:
    """Cluster by key subject, write one public prompt per cluster, each request its own split."""
    with batch.timed("cluster"):
        groups = by_entity(batch.prompts)
    return batch.plan(groups, batch.write(batch.writer, groups))
