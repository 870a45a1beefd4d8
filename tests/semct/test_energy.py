"""Meters: RAPL's counters as the kernel shows them, and honest words where there are none."""

from pathlib import Path

import pytest

from semct.energy import Gpu, Rapl, find_meter


def package(folder: Path, number: int, microjoules: int, most: int = 1_000_000) -> Path:
    path = folder / f"intel-rapl:{number}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    return path


def test_packages_add_up_and_counters_start_again(tmp_path: Path) -> None:
    meter = Rapl([package(tmp_path, 0, 100_000), package(tmp_path, 1, 900_000)])
    assert meter.name == "RAPL, 2 processor packages"
    assert meter.joules() == 0.0
    package(tmp_path, 0, 350_000)
    assert meter.joules() == pytest.approx(0.25)
    package(tmp_path, 1, 50_000)  # over the end of its range
    assert meter.joules() == pytest.approx(0.25 + 0.15)
    assert meter.joules() == pytest.approx(0.25 + 0.15)


def test_only_packages_count(tmp_path: Path) -> None:
    package(tmp_path, 0, 0)
    part = tmp_path / "intel-rapl:0:0"  # the cores, which the package holds already
    part.mkdir()
    meter, name = find_meter(powercap=tmp_path)
    assert meter is not None
    assert name == meter.name == "RAPL, 1 processor package"


def test_no_counters_are_no_meter(tmp_path: Path) -> None:
    meter, reason = find_meter(powercap=tmp_path)
    assert meter is None
    assert reason.startswith("no meter: the processor shows no energy counters")
    (package(tmp_path, 0, 0) / "energy_uj").unlink()
    meter, reason = find_meter(powercap=tmp_path)
    assert meter is None
    assert "cannot be read" in reason


def test_a_gpu_without_its_reader_is_no_meter() -> None:
    meter, reason = find_meter("cuda:0")
    assert meter is None
    assert reason.startswith("no meter:")


def test_a_gpu_counts_millijoules_from_when_the_meter_was_made() -> None:
    class Gpus:
        millijoules = 5000.0

        def get_total_energy_consumption(self, index: int) -> float:
            assert index == 1
            return self.millijoules

    gpus = Gpus()
    meter = Gpu(gpus, 1, "NVIDIA H200 8308ad1b")
    assert meter.name == "NVML, NVIDIA H200 8308ad1b"
    gpus.millijoules = 7500.0
    assert meter.joules() == 2.5
