"""``semct calibrate``: this machine's own pace with a model, as a profile file and as a table."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.record import provenance
from semct import calibration
from semct.calibration import Calibration
from semct.diffusion import Denoiser
from semct.energy import find_meter


def measure(
    path: Path, *, model: str, rows: Sequence[int], repeats: int, threads: int, device: str, console: Console
) -> Calibration:
    """Measure this machine into the profile file ``path``, which gives the profile its name.

    ``device`` is torch's. Raises ``ModelNotFound``, and ``OSError`` where the file cannot be written.
    """
    torch.set_num_threads(threads)
    meter, metered_by = find_meter(device)
    with console.status("loading the model") as status:
        denoiser = Denoiser.load(model, device=device)
        found = calibration.calibrate(
            denoiser,
            name=path.stem,
            source=_source(device, threads),
            rows=rows,
            repeats=repeats,
            meter=meter,
            metered_by=metered_by,
            told=status.update,
        )
    calibration.save(found, path)
    return found


def render(found: Calibration) -> Table:
    """The measurements beside what the profile gives for them."""
    table = Table(
        box=SIMPLE_HEAD,
        title=f"{found.name}: {found.model}",
        title_justify="left",
        caption_justify="left",
        caption=f"A call takes {1e3 * found.call_seconds:.2f} ms and {1e3 * found.step_seconds:.2f} ms for each row; "
        f"decoding {1e3 * found.decode_seconds:.2f} ms.\n"
        + (f"{found.watts:.1f} W while denoising ({found.meter})." if found.watts is not None else found.meter + "."),
    )
    for title in ("rows", "measured (ms)", "profile (ms)"):
        table.add_column(title, justify="right")
    for call in found.calls:
        expected = found.call_seconds + call.rows * found.step_seconds
        table.add_row(str(call.rows), f"{1e3 * call.seconds:.2f}", f"{1e3 * expected:.2f}")
    return table


def _source(device: str, threads: int) -> str:
    known = provenance()
    hardware = known.hardware
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    machine = name or (f"{hardware.cpu}, {threads} torch thread{'s' if threads > 1 else ''}" if hardware else device)
    return f"measured on {machine}, {platform.system()}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}"
