"""The cache keeps within its bound, drops what its policy values least, and leaves the engine's latents as they are."""

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semct.cache import STRIDE, CacheSettings, LatentCache, Policy, Prefix
from semct.compute import Native
from semct.cost import Link, Network, NodeState, Weights
from semct.diffusion import Denoiser
from semct.engine import Done, Engine, Job
from semct.planner import online
from semct.prompts import load_sentence_encoder
from semct.quality import load_quality_model
from semct.routes import Plan, Request, route

STEPS = 12
VECTOR = np.ones(3, np.float32)
LATENT = torch.zeros(1)


def prefix(prompt: str, seed: int = 1) -> Prefix:
    return Prefix(seed=seed, steps=STEPS, model="m", prompt=prompt)


def holding(latents: int, policy: Policy = "lru") -> LatentCache:
    return LatentCache(CacheSettings(megabytes=latents, policy=policy), latent_bytes=1_000_000)


def run(cache: LatentCache, of: Prefix, stop: int) -> None:
    """What planner and engine do for one request."""
    cache.plan(of, VECTOR, stop)
    found = cache.find(of, stop)
    for step in range((found[0] if found else 0) + 1, stop + 1):
        cache.keep(of, step, LATENT)
    cache.reached(of, stop)


def held(cache: LatentCache, of: Prefix) -> list[int]:
    return [s for s in range(STEPS + 1) if (found := cache.find(of, s)) is not None and found[0] == s]


@settings(max_examples=80)
@given(
    requests=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, STEPS)), max_size=30),
    latents=st.integers(1, 8),
    policy=st.sampled_from(get_args(Policy)),
)
def test_the_bound_is_kept_and_every_request_is_a_hit_or_a_miss(
    requests: list[tuple[str, int]], latents: int, policy: Policy
) -> None:
    cache = holding(latents, policy)
    for prompt, stop in requests:
        fresh = cache.fresh_steps(prefix(prompt))
        assert fresh[0] == 0
        assert (np.diff(fresh) <= 1).all()
        run(cache, prefix(prompt), stop)
        assert cache.counts.bytes <= latents * 1_000_000
        assert all(step % STRIDE == 0 for step in held(cache, prefix(prompt)))
    counts = cache.counts
    assert counts.hits + counts.misses == len(requests)
    assert counts.steps_saved <= sum(stop for _, stop in requests)
    known, vectors = cache.prefixes(STEPS, "m")
    assert len(known) == len(vectors)
    assert sum(len(held(cache, p)) for p in known) * 1_000_000 == counts.bytes
    # What is left of nothing is forgotten.
    assert all(held(cache, p) for p in known)


def test_steps_that_are_running_may_be_counted_on() -> None:
    cache = holding(9)
    cache.plan(prefix("a"), VECTOR, 7)
    assert cache.fresh_steps(prefix("a")).tolist() == [0] * 8 + [1, 2, 3, 4, 5]
    cache.plan(prefix("a"), VECTOR, 9)
    assert (cache.counts.hits, cache.counts.misses, cache.counts.steps_saved) == (1, 1, 7)
    for step in range(1, 10):
        cache.keep(prefix("a"), step, LATENT)
    cache.reached(prefix("a"), 7)
    cache.reached(prefix("a"), 9)
    assert cache.fresh_steps(prefix("a")).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert cache.fresh_steps(prefix("never seen")).tolist() == list(range(STEPS + 1))
    cache.miss()
    assert cache.counts.misses == 2


@pytest.mark.parametrize(
    ("policy", "dropped"),
    [
        ("lru", ("a", 4)),  # used first
        ("lfu", ("b", 4)),  # never used again, and the older of two
        ("lcbfu", ("b", 4)),  # once 4 steps, against twice 8, once 8 and three times 4
        ("gain", ("b", 4)),
    ],
)
def test_each_policy_drops_what_it_values_least(policy: Policy, dropped: tuple[str, int]) -> None:
    cache = holding(5, policy)
    run(cache, prefix("a"), 8)
    run(cache, prefix("a"), 5)
    run(cache, prefix("a"), 5)
    run(cache, prefix("b"), 8)
    run(cache, prefix("a"), 9)
    everything = {("a", 4), ("a", 8), ("b", 4), ("b", 8)}
    assert {(p, s) for p in "ab" for s in held(cache, prefix(p))} == everything
    run(cache, prefix("c"), 8)
    assert cache.counts.evictions == 1
    left = {(p, s) for p in "abc" for s in held(cache, prefix(p))}
    assert everything - left == {dropped}


def finish(engine: Engine) -> dict[str, Done]:
    done: dict[str, Done] = {}
    while not engine.idle:
        done |= {d.job.request: d for d in engine.call()}
    return done


@pytest.fixture
def serve(tiny: Denoiser) -> Callable[..., dict[str, Done]]:
    """Runs (request, public prompt, shared steps) together, with or without a cache."""
    engine = Engine({tiny.name: tiny}, Native())

    def served(*asked: tuple[str, str, int], cache: LatentCache | None) -> dict[str, Done]:
        for name, public, shared in asked:
            request = Request(id=name, device="d", prompt=name, seed=1, steps=STEPS)
            spans = (("edge", tiny.name, public, shared), ("edge", tiny.name, name, STEPS - shared))
            if cache is not None:
                cache.begin()
                cache.plan(Prefix(seed=1, steps=STEPS, model=tiny.name, prompt=public), VECTOR, shared)
            engine.submit(Job(request=name, seed=1, steps=STEPS, segments=route(request, *spans).segments, cache=cache))
        return finish(engine)

    return served


def test_a_later_request_starts_where_the_cache_lets_it(serve: Callable[..., dict[str, Done]]) -> None:
    cache = holding(9)
    assert serve(("first", "a cat", 9), cache=cache)["first"].steps == STEPS
    later = serve(("same", "a cat", 8), ("later", "a cat", 11), ("earlier", "a cat", 6), cache=cache)
    # From 8 nothing is missing; to 11 three steps, to 6 two from 4.
    assert [later[name].steps for name in ("same", "later", "earlier")] == [4, 3 + 1, 2 + 6]
    plain = {**serve(("same", "a cat", 8), cache=None), **serve(("later", "a cat", 11), cache=None)}
    for name, done in plain.items():
        torch.testing.assert_close(later[name].latent, done.latent, rtol=1e-4, atol=1e-4)
    assert cache.active == 0
    assert cache.counts.hits == 3


def test_what_was_evicted_is_computed_again(serve: Callable[..., dict[str, Done]]) -> None:
    cache = holding(1)
    serve(("first", "a cat", 8), cache=cache)
    serve(("other", "a dog", 8), cache=cache)
    again = serve(("again", "a cat", 8), cache=cache)["again"]
    assert again.steps == STEPS
    torch.testing.assert_close(
        again.latent, serve(("again", "a cat", 8), cache=None)["again"].latent, rtol=1e-4, atol=1e-4
    )


def test_without_a_cache_nothing_is_kept(serve: Callable[..., dict[str, Done]]) -> None:
    serve(("first", "a cat", 8), cache=None)
    assert serve(("second", "a cat", 8), cache=None)["second"].steps == STEPS


def asked(*prompts: str, seed: int = 7) -> tuple[tuple[Request, ...], np.ndarray]:
    found = tuple(Request(id=p, device="d", prompt=p, seed=seed, steps=28) for p in prompts)
    return found, load_sentence_encoder().embed(prompts)


def planned(cache: LatentCache, *prompts: str, foresee: bool, quality: float = 0.4) -> Plan:
    """What an idle edge plans for these requests, which come together."""
    requests, vectors = asked(*prompts)
    phone = NodeState(step_seconds=0.6, step_joules=150.0, decode_seconds=0.3, decode_joules=70.0)
    return online.plan(
        requests,
        vectors,
        cache,
        model="m",
        network=Network(
            edge="edge",
            nodes={"edge": NodeState(step_seconds=0.05, step_joules=20.0), "d": phone},
            uplinks={"d": Link()},
            downlinks={"d": Link()},
            latent_bytes=1000,
        ),
        weights=Weights(quality=quality, latency=(1 - quality) / 2, energy=(1 - quality) / 2),
        quality=load_quality_model("embedded"),
        most_shared=13,
        foresee=foresee,
    )


@pytest.mark.parametrize("foresee", [False, True])
def test_a_later_request_joins_what_is_like_it(foresee: bool) -> None:
    cache = holding(99)
    first = planned(cache, "a white cat in the snow", foresee=foresee)
    assert first.spared == {}
    assert cache.counts.misses == 1
    (cluster,) = planned(cache, "a grey cat in the snow", foresee=foresee).clusters
    assert cluster.source == "cache"
    assert cluster.public_prompt == "a white cat in the snow"
    later = planned(cache, "a white cat in the snow", foresee=foresee)
    assert later.spared["a white cat in the snow"] == 13
    # Under another prompt no more than is allowed.
    other = planned(cache, "a brown cat in the snow", foresee=foresee)
    assert other.spared["a brown cat in the snow"] <= 13
    assert cache.counts.hits == 3


def test_a_new_public_prompt_has_recent_ones_in_mind() -> None:
    cache = holding(99)
    wishes = ["a bus at night", "a tractor at night", "a red car at night", "a train at night"]
    for wish, vector in zip(wishes[1:], load_sentence_encoder().embed(wishes[1:]), strict=True):
        cache.recent.append((wish, vector))
    (cluster,) = planned(cache, wishes[0], foresee=True, quality=0.2).clusters
    assert cluster.source == "mean"
    assert wishes[0] in cluster.public_prompt
    assert set(cluster.public_prompt) <= set(wishes)
    alone = planned(holding(99), wishes[0], foresee=True)
    assert {s.prompt for s in alone.routes[0].segments} == {wishes[0]}


def test_who_comes_to_a_busy_edge_leaves_more_to_the_device() -> None:
    idle, busy = holding(99), holding(99)
    for _ in range(40):
        busy.begin()
    steps = [
        sum(s.stop - s.start for s in planned(c, "a cat", foresee=True).routes[0].segments if s.node == "edge")
        for c in (idle, busy)
    ]
    assert steps[0] > steps[1]
