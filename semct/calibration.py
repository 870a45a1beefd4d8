"""Measures a machine natively into a compute profile: a JSON file that a scenario can name.

A denoiser call takes a fixed time and a time for each of its rows; both come from calls of several sizes by least
squares. A node that names the profile emulates the measured machine with the measured model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from semct.diffusion import Denoiser
from semct.energy import Meter

Amount = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]


class BadProfile(ValueError):
    """A profile file cannot be read or makes no sense."""


class Measured(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fastest call with so many rows, in seconds."""

    rows: Annotated[int, Meta(ge=1)]
    seconds: Positive


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine's pace with one model: a denoiser call takes ``call_seconds + rows * step_seconds``.

    ``watts`` is the mean power while it denoises, none where there was no ``meter``. ``calls`` are the measurements,
    ``error`` the largest relative deviation of the fit from them; ``latent_bytes`` are those of a float16 latent.
    ``source`` says what was measured, with what and when.
    """

    format: Literal["semct-profile"] = "semct-profile"
    version: Literal[1] = 1
    name: str
    model: str
    source: str
    call_seconds: Amount
    step_seconds: Amount
    decode_seconds: Amount
    watts: Amount | None = None
    meter: str
    step_flops: Amount
    decode_flops: Amount
    latent_bytes: Annotated[int, Meta(ge=1)]
    calls: tuple[Measured, ...] = ()
    error: Amount = 0.0


def calibrate(
    denoiser: Denoiser,
    *,
    name: str,
    source: str,
    rows: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 5,
    meter: Meter | None = None,
    metered_by: str = "no meter",
    told: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Measure a denoiser here; the fastest of ``repeats`` calls counts, being the least disturbed.

    Raises ``ValueError`` for fewer than two different numbers of rows.
    """
    if len(set(rows)) < 2:
        raise ValueError(f"two different numbers of rows are needed to tell a call's time from a row's, not {rows}")
    noise = denoiser.noise(0)
    _step_seconds(denoiser, 1)
    denoiser.decode([noise])
    calls = []
    before, busy = meter.joules() if meter else 0.0, 0.0
    for count in sorted(set(rows)):
        told(f"{count} row{'s' if count > 1 else ''}")
        taken = [_step_seconds(denoiser, count) for _ in range(repeats)]
        busy += sum(taken)
        calls.append(Measured(rows=count, seconds=min(taken)))
    watts = (meter.joules() - before) / busy if meter else None
    told("decoding")
    decode = min(_seconds(lambda: denoiser.decode([noise])) for _ in range(repeats))
    call, step, error = fit(calls)
    return Calibration(
        name=name,
        model=denoiser.name,
        source=source,
        call_seconds=call,
        step_seconds=step,
        decode_seconds=decode,
        watts=watts,
        meter=metered_by,
        step_flops=float(denoiser.flops_per_step),
        decode_flops=float(denoiser.flops_per_decode),
        latent_bytes=2 * noise.numel(),
        calls=tuple(calls),
        error=error,
    )


def quick_fit(denoiser: Denoiser) -> tuple[float, float]:
    """Seconds of a call and of a row, from the fastest of three calls of one row and of four."""
    calls = [Measured(rows=n, seconds=min(_step_seconds(denoiser, n) for _ in range(3))) for n in (1, 4)]
    call, step, _ = fit(calls)
    return call, step


def quick_watts(denoiser: Denoiser, meter: Meter, *, seconds: float = 0.5) -> float:
    """Mean power while calls of four rows run for so long: meters count in steps of up to a tenth of a second."""
    before, busy = meter.joules(), 0.0
    while busy < seconds:
        busy += _step_seconds(denoiser, 4)
    return (meter.joules() - before) / busy


def fit(calls: Sequence[Measured]) -> tuple[float, float, float]:
    """Seconds of a call and of a row, neither below 0, and the largest relative deviation from the measurements.

    Least squares of relative deviations, so that small calls count as much as large ones.
    """
    from scipy.optimize import nnls  # noqa: PLC0415 (slow import, and most nodes measure nothing)

    rows = np.array([float(c.rows) for c in calls])
    seconds = np.array([c.seconds for c in calls])
    (call, step), _ = nnls(np.stack([1 / seconds, rows / seconds], axis=1), np.ones(len(calls)))
    error = float(np.abs((call + step * rows) / seconds - 1).max())
    return float(call), float(step), error


def save(calibration: Calibration, path: Path) -> None:
    """Write the profile's file."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n")


def load(path: Path) -> Calibration:
    """The profile in a file; raises ``BadProfile`` in one sentence."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except OSError as error:
        raise BadProfile(f"the compute profile {path} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise BadProfile(f"{path} is no compute profile: {error}") from error


def _step_seconds(denoiser: Denoiser, rows: int) -> float:
    text, noise = denoiser.encode(""), denoiser.noise(0)
    return _seconds(lambda: denoiser.step([noise] * rows, [0] * rows, [1] * rows, [text] * rows))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
