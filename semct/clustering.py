"""Partitions of a batch of prompts into clusters that share early denoising.

SemCT clusters by meaning: average-linkage hierarchical agglomerative clustering (HAC) of sentence
embeddings until K clusters remain. The semantic-free framework clusters by entity [10, 12], the
clustering-free one takes the batch as one cluster [11].
"""

from __future__ import annotations

import functools
import math
import re
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

Partition = tuple[tuple[int, ...], ...]
"""Clusters of member indices: members ascending, clusters in the order of their first members."""

Number = int | Literal["utility", "silhouette"]
"""The number of clusters K, or how to find it."""

EQUAL = 1e-6
"""Cosines of float32 embeddings differ by that much for nothing, and otherwise on another processor."""

_MOST_SILHOUETTES = 64  # clusters; 10,000 prompts then take seconds

_ROWS = 256  # of the matrix of cosines at once

_POSSESSIVE = re.compile(r"['’]s?\b")  # noqa: RUF001
_PHRASE_ENDS = {"IN", "TO", "CC", "WDT", ",", ":", "."}  # Penn tags that no noun phrase continues with


class Merge(msgspec.Struct, frozen=True):
    """Two nodes of a dendrogram that become one: prompts are 0 to n - 1, merge i makes node n + i."""

    left: int
    right: int
    similarity: float  # mean cosine between the prompts below left and those below right


class Dendrogram(msgspec.Struct, frozen=True):
    """All merges of n prompts, the most similar first; one clustering that can be cut at many levels."""

    prompts: int
    merges: tuple[Merge, ...]

    def cut(self, clusters: int) -> Partition:
        """Return the partition at which the given number of clusters remain.

        Equal prompts always share a cluster, so there are fewer where there are fewer different prompts.

        Raises:
            ValueError: Less than one cluster is asked for.
        """
        if clusters < 1:
            msg = f"A partition has at least 1 cluster; {clusters} were asked for."
            raise ValueError(msg)
        equal = sum(merge.similarity >= 1 - EQUAL for merge in self.merges)
        return self._after(max(self.prompts - clusters, equal))

    def _after(self, merges: int) -> Partition:
        nodes: dict[int, list[int]] = {prompt: [prompt] for prompt in range(self.prompts)}
        for i, merge in enumerate(self.merges[:merges]):
            fewer, more = sorted((nodes.pop(merge.left), nodes.pop(merge.right)), key=len)
            more.extend(fewer)
            nodes[self.prompts + i] = more
        return _in_order(nodes.values())


def dendrogram(embeddings: NDArray[np.floating]) -> Dendrogram:
    """Cluster by average linkage on the cosine distance (step 1 of the paper's SemCT).

    Args:
        embeddings: Sentence vectors, (n, d).

    Returns:
        All n - 1 merges.
    """
    n = len(embeddings)
    different, copies = np.unique(embeddings, axis=0, return_inverse=True)
    if n < 2:
        return Dendrogram(n, ())
    if len(different) == n:
        return Dendrogram(n, _merges(linkage(cosine_distances(embeddings), "average")))
    # Equal prompts merge first, whatever the rest: each different one then starts as large as it is frequent.
    top: list[int] = [-1] * len(different)
    first: list[Merge] = []
    for prompt, i in enumerate(copies.ravel().tolist()):
        if top[i] >= 0:
            first.append(Merge(top[i], prompt, 1.0))
        top[i] = prompt if top[i] < 0 else n + len(first) - 1
    sizes = np.bincount(copies.ravel()).astype(np.float64)
    rest = _merges(_linkage_by_size(squareform(cosine_distances(different)), sizes))
    node = [*top, *range(n + len(first), 2 * n - 1)]
    return Dendrogram(n, (*first, *(Merge(node[m.left], node[m.right], m.similarity) for m in rest)))


def _merges(rows: NDArray[np.float64]) -> tuple[Merge, ...]:
    """The merges in scipy's form of a linkage: left, right, distance, size."""
    return tuple(
        Merge(int(left), int(right), similarity)
        for left, right, similarity in zip(*rows[:, :2].T.tolist(), (1 - rows[:, 2]).tolist(), strict=True)
    )


def _linkage_by_size(distances: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average linkage of points that stand for several equal ones each, by nearest-neighbour chains.

    Args:
        distances: Of every pair, (m, m), symmetric. It is overwritten.
        sizes: How many equal points each of them stands for, (m,).

    Returns:
        Scipy's form of a linkage, (m - 1, 4); sizes count what the points stand for.
    """
    m = len(distances)
    np.fill_diagonal(distances, np.inf)
    weight = sizes.copy()
    found = np.empty((max(m - 1, 0), 3))
    chain: list[int] = []
    left = set(range(m))
    for merge in range(m - 1):
        if not chain:
            chain.append(next(iter(left)))
        while True:
            end = chain[-1]
            nearest = int(distances[end].argmin())
            # Of equally near ones, the one before it in the chain, or the chain would run in a circle.
            if len(chain) > 1 and distances[end, chain[-2]] <= distances[end, nearest]:
                break
            chain.append(nearest)
        a, b = chain.pop(), chain.pop()
        found[merge] = a, b, distances[a, b]
        row = (weight[a] * distances[a] + weight[b] * distances[b]) / (weight[a] + weight[b])
        row[b] = np.inf
        distances[b], distances[:, b] = row, row
        distances[a], distances[:, a] = np.inf, np.inf
        distances[b, b] = np.inf
        weight[b] += weight[a]
        left.discard(a)
    # Chains find merges out of order: sort them, then name each side by the node that it has become.
    rows = np.empty((len(found), 4))
    node, size = list(range(m)), sizes.tolist()
    parent = list(range(m))

    def root(point: int) -> int:
        while parent[point] != point:
            parent[point] = parent[parent[point]]
            point = parent[point]
        return point

    for i, (one, other, distance) in enumerate(found[np.argsort(found[:, 2], kind="stable")].tolist()):
        a, b = root(int(one)), root(int(other))
        parent[a] = b
        size[b] += size[a]
        rows[i] = *sorted((node[a], node[b])), distance, size[b]
        node[b] = m + i
    return rows


def cosine_distances(embeddings: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return 1 - cosine of every pair i < j, row by row as in scipy's condensed form, (n (n - 1) / 2,).

    By matrix products of blocks of rows, which takes a fraction of scipy's ``pdist`` time and next to no memory
    beside the result (400 MB for 10,000 prompts).

    Args:
        embeddings: Sentence vectors, (n, d), none of them zero.
    """
    vectors = embeddings.astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    n = len(vectors)
    distances = np.empty(n * (n - 1) // 2)
    end = 0
    for first in range(0, n, _ROWS):
        cosines = vectors[first : first + _ROWS] @ vectors[first:].T
        for row, cosine in enumerate(cosines):
            others = cosine[row + 1 :]
            np.subtract(1.0, others, out=distances[end : end + len(others)])
            end += len(others)
    # Rounding may leave equal prompts a distance just below 0.
    return np.maximum(distances, 0.0, out=distances)


def best_silhouette(embeddings: NDArray[np.floating], grown: Dendrogram) -> int:
    """Return the number of clusters with the highest mean silhouette by cosine distance.

    All numbers from 2 to 2 sqrt(n) are tried, but none above 64. A prompt's silhouette is (b - a) / max(a, b) with a
    its mean distance to the others of its cluster and b that to the nearest other one; 0 for a cluster of one.
    Of equally good numbers the smallest counts. Fewer than three different prompts, and prompts that no number
    divides well, are one cluster.

    Args:
        embeddings: Unit sentence vectors, (n, d).
        grown: Their dendrogram.
    """
    n = grown.prompts
    vectors = np.asarray(embeddings, np.float64)
    scores = {1: 0.0}
    for clusters in range(2, min(n, math.isqrt(4 * n) + 1, _MOST_SILHOUETTES + 1)):
        groups = grown.cut(clusters)
        if len(groups) < clusters:  # there are no more different prompts
            break
        scores[clusters] = _silhouette(vectors, groups)
    return max(scores, key=lambda k: (round(scores[k], 9), -k))


def _silhouette(vectors: NDArray[np.float64], groups: Partition) -> float:
    """The mean silhouette of unit vectors (n, d)."""
    sizes = np.array([len(group) for group in groups])
    label = np.empty(len(vectors), dtype=np.int64)
    for m, group in enumerate(groups):
        label[list(group)] = m
    sums = np.stack([vectors[list(group)].sum(axis=0) for group in groups])
    distance = sizes - vectors @ sums.T  # summed over each cluster's members
    rows = np.arange(len(vectors))
    own = np.maximum(distance[rows, label], 0) / np.maximum(sizes[label] - 1, 1)
    mean = distance / sizes
    mean[rows, label] = np.inf
    nearest = mean.min(axis=1)
    value = (nearest - own) / np.maximum(np.maximum(nearest, own), 1e-12)
    return float(np.where(sizes[label] > 1, value, 0.0).mean())


def by_entity(prompts: Sequence[str]) -> Partition:
    """Return clusters of prompts with the same main entity, as in semantic-free frameworks [10, 12].

    "A white cat on a windowsill" and "two cats in the rain" share one; "a kitten" is another entity.
    """
    entities = {prompt: main_entity(prompt) for prompt in set(prompts)}
    return _by_key([entities[prompt] for prompt in prompts])


def together(n: int) -> Partition:
    """Return n prompts as one cluster, as in clustering-free frameworks [11]."""
    return (tuple(range(n)),) if n else ()


def alone(n: int) -> Partition:
    """Return n prompts as n clusters."""
    return tuple((i,) for i in range(n))


def medoid(embeddings: NDArray[np.floating]) -> int:
    """Return the index of the member with the highest mean cosine to all members.

    Args:
        embeddings: Unit sentence vectors, (n, d), n at least 1.
    """
    return first_best(embeddings @ embeddings.mean(axis=0))


def first_best(cosines: NDArray[np.floating]) -> int:
    """Return the index of the greatest of some cosines (n,); of several that are as good as equal, the first.

    So two prompts that are each as near to the other have the same medoid on every machine.
    """
    return int(np.argmax(cosines >= cosines.max() - EQUAL))


def mean_similarity(embeddings: NDArray[np.floating]) -> float:
    """Return the mean pairwise cosine of unit sentence vectors (n, d); 1 for a single one."""
    n = len(embeddings)
    if n == 1:
        return 1.0
    total = embeddings.sum(axis=0, dtype=np.float64)
    return float((total @ total - n) / (n * (n - 1)))


def main_entity(prompt: str) -> str:
    """Return the noun that a prompt is about, in the singular and in lower case.

    That is the head of the first noun phrase: the last of its first run of nouns, by the part-of-speech
    tagger of TextBlob (a lexicon of 94,000 English words with rules for context and unknown words). A phrase
    with "of" is about what follows: "a photo of a cat" about a cat, "a slice of pizza" about pizza. A prompt
    without a noun is its own entity.

    The tagger errs on about one prompt in thirty, mostly on a noun that is also a verb or an adverb.
    """
    tag, singularize = _tagger()
    tokens = tag(_POSSESSIVE.sub("", prompt), tokenize=True)
    head, determined = "", False
    for (word, part), (after, after_part) in zip(tokens, [*tokens, ("", ".")][1:], strict=True):
        gerund = word.endswith("ing")
        if head and word.lower() == "of":
            head, determined = "", False
        elif head and gerund and after != "of":  # "an owl landing on a post": a participle, often tagged NN
            break
        elif part.startswith("NN") or (gerund and after == "of"):
            head = singularize(word) if part in {"NNS", "NNPS"} else word
        elif head:
            break
        elif determined and part.startswith("VB") and after_part in _PHRASE_ENDS:  # "a rose at night"
            head = word
        determined = determined or part in {"DT", "PRP$"}
    return (head or prompt).strip().lower()


@functools.cache
def _tagger() -> tuple[Callable[..., list[tuple[str, str]]], Callable[[str], str]]:
    """TextBlob's tagger, and what it makes a noun singular with. NLTK, which it brings, would bring 1.3 s of others."""
    with _as_if_missing("scipy.stats", "sklearn"):
        from textblob.en import tag  # noqa: PLC0415 (slow import)
        from textblob.en.inflect import singularize  # noqa: PLC0415
    return tag, singularize


@contextmanager
def _as_if_missing(*modules: str) -> Iterator[None]:
    """Who imports one of them meanwhile is told that it is not installed, unless it is there already."""
    absent = [module for module in modules if module not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None is Python's sign for it
    try:
        yield
    finally:
        for module in absent:
            del sys.modules[module]


def _by_key(keys: Iterable[Hashable]) -> Partition:
    members: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        members.setdefault(key, []).append(i)
    return _in_order(members.values())


def _in_order(clusters: Iterable[Iterable[int]]) -> Partition:
    return tuple(sorted(tuple(sorted(members)) for members in clusters))
