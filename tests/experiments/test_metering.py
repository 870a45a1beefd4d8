"""Meters that nodes share: every joule once, by busy time, and none where nothing counts them."""

import copy
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.messages import Call, Compute, Result, Spent, Stage
from experiments.metering import own_part, share_out, without_meter
from experiments.served import Served

RAPL = "RAPL, 1 processor package"


def compute(profile: str = "native", meter: str | None = RAPL, machine: str = "box") -> Compute:
    return Compute(profile=profile, step_seconds=1.0, step_joules=1.0, meter=meter, machine=machine)


def spent(node: str, calls: list[tuple[float, float]], watts: float) -> Spent:
    busy = sum(stop - start for start, stop in calls)
    told = tuple(Call(model="m", start=start, stop=stop, steps=(0,)) for start, stop in calls)
    return Spent(
        round="r",
        node=node,
        denoiser_calls=len(calls),
        rows=len(calls),
        flops=0.0,
        busy=busy,
        joules=busy * watts,
        overruns=0,
        calls=told,
    )


def result(request: str, device: str, *stages: Stage) -> Result:
    return Result(round="r", request=request, device=device, outcome="answered", asked=0.0, finished=9.0, stages=stages)


def denoise(node: str, busy: float, joules: float = 0.0) -> Stage:
    return Stage(name="denoise", node=node, start=0.0, stop=4.0, busy=busy, joules=joules)


def served(spents: list[Spent], results: list[Result]) -> Served:
    prompts = {r.request: "p" for r in results}
    return Served(
        round="r",
        framework="f",
        repetition=0,
        seed=1,
        prompts=prompts,
        devices={r.request: r.device for r in results},
        results={r.request: r for r in results},
        spent={s.node: s for s in spents},
    )


def test_nodes_that_are_busy_at_once_share_what_their_meter_counts() -> None:
    # 10 W throughout: a alone for 2 s, both for 2 s, b alone for 1 s. Whoever computes counts all of it.
    round_ = served(
        [spent("a", [(0.0, 4.0)], 10.0), spent("b", [(2.0, 5.0)], 10.0)],
        [result("one", "a", denoise("a", 3.0, 30.0)), result("two", "b", denoise("a", 1.0, 10.0), denoise("b", 3.0))],
    )
    share_out(round_, {"a": compute(), "b": compute()})
    assert round_.spent["a"].joules == pytest.approx(30.0)
    assert round_.spent["b"].joules == pytest.approx(20.0)
    (one,) = round_.results["one"].stages
    on_a, on_b = round_.results["two"].stages
    assert (one.joules, on_a.joules, on_b.joules) == pytest.approx((22.5, 7.5, 20.0))


def test_a_meter_of_another_machine_is_another_meter() -> None:
    both = [spent("a", [(0.0, 4.0)], 10.0), spent("b", [(0.0, 4.0)], 10.0)]
    round_ = served(both, [])
    share_out(round_, {"a": compute(), "b": compute(machine="other")})
    assert [s.joules for s in round_.spent.values()] == pytest.approx([40.0, 40.0])


def test_decoding_is_busy_time_too_and_a_node_that_only_decodes_has_its_joules() -> None:
    decode = Stage(name="decode", node="a", start=0.0, stop=2.0, busy=2.0, joules=20.0)
    round_ = served([spent("a", [], 0.0)], [result("one", "a", decode)])
    share_out(round_, {"a": compute()})
    assert round_.results["one"].stages[0].joules == pytest.approx(20.0)


def test_emulated_nodes_keep_what_their_profile_says_and_native_ones_without_meter_are_named() -> None:
    computes = {"a": compute("a100", None), "b": compute(meter=None), "c": compute()}
    assert without_meter(computes) == {"b"}
    before = served([spent("a", [(0.0, 1.0)], 400.0)], [result("one", "a", denoise("a", 1.0, 400.0))])
    after = copy.deepcopy([before.spent, before.results])
    share_out(before, computes)
    assert [before.spent, before.results] == after


@given(
    st.lists(
        st.lists(st.tuples(st.floats(0, 50), st.floats(0.01, 5)), min_size=1, max_size=6),
        min_size=1,
        max_size=4,
    )
)
def test_the_parts_add_up_to_the_time_in_which_anybody_was_busy(nodes: list[list[tuple[float, float]]]) -> None:
    spans = []
    for lengths in nodes:
        starts = np.cumsum([gap for gap, _ in lengths]) + np.cumsum([0.0, *(length for _, length in lengths[:-1])])
        spans.append(np.array([(s, s + length) for s, (_, length) in zip(starts, lengths, strict=True)]))
    parts = [own_part(own, [o for o in spans if o is not own]) * (own[:, 1] - own[:, 0]).sum() for own in spans]
    events = sorted({float(t) for s in spans for t in s.ravel()})
    anybody = sum(b - a for a, b in pairwise(events) if any(((s[:, 0] <= a) & (s[:, 1] >= b)).any() for s in spans))
    assert sum(parts) == pytest.approx(anybody, rel=1e-6)
