"""SemCT, the paper's framework.

Semantic clusters (MiniLM embeddings, average-linkage HAC down to K), one public prompt per cluster from the
language model, each request its own split, splits and compute shares from the two-tier planner. Kept of the
paper: all of it; its first tier is exact here instead of learned.
"""

from semct.frameworks import Batch, framework
from semct.routes import Plan


@framework("semct")
def plan(batch: Batch) -> Plan:
    """Cluster by meaning, write one public prompt per cluster, plan both tiers."""
    groups = batch.cluster(batch.embed(batch.prompts))
    return batch.plan(groups, batch.write(batch.writer, groups))
