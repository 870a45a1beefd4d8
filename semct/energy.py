"""Energy meters of this machine: what its processors or GPUs count themselves, where they may be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

_POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """Counts joules."""

    @property
    def name(self) -> str:
        """What it measures, for the record."""
        ...

    def joules(self) -> float:
        """Joules since the meter was made."""
        ...


class Rapl:
    """The processor packages' own counters (RAPL), through Linux's powercap folders.

    A counter starts again at its range's end; reading at least once in that time (minutes) keeps count.
    """

    def __init__(self, packages: Sequence[Path]) -> None:
        self.name = f"RAPL, {len(packages)} processor package{'s' if len(packages) != 1 else ''}"
        self._packages = tuple(packages)
        self._range = [int((p / "max_energy_range_uj").read_text()) for p in packages]
        self._last = self._read()
        self._total = 0

    def joules(self) -> float:
        """Joules of all packages since the meter was made."""
        now = self._read()
        for after, before, most in zip(now, self._last, self._range, strict=True):
            self._total += after - before if after >= before else after + most - before
        self._last = now
        return self._total / 1e6

    def _read(self) -> list[int]:
        return [int((p / "energy_uj").read_text()) for p in self._packages]


class Gpu:
    """The counter of one NVIDIA GPU (NVML), through zeus. ``name`` tells it from other GPUs, on other machines too."""

    def __init__(self, gpus: Any, index: int, name: str) -> None:
        self.name = f"NVML, {name}"
        self._gpus = gpus
        self._index = index
        self._first = self._read()

    def joules(self) -> float:
        """Joules since the meter was made."""
        return self._read() - self._first

    def _read(self) -> float:
        return float(self._gpus.get_total_energy_consumption(self._index)) / 1e3


def find_meter(device: str = "cpu", *, powercap: Path = _POWERCAP) -> tuple[Meter | None, str]:
    """A meter of torch's ``device``, a GPU or the processors; and its name, or why there is none."""
    if device.startswith("cuda"):
        return _gpu_meter(torch.device(device).index or 0)
    packages = [p for p in sorted(powercap.glob("intel-rapl:*")) if p.name.count(":") == 1]
    if not packages:
        return None, f"no meter: the processor shows no energy counters (RAPL) in {powercap}"
    try:
        meter = Rapl(packages)
    except OSError as error:
        return None, f"no meter: the processor's energy counters cannot be read ({error.strerror}); root may"
    return meter, meter.name


def _gpu_meter(index: int) -> tuple[Meter | None, str]:
    try:
        from zeus.device import get_gpus  # noqa: PLC0415  an extra that machines with a GPU may have
    except ImportError:
        return None, "no meter: reading a GPU's energy takes the package zeus, which is not installed"
    try:
        known = torch.cuda.get_device_properties(index)
        meter = Gpu(get_gpus(), index, f"{known.name} {str(known.uuid)[:8]}")
    except Exception as error:  # whatever the driver has to say
        return None, f"no meter: GPU {index} cannot be read ({error})"
    return meter, meter.name
