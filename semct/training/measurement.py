"""What the trained model is worth: samples of held-out captions and retrieval.

`python -m semct.training.measurement --help`. Writes the samples of docs/embedded-model.md, and the pairs and
triples of prompts on which `semct quality` measures content quality against shared steps.
"""

# ruff: noqa: S311 (prompts are drawn by lot, not kept secret)
from __future__ import annotations

import csv
import itertools
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from semct.diffusion import Denoiser
from semct.prompts import SentenceEncoder, load_sentence_encoder
from semct.quality import EmbeddedScorer, load_scorer
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
"""Similarities of public to personal prompt that pairs are drawn at, each +-0.05."""

ROOT_BANDS = (0.1, 0.25, 0.4, 0.55)
"""Similarities of root to personal prompt that triples are drawn at, each +-0.06."""

PUBLIC_BANDS = (0.4, 0.55, 0.7, 0.85)
"""Similarities of public to personal prompt that triples are drawn at, each +-0.06."""

STEPS = 28
"""T."""

_SHIPPED = Path(__file__).parent.parent / "assets"

console = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Pair(msgspec.Struct, frozen=True):
    """A public and a personal prompt and their cosine similarity."""

    public: str
    personal: str
    similarity: float


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


def draw_triples(encoder: SentenceEncoder, count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Draw up to `count` triples (root, public, personal) for each two bands, the root's the lower one.

    Personal prompts name held-out combinations; public prompts are captions of training scenes, half of them
    vague, and rewordings of personal prompts; roots are vague captions and such as fit any picture.
    """
    rng = random.Random(seed)
    combinations = sorted(HELD_OUT)
    personal = sorted({caption(Scene(*rng.choice(combinations)), rng) for _ in range(500)})
    examples = training_examples(400, seed + 1)
    public = {e.caption if i % 2 else vague_caption(e.scene, rng) for i, e in enumerate(examples)}
    public |= {caption(Scene(*rng.choice(combinations)), rng) for _ in range(150)}
    roots = {vague_caption(e.scene, rng) for e in training_examples(300, seed + 2)}
    roots |= {
        "a colourful picture of something outside",
        "a picture of something",
        "an object in front of a background",
    }
    publics, roots_in_order = sorted(public), sorted(roots)
    to_public, to_root = encoder.similarity(personal, publics), encoder.similarity(personal, roots_in_order)
    triples: list[tuple[str, str, str]] = []
    used: set[int] = set()
    for far, near in itertools.product(ROOT_BANDS, PUBLIC_BANDS):
        hits = np.argwhere(np.abs(to_public - near) < 0.06).tolist() if far < near else []
        rng.shuffle(hits)
        met: set[int] = set()
        for i, j in hits:
            fitting = np.flatnonzero(np.abs(to_root[i] - far) < 0.06).tolist()
            if len(met) < count and i not in met and j not in used and fitting and publics[j] != personal[i]:
                met.add(i)
                used.add(j)
                triples.append((roots_in_order[rng.choice(fitting)], publics[j], personal[i]))
    return triples


def draw(denoiser: Denoiser, prompts: Sequence[str], seed: int) -> NDArray[np.uint8]:
    """Draw one picture of each prompt, uint8 (n, 64, 64, 3), from noise of its own."""
    parts = []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        noise = [denoiser.noise(seed + start + i) for i in range(len(part))]
        parts.append(denoiser.decode(denoiser.run(noise, 0, STEPS, STEPS, part)))
    return np.concatenate(parts)


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


@app.command()
def main(
    *,
    model: Annotated[Path, typer.Option(help="Folder of the trained model.")] = _SHIPPED / "embedded",
    scorer: Annotated[str, typer.Option(help="'embedded' or a trained scorer's folder.")] = "embedded",
    output: Annotated[Path, typer.Option(help="Folder for the samples, pairs.csv and triples.csv.")] = Path(),
    count: Annotated[int, typer.Option(min=8, help="Pairs of each band of similarity.")] = 48,
    triples: Annotated[int, typer.Option(min=1, help="Triples of each two bands.")] = 9,
    seed: int = 0,
) -> None:
    """Sample held-out captions, measure retrieval, and draw the prompts that `semct quality` measures."""
    encoder = load_sentence_encoder()
    denoiser = Denoiser.load(str(model))
    judge = load_scorer(scorer)
    if not isinstance(judge, EmbeddedScorer):
        msg = f"{scorer!r} is no embedded scorer."
        raise typer.BadParameter(msg)

    captions = [example.caption for example in held_out_captions(32)]
    samples = draw(denoiser, captions, seed)
    grid(samples, captions).save(output / "embedded-samples.png", optimize=True)
    console.print(f"mean score of 32 held-out captions: {judge.score(samples, captions).mean():.3f}")

    examples = retrieval_examples(200, seed)
    asked = [example.caption for example in examples]
    real = retrieval(judge, render_all([example.scene for example in examples]), asked)
    made = retrieval(judge, draw(denoiser, asked, seed + 1000), asked)
    console.print(f"retrieval@1 of 100: real {real:.3f}, generated {made:.3f}")

    pairs = [(p.public, p.personal) for drawn in draw_pairs(encoder, count, seed).values() for p in drawn]
    _write(output / "pairs.csv", ("public", "personal"), pairs)
    _write(output / "triples.csv", ("root", "public", "personal"), draw_triples(encoder, triples, seed))


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    app()
