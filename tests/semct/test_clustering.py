"""Partitions cover every prompt once, keep to K, and do not depend on the order of the batch."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

from semct.clustering import (
    Partition,
    alone,
    best_silhouette,
    by_entity,
    cosine_distances,
    dendrogram,
    main_entity,
    mean_similarity,
    medoid,
    together,
)
from semct.prompts import load_sentence_encoder

THEMES = [
    "a penguin in the snow",
    "a bus at night",
    "a dog in the snow",
    "a pizza at the beach",
    "a red car at night",
    "a panda in the snow",
    "a hamburger at the beach",
    "a tractor at night",
]


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@st.composite
def embeddings(draw: st.DrawFn) -> NDArray[np.float64]:
    """Unit vectors in general position, some of them several times."""
    n, different = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return unit(rng.normal(size=(different, 6)))[rng.integers(different, size=n)]


def assert_partition(partition: Partition, n: int) -> None:
    assert sorted(i for members in partition for i in members) == list(range(n))
    assert all(members == tuple(sorted(members)) for members in partition)
    assert [members[0] for members in partition] == sorted(members[0] for members in partition)


@given(embeddings(), st.integers(1, 15))
def test_every_prompt_is_in_one_of_at_most_k_clusters(vectors: NDArray[np.float64], clusters: int) -> None:
    partition = dendrogram(vectors).cut(clusters)
    assert_partition(partition, len(vectors))
    assert len(partition) == min(clusters, len(np.unique(vectors, axis=0)))


@given(embeddings(), st.integers(1, 15))
def test_equal_prompts_share_a_cluster(vectors: NDArray[np.float64], clusters: int) -> None:
    for members in dendrogram(vectors).cut(clusters):
        outside = np.delete(vectors, members, axis=0)
        assert all(not (outside == vectors[i]).all(axis=1).any() for i in members)


@given(embeddings(), st.integers(1, 15), st.randoms(use_true_random=False))
def test_the_order_of_the_batch_changes_nothing(vectors: NDArray[np.float64], clusters: int, random: object) -> None:
    order = np.random.default_rng(random.getrandbits(32)).permutation(len(vectors))  # type: ignore[attr-defined]
    here = {frozenset(members) for members in dendrogram(vectors).cut(clusters)}
    there = {frozenset(int(order[i]) for i in members) for members in dendrogram(vectors[order]).cut(clusters)}
    assert here == there


@given(embeddings(), st.integers(1, 14))
def test_fewer_clusters_come_from_merging_two(vectors: NDArray[np.float64], clusters: int) -> None:
    tree = dendrogram(vectors)
    fine, coarse = tree.cut(clusters + 1), tree.cut(clusters)
    assert all(any(set(members) <= set(whole) for whole in coarse) for members in fine)


def test_average_linkage_by_hand() -> None:
    degrees = np.radians([0, 10, 50, 120])
    tree = dendrogram(np.stack([np.cos(degrees), np.sin(degrees)], axis=1))
    assert [(merge.left, merge.right) for merge in tree.merges] == [(0, 1), (2, 4), (3, 5)]
    cosines = np.cos(np.radians([10, 50, 40, 120, 110, 70]))
    assert [merge.similarity for merge in tree.merges] == pytest.approx(
        [cosines[0], cosines[1:3].mean(), cosines[3:].mean()]
    )
    assert tree.cut(2) == ((0, 1, 2), (3,))


def test_three_themes_are_found() -> None:
    vectors = load_sentence_encoder().embed(THEMES)
    assert dendrogram(vectors).cut(3) == ((0, 2, 5), (1, 4, 7), (3, 6))


def test_no_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 cluster; 0 were asked for"):
        dendrogram(np.eye(3)).cut(0)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_together_and_alone(n: int) -> None:
    assert_partition(together(n), n)
    assert_partition(alone(n), n)
    assert len(together(n)) == min(n, 1)
    assert len(alone(n)) == n


def test_nothing_to_cluster() -> None:
    assert dendrogram(np.empty((0, 4))).cut(3) == ()
    assert by_entity([]) == ()


@given(embeddings())
def test_the_medoid_is_nearest_to_all(vectors: NDArray[np.float64]) -> None:
    means = (vectors @ vectors.T).mean(axis=1)
    assert means[medoid(vectors)] == pytest.approx(means.max())


@given(embeddings())
def test_of_two_the_medoid_is_the_first(vectors: NDArray[np.float64]) -> None:
    pair = vectors[[0, -1]].astype(np.float32)
    assert medoid(pair) == 0


@given(embeddings())
def test_mean_similarity_is_over_pairs(vectors: NDArray[np.float64]) -> None:
    pairs = [vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i)]
    assert mean_similarity(vectors) == pytest.approx(np.mean(pairs) if pairs else 1.0)


@pytest.mark.parametrize(
    ("prompt", "entity"),
    [
        ("a cat on the beach", "cat"),
        ("A fluffy white cat with blue eyes sitting on a windowsill.", "cat"),
        ("two dogs playing in the park", "dog"),
        ("a photo of a rocket at night", "rocket"),
        ("a slice of pizza in the living room", "pizza"),
        ("portrait of an old fisherman, oil painting", "fisherman"),
        ("a red sports car on a coastal road", "car"),
        ("there is a birthday cake on the table", "cake"),
        ("a rose at night", "rose"),  # tagged as the past of "rise"
        ("a snowy owl landing on a post", "owl"),
        ("a wizard's tower with floating books", "tower"),
        ("Old lighthouses on the coast", "lighthouse"),
        ("running swiftly", "running swiftly"),
        ("", ""),
    ],
)
def test_main_entity(prompt: str, entity: str) -> None:
    assert main_entity(prompt) == entity


def test_prompts_about_one_entity_share_a_cluster() -> None:
    prompts = ["a white cat in a house", "a dog in the rain", "two cats at sea", "a photo of a cat", "dogs"]
    assert by_entity(prompts) == ((0, 2, 3), (1, 4))


@settings(max_examples=50)
@given(st.lists(st.text(max_size=40), max_size=6))
def test_any_text_has_an_entity(prompts: list[str]) -> None:
    assert_partition(by_entity(prompts), len(prompts))


@given(embeddings())
def test_average_linkage_merges_the_closest_pair_of_clusters_every_time(vectors: NDArray[np.float64]) -> None:
    """By the definition, in cubic time: duplicates count as often as they stand in the batch."""
    tree = dendrogram(vectors)
    cosines = vectors @ vectors.T
    clusters = {i: [i] for i in range(len(vectors))}
    for i, merge in enumerate(tree.merges):
        pairs = {(a, b): cosines[np.ix_(clusters[a], clusters[b])].mean() for a in clusters for b in clusters if a < b}
        assert merge.similarity == pytest.approx(max(pairs.values()), abs=1e-9)
        assert pairs[min(merge.left, merge.right), max(merge.left, merge.right)] == pytest.approx(
            merge.similarity, abs=1e-9
        )
        clusters[len(vectors) + i] = clusters.pop(merge.left) + clusters.pop(merge.right)
    assert len(clusters) == 1


def test_a_hundred_thousand_users_with_few_different_prompts_are_clustered() -> None:
    """Only different prompts cost quadratic memory."""
    rng = np.random.default_rng(0)
    different = unit(rng.normal(size=(40, 16)))
    chosen = rng.integers(40, size=100_000)
    partition = dendrogram(different[chosen].astype(np.float32)).cut(5)
    assert_partition(partition, 100_000)
    assert len(partition) == 5


@given(embeddings())
def test_cosine_distances_are_scipys(vectors: NDArray[np.float64]) -> None:
    assert cosine_distances(3 * vectors) == pytest.approx(pdist(vectors, "cosine"), abs=1e-12)


def naive_silhouette(vectors: NDArray[np.float64], partition: Partition) -> float:
    """By the definition, pair by pair."""
    distance = np.clip(1 - vectors @ vectors.T, 0, None)
    values = []
    for group in partition:
        for i in group:
            others = [j for j in group if j != i]
            a = distance[i, others].mean() if others else 0.0
            b = min(distance[i, list(g)].mean() for g in partition if g != group)
            values.append((b - a) / max(a, b) if others and max(a, b) > 0 else 0.0)
    return float(np.mean(values))


@settings(max_examples=60)
@given(embeddings())
def test_the_number_by_silhouette_is_the_best_of_those_tried(vectors: NDArray[np.float64]) -> None:
    n, grown = len(vectors), dendrogram(vectors)
    found = best_silhouette(vectors, grown)
    tried = {k: grown.cut(k) for k in range(2, min(n, math.isqrt(4 * n) + 1)) if len(grown.cut(k)) == k}
    scores = {1: 0.0} | {k: naive_silhouette(vectors, partition) for k, partition in tried.items()}
    assert scores[found] == pytest.approx(max(scores.values()), abs=1e-6)


def test_three_themes_have_the_best_silhouette() -> None:
    vectors = load_sentence_encoder().embed(THEMES)
    assert best_silhouette(vectors, dendrogram(vectors)) == 3
    assert best_silhouette(vectors[:1], dendrogram(vectors[:1])) == 1
    assert best_silhouette(np.repeat(vectors[:1], 4, axis=0), dendrogram(np.repeat(vectors[:1], 4, axis=0))) == 1
