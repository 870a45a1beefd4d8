"""Frameworks: plans that lead every request home, the traits of each scheme, and how frameworks are found."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from semct import frameworks
from semct.cache import CacheSettings, LatentCache
from semct.clustering import Number, by_entity
from semct.cost import Link, Network, NodeState, Weights
from semct.frameworks import Batch, UnknownFramework
from semct.prompts import SentenceEncoder, load_sentence_encoder
from semct.public_prompt import MedoidWriter
from semct.quality import load_quality_model
from semct.routes import Plan, Request, shared_steps, steps_by_node

BUILT_IN = [
    "cached",
    "semct-async",
    "clustering-free",
    "device-only",
    "edge-device",
    "hierarchical",
    "hybrid",
    "semantic-free",
    "semct",
    "semct-tree",
]
PROMPTS = [
    "a white cat in the snow",
    "a grey cat in the snow",
    "a bus at night",
    "a red bus at night",
    "a lemon at the beach",
    "a brown dog in the snow",
    "a pear at the beach",
    "a train at night",
]
STEPS = 28


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return load_sentence_encoder()


def batch(encoder: SentenceEncoder, *, seed: int = 7, prompts: list[str] | None = None, clusters: Number = 3) -> Batch:
    asked = PROMPTS if prompts is None else prompts
    devices = [f"device-{i}" for i in range(len(asked))]
    phone = NodeState(step_seconds=0.6, step_joules=150.0, decode_seconds=0.3, decode_joules=70.0)
    return Batch(
        requests=tuple(
            Request(id=f"r{i}", device=d, prompt=p, seed=seed, steps=STEPS)
            for i, (d, p) in enumerate(zip(devices, asked, strict=True))
        ),
        network=Network(
            edge="edge",
            nodes={"edge": NodeState(step_seconds=0.05, step_joules=20.0), **dict.fromkeys(devices, phone)},
            uplinks=dict.fromkeys(devices, Link(rate=20e6, delay=0.005, watts=0.2)),
            downlinks=dict.fromkeys(devices, Link(rate=80e6, delay=0.005, watts=1.0)),
            latent_bytes=512 * 1024,
        ),
        weights=Weights(),
        quality=load_quality_model("sd3-medium"),
        encoder=encoder,
        writer=MedoidWriter(encoder),
        model="embedded",
        clusters=clusters,
        most_shared=13,
        seed=seed,
        cache=LatentCache(CacheSettings(), latent_bytes=512 * 1024),
    )


def plan_of(name: str, asked: Batch) -> Plan:
    return frameworks.load(name)(asked)


def on_edge(plan: Plan, request: str) -> tuple[int, int]:
    """Steps on the edge with the public prompt and with the personal one."""
    cluster = next(c for c in plan.clusters if request in c.members)
    route = next(r for r in plan.routes if r.request == request)
    steps = {s.prompt: s.stop - s.start for s in route.segments if s.node == "edge"}
    shared = steps.pop(cluster.public_prompt, 0)
    return shared, sum(steps.values())


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("users", [1, 2, 8])
def test_every_request_is_led_from_start_to_end(encoder: SentenceEncoder, name: str, users: int) -> None:
    asked = batch(encoder, prompts=PROMPTS[:users])
    plan = plan_of(name, asked)
    assert [r.request for r in plan.routes] == [r.id for r in asked.requests]
    for request, route in zip(asked.requests, plan.routes, strict=True):
        assert (route.segments[0].start, route.segments[-1].stop) == (0, STEPS)
        assert set(route.nodes) <= {"edge", request.device}
        # The device, where it works, works last and with its own user's prompt.
        assert all(s.prompt == request.prompt for s in route.segments if s.node == request.device)
        assert "edge" not in route.nodes[1:]
    assert set(plan.predictions) == {r.id for r in asked.requests}
    members = [m for c in plan.clusters for m in c.members]
    assert sorted(members) == (sorted(plan.predictions) if plan.clusters else [])
    assert plan.clusters == () or sum(c.share for c in plan.clusters) == pytest.approx(1)
    assert asked.seconds["plan"] > 0


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_same_seed_makes_the_same_plan(encoder: SentenceEncoder, name: str) -> None:
    assert plan_of(name, batch(encoder)) == plan_of(name, batch(encoder))


def test_semct_has_k_clusters_of_like_meaning(encoder: SentenceEncoder) -> None:
    for clusters in (1, 2, 3, 5):
        assert len(plan_of("semct", batch(encoder, clusters=clusters)).clusters) == clusters
    plan = plan_of("semct", batch(encoder))
    assert {c.members for c in plan.clusters} == {("r0", "r1", "r5"), ("r2", "r3", "r7"), ("r4", "r6")}
    vectors = {p: encoder.embed([p])[0] for p in PROMPTS}
    for cluster in plan.clusters:
        assert cluster.source == "medoid"
        wishes = [PROMPTS[int(m.removeprefix("r"))] for m in cluster.members]
        assert cluster.public_prompt in wishes
        expected = [float(vectors[w] @ vectors[cluster.public_prompt]) for w in wishes]
        assert cluster.similarity == pytest.approx(expected, abs=1e-5)
    assert max(shared_steps(plan.routes).values()) > 0


@pytest.mark.parametrize("how", ["utility", "silhouette"])
def test_the_number_of_clusters_may_be_found(encoder: SentenceEncoder, how: Literal["utility", "silhouette"]) -> None:
    asked = batch(encoder, clusters=how)
    plan = plan_of("semct", asked)
    assert asked.seconds["cluster"] > 0
    fixed = [plan_of("semct", batch(encoder, clusters=k)) for k in range(1, len(PROMPTS) + 1)]
    assert plan in fixed
    mean = [np.mean([p.utility for p in f.predictions.values()]) for f in fixed]
    if how == "utility":
        assert mean[len(plan.clusters) - 1] >= max(mean) - 0.01
    else:
        assert len(plan.clusters) == 3


def test_hybrid_clusters_by_subject_with_own_splits(encoder: SentenceEncoder) -> None:
    plan = plan_of("hybrid", batch(encoder))
    assert [c.members for c in plan.clusters] == [tuple(f"r{i}" for i in g) for g in by_entity(PROMPTS)]
    assert {c.source for c in plan.clusters} <= {"medoid"}


def test_more_clusters_than_different_wishes_are_not_made(encoder: SentenceEncoder) -> None:
    plan = plan_of("semct", batch(encoder, prompts=["a cat", "a cat", "a dog"], clusters=3))
    assert [c.members for c in plan.clusters] == [("r0", "r1"), ("r2",)]


def test_semantic_free_clusters_by_entity_with_one_split_each(encoder: SentenceEncoder) -> None:
    plan = plan_of("semantic-free", batch(encoder))
    assert [c.members for c in plan.clusters] == [tuple(f"r{i}" for i in g) for g in by_entity(PROMPTS)]
    assert ("r0", "r1") in [c.members for c in plan.clusters]
    for cluster in plan.clusters:
        assert cluster.source == "member"
        assert cluster.public_prompt in {PROMPTS[int(m.removeprefix("r"))] for m in cluster.members}
        stops = {next(r for r in plan.routes if r.request == m).segments[-1].start for m in cluster.members}
        others = [m for m in cluster.members if PROMPTS[int(m.removeprefix("r"))] != cluster.public_prompt]
        assert len({on_edge(plan, m) for m in others}) <= 1
        assert len(stops) <= 1 or len(cluster.members) > 1


def test_clustering_free_is_one_cluster_with_one_split_and_a_random_members_prompt(encoder: SentenceEncoder) -> None:
    words = set()
    for seed in range(6):
        plan = plan_of("clustering-free", batch(encoder, seed=seed))
        (cluster,) = plan.clusters
        assert len(cluster.members) == len(PROMPTS)
        assert cluster.public_prompt in PROMPTS
        assert cluster.share == 1.0
        words.add(cluster.public_prompt)
        others = [r.id for r in batch(encoder).requests if r.prompt != cluster.public_prompt]
        assert len({on_edge(plan, r) for r in others}) == 1
    assert len(words) > 1


def test_edge_device_shares_nothing(encoder: SentenceEncoder) -> None:
    plan = plan_of("edge-device", batch(encoder))
    assert set(shared_steps(plan.routes).values()) == {0}
    assert [c.members for c in plan.clusters] == [(f"r{i}",) for i in range(len(PROMPTS))]
    assert {s.prompt for r in plan.routes for s in r.segments} == set(PROMPTS)
    assert any("edge" in r.nodes for r in plan.routes)


def test_device_only_leaves_the_edge_alone(encoder: SentenceEncoder) -> None:
    asked = batch(encoder)
    plan = plan_of("device-only", asked)
    assert plan.clusters == ()
    assert [r.nodes for r in plan.routes] == [(r.device,) for r in asked.requests]
    # The request still goes to the edge and back, which takes a little off the utility of staying at home.
    for found in plan.predictions.values():
        assert found.latency == pytest.approx(STEPS * 0.6 + 0.3, abs=0.02)
        assert found.utility == pytest.approx(asked.weights.quality, abs=1e-3)


def test_with_a_fast_edge_all_are_predicted_to_serve_better_than_the_device(encoder: SentenceEncoder) -> None:
    plans = {name: plan_of(name, batch(encoder)) for name in BUILT_IN}
    utility = {name: np.mean([p.utility for p in plan.predictions.values()]) for name, plan in plans.items()}
    alone = utility.pop("device-only")
    assert min(utility.values()) > alone
    # On clear themes, sharing by meaning serves better than serving each alone, with less work.
    assert utility["semct"] > utility["edge-device"]
    assert steps_by_node(plans["semct"].routes)["edge"] < steps_by_node(plans["edge-device"].routes)["edge"]


# The registry


@pytest.fixture
def third_party(tmp_path: Path) -> Iterator[Path]:
    """A site folder with an installed distribution that announces a framework."""
    (tmp_path / "elsewhere_plans.py").write_text(
        '"""A framework of another package."""\n'
        "from semct.frameworks import Batch, framework, load\n"
        "from semct.routes import Plan\n"
        '@framework("elsewhere")\n'
        "def plan(batch: Batch) -> Plan:\n"
        '    return load("device-only")(batch)\n'
    )
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[semct.frameworks]\nelsewhere = elsewhere_plans\n")
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path.remove(str(tmp_path))
    sys.modules.pop("elsewhere_plans", None)
    frameworks._registered.pop("elsewhere", None)


def test_all_built_in_frameworks_are_there() -> None:
    assert set(BUILT_IN) <= set(frameworks.names())
    for name in BUILT_IN:
        assert (sys.modules[frameworks.load(name).__module__].__doc__ or "").strip()


def test_an_unknown_name_gets_a_sentence_with_the_known_ones() -> None:
    with pytest.raises(UnknownFramework) as raised:
        frameworks.load("semtc")
    sentence = str(raised.value)
    assert sentence.startswith("framework 'semtc' is not known; there is ")
    assert all(name in sentence for name in BUILT_IN)
    assert "\n" not in sentence


def test_an_installed_package_can_add_a_framework(encoder: SentenceEncoder, third_party: Path) -> None:
    assert "elsewhere" in frameworks.names()
    asked = batch(encoder)
    assert plan_of("elsewhere", asked) == plan_of("device-only", asked)


def test_a_name_cannot_be_taken_twice(third_party: Path) -> None:
    (third_party / "elsewhere_plans.py").write_text(
        'from semct.frameworks import framework\n@framework("semct")\ndef plan(batch):\n    raise AssertionError\n'
    )
    with pytest.raises(
        ValueError, match=r"framework 'semct' of elsewhere_plans is already in semct\.frameworks\.semct"
    ):
        frameworks.names()
    (third_party / "elsewhere-1.0.dist-info" / "entry_points.txt").unlink()
    assert frameworks.load("semct").__module__ == "semct.frameworks.semct"
