"""Hierarchical sharing over a prompt tree [arXiv 2508.21032].

One machine makes a set of pictures: agglomerative clustering of the prompts' embeddings gives a tree, an inner node is
conditioned on the average of the embeddings below it, and a step runs at the highest node whose heterogeneity is
still allowed at that step. Kept: the tree, averaged embeddings as inner conditions, allowed heterogeneity that falls
with the steps, all steps on one machine (the edge). Simplified: heterogeneity is the mean cosine distance between the
prompts of a node's two children, and step k of T allows 1 - k / T of it, so that a node of mean similarity s is left
at step s T; the paper tunes that function to models which are conditioned on image embeddings.
"""

import numpy as np

from semct.clustering import dendrogram
from semct.frameworks import Batch, framework
from semct.planner import tree
from semct.routes import Plan


@framework("hierarchical")
def plan(batch: Batch) -> Plan:
    """Leave each node of the prompt tree at a step in proportion to its similarity, everything on the edge."""
    vectors = batch.embed(batch.prompts)
    with batch.timed("cluster"):
        prompts = tree.PromptTree(dendrogram(vectors), batch.prompts, vectors)
    with batch.timed("plan"):
        steps = batch.requests[0].steps
        allowed = np.array([0.0] * prompts.leaves + prompts.closeness)
        left = steps - np.arange(steps + 1)
        return tree.plan(
            batch.requests,
            prompts,
            np.floor(np.clip(allowed + 1e-6, 0, 1) * steps).astype(np.int64),
            np.tile(left, (len(batch.requests), 1)),
            model=batch.model,
            network=batch.network,
            weights=batch.weights,
            quality=batch.quality,
        )
