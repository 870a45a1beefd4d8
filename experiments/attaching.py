"""``semct device``: this machine takes a place in a running testbed, and computes at its own pace."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from device_node.node import DeviceSettings
from device_node.process import serve
from experiments.calibrating import measure
from node.enrolment import Door, serve_enrolled
from node.settings import start_logging
from semct import calibration
from semct.calibration import BadProfile
from semct.diffusion import place

_ROWS: Sequence[int] = (1, 2, 4, 8)
_REPEATS = 5


def attach(door: Door, *, model: str, device: str, threads: int, console: Console) -> None:
    """Serve run after run until the testbed ends; ``model`` is measured beforehand, others when a run wants them.

    ``device`` is torch's, or ``auto``. Raises what ``serve_enrolled`` and ``measure`` raise, and ``NoSuchDevice``.
    """
    device = place(device)
    pace_of(model, device=device, threads=threads, console=console)
    start_logging()

    def serve_here(settings: DeviceSettings) -> bool:
        measured = pace_of(settings.models[0], device=device, threads=threads, console=console)
        here = msgspec.structs.replace(
            settings, profile="native", measured=str(measured), threads=threads, torch_device=device
        )
        return serve(here)

    serve_enrolled(DeviceSettings, serve_here, door)


def pace_of(model: str, *, device: str, threads: int, console: Console) -> Path:
    """The profile of this machine's pace with a model: measured once, then kept in the user's cache folder.

    Raises ``ModelNotFound``, and ``OSError`` where it cannot be kept.
    """
    name = model if model.isidentifier() else hashlib.sha256(model.encode()).hexdigest()[:16]
    path = cache_folder() / f"{name}-{f'{threads}-threads' if device == 'cpu' else device.replace(':', '-')}.json"
    try:
        calibration.load(path)
    except BadProfile:
        console.print(f"measuring this machine's pace with {model}, once", highlight=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        measure(path, model=model, rows=_ROWS, repeats=_REPEATS, threads=threads, device=device, console=console)
    return path


def cache_folder() -> Path:
    """Where what was measured here is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "semct" / "pace"
