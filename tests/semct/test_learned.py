"""The learned planner: what agents see and earn, how they decide, what a checkpoint holds, and that they learn."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from semct.cost import Backlog, Link, Network, NodeState, Weights
from semct.planner import two_tier
from semct.planner.learned import (
    LEVELS,
    SHARED,
    SHIPPED,
    Field,
    Header,
    NotAPolicy,
    Policy,
    cost,
    field_of,
    load_policy,
    most_shared,
    observe,
    others,
    own,
    personal,
)
from semct.planner.learning import Progress, Settings, draw, exact, gap, judge, learn
from semct.public_prompt import PublicPrompt
from semct.quality import load_quality_model
from semct.routes import Request

QUALITIES = [load_quality_model("sd3-medium"), load_quality_model("embedded")]


def drawn(seed: int, batches: int = 2) -> tuple[np.random.Generator, Field]:
    rng = np.random.default_rng(seed)
    return rng, draw(rng, QUALITIES, batches)


def anything(rng: np.random.Generator, field: Field) -> tuple[np.ndarray, np.ndarray]:
    x = rng.integers(0, most_shared(field) + 1)
    return x, personal(rng.integers(0, LEVELS, field.users), x, field.prices.steps)


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_an_agent_earns_what_its_split_changes_for_all(seed: int) -> None:
    rng, field = drawn(seed, batches=1)
    field = msgspec.structs.replace(field, owed=rng.uniform(0, 2, 1))
    x, y = anything(rng, field)
    n = int(rng.integers(field.users))
    without = (x.copy(), y.copy())
    without[0][n] = without[1][n] = 0
    changed = cost(field, x, y)[0] - cost(field, *without)[0]
    nothing = np.zeros_like(x)
    own_part = own(field, x, y)[n] - own(field, nothing, nothing)[n]
    assert own_part + others(field, x, y).waiting(x, y)[n] == pytest.approx(changed, abs=1e-7)


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_no_decision_beats_the_exact_planner(seed: int) -> None:
    rng, field = drawn(seed)
    field = msgspec.structs.replace(field, owed=rng.choice([0.0, 1.0], len(field.step)))
    least = exact(field)
    for decided in (anything(rng, field), (most_shared(field), np.zeros(field.users, dtype=np.int64))):
        assert (least <= cost(field, *decided) + 1e-9).all()


def test_an_agent_sees_finite_numbers_of_its_own_batch_alone() -> None:
    for seed in range(20):
        rng, field = drawn(seed)
        decided = anything(rng, field)
        seen = observe(field, *decided)
        assert np.isfinite(seen).all()
        half = field.users // 2
        other = (decided[0].copy(), decided[1].copy())
        other[0][half:] = other[1][half:] = 0
        assert np.array_equal(observe(field, *other)[:half], seen[:half])


def header(seen: int = 29) -> Header:
    return Header(observations=seen, hidden=(8, 8), episodes=3, seed=1)


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = Policy(header())
    policy.std.fill_(2.0)
    policy.save(tmp_path / "p.safetensors")
    found = Policy.load(tmp_path / "p.safetensors")
    assert found.header == policy.header
    seen, longest = torch.randn(5, 29), torch.tensor([0, 3, 13, 13, 13])
    assert all(torch.equal(a, b) for a, b in zip(found(seen, longest), policy(seen, longest), strict=True))
    assert int(found(seen, longest)[0].argmax(dim=1)[0]) == 0  # more than x = 0 is ruled out


def test_what_is_no_policy_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(NotAPolicy, match="cannot be read"):
        Policy.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(NotAPolicy, match="cannot be read"):
        Policy.load(path)
    tensors = {"a": torch.zeros(1)}
    for metadata, sentence in (
        (None, "is no policy"),
        ({"policy": msgspec.json.encode(msgspec.structs.replace(header(), version=9)).decode()}, "of version 9"),
        ({"policy": msgspec.json.encode(header()).decode()}, "not those of its header"),
    ):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(NotAPolicy, match=sentence):
            Policy.load(path)


def test_agents_learn(tmp_path: Path) -> None:
    """A few episodes already come nearer to the exact planner than leaving all to the devices."""
    judged = judge(np.random.default_rng(5), QUALITIES, 4, 2)
    curve: list[Progress] = []
    few = Settings(episodes=12, hidden=(32,), scenes=4, batches=8, minibatch=256, learning_rate=3e-3, seed=2)
    policy = learn(QUALITIES, few, judged=judged, every=6, told=curve.append)
    assert [p.episode for p in curve] == [6, 12]
    nothing, lost, best = [np.zeros(j.field.users, dtype=np.int64) for j in judged], 0.0, 0.0
    for each, none in zip(judged, nothing, strict=True):
        lost += float((cost(each.field, none, none) - each.least).sum())
        best -= float(each.least.sum())
    assert gap(policy, judged) < lost / best
    assert curve[-1].gap == pytest.approx(gap(policy, judged))
    again = learn(QUALITIES, few)
    assert all(
        torch.equal(a, b) for a, b in zip(policy.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_the_shipped_policy_is_small_and_near_the_exact_planner() -> None:
    assert SHIPPED.stat().st_size < 300_000
    policy = load_policy("learned")
    assert policy is not None
    assert load_policy("exact") is None
    assert policy.header.gap is not None
    judged = judge(np.random.default_rng(77), QUALITIES, 10, 2)
    assert -1e-9 <= gap(policy, judged) < 0.05


def batch(users: int = 6) -> tuple[tuple[Request, ...], list[tuple[int, ...]], list[np.ndarray], Network]:
    names = [f"d{i}" for i in range(users)]
    device = NodeState(step_seconds=0.3, step_joules=135.0, decode_seconds=0.26, decode_joules=118.0)
    network = Network(
        edge="edge",
        nodes={"edge": NodeState(step_seconds=0.02, step_joules=30.0), **dict.fromkeys(names, device)},
        uplinks=dict.fromkeys(names, Link(rate=2e7)),
        downlinks=dict.fromkeys(names, Link(rate=5e7)),
        latent_bytes=524_288,
    )
    requests = tuple(Request(id=n, device=n, prompt=f"wish of {n}", seed=1, steps=28) for n in names)
    groups = [tuple(range(users // 2)), tuple(range(users // 2, users))]
    return requests, groups, [np.full(len(g), 0.7) for g in groups], network


def test_the_agents_leave_a_busy_edge_alone() -> None:
    requests, groups, similarity, network = batch()
    work = []
    for count in (0, 100_000):
        busy = msgspec.structs.replace(network.nodes["edge"], backlog=(Backlog(steps={"m": count}, requests=10),))
        field = field_of(
            requests,
            groups,
            similarity,
            network=msgspec.structs.replace(network, nodes={**network.nodes, "edge": busy}),
            weights=Weights(),
            quality=QUALITIES[0],
            most_shared=13,
        )
        shared, edge = Policy.load().decide(field)
        work.append(int((shared + edge).sum()))
    assert work[0] > 0 == work[1]


@pytest.mark.parametrize("sharing", [True, False])
def test_a_plan_may_come_from_the_agents(sharing: bool) -> None:
    requests, groups, similarity, network = batch()
    public = [PublicPrompt(f"public {m}", "medoid", 0.7, 1) for m in range(len(groups))]
    plans = [
        two_tier.plan(
            requests,
            groups,
            public,
            similarity,
            model="m",
            network=network,
            weights=Weights(),
            quality=QUALITIES[0],
            most_shared=13,
            sharing=sharing,
            policy=policy,
        )
        for policy in (None, Policy.load())
    ]
    exactly, decided = plans
    assert exactly.gap == pytest.approx(0, abs=1e-9)
    assert decided.gap is None
    assert [r.request for r in decided.routes] == [r.id for r in requests]
    assert sum(c.share for c in decided.clusters) == pytest.approx(1)
    if not sharing:
        assert not any(s.prompt.startswith("public") for r in decided.routes for s in r.segments)
    best, found = (np.mean([p.utility for p in plan.predictions.values()]) for plan in plans)
    assert found >= 0.9 * best


def test_agents_decide_for_requests_of_one_length_only() -> None:
    requests, groups, similarity, network = batch()
    mixed = (msgspec.structs.replace(requests[0], steps=20), *requests[1:])
    with pytest.raises(ValueError, match="one number of steps"):
        field_of(mixed, groups, similarity, network=network, weights=Weights(), quality=QUALITIES[0], most_shared=13)


def test_levels_of_y_reach_from_nothing_to_all_that_is_left() -> None:
    shared = np.arange(SHARED)
    assert personal(np.zeros(SHARED, dtype=np.int64), shared, 28).tolist() == [0] * SHARED
    assert personal(np.full(SHARED, LEVELS - 1), shared, 28).tolist() == (28 - shared).tolist()
