"""SemCT with sharing at several levels, beyond the paper.

The clustering is a dendrogram, so sharing need not stop at one level: all users may share the first steps, clusters the
next ones, near-duplicates nearly all. Each level runs on the mean of the prompts below it, which needs no language
model, and a dynamic programme cuts the dendrogram where the predicted utility asks (``semct.planner.tree``). Kept
of SemCT: embeddings, average linkage, own splits, compute shares, the split between edge and device. Not kept: the
number of clusters, which utility decides, and public prompts in words. The bound on shared steps holds for the root;
closer nodes may share more, until they lose as much.
"""

from semct.clustering import dendrogram
from semct.frameworks import Batch, framework
from semct.planner import tree
from semct.routes import Plan


@framework("semct-tree")
def plan(batch: Batch) -> Plan:
    """Cut the dendrogram of the prompts where utility asks, at as many levels as it asks."""
    vectors = batch.embed(batch.prompts)
    with batch.timed("cluster"):
        prompts = tree.PromptTree(dendrogram(vectors), batch.prompts, vectors)
    with batch.timed("plan"):
        return tree.best_plan(
            batch.requests,
            prompts,
            model=batch.model,
            network=batch.network,
            weights=batch.weights,
            quality=batch.quality,
            most_shared=batch.most_shared,
        )
