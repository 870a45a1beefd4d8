"""Costs: the utility's zero point, weights, and links from unshaped to hopeless."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semct.cost import Link, Network, NodeState, Outcome, Weights, device_only, utility

positive = st.floats(1e-3, 1e6)
outcomes = st.builds(Outcome, quality=st.floats(1e-3, 2), latency=positive, energy=positive)
weights = (
    st.tuples(*[st.integers(0, 10)] * 3)
    .filter(any)
    .map(lambda w: Weights(quality=w[0] / sum(w), latency=w[1] / sum(w), energy=w[2] / sum(w)))
)


@given(outcomes, weights)
def test_device_only_against_itself_scores_the_quality_weight(reference: Outcome, w: Weights) -> None:
    assert utility(reference, reference, w) == pytest.approx(w.quality)


@given(outcomes, outcomes, weights, st.floats(1.01, 10))
def test_better_is_more(outcome: Outcome, reference: Outcome, w: Weights, factor: float) -> None:
    before = utility(outcome, reference, w)
    for change in (
        Outcome(quality=outcome.quality * factor, latency=outcome.latency, energy=outcome.energy),
        Outcome(quality=outcome.quality, latency=outcome.latency / factor, energy=outcome.energy),
        Outcome(quality=outcome.quality, latency=outcome.latency, energy=outcome.energy / factor),
    ):
        assert utility(change, reference, w) >= before


def test_utility_is_the_weighted_sum() -> None:
    reference = Outcome(quality=0.5, latency=10.0, energy=100.0)
    outcome = Outcome(quality=0.4, latency=5.0, energy=20.0)
    w = Weights(quality=0.5, latency=0.3, energy=0.2)
    assert utility(outcome, reference, w) == pytest.approx(0.5 * 0.8 + 0.3 * 0.5 + 0.2 * 0.8)


def test_an_energy_that_nobody_meters_counts_as_unchanged() -> None:
    reference = Outcome(quality=0.5, latency=10.0, energy=0.0)
    assert utility(reference, reference, Weights()) == pytest.approx(1 / 3)


@pytest.mark.parametrize("parts", [(0.5, 0.5, 0.5), (0, 0, 0), (1.2, -0.2, 0), (math.nan, 0.5, 0.5)])
def test_weights_that_are_none_are_refused(parts: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and sum to 1"):
        Weights(quality=parts[0], latency=parts[1], energy=parts[2])


def test_an_unshaped_link_takes_its_delay() -> None:
    link = Link(delay=0.02, watts=1.0)
    assert link.seconds(10**9) == 0.02
    assert link.airtime(10**9) == 0.0
    assert link.joules(10**9) == 0.0


@given(rate=st.floats(1, 1e9), delay=st.floats(0, 10), watts=st.floats(0, 10), size=st.integers(0, 10**7))
def test_a_link_takes_delay_and_bits_over_rate(rate: float, delay: float, watts: float, size: int) -> None:
    link = Link(rate=rate, delay=delay, watts=watts)
    assert link.seconds(size) == pytest.approx(delay + 8 * size / rate)
    assert link.joules(size) == pytest.approx(watts * 8 * size / rate)


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": -1.0}, {"rate": math.nan}, {"delay": -1.0}])
def test_a_link_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Link(**wrong)


def test_device_only_is_all_steps_and_one_decode() -> None:
    node = NodeState(step_seconds=0.5, step_joules=3.0, decode_seconds=0.25, decode_joules=7.0)
    network = Network(edge="edge", nodes={"d": node}, uplinks={}, downlinks={}, latent_bytes=1)
    assert device_only(network, "d", 28, 0.9) == Outcome(quality=0.9, latency=14.25, energy=91.0)
