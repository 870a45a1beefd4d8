"""The engine against diffusers' own pipeline called per request: ``python benchmarks/engine.py``.

Sixteen requests in two clusters, 28 steps each, of which the first 14 are shared by the cluster and run with its
public prompt. The pipeline does what a user would do today: one call per request, all steps with the personal
prompt. So the engine does less work by plan (sharing) and does it in fuller calls (batching); the table says how
much comes from which.

Counted: denoising from noise to the final latent, with the pipeline's and the engine's own bookkeeping. Not counted,
for either: encoding prompts (embeddings are given), decoding latents, loading. Same weights, device, threads, float
type, guidance and schedule; repetitions of all parts are interleaved, since other load on the machine comes and goes.
The limit is the time that the engine's FLOPs would take at the best rate that the bare transformer reached in any of
the batch sizes tried, measured in the same repetition. FLOPs are counted by torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_log
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from semct.compute import Native
from semct.diffusion import ASSETS, EMBEDDED, Conditioning, Denoiser
from semct.engine import Done, Engine, Job
from semct.routes import Request, route

CLUSTERS = {
    "an animal in the snow": [
        *("a white cat in the snow", "a brown dog in the snow", "an owl in the snow", "a fox in the snow"),
        *("a grey cat in the snow", "a black dog in the snow", "a bird in the snow", "a hare in the snow"),
    ],
    "fruit on a table": [
        *("a red apple on a table", "a lemon on a table", "a pear on a table", "grapes on a table"),
        *("a green apple on a table", "an orange on a table", "cherries on a table", "a melon on a table"),
    ],
}
STEPS = 28
SHARED = 14
SWEEP = (2, 4, 8, 16, 32, 64)
LEAST_SPEED_UP = 2.0
MOST_OF_LIMIT = 1.3


def load_pipeline(model: str) -> Any:
    """Diffusers' pipeline on the same folder, without text encoders: embeddings are given."""
    without_text = dict.fromkeys([f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")])
    folder = str(ASSETS / EMBEDDED) if model == EMBEDDED else model
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **without_text)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_pipeline(pipeline: Any, denoiser: Denoiser, prompts: Sequence[str]) -> list[Tensor]:
    """One call of the pipeline for each prompt."""
    null = denoiser.encode("")
    _, height, width = denoiser.latent_shape
    scale = pipeline.vae_scale_factor
    finished = []
    for prompt in prompts:
        text = denoiser.encode(prompt)
        finished += pipeline(
            prompt_embeds=text.tokens[None],
            pooled_prompt_embeds=text.pooled[None],
            negative_prompt_embeds=null.tokens[None],
            negative_pooled_prompt_embeds=null.pooled[None],
            guidance_scale=denoiser.guidance,
            num_inference_steps=STEPS,
            height=height * scale,
            width=width * scale,
            latents=denoiser.noise(1)[None],
            output_type="latent",
        ).images
    return finished


def jobs(denoiser: Denoiser) -> list[Job]:
    """All requests as jobs whose whole route is on this node."""
    found = []
    for public, members in CLUSTERS.items():
        for prompt in members:
            request = Request(id=prompt, device="device", prompt=prompt, seed=1, steps=STEPS)
            spans = (("edge", denoiser.name, public, SHARED), ("edge", denoiser.name, prompt, STEPS - SHARED))
            segments = route(request, *spans).segments
            found.append(Job(request=prompt, seed=1, steps=STEPS, segments=segments, group=public))
    return found


def by_engine(denoiser: Denoiser, work: Sequence[Job], rows: int) -> tuple[list[Done], int]:
    """All jobs at once; also how many denoiser calls that took."""
    engine = Engine({denoiser.name: denoiser}, Native(), rows=rows)
    for job in work:
        engine.submit(job)
    done: list[Done] = []
    while not engine.idle:
        done += engine.call()
    return done, engine.totals.calls


def bare_calls(pipeline: Any, denoiser: Denoiser) -> dict[int, Callable[[], Any]]:
    """One call of nothing but the transformer for each batch size of the sweep (guidance doubles rows: 2 is one)."""

    def call(batch: int) -> Callable[[], Any]:
        text: Conditioning = denoiser.encode("a cat")
        inputs = {
            "hidden_states": denoiser.noise(1).repeat(batch, 1, 1, 1),
            "encoder_hidden_states": text.tokens.repeat(batch, 1, 1),
            "pooled_projections": text.pooled.repeat(batch, 1),
            "timestep": torch.full((batch,), 500.0),
        }
        return lambda: pipeline.transformer(**inputs, return_dict=False)

    return {batch: call(batch) for batch in SWEEP}


def counted(call: Callable[[], Any]) -> int:
    """FLOPs of a call, attention's among them: torch knows those of its plain form only."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


class Took(NamedTuple):
    """Seconds of a call: on the wall, and of this process on the CPU."""

    wall: float
    cpu: float


def timed(call: Callable[[], Any], *, times: int = 1) -> Took:
    """Seconds that the fastest of some calls takes."""
    found = []
    for _ in range(times):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        found.append(Took(time.perf_counter() - wall, time.process_time() - cpu))
    return Took(min(t.wall for t in found), min(t.cpu for t in found))


def check(denoiser: Denoiser, done: Sequence[Done]) -> None:
    """The engine's latents are those of the same routes run one by one."""
    for each in (done[0], done[-1]):
        latent = [denoiser.noise(each.job.seed)]
        for segment in each.job.segments:
            latent = denoiser.run(latent, segment.start, segment.stop, STEPS, [segment.prompt])
        torch.testing.assert_close(each.latent, latent[0], rtol=1e-2, atol=1e-2)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, least and most."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> int:
    """Measure and print; exit code 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED, help="'embedded' or a diffusers folder with text.json")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--rows", type=int, default=16, help="the engine's bound on a denoiser call")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads, for all parts alike")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    diffusers_log.set_verbosity_error()
    denoiser = Denoiser.load(options.model)
    pipeline = load_pipeline(options.model)
    prompts = [prompt for members in CLUSTERS.values() for prompt in members]
    work = jobs(denoiser)
    done, calls = by_engine(denoiser, work, options.rows)  # also encodes all prompts, which is not counted
    check(denoiser, done)
    flops = {
        "pipeline": counted(lambda: by_pipeline(pipeline, denoiser, prompts[:1])) * len(prompts),
        "engine": counted(lambda: by_engine(denoiser, work, options.rows)),
    }
    bare = bare_calls(pipeline, denoiser)
    bare_flops = {batch: counted(call) for batch, call in bare.items()}
    for call in bare.values():
        call()
    took: dict[str, list[Took]] = {"pipeline": [], "engine": [], "limit": []}
    rates: dict[int, list[float]] = {batch: [] for batch in SWEEP}
    console = Console()
    with console.status("measuring"):
        for _ in range(options.repetitions):
            took["pipeline"].append(timed(lambda: by_pipeline(pipeline, denoiser, prompts)))
            sweep = {batch: timed(call, times=5) for batch, call in bare.items()}
            took["engine"].append(timed(lambda: by_engine(denoiser, work, options.rows)))
            for batch, t in sweep.items():
                rates[batch].append(bare_flops[batch] / t.wall)
            best = Took(*(min(t[i] / bare_flops[batch] for batch, t in sweep.items()) for i in range(2)))
            took["limit"].append(Took(flops["engine"] * best.wall, flops["engine"] * best.cpu))
    return report(console, options, flops=flops, took=took, rates=rates, calls=calls)


def report(
    console: Console,
    options: argparse.Namespace,
    *,
    flops: dict[str, int],
    took: dict[str, list[Took]],
    rates: dict[int, list[float]],
    calls: int,
) -> int:
    """Print tables and the verdict."""
    users = sum(map(len, CLUSTERS.values()))
    console.print(
        f"{users} requests in {len(CLUSTERS)} clusters, {STEPS} steps, the first {SHARED} shared; model "
        f"{options.model}, {options.threads} thread(s), engine rows {options.rows}; {options.repetitions} interleaved "
        f"repetitions: median (least to most)",
        highlight=False,
    )
    table = Table()
    for column in ("", "wall seconds", "CPU seconds", "GFLOP", "GFLOP/s", "denoiser calls"):
        table.add_column(column, justify="right" if column else "left")
    work = {**flops, "limit": flops["engine"]}
    for name, count in (("pipeline", users * STEPS), ("engine", calls), ("limit", "")):
        rate = [work[name] / t.wall / 1e9 for t in took[name]]
        wall, cpu = spread([t.wall for t in took[name]]), spread([t.cpu for t in took[name]])
        table.add_row(name, wall, cpu, f"{work[name] / 1e9:.1f}", spread(rate, 1), str(count))
    console.print(table)
    console.print("The bare transformer; guidance doubles rows, so the pipeline's calls have batch 2:")
    sweep = Table("batch", "GFLOP/s")
    for batch, found in rates.items():
        sweep.add_row(str(batch), spread([rate / 1e9 for rate in found], 1))
    console.print(sweep)
    faster, over = ratios(took["pipeline"], took["engine"]), ratios(took["engine"], took["limit"])
    fewer = flops["pipeline"] / flops["engine"]
    console.print(f"pipeline / engine, wall time: {spread(faster.wall)}; bar: at least {LEAST_SPEED_UP}")
    console.print(f"  CPU time, which other load does not lengthen: {spread(faster.cpu)}")
    console.print(f"  FLOPs, by sharing: {fewer:.2f}; the rest, by fuller calls: {median(faster.wall) / fewer:.2f}")
    console.print(f"engine / limit, wall time: {spread(over.wall)}; bar: at most {MOST_OF_LIMIT}")
    console.print(f"  CPU time: {spread(over.cpu)}")
    reached = median(faster.wall) >= LEAST_SPEED_UP and median(over.wall) <= MOST_OF_LIMIT
    console.print("both bars reached" if reached else "a bar is missed")
    return 0 if reached else 1


class Ratios(NamedTuple):
    """Quotients of times, repetition by repetition."""

    wall: list[float]
    cpu: list[float]


def ratios(above: Sequence[Took], below: Sequence[Took]) -> Ratios:
    """How many times longer one took than the other."""
    pairs = list(zip(above, below, strict=True))
    return Ratios([a.wall / b.wall for a, b in pairs], [a.cpu / b.cpu for a, b in pairs])


if __name__ == "__main__":
    sys.exit(main())
