"""How long a node computes and what that costs: natively, or emulating other hardware and a larger model.

*Native* takes the time it takes. *Emulated* runs the real denoiser and then holds the call until the time
that a profile gives for the emulated model has passed; a real call that takes longer than that is an
overrun, and is counted. Emulation wraps the denoiser, so neither engine nor nodes know of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from semct.calibration import BadProfile, Calibration, quick_fit, quick_watts
from semct.calibration import load as load_calibration
from semct.diffusion import EMBEDDED, EMBEDDED_SMALL, Conditioning, Denoiser
from semct.energy import Meter

T = TypeVar("T")


class Cost(NamedTuple):
    """What one call took: seconds, joules, FLOPs; whether it overran its profile; whether it is modelled."""

    seconds: float
    joules: float
    flops: float
    overrun: bool
    modelled: bool


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Hardware to emulate: sustained TFLOP/s on a diffusion transformer, and watts while busy.

    Sustained rates are half of the peak that the vendor names: a model of the utilisation, not a measurement.
    """

    name: str
    tflops: float
    watts: float
    source: str

    def cost(self, tflop: float) -> Cost:
        """What so much work takes on this hardware."""
        seconds = tflop / self.tflops
        return Cost(seconds, seconds * self.watts, tflop * 1e12, overrun=False, modelled=True)


class EmulatedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model to emulate: TFLOP a guided step and a decode take, and the bytes of its latent on the wire."""

    name: str
    step_tflop: float
    decode_tflop: float
    latent_bytes: int
    source: str


PROFILES = {
    p.name: p
    for p in (
        Profile(
            name="a100",
            tflops=156.0,
            watts=400.0,
            source="NVIDIA A100 datasheet: 312 TFLOP/s bf16 dense, 400 W (SXM); half of it sustained",
        ),
        Profile(
            name="a100-x3",
            tflops=468.0,
            watts=1200.0,
            source="three A100 of the profile a100, as one device whose work divides freely among them",
        ),
        Profile(
            name="a100-x8",
            tflops=1248.0,
            watts=3200.0,
            source="eight A100 of the profile a100 (the GPUs of one DGX A100), as one device whose work divides freely",
        ),
        Profile(
            name="rtx-3090-ti",
            tflops=40.0,
            watts=450.0,
            source="NVIDIA GA102 whitepaper: 80 TFLOP/s fp16 with fp32 accumulate, 450 W; half of it sustained",
        ),
        Profile(
            name="jetson-orin",
            tflops=21.3,
            watts=60.0,
            source="NVIDIA Jetson AGX Orin 64GB datasheet: 42.5 TFLOP/s fp16 dense, 60 W; half of it sustained",
        ),
    )
}
"""The hardware that can be emulated, by name."""

EMULATED_MODELS = {
    m.name: m
    for m in (
        EmulatedModel(
            name="sd3-medium",
            step_tflop=12.0,
            decode_tflop=10.5,
            latent_bytes=16 * 128 * 128 * 2,
            source="SemCT, Table 1: 16800 TFLOP for 50 x 28 steps; decode counted by torch on diffusers' "
            "AutoencoderKL (which counts 16.9 TFLOP for a guided step of 1024 x 1024 and 154 tokens)",
        ),
        EmulatedModel(
            name="sd3-800m",
            step_tflop=5.6,
            decode_tflop=10.5,
            latent_bytes=16 * 128 * 128 * 2,
            source="modelled: the smallest of the sizes that Stability AI announced with Stable Diffusion 3 (800 M to "
            "8 B parameters, arXiv 2403.03206), taken as its architecture at depth 18 (856 M), for which torch counts "
            "7.87 TFLOP where it counts 16.87 for SD3 Medium (depth 24); that part of SD3 Medium's 12 TFLOP",
        ),
    )
}
"""The models that can be emulated, by name."""

STANDS_FOR = {EMBEDDED: "sd3-medium", EMBEDDED_SMALL: "sd3-800m"}
"""Whose size and pace an emulated node shows for the models that come with the package, unless told otherwise."""


CALIBRATED = ".json"
"""How the name of a profile ends that is a file made by ``semct calibrate``."""


class Processor(Protocol):
    """Runs a denoiser's calls at a pace, and says what they cost. Times are seconds of the emulated world."""

    @property
    def profile(self) -> str:
        """What stands in the record: a profile's name, or ``native``."""
        ...

    @property
    def meter(self) -> str | None:
        """What counts the joules; none where a profile gives them, or nothing does."""
        ...

    @property
    def latent_bytes(self) -> int:
        """The least size of a latent on the wire; shorter ones are padded."""
        ...

    def call_cost(self, denoiser: Denoiser) -> Cost:
        """What the planner expects of a call beside its rows."""
        ...

    def step_cost(self, denoiser: Denoiser) -> Cost:
        """What the planner expects of each row's step in a call."""
        ...

    def decode_cost(self, denoiser: Denoiser) -> Cost:
        """What the planner expects of one decode."""
        ...

    def step(
        self,
        denoiser: Denoiser,
        latents: Sequence[Tensor],
        at: Sequence[int],
        of: Sequence[int],
        conditionings: Sequence[Conditioning],
    ) -> tuple[list[Tensor], Cost]:
        """``Denoiser.step`` and its cost."""
        ...

    def decode(self, denoiser: Denoiser, latents: Sequence[Tensor]) -> tuple[NDArray[np.uint8], Cost]:
        """``Denoiser.decode`` and its cost."""
        ...


class Native:
    """This machine's own pace, and all that its ``meter`` counts during a call; zero joules where it has none.

    What was ``measured`` of its pace before need not be again.
    """

    profile = "native"
    latent_bytes = 0

    def __init__(self, measured: Calibration | None = None, meter: Meter | None = None) -> None:
        self._meter = meter
        self._expected: dict[str, tuple[float, float, float]] = {}
        if measured is not None:
            self._expected[measured.model] = (measured.call_seconds, measured.step_seconds, measured.watts or 0.0)

    @property
    def meter(self) -> str | None:
        """The meter's name."""
        return self._meter.name if self._meter else None

    def call_cost(self, denoiser: Denoiser) -> Cost:
        """Measured on first use of a model: calls of a few rows tell a call's time from a row's."""
        seconds, _, watts = self._measured(denoiser)
        return Cost(seconds, seconds * watts, 0.0, overrun=False, modelled=False)

    def step_cost(self, denoiser: Denoiser) -> Cost:
        """Measured together with ``call_cost``."""
        _, seconds, watts = self._measured(denoiser)
        return Cost(seconds, seconds * watts, float(denoiser.flops_per_step), overrun=False, modelled=False)

    def _measured(self, denoiser: Denoiser) -> tuple[float, float, float]:
        """Seconds of a call and of a row, and watts."""
        if denoiser.name not in self._expected:
            watts = quick_watts(denoiser, self._meter) if self._meter else 0.0
            self._expected[denoiser.name] = (*quick_fit(denoiser), watts)
        return self._expected[denoiser.name]

    def decode_cost(self, denoiser: Denoiser) -> Cost:
        """Its time is taken as free, being small beside the steps'. Its operations are counted here, on first use."""
        return Cost(0.0, 0.0, float(denoiser.flops_per_decode), overrun=False, modelled=False)

    def step(
        self,
        denoiser: Denoiser,
        latents: Sequence[Tensor],
        at: Sequence[int],
        of: Sequence[int],
        conditionings: Sequence[Conditioning],
    ) -> tuple[list[Tensor], Cost]:
        """``Denoiser.step`` and its cost."""
        flops = float(denoiser.flops_per_step * len(latents))
        return self._run(lambda: denoiser.step(latents, at, of, conditionings), flops)

    def decode(self, denoiser: Denoiser, latents: Sequence[Tensor]) -> tuple[NDArray[np.uint8], Cost]:
        """``Denoiser.decode`` and its cost."""
        return self._run(lambda: denoiser.decode(latents), float(denoiser.flops_per_decode * len(latents)))

    def _run(self, call: Callable[[], T], flops: float) -> tuple[T, Cost]:
        before = self._meter.joules() if self._meter else 0.0
        result, seconds = _timed(call)
        joules = self._meter.joules() - before if self._meter else 0.0
        return result, Cost(seconds, joules, flops, overrun=False, modelled=False)


class Emulated:
    """Another machine's pace with other models, held in real time stretched by ``slowdown``.

    ``models`` says which model each denoiser stands for, by the denoiser's name.
    """

    meter = None

    def __init__(self, profile: Profile, models: Mapping[str, EmulatedModel], *, slowdown: float = 1.0) -> None:
        self.latent_bytes = max(m.latent_bytes for m in models.values())
        self._profile = profile
        self._models = models
        self._slowdown = slowdown

    @property
    def profile(self) -> str:
        """The profile's name."""
        return self._profile.name

    def call_cost(self, denoiser: Denoiser) -> Cost:  # noqa: ARG002
        """Nothing: on a saturated GPU a call takes as long as its rows."""
        return self._profile.cost(0.0)

    def step_cost(self, denoiser: Denoiser) -> Cost:
        """One row's step by the profile."""
        return self._profile.cost(self._models[denoiser.name].step_tflop)

    def decode_cost(self, denoiser: Denoiser) -> Cost:
        """One decode by the profile."""
        return self._profile.cost(self._models[denoiser.name].decode_tflop)

    def step(
        self,
        denoiser: Denoiser,
        latents: Sequence[Tensor],
        at: Sequence[int],
        of: Sequence[int],
        conditionings: Sequence[Conditioning],
    ) -> tuple[list[Tensor], Cost]:
        """``Denoiser.step``, held for the profile's time: rows share a saturated GPU, so it grows with them."""
        cost = self._profile.cost(self._models[denoiser.name].step_tflop * len(latents))
        return _held(lambda: denoiser.step(latents, at, of, conditionings), cost, self._slowdown)

    def decode(self, denoiser: Denoiser, latents: Sequence[Tensor]) -> tuple[NDArray[np.uint8], Cost]:
        """``Denoiser.decode``, held for the profile's time."""
        cost = self._profile.cost(self._models[denoiser.name].decode_tflop * len(latents))
        return _held(lambda: denoiser.decode(latents), cost, self._slowdown)


class Calibrated:
    """A machine's pace as it was measured, with the model that it was measured with, held in stretched real time."""

    meter = None

    def __init__(self, measured: Calibration, *, slowdown: float = 1.0) -> None:
        self.profile = measured.name
        self.latent_bytes = measured.latent_bytes
        self._measured = measured
        self._slowdown = slowdown

    def call_cost(self, denoiser: Denoiser) -> Cost:  # noqa: ARG002
        """A call beside its rows, as measured."""
        return self._cost(self._measured.call_seconds, 0.0)

    def step_cost(self, denoiser: Denoiser) -> Cost:  # noqa: ARG002
        """Each row's step in a call, as measured."""
        return self._cost(self._measured.step_seconds, self._measured.step_flops)

    def decode_cost(self, denoiser: Denoiser) -> Cost:  # noqa: ARG002
        """One decode, as measured."""
        return self._cost(self._measured.decode_seconds, self._measured.decode_flops)

    def step(
        self,
        denoiser: Denoiser,
        latents: Sequence[Tensor],
        at: Sequence[int],
        of: Sequence[int],
        conditionings: Sequence[Conditioning],
    ) -> tuple[list[Tensor], Cost]:
        """``Denoiser.step``, held for the time that a call of so many rows was measured to take."""
        m, rows = self._measured, len(latents)
        cost = self._cost(m.call_seconds + rows * m.step_seconds, rows * m.step_flops)
        return _held(lambda: denoiser.step(latents, at, of, conditionings), cost, self._slowdown)

    def decode(self, denoiser: Denoiser, latents: Sequence[Tensor]) -> tuple[NDArray[np.uint8], Cost]:
        """``Denoiser.decode``, held for as long as it was measured to take, one after the other."""
        m, rows = self._measured, len(latents)
        cost = self._cost(rows * m.decode_seconds, rows * m.decode_flops)
        return _held(lambda: denoiser.decode(latents), cost, self._slowdown)

    def _cost(self, seconds: float, flops: float) -> Cost:
        return Cost(seconds, seconds * (self._measured.watts or 0.0), flops, overrun=False, modelled=True)


class UnknownProfile(ValueError):
    """A scenario names hardware or a model to emulate that is not in the tables, or a file that is no profile."""


def check_names(profile: str, models: Iterable[str]) -> None:
    """Raise ``UnknownProfile`` unless a node can compute like this."""
    if profile.endswith(CALIBRATED):
        calibrated(profile, models)
    elif profile != Native.profile:
        _named(PROFILES, profile, "compute profile")
        for model in models:
            _named(EMULATED_MODELS, model, "emulated model")


def processor(
    profile: str, models: Mapping[str, str], *, slowdown: float, measured: str = "", meter: Meter | None = None
) -> Processor:
    """The processor of a node: ``profile`` is ``native``, a name in ``PROFILES``, or the file of a calibrated one.

    ``models`` are names in ``EMULATED_MODELS``: what each of the node's denoisers stands for, by its name. ``measured``
    is a calibrated profile's file that says what a native node is expected to take; the ``meter`` counts its energy.
    """
    if profile.endswith(CALIBRATED):
        return calibrated(profile, models, slowdown=slowdown)
    if profile == Native.profile:
        return Native(_measured(measured) if measured else None, meter)
    return Emulated(
        _named(PROFILES, profile, "compute profile"),
        {denoiser: _named(EMULATED_MODELS, model, "emulated model") for denoiser, model in models.items()},
        slowdown=slowdown,
    )


def calibrated(path: str, models: Iterable[str], *, slowdown: float = 1.0) -> Calibrated:
    """The processor of a calibrated profile's file, for a node with these models.

    Raises ``UnknownProfile`` where the file is none, or for several models, of which it was measured with but one.
    """
    names = list(models)
    if len(names) > 1:
        raise UnknownProfile(f"the profile {path} was measured with one model; a node cannot run {names} by it")
    return Calibrated(_measured(path), slowdown=slowdown)


def _measured(path: str) -> Calibration:
    try:
        return load_calibration(Path(path))
    except BadProfile as error:
        raise UnknownProfile(str(error)) from error


def _named(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise UnknownProfile(f"{what} {name!r} is not known; there is {', '.join(sorted(table))}")
    return table[name]


def _held(call: Callable[[], T], cost: Cost, slowdown: float) -> tuple[T, Cost]:
    """What a call gives, once the time has passed that it is to take; an overrun where that is over before."""
    result, real = _timed(call)
    wanted = cost.seconds * slowdown
    if real > wanted:
        return result, cost._replace(overrun=True)
    time.sleep(wanted - real)
    return result, cost


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start
