"""Calibration: a call's and a row's time from measurements, profile files, and what nodes make of them."""

import dataclasses
import re
import time
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semct.calibration import BadProfile, Calibration, Measured, calibrate, fit, load, quick_fit, save
from semct.compute import Calibrated, UnknownProfile, check_names, processor
from semct.diffusion import Denoiser

PROFILE = Calibration(
    name="box",
    model="m",
    source="invented here",
    call_seconds=0.03,
    step_seconds=0.01,
    decode_seconds=0.02,
    watts=50.0,
    meter="a meter",
    step_flops=2e9,
    decode_flops=1e9,
    latent_bytes=2048,
)


@dataclasses.dataclass
class Steady:
    """A meter that counts a fixed power."""

    watts: float
    name: str = "steady"

    def __post_init__(self) -> None:
        self._start = time.perf_counter()

    def joules(self) -> float:
        return self.watts * (time.perf_counter() - self._start)


@given(st.floats(0, 1), st.floats(1e-4, 1), st.lists(st.integers(1, 64), min_size=2, max_size=8, unique=True))
def test_what_follows_the_form_is_found_again(call: float, step: float, rows: list[int]) -> None:
    found = fit([Measured(rows=n, seconds=call + step * n) for n in rows])
    assert found == pytest.approx((call, step, 0.0), rel=1e-6, abs=1e-6)


def test_times_that_grow_faster_than_rows_have_no_call_below_zero() -> None:
    call, step, error = fit([Measured(rows=1, seconds=0.1), Measured(rows=8, seconds=1.6)])
    assert call == 0.0
    assert 0.1 <= step <= 0.2
    assert error == pytest.approx(max(step / 0.1 - 1, 1 - step / 0.2))


def test_a_machine_is_measured_with_the_real_model(tiny: Denoiser) -> None:
    told: list[str] = []
    found = calibrate(
        tiny, name="here", source="a test", rows=(4, 1), repeats=2, meter=Steady(30.0), metered_by="steady",
        told=told.append,
    )  # fmt: skip
    assert [c.rows for c in found.calls] == [1, 4]
    assert all(c.seconds > 0 for c in found.calls)
    assert told == ["1 row", "4 rows", "decoding"]
    assert found.call_seconds + found.step_seconds > 0
    assert found.decode_seconds > 0
    # The meter also counts what lies between the calls.
    assert found.watts is not None
    assert found.watts >= 30.0
    assert (found.step_flops, found.decode_flops) == (tiny.flops_per_step, tiny.flops_per_decode)
    assert found.latent_bytes == 2 * tiny.noise(0).numel()
    assert (found.name, found.model, found.meter) == ("here", tiny.name, "steady")


def test_without_a_meter_there_are_no_watts(tiny: Denoiser) -> None:
    assert calibrate(tiny, name="here", source="a test", rows=(1, 2), repeats=1).watts is None
    assert min(quick_fit(tiny)) >= 0


def test_one_size_of_call_is_not_enough(tiny: Denoiser) -> None:
    with pytest.raises(ValueError, match="two different numbers of rows"):
        calibrate(tiny, name="here", source="a test", rows=(2, 2))


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    save(PROFILE, tmp_path / "box.json")
    assert load(tmp_path / "box.json") == PROFILE


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is no compute profile"),
        ('{"format": "other"}', "is no compute profile"),
        (msgspec.json.encode(msgspec.structs.replace(PROFILE, step_seconds=-1.0)).decode(), "step_seconds"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_in_one_sentence(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "box.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadProfile, match=re.escape(str(path))) as raised:
        load(path)
    assert sentence in str(raised.value)
    with pytest.raises(UnknownProfile, match=sentence):
        check_names(str(path), ["sd3-medium"])


def test_a_node_takes_the_measured_time(tiny: Denoiser, tmp_path: Path) -> None:
    save(PROFILE, tmp_path / "box.json")
    check_names(str(tmp_path / "box.json"), ["embedded"])
    pace = processor(str(tmp_path / "box.json"), {tiny.name: "any"}, slowdown=2.0)
    assert isinstance(pace, Calibrated)
    assert (pace.profile, pace.latent_bytes) == ("box", 2048)
    assert pace.call_cost(tiny).seconds == 0.03
    assert (pace.step_cost(tiny).seconds, pace.step_cost(tiny).joules) == (0.01, pytest.approx(0.5))
    assert pace.decode_cost(tiny).flops == 1e9
    with pytest.raises(UnknownProfile, match="measured with one model"):
        check_names(str(tmp_path / "box.json"), ["embedded", "embedded-small"])
    start = time.perf_counter()
    latents, cost = pace.step(tiny, [tiny.noise(0)] * 2, [0, 1], [4, 4], [tiny.encode("a cat")] * 2)
    assert time.perf_counter() - start >= 2 * 0.05
    assert cost.seconds == pytest.approx(0.05)
    assert cost.joules == pytest.approx(2.5)
    assert (cost.flops, cost.modelled) == (4e9, True)
    alone = tiny.run([tiny.noise(0)], 0, 1, 4, ["a cat"])[0]
    assert torch.allclose(latents[0], alone, atol=1e-5)
    pictures, cost = pace.decode(tiny, [tiny.noise(0)])
    assert len(pictures) == 1
    assert cost.seconds == pytest.approx(0.02)
