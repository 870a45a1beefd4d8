"""What sharing costs in pictures and saves in work, measured on the embedded model without processes.

``python benchmarks/sharing.py writers``: which public prompt gives the best pictures per shared step. Sixteen clusters
of captions, five members each; for every writer, k steps with the cluster's public prompt and the rest with each
member's own, all from one noise; the scorer's mean over the 80 pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.scenario import PromptSet, _load
from semct.compute import Native
from semct.diffusion import Denoiser
from semct.engine import Engine, Job
from semct.prompts import load_sentence_encoder
from semct.public_prompt import LanguageModelWriter, MeanWriter, MedoidWriter, PublicPrompt, RandomMemberWriter, Writer
from semct.quality import Scorer, load_scorer
from semct.routes import Request, Route, route

STEPS = 28
SEED = 1
ROWS = 32
CLUSTERS = (
    *("rocket-at-night", "turtle-underwater", "cactus-in-the-desert"),
    *("roses-here-and-there", "pizza-and-burgers-by-the-sea", "owls-and-cats-at-night", "cars-and-buses-downtown"),
    *("food-at-the-beach", "vehicles-at-sunset", "plants-in-the-forest", "swimmers-underwater"),
    *("dogs-here-and-there", "animals-in-the-snow", "things-in-a-living-room", "anything-in-the-desert"),
    "animals-anywhere",
)
MEMBERS = 5
SHARED = (8, 12, 16, 20)


def draw(denoiser: Denoiser, routes: Iterable[Route]) -> tuple[dict[str, NDArray[np.uint8]], int]:
    """The picture of each route's request, and how many steps were run: shared ones once, on whatever node."""
    engine = Engine({denoiser.name: denoiser}, Native(denoiser), rows=ROWS)
    for r in routes:
        engine.submit(Job(request=r.request, seed=r.seed, steps=r.steps, segments=r.segments))
    pictures = {}
    while not engine.idle:
        for done in engine.call():
            pictures[done.job.request] = denoiser.decode([done.latent])[0]
    return pictures, engine.totals.rows


def scores(scorer: Scorer, pictures: Mapping[str, NDArray[np.uint8]], prompts: Mapping[str, str]) -> dict[str, float]:
    """The score of each request's picture against its personal prompt."""
    names = list(pictures)
    found = scorer.score(np.stack([pictures[n] for n in names]), [prompts[n] for n in names])
    return dict(zip(names, map(float, found), strict=True))


def writers(denoiser: Denoiser, scorer: Scorer, console: Console) -> None:
    """Which public prompt gives the best pictures per shared step."""
    encoder = load_sentence_encoder()
    groups = prompt_groups()
    clusters = [groups[name][:: max(1, len(groups[name]) // MEMBERS)][:MEMBERS] for name in CLUSTERS]
    by_name: dict[str, Writer] = {
        "random": RandomMemberWriter(encoder),
        "medoid": MedoidWriter(encoder),
        "best-of-n": LanguageModelWriter.load("smollm2", encoder, plain=True),
        "smollm2": LanguageModelWriter.load("smollm2", encoder),
        "mean": MeanWriter(encoder),
    }
    alone = shared_runs(denoiser, scorer, clusters, [PublicPrompt("", "member", 0, 0)] * len(clusters), 0)
    console.print(f"no sharing: {np.mean(alone):.3f} over {len(alone)} pictures", highlight=False)
    table = Table("writer", "similarity", *(f"k = {k}" for k in SHARED))
    paired = Table("against smollm2", *(f"k = {k}" for k in SHARED))
    found: dict[tuple[str, int], NDArray[np.float64]] = {}
    for name, writer in track(list(by_name.items()), console=console, transient=True):
        public = writer.write(clusters, SEED)
        for k in SHARED:
            found[name, k] = shared_runs(denoiser, scorer, clusters, public, k)
        table.add_row(
            name, f"{np.mean([p.similarity for p in public]):.3f}", *(f"{found[name, k].mean():.3f}" for k in SHARED)
        )
    for name in by_name:
        if name != "smollm2":
            gaps = [cluster_gaps(found[name, k] - found["smollm2", k]) for k in SHARED]
            paired.add_row(name, *(f"{g.mean():+.3f} ± {1.96 * g.std(ddof=1) / len(g) ** 0.5:.3f}" for g in gaps))
    console.print(table)
    console.print(paired)


def cluster_gaps(gaps: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each cluster: its members' pictures are not independent."""
    return gaps.reshape(len(CLUSTERS), MEMBERS).mean(axis=1)


def shared_runs(
    denoiser: Denoiser, scorer: Scorer, clusters: Sequence[Sequence[str]], public: Sequence[PublicPrompt], shared: int
) -> NDArray[np.float64]:
    """The scores (pictures,) where each cluster shares that many steps, cluster by cluster."""
    routes, prompts = [], {}
    for m, (members, p) in enumerate(zip(clusters, public, strict=True)):
        for n, prompt in enumerate(members):
            request = Request(id=f"{m}-{n}", device="device", prompt=prompt, seed=SEED, steps=STEPS)
            spans = (("edge", denoiser.name, p.text, shared), ("edge", denoiser.name, prompt, STEPS - shared))
            routes.append(route(request, *spans))
            prompts[request.id] = prompt
    pictures, _ = draw(denoiser, routes)
    found = scores(scorer, pictures, prompts)
    return np.array([found[name] for name in prompts])


def prompt_groups() -> dict[str, tuple[str, ...]]:
    """The groups of captions that come with the package."""
    path = Path(__file__).parents[1] / "experiments" / "prompts" / "embedded.yaml"
    prompts: PromptSet = _load(path, PromptSet, "prompt set")
    return {g.name: g.prompts for g in prompts.groups}


PARTS = {"writers": writers}


def main() -> int:
    """Measure one part and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    PARTS[options.part](Denoiser.load("embedded"), load_scorer("embedded"), Console(width=120))
    return 0


if __name__ == "__main__":
    sys.exit(main())
