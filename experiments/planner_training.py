"""``semct train-planner``: agents learn to split, and leave a checkpoint with their learning curve."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress as Bar

from semct.planner.learning import Progress, Settings, judge, learn
from semct.quality import load_quality_model

_JUDGED = (25, 4)  # scenes, and batches of each, that no policy learns on
_SEED = 999  # of those


def train(folder: Path, settings: Settings, *, qualities: Sequence[str], every: int, console: Console) -> float:
    """Train a policy, leave ``policy.safetensors``, ``learning.csv`` and ``learning.svg``, and return its gap.

    The gap is the share of the exact planner's mean utility that it misses, on batches that it did not learn on.
    Raises ``QualityModelError``, and ``OSError`` where the folder cannot be written.
    """
    torch.set_num_threads(1)
    models = [load_quality_model(name) for name in qualities]
    folder.mkdir(parents=True, exist_ok=True)
    judged = judge(np.random.default_rng(_SEED), models, *_JUDGED)
    curve: list[Progress] = []
    with Bar(console=console) as bar:
        task = bar.add_task("episodes", total=settings.episodes)

        def told(point: Progress) -> None:
            curve.append(point)
            write_curve(folder, curve)
            gap = "" if point.gap is None else f", {100 * point.gap:.2f} % below the exact planner"
            bar.update(task, completed=point.episode, description=f"episode {point.episode}{gap}")

        policy = learn(models, settings, judged=judged, every=every, told=told)
    last = curve[-1].gap
    policy.header = msgspec.structs.replace(policy.header, gap=last)
    policy.save(folder / "policy.safetensors")
    return float("nan") if last is None else last


def write_curve(folder: Path, curve: Sequence[Progress]) -> None:
    """The learning curve so far, as CSV and as a figure."""
    with (folder / "learning.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(Progress.__struct_fields__)
        rows.writerows(msgspec.structs.astuple(point) for point in curve)
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    points = [(p.episode, 100 * p.gap) for p in curve if p.gap is not None]
    axes.plot([e for e, _ in points], [g for _, g in points], marker="o", markersize=3)
    axes.set(xlabel="episode", ylabel="utility below the exact planner (%)", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(folder / "learning.svg")
    plt.close(figure)
