"""What the trained model is worth: samples of held-out captions, retrieval, and quality against shared steps.

`python -m semct.training.measurement --help`. Writes the pictures of docs/embedded-model.md and the fitted
quality model.
"""

# ruff: noqa: S311 (prompts are drawn by lot, not kept secret)
from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
import torch
import typer
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track

from semct.prompts import SentenceEncoder, load_sentence_encoder
from semct.quality import Band, EmbeddedScorer, QualityModel, fit_curve, load_scorer
from semct.training.export import TextConditioning
from semct.training.scenes import (
    HELD_OUT,
    Example,
    Scene,
    caption,
    held_out_captions,
    render_all,
    training_examples,
    vague_caption,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

BANDS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
"""Similarities of public to personal prompt at which the curve is measured, each +-0.05."""

SHARED = (0, 4, 8, 12, 16, 20, 24, 28)
"""Shared steps at which it is measured."""

_SHIPPED = Path(__file__).parent.parent / "assets"

console = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Sampler:
    """Samples the model in a folder in bfloat16, many prompts at once, from any step to any other.

    Args:
        folder: A folder that `python -m semct.training` wrote.
        encoder: The sentence encoder that conditions it.
        shift: The schedule's shift in place of the folder's, or None.
    """

    def __init__(self, folder: Path, encoder: SentenceEncoder, *, shift: float | None = None) -> None:
        self.text = msgspec.json.decode((folder / "text.json").read_bytes(), type=TextConditioning)
        self._denoiser = SD3Transformer2DModel.from_pretrained(folder / "transformer").eval()
        self._autoencoder = AutoencoderTiny.from_pretrained(folder / "vae").eval()
        changed = {} if shift is None else {"shift": shift}
        schedule = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", **changed)
        schedule.set_timesteps(self.text.steps)
        self._sigmas = schedule.sigmas
        self._timesteps = schedule.timesteps
        self._encoder = encoder

    def noise(self, count: int, seed: int) -> torch.Tensor:
        """Return the latents that inferences start from, float32 (count, 24, 8, 8)."""
        size, channels = self._denoiser.config.sample_size, self._denoiser.config.in_channels
        return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))

    @torch.inference_mode()
    def run(self, latents: torch.Tensor, prompts: Sequence[str], start: int, stop: int) -> list[torch.Tensor]:
        """Run denoising steps [start, stop) and return the latents after each, the given ones first."""
        states, pooled = self._encoder.tokens([*prompts, ""], self.text.tokens, batch=64)
        # Every prompt's row, then as many rows of the null prompt.
        rows = torch.cat([torch.arange(len(prompts)), torch.full((len(prompts),), len(prompts))])
        states, pooled = states[rows] * self.text.token_scale, pooled[rows] * self.text.pooled_scale
        kept = [latents]
        for k in range(start, stop):
            with torch.autocast("cpu", torch.bfloat16):
                velocity = self._denoiser(
                    hidden_states=torch.cat([latents, latents]),
                    encoder_hidden_states=states,
                    pooled_projections=pooled,
                    timestep=self._timesteps[k].expand(2 * len(latents)),
                    return_dict=False,
                )[0].float()
            asked, null = velocity.chunk(2)
            step = self._sigmas[k + 1] - self._sigmas[k]
            latents = latents + step * (null + self.text.guidance * (asked - null))
            kept.append(latents)
        return kept

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """Return the pictures, uint8 (n, 64, 64, 3), of latents, float32 (n, 24, 8, 8)."""
        scale = self._autoencoder.config.scaling_factor
        pictures = torch.cat([self._autoencoder.decode(part / scale).sample for part in torch.split(latents, 64)])
        return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).numpy()

    def pictures(self, prompts: Sequence[str], seed: int) -> NDArray[np.uint8]:
        """Return one picture of each prompt, uint8 (n, 64, 64, 3)."""
        return self.decode(self.run(self.noise(len(prompts), seed), prompts, 0, self.text.steps)[-1])


class Pair(msgspec.Struct, frozen=True):
    """A public and a personal prompt and their cosine similarity."""

    public: str
    personal: str
    similarity: float


class Point(msgspec.Struct, frozen=True):
    """Mean score of a band's pairs after `shared` steps with the public prompts, and its standard error."""

    similarity: float
    shared: int
    score: float
    error: float


def draw_pairs(encoder: SentenceEncoder, count: int, seed: int = 0) -> dict[float, list[Pair]]:
    """Draw `count` pairs of prompts for each band.

    Personal prompts name held-out combinations. Public prompts are captions of training scenes, a third of
    them vague ("an animal at the beach").
    """
    rng = random.Random(seed)
    combinations = sorted(HELD_OUT)
    personal = sorted({caption(Scene(*rng.choice(combinations)), rng) for _ in range(500)})
    examples = training_examples(400, seed + 1)
    public = {e.caption if i % 3 else vague_caption(e.scene, rng) for i, e in enumerate(examples)}
    # Rewordings of personal prompts: what reaches the highest band.
    public |= {caption(Scene(*rng.choice(combinations)), rng) for _ in range(300)}
    ordered = sorted(public)
    vectors = [encoder.tokens(prompts, 1, batch=64)[1] for prompts in (ordered, personal)]
    likeness = (vectors[0] @ vectors[1].T).numpy()
    pairs: dict[float, list[Pair]] = {}
    for band in BANDS:
        hits = np.argwhere(np.abs(likeness - band) < 0.05).tolist()
        rng.shuffle(hits)
        chosen: list[Pair] = []
        used: set[str] = set()
        for i, j in hits:
            if len(chosen) < count and not used & {ordered[i], personal[j]}:
                used |= {ordered[i], personal[j]}
                chosen.append(Pair(ordered[i], personal[j], float(likeness[i, j])))
        pairs[band] = chosen
    return pairs


def measure_curve(
    sampler: Sampler, scorer: EmbeddedScorer, pairs: Sequence[Pair], shared: Sequence[int], seed: int
) -> list[Point]:
    """Run each pair's public prompt for k steps, its personal prompt for the rest, and score the pictures."""
    publics, personals = [p.public for p in pairs], [p.personal for p in pairs]
    latents = sampler.run(sampler.noise(len(pairs), seed), publics, 0, max(shared))
    similarity = float(np.mean([p.similarity for p in pairs]))
    points = []
    for k in shared:
        last = sampler.run(latents[k], personals, k, sampler.text.steps)[-1]
        scores = scorer.score(sampler.decode(last), personals)
        error = float(scores.std(ddof=1) / np.sqrt(len(scores)))
        points.append(Point(similarity, k, float(scores.mean()), error))
    return points


def retrieval(scorer: EmbeddedScorer, pictures: NDArray[np.uint8], captions: Sequence[str], among: int = 100) -> float:
    """Return how often a picture's own caption scores highest of `among` different captions."""
    seen, asked = scorer.vectors(pictures, captions)
    hits = [
        np.argmax(seen[block] @ asked[block].T, axis=1) == np.arange(len(seen[block]))
        for block in (slice(start, start + among) for start in range(0, len(captions), among))
    ]
    return float(np.concatenate(hits).mean())


def retrieval_examples(count: int, seed: int) -> list[Example]:
    """Draw plain captions of the middle placement, no thing and background twice within any hundred."""
    rng = random.Random(seed)
    examples: list[Example] = []
    while len(examples) < count:
        block = {example.scene for example in examples[len(examples) // 100 * 100 :]}
        scene = Scene(rng.randrange(32), rng.randrange(10))
        if scene not in block:
            examples.append(Example(scene, caption(scene, rng)))
    return examples


def grid(pictures: NDArray[np.uint8], captions: Sequence[str], columns: int = 8, zoom: int = 3) -> Image.Image:
    """Lay pictures out in rows with their captions below."""
    width, height = pictures.shape[2] * zoom, pictures.shape[1] * zoom
    cell, line = (width + 8, height + 34), 13
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (cell[0] * columns, cell[1] * rows), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for i, (picture, text) in enumerate(zip(pictures, captions, strict=True)):
        x, y = i % columns * cell[0] + 4, i // columns * cell[1] + 4
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC), (x, y))
        words, lines = text.split(), [""]
        for word in words:
            longer = f"{lines[-1]} {word}".strip()
            if draw.textlength(longer, font) > width:
                lines.append(word)
            else:
                lines[-1] = longer
        for j, shown in enumerate(lines[:2]):
            draw.text((x, y + height + 2 + j * line), shown, fill="black", font=font)
    return sheet


def plot_curves(points: Sequence[Sequence[Point]], model: QualityModel, path: Path) -> None:
    """Draw each band's measurements with standard errors, and the fitted curves."""
    import matplotlib as mpl  # noqa: PLC0415 (slow import)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(points)))
    fine = np.linspace(0, model.steps, 200)
    for colour, band, measured in zip(colours, model.bands, points, strict=True):
        axes.errorbar(
            [p.shared for p in measured],
            [p.score for p in measured],
            [p.error for p in measured],
            fmt="o",
            markersize=4,
            color=colour,
        )
        axes.plot(fine, band.curve(fine), color=colour, label=f"{band.similarity:.2f}")
    axes.set(xlabel=f"shared steps k of {model.steps}", ylabel="score against the personal prompt")
    axes.grid(alpha=0.3)
    axes.legend(title="similarity", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


@app.command()
def main(
    *,
    model: Annotated[Path, typer.Option(help="Folder of the trained model.")] = _SHIPPED / "embedded",
    scorer: Annotated[str, typer.Option(help="'embedded' or a trained scorer's folder.")] = "embedded",
    quality: Annotated[Path, typer.Option(help="Where the fitted quality model goes.")] = Path("embedded.json"),
    pictures: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path(),
    count: Annotated[int, typer.Option(min=8, help="Pairs of each similarity band.")] = 48,
    shift: Annotated[float | None, typer.Option(help="Another shift than the model's.")] = None,
    seed: int = 0,
) -> None:
    """Sample held-out captions, measure retrieval, and fit content quality against shared steps."""
    encoder = load_sentence_encoder()
    sampler = Sampler(model, encoder, shift=shift)
    judge = load_scorer(scorer)
    if not isinstance(judge, EmbeddedScorer):
        msg = f"{scorer!r} is no embedded scorer."
        raise typer.BadParameter(msg)

    captions = [example.caption for example in held_out_captions(32)]
    samples = sampler.pictures(captions, seed)
    grid(samples, captions).save(pictures / "embedded-samples.png", optimize=True)
    console.print(f"mean score of 32 held-out captions: {judge.score(samples, captions).mean():.3f}")

    examples = retrieval_examples(200, seed)
    asked = [example.caption for example in examples]
    real = retrieval(judge, render_all([example.scene for example in examples]), asked)
    made = retrieval(judge, sampler.pictures(asked, seed + 1), asked)
    console.print(f"retrieval@1 of 100: real {real:.3f}, generated {made:.3f}")

    points = [
        measure_curve(sampler, judge, pairs, SHARED, seed + i)
        for i, pairs in enumerate(track(draw_pairs(encoder, count, seed).values(), "Measuring", console=console))
    ]
    bands, errors = [], []
    for measured in points:
        shared, scores = [p.shared for p in measured], [p.score for p in measured]
        curve = fit_curve(shared, scores)
        errors.append(float(np.sqrt(np.mean((curve(shared) - scores) ** 2))))
        bands.append(Band(round(measured[0].similarity, 4), curve))
        console.print(f"{bands[-1].similarity:.2f} " + " ".join(f"{p.shared}:{p.score:.3f}" for p in measured))
    source = f"{count} pairs per band, scored by the embedded scorer; python -m semct.training.measurement"
    fitted = QualityModel("embedded", "embedded", sampler.text.steps, source, max(errors), tuple(bands))
    quality.write_bytes(msgspec.json.format(msgspec.json.encode(fitted), indent=2) + b"\n")
    plot_curves(points, fitted, pictures / "embedded-curve.png")


if __name__ == "__main__":
    app()
