"""Measures what fewer steps and a smaller model cost: `python -m semct.training.tradeoffs --help`.

The same held-out captions and noise at every setting, guidance as shipped, in bfloat16, scored against the caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from semct.diffusion import EMBEDDED, EMBEDDED_SMALL, Denoiser
from semct.quality import Scorer, load_scorer
from semct.tradeoffs import Point, Tradeoffs
from semct.training.scenes import held_out_captions

STEPS = (2, 4, 6, 8, 12, 16, 20, 28)
SWITCHES = (0, 4, 8, 12, 16, 20, 24, 28)
FULL = 28

console = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Judge:
    """Scores what a model makes of captions, each from a noise of its own."""

    def __init__(self, model: Denoiser, scorer: Scorer, captions: Sequence[str]) -> None:
        self._model = model
        self._scorer = scorer
        self.captions = captions
        self.noise = [model.noise(seed) for seed in range(len(captions))]

    def point(self, at: int, latents: Sequence[torch.Tensor]) -> Point:
        """The mean score of the pictures of these latents."""
        scores = self._scorer.score(self._model.decode(latents), self.captions)
        error = float(scores.std(ddof=1) / np.sqrt(len(scores)))
        return Point(at=at, score=round(float(scores.mean()), 4), error=round(error, 4))


def by_steps(judge: Judge, model: Denoiser) -> tuple[Point, ...]:
    """The score of pictures in fewer steps."""
    return tuple(
        judge.point(n, model.run(judge.noise, 0, n, n, judge.captions))
        for n in track(STEPS, "fewer steps", console=console)
    )


def by_switch(judge: Judge, large: Denoiser, small: Denoiser) -> tuple[Point, ...]:
    """The score of pictures that the small model finishes, by the steps that the large one made."""
    points, latents, before = [], judge.noise, 0
    for at in track(SWITCHES, "small model", console=console):
        latents = large.run(latents, before, at, FULL, judge.captions)
        points.append(judge.point(at, small.run(latents, at, FULL, FULL, judge.captions)))
        before = at
    return tuple(points)


@app.command()
def main(
    *,
    large: Annotated[str, typer.Option(help="The large model: a name or a folder.")] = EMBEDDED,
    small: Annotated[str, typer.Option(help="The small model of the same latents.")] = EMBEDDED_SMALL,
    scorer: Annotated[str, typer.Option(help="'embedded', or a CLIP model.")] = "embedded",
    output: Annotated[Path, typer.Option(help="Where the curves go.")] = Path("tradeoffs.json"),
    captions: Annotated[int, typer.Option(min=2, max=40, help="Held-out captions.")] = 32,
) -> None:
    """Score held-out captions in fewer steps, and with the small model from some step on."""
    first, second = (Denoiser.load(name, dtype=torch.bfloat16) for name in (large, small))
    judge = Judge(first, load_scorer(scorer), [example.caption for example in held_out_captions(captions)])
    found = Tradeoffs(
        model=large,
        small_model=small,
        scorer=scorer,
        source=f"{captions} held-out captions, each from its own noise; python -m semct.training.tradeoffs",
        full=FULL,
        by_steps=by_steps(judge, first),
        by_switch=by_switch(judge, first, second),
    )
    for points in (found.by_steps, found.by_switch):
        console.print(" ".join(f"{p.at}:{p.score:.3f}±{p.error:.3f}" for p in points))
    output.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")


if __name__ == "__main__":
    app()
