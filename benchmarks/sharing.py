"""What sharing costs in pictures and saves in work, measured on the embedded model without processes.

``python benchmarks/sharing.py writers``: which public prompt gives the best pictures per shared step. Sixteen clusters
of captions, five members each; for every writer, k steps with the cluster's public prompt and the rest with each
member's own, all from one noise; the scorer's mean over the 80 pictures.

``python benchmarks/sharing.py levels``: what sharing at several levels saves at equal measured quality. Fifty users of
the emulated cell (RTX 3090 Ti, A100, SD3 Medium's pace), planned by every framework for a range of weights of quality
against energy, and drawn; once with 50 different captions, once with the cell's 30, so that some ask for the same.
``semct`` may share as many steps as it likes here. Work is counted in steps of 12 TFLOP, each distinct one once.

``python benchmarks/sharing.py arrivals``: requests that come one by one. A hundred and fifty users of the same cell ask
for captions drawn from all of the package's, at several rates; ``semct`` plans them in windows, ``semct-async`` and
``cached`` as they come. The engine runs in virtual time, without a model; scores are the quality curves'. Public
prompts are medoids, and planning takes no time: a language model would add its seconds to every window. The last
column says how far latency is off what is forecast when a plan is made, in the median of requests with edge steps.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from experiments.scenario import PromptSet, load_part
from semct import frameworks
from semct.cache import CacheSettings, LatentCache
from semct.clustering import Number
from semct.compute import EMULATED_MODELS, PROFILES, Cost, Native, Processor
from semct.cost import Link, Network, NodeState, Outcome, Weights, device_only, utility
from semct.diffusion import Denoiser
from semct.engine import Engine, Job, backlog
from semct.prompts import SentenceEncoder, load_sentence_encoder
from semct.public_prompt import LanguageModelWriter, MeanWriter, MedoidWriter, PublicPrompt, RandomMemberWriter, Writer
from semct.quality import Scorer, load_quality_model, load_scorer
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

ASKING = 150
RATES = (0.5, 2, 8)
ROWS_OF_EDGE = 8
NOTHING = torch.empty(0)

USERS = 50
STEP_TFLOP = 12
CELL = ("animals-in-the-snow", "vehicles-at-sunset", "food-at-the-beach")
DISTINCT = (*CELL, "plants-in-the-forest", "things-in-a-living-room", "dogs-here-and-there")
QUALITY_WEIGHTS = (0.3, 0.5, 0.4, 0.6)


def draw(denoiser: Denoiser, routes: Iterable[Route]) -> tuple[dict[str, NDArray[np.uint8]], int]:
    """The picture of each route's request, and how many steps were run: shared ones once, on whatever node."""
    engine = Engine({denoiser.name: denoiser}, Native(), rows=ROWS)
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


def levels(denoiser: Denoiser, scorer: Scorer, console: Console) -> None:
    """The work and the measured quality of semct, semct-tree and hierarchical."""
    encoder = load_sentence_encoder()
    writer = LanguageModelWriter.load("smollm2", encoder)
    groups = prompt_groups()
    cell = [p for name in CELL for p in groups[name]]
    distinct = list(dict.fromkeys(p for name in DISTINCT for p in groups[name]))
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "semct-tree": ("semct-tree", {}),
        "semct, K by utility": ("semct", {"clusters": "utility", "most_shared": STEPS}),
        "semct, K = 3": ("semct", {"clusters": 3, "most_shared": STEPS}),
    }
    for title, prompts in {
        "different captions": distinct[:USERS],
        "the cell's captions": [cell[i % len(cell)] for i in range(USERS)],
    }.items():
        console.print(f"{title}: framework | weight of quality | TFLOP | score | predicted score | planned in, CPU")
        points: dict[str, list[Point]] = {}
        runs = [(label, w) for w in QUALITY_WEIGHTS for label in ways]
        runs.insert(len(ways), ("hierarchical", QUALITY_WEIGHTS[0]))
        for label, weight in runs:
            name, more = ways.get(label, (label, {}))
            batch = cell_batch(encoder, writer, prompts, weight, **more)
            started = time.process_time()
            plan = frameworks.load(name)(batch)
            took = time.process_time() - started
            pictures, steps = draw(denoiser, plan.routes)
            found = scores(scorer, pictures, {r.id: r.prompt for r in batch.requests})
            point = Point(steps * STEP_TFLOP, float(np.mean(list(found.values()))))
            points.setdefault(label, []).append(point)
            predicted = np.mean([p.quality for p in plan.predictions.values()])
            row = f"{weight:g} | {point.tflop:.0f} | {point.score:.3f} | {predicted:.3f} | {1000 * took:.0f} ms"
            console.print(f"{label} | {row}", highlight=False)
        console.print(savings(points))


class Point(NamedTuple):
    """What one plan took and gave."""

    tflop: float
    score: float


def savings(points: Mapping[str, Sequence[Point]]) -> Table:
    """What each framework takes at the quality of each plan of semct, against the least that any semct takes for it."""
    table = Table("score", "semct", *(label for label in points if not label.startswith("semct,")))
    semct = [p for label, found in points.items() if label.startswith("semct,") for p in found]
    for target in sorted({p.score for p in semct}, reverse=True):
        base = least(semct, target)
        cells = []
        for label, found in points.items():
            if not label.startswith("semct,"):
                other = least(found, target)
                cells.append("-" if other is None or base is None else f"{other:.0f} ({other / base - 1:+.0%})")
        if base is not None:
            table.add_row(f"{target:.3f}", f"{base:.0f}", *cells)
    return table


def least(points: Sequence[Point], score: float) -> float | None:
    """The least TFLOP of a plan that reaches a score, or of a mixture of two of them that does so on average."""
    reached = [p.tflop for p in points if p.score >= score]
    for above in points:
        for below in points:
            if below.score < score <= above.score and below.tflop < above.tflop:
                part = (score - below.score) / (above.score - below.score)
                reached.append(below.tflop + part * (above.tflop - below.tflop))
    return min(reached, default=None)


def cell_batch(
    encoder: SentenceEncoder,
    writer: Writer,
    prompts: Sequence[str],
    weight: float,
    *,
    clusters: Number = 3,
    most_shared: int = 13,
) -> frameworks.Batch:
    """A batch of the emulated cell: what weight the quality leaves is the energy's, which goes with the work."""
    model = EMULATED_MODELS["sd3-medium"]

    def state(profile: str) -> NodeState:
        seconds, decode = (t / PROFILES[profile].tflops for t in (model.step_tflop, model.decode_tflop))
        watts = PROFILES[profile].watts
        return NodeState(
            step_seconds=seconds, step_joules=watts * seconds, decode_seconds=decode, decode_joules=watts * decode
        )

    devices = [f"device-{i}" for i in range(len(prompts))]
    return frameworks.Batch(
        requests=tuple(
            Request(id=f"r{i}", device=d, prompt=p, seed=SEED, steps=STEPS)
            for i, (d, p) in enumerate(zip(devices, prompts, strict=True))
        ),
        network=Network(
            edge="edge",
            nodes={"edge": state("a100"), **dict.fromkeys(devices, state("rtx-3090-ti"))},
            uplinks=dict.fromkeys(devices, Link(rate=20e6, delay=0.01, watts=0.2)),
            downlinks=dict.fromkeys(devices, Link(rate=50e6, delay=0.01, watts=1.0)),
            latent_bytes=model.latent_bytes,
        ),
        weights=Weights(quality=weight, latency=0.0, energy=1 - weight),
        quality=load_quality_model("embedded"),
        encoder=encoder,
        writer=writer,
        model="embedded",
        clusters=clusters,
        most_shared=most_shared,
        seed=SEED,
        cache=LatentCache(CacheSettings(), latent_bytes=model.latent_bytes),
    )


def arrivals(_: Denoiser, __: Scorer, console: Console) -> None:
    """What windows and online planning give at several rates of arrival."""
    encoder = load_sentence_encoder()
    writer = MedoidWriter(encoder)
    every = [p for prompts in prompt_groups().values() for p in prompts]
    chance = random.Random(SEED)  # noqa: S311  no secret
    prompts = [chance.choice(every) for _ in range(ASKING)]
    ways = [
        ("semct", 1.0),
        ("semct", 5.0),
        ("semct-tree", 1.0),
        ("cached", 0.0),
        ("semct-async", 0.0),
        ("device-only", 0.0),
    ]
    for rate in RATES:
        columns = ("framework", "window", "TFLOP", "score", "latency, mean", "95 %", "energy", "utility", "hits", "off")
        table = Table(*columns, title=f"{rate:g} requests per second")
        times = list(accumulate(chance.expovariate(rate) for _ in prompts))
        for name, window in ways:
            batch = cell_batch(encoder, writer, prompts, 0.4)
            batch = replace(batch, weights=Weights(quality=0.4, latency=0.3, energy=0.3))
            cell = Cell(batch, name, window)
            tflop, outcomes = cell.play(times)
            references = [device_only(batch.network, r.device, r.steps, batch.alone) for r in batch.requests]
            gained = [utility(o, ref, batch.weights) for o, ref in zip(outcomes, references, strict=True)]
            latency = [o.latency for o in outcomes]
            counts = batch.cache.counts
            off = [abs(cell.expected[r.id] / o.latency - 1) for r, o in zip(batch.requests, outcomes, strict=True)]
            off = [each for each, r in zip(off, batch.requests, strict=True) if r.id in cell.offloaded]
            table.add_row(
                name,
                f"{window:g} s",
                f"{tflop:.0f}",
                f"{np.mean([o.quality for o in outcomes]):.3f}",
                f"{np.mean(latency):.2f} s",
                f"{np.quantile(latency, 0.95):.2f} s",
                f"{np.mean([o.energy for o in outcomes]):.0f} J",
                f"{np.mean(gained):.3f}",
                f"{counts.hits} of {counts.hits + counts.misses}" if counts.hits + counts.misses else "-",
                f"{np.median(off):.0%}" if off else "-",
            )
        console.print(table)


class Cell:
    """An edge whose engine runs in virtual time, and devices that only take time; it is the engine's processor.

    ``expected`` are the latencies that were forecast when plans were made, ``offloaded`` those with steps on the edge.
    """

    def __init__(self, batch: frameworks.Batch, framework: str, window: float) -> None:
        self.now = 0.0
        self.expected: dict[str, float] = {}
        self.offloaded: set[str] = set()
        self._batch = batch
        self._plan = frameworks.load(framework)
        self._window = window
        self._state = batch.network.nodes["edge"]
        denoisers: dict[str, Any] = {batch.model: self}
        self._engine = Engine(denoisers, cast("Processor", self), rows=ROWS_OF_EDGE, clock=lambda: self.now)
        self._outcomes: dict[str, Outcome] = {}
        self._steps = 0
        self._quality: dict[str, float] = {}
        self._left: dict[str, int] = {}
        self._jobs: dict[str, Job] = {}

    def noise(self, _: int) -> Tensor:
        return NOTHING

    def encode(self, *_: object) -> Tensor:
        return NOTHING

    def step(self, _: object, latents: Sequence[object], *__: object) -> tuple[list[Tensor], Cost]:
        """What the engine asks of its processor."""
        seconds = self._state.call_seconds + len(latents) * self._state.step_seconds
        joules = self._state.call_joules + len(latents) * self._state.step_joules
        self.now += seconds
        return [NOTHING] * len(latents), Cost(seconds, joules, 0.0, overrun=False, modelled=True)

    def play(self, times: Sequence[float]) -> tuple[float, list[Outcome]]:
        """TFLOP in all, and what each request got that comes at its time."""
        asked = {r.id: at for r, at in zip(self._batch.requests, times, strict=True)}
        coming, waiting = list(self._batch.requests), list[Request]()
        while len(self._outcomes) < len(asked):
            while coming and asked[coming[0].id] <= self.now:
                waiting.append(coming.pop(0))
            due = asked[waiting[0].id] + self._window if waiting else math.inf
            if waiting and (self.now >= due or not coming):
                self._submit(waiting, asked)
                waiting = []
            elif self._engine.idle:
                self.now = min(due, asked[coming[0].id]) if coming else due
            else:
                for done in self._engine.call():
                    del self._jobs[done.job.request]
                    self._finish(done.job.request, asked, done.joules)
        tflop = (self._engine.totals.rows + self._steps) * STEP_TFLOP
        return tflop, [self._outcomes[r.id] for r in self._batch.requests]

    def _submit(self, waiting: Sequence[Request], asked: Mapping[str, float]) -> None:
        owed = backlog(self._jobs.values(), self._engine.reached())
        nodes = {**self._batch.network.nodes, "edge": msgspec.structs.replace(self._state, backlog=owed)}
        network = msgspec.structs.replace(self._batch.network, nodes=nodes)
        batch = replace(self._batch, requests=tuple(waiting), network=network)
        plan = self._plan(batch)
        forecast = batch.forecast(plan).predictions
        for r in plan.routes:
            self.expected[r.request] = self.now - asked[r.request] + forecast[r.request].latency
            own = tuple(s for s in r.segments if s.node == "edge")
            self._quality[r.request] = plan.predictions[r.request].quality
            self._left[r.request] = r.steps - sum(s.stop - s.start for s in own)
            self._steps += self._left[r.request]
            if not own:
                self._finish(r.request, asked, 0.0)
                continue
            cluster = next((i for i, c in enumerate(plan.clusters) if r.request in c.members), None)
            self.offloaded.add(r.request)
            self._jobs[r.request] = Job(
                request=r.request,
                seed=r.seed,
                steps=r.steps,
                segments=own,
                group=(self.now, cluster),
                weight=plan.share(r.request),
                cache=batch.cache if plan.caching else None,
            )
            self._engine.submit(self._jobs[r.request])

    def _finish(self, request: str, asked: Mapping[str, float], joules: float) -> None:
        """The latent, or the order to begin, goes to the device, which does the rest."""
        network, device = self._batch.network, f"device-{request.removeprefix('r')}"
        left, node, up, down = (
            self._left[request],
            network.nodes[device],
            network.uplinks[device],
            network.downlinks[device],
        )
        size = network.latent_bytes if left < STEPS else network.request_bytes
        self._outcomes[request] = Outcome(
            quality=self._quality[request],
            latency=self.now
            - asked[request]
            + up.seconds(network.request_bytes)
            + down.seconds(size)
            + left * node.lone_seconds
            + node.decode_seconds,
            energy=joules + down.joules(size) + left * node.lone_joules + node.decode_joules,
        )


def prompt_groups() -> dict[str, tuple[str, ...]]:
    """The groups of captions that come with the package."""
    path = Path(__file__).parents[1] / "experiments" / "prompts" / "embedded.yaml"
    prompts: PromptSet = load_part(path, PromptSet, "prompt set")
    return {g.name: g.prompts for g in prompts.groups}


PARTS = {"arrivals": arrivals, "levels": levels, "writers": writers}


def main() -> int:
    """Measure one part and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="what the denoiser runs in")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    PARTS[options.part](
        Denoiser.load("embedded", dtype=getattr(torch, options.dtype)), load_scorer("embedded"), Console(width=120)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
