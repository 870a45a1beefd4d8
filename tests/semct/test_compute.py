"""Pace: emulated calls take the profile's time, overruns are counted, native ones cost what they cost."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semct import compute
from semct.compute import EMULATED_MODELS, PROFILES, Emulated, EmulatedModel, Native, Profile, UnknownProfile, processor
from semct.diffusion import Denoiser

FAST = Profile(name="fast", tflops=10.0, watts=100.0, source="invented here")
MODEL = EmulatedModel(name="large", step_tflop=2.0, decode_tflop=1.0, latent_bytes=4096, source="invented here")
SMALLER = EmulatedModel(name="smaller", step_tflop=1.0, decode_tflop=1.0, latent_bytes=2048, source="invented here")


STANDS = {"some": MODEL}


class Clock:
    """Time that passes only in sleep and where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(compute, "time", fake)
    return fake


class Slow:
    """A denoiser whose calls take a fixed time of the clock."""

    name = "some"

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds

    def step(self, latents: list[torch.Tensor], *_: object) -> list[torch.Tensor]:
        self._clock.now += self._seconds
        return latents

    def decode(self, latents: list[torch.Tensor]) -> np.ndarray:
        self._clock.now += self._seconds
        return np.zeros((len(latents), 8, 8, 3), np.uint8)


@settings(deadline=None)
@given(rows=st.integers(1, 16), slowdown=st.floats(0.5, 8), real=st.floats(0, 0.0999))
def test_a_call_is_held_for_the_profiles_time(rows: int, slowdown: float, real: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(compute, "time", clock)
        denoiser = Slow(clock, real)
        pace = Emulated(FAST, STANDS, slowdown=slowdown)
        latents, cost = pace.step(denoiser, [torch.zeros(1)] * rows, [], [], [])  # type: ignore[arg-type]
        assert clock.now == pytest.approx(0.2 * rows * slowdown)
        assert len(latents) == rows
        # What stands in the record is the emulated world's: no slowdown in it.
        assert cost.seconds == pytest.approx(0.2 * rows)
        assert cost.joules == pytest.approx(20.0 * rows)
        assert cost.flops == pytest.approx(2e12 * rows)
        assert (cost.overrun, cost.modelled) == (False, True)


def test_a_decode_is_held_too(clock: Clock) -> None:
    pictures, cost = Emulated(FAST, STANDS).decode(Slow(clock, 0.01), [torch.zeros(1)] * 3)  # type: ignore[arg-type]
    assert clock.now == pytest.approx(0.3)
    assert len(pictures) == 3
    assert cost.seconds == pytest.approx(0.3)


@pytest.mark.parametrize(("real", "slowdown", "overrun"), [(0.21, 1.0, True), (0.21, 2.0, False), (0.19, 1.0, False)])
def test_a_call_that_takes_longer_than_the_profile_is_an_overrun(
    clock: Clock, real: float, slowdown: float, overrun: bool
) -> None:
    pace = Emulated(FAST, STANDS, slowdown=slowdown)
    _, cost = pace.step(Slow(clock, real), [torch.zeros(1)], [], [], [])  # type: ignore[arg-type]
    assert cost.overrun is overrun
    assert cost.seconds == pytest.approx(0.2)
    assert clock.now == pytest.approx(max(real, 0.2 * slowdown))


def test_each_denoiser_stands_for_a_model_of_its_own(clock: Clock) -> None:
    pace = Emulated(FAST, {"some": MODEL, "other": SMALLER})
    large, small = Slow(clock, 0.0), Slow(clock, 0.0)
    small.name = "other"
    for denoiser, seconds in ((large, 0.2), (small, 0.1)):
        before = clock.now
        _, cost = pace.step(denoiser, [torch.zeros(1)], [], [], [])  # type: ignore[arg-type]
        assert clock.now - before == pytest.approx(seconds)
        assert cost == pace.step_cost(denoiser)  # type: ignore[arg-type]
    assert pace.latent_bytes == 4096


def test_real_time_is_held_with_the_real_model(tiny: Denoiser) -> None:
    profile = Profile(name="slow", tflops=20.0, watts=1.0, source="invented here")
    pace = Emulated(profile, {tiny.name: MODEL})
    start = time.perf_counter()
    (latent,), cost = pace.step(tiny, [tiny.noise(0)], [0], [4], [tiny.encode("a cat")])
    assert time.perf_counter() - start >= cost.seconds == pytest.approx(0.1)
    assert torch.equal(latent, tiny.run([tiny.noise(0)], 0, 1, 4, ["a cat"])[0])


def test_a_native_call_costs_the_time_and_flops_it_took(tiny: Denoiser) -> None:
    pace = Native()
    start = time.perf_counter()
    _, cost = pace.step(tiny, [tiny.noise(0), tiny.noise(1)], [0, 3], [4, 4], [tiny.encode("a cat")] * 2)
    assert 0 < cost.seconds <= time.perf_counter() - start
    assert cost.flops == 2 * tiny.flops_per_step
    assert (cost.joules, cost.overrun, cost.modelled) == (0.0, False, False)
    _, decoding = pace.decode(tiny, [tiny.noise(0)])
    assert decoding.flops == tiny.flops_per_decode
    assert decoding.seconds > 0


def test_a_native_node_measures_its_step_once(tiny: Denoiser) -> None:
    pace = Native()
    expected = (pace.call_cost(tiny), pace.step_cost(tiny))
    assert min(cost.seconds for cost in expected) >= 0
    assert sum(cost.seconds for cost in expected) > 0
    assert (pace.call_cost(tiny), pace.step_cost(tiny)) == expected
    assert pace.latent_bytes == 0


def test_profiles_and_models_are_found_by_name(tiny: Denoiser) -> None:
    assert isinstance(processor("native", {}, slowdown=1.0), Native)
    pace = processor("a100", {tiny.name: "sd3-medium"}, slowdown=1.0)
    assert pace.profile == "a100"
    assert pace.step_cost(tiny).seconds == pytest.approx(12 / 156)
    assert pace.step_cost(tiny).joules == pytest.approx(400 * 12 / 156)
    assert pace.decode_cost(tiny).seconds == pytest.approx(10.5 / 156)
    assert pace.latent_bytes == 512 * 1024


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda d: processor("abacus", {d.name: "sd3-medium"}, slowdown=1.0),
            "compute profile 'abacus' is not known; there is",
        ),
        (
            lambda d: processor("a100", {d.name: "sd9"}, slowdown=1.0),
            "model 'sd9' is not known; there is sd3-800m, sd3-medium",
        ),
    ],
)
def test_an_unknown_name_gets_a_sentence_with_the_known_ones(
    tiny: Denoiser, make: Callable[[Denoiser], object], sentence: str
) -> None:
    with pytest.raises(UnknownProfile, match=sentence):
        make(tiny)


def test_every_table_entry_says_where_it_is_from() -> None:
    for name, entry in [*PROFILES.items(), *EMULATED_MODELS.items()]:
        assert entry.name == name
        assert len(entry.source) > 20
    assert all(p.tflops > 0 and p.watts > 0 for p in PROFILES.values())


class Ticking:
    """A meter that has counted so much, as a denoiser's calls take it further."""

    name = "a meter"

    def __init__(self) -> None:
        self.total = 0.0

    def joules(self) -> float:
        return self.total


def test_a_native_call_costs_what_its_meter_counts_meanwhile(tiny: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Ticking()
    step = tiny.step

    def drawing(*arguments: object) -> list[torch.Tensor]:
        meter.total += 3.0
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tiny, "step", drawing)
    pace = processor("native", {}, slowdown=1.0, meter=meter)
    assert pace.meter == "a meter"
    assert processor("native", {}, slowdown=1.0).meter is None
    meter.total = 100.0
    noise, text = tiny.noise(0), tiny.encode("")
    _, cost = pace.step(tiny, [noise], [0], [4], [text])
    assert (cost.joules, cost.modelled) == (3.0, False)
    assert pace.step(tiny, [noise], [0], [4], [text])[1].joules == 3.0
    assert pace.decode(tiny, [noise])[1].joules == 0.0
    # What planning expects is power times time.
    assert pace.step_cost(tiny).joules > 0 or pace.call_cost(tiny).joules > 0
    assert Native().step_cost(tiny).joules == 0
