"""The command that trains the embedded model: `python -m semct.training --help`.

The large size is trained from nothing: autoencoder, scorer, denoiser. The small one is a denoiser only, in the
latents of a large model that is there already.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderTiny
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from semct.prompts import EncoderNotFound, load_sentence_encoder
from semct.training.autoencoder import fit_patch_code, psnr, train_autoencoder
from semct.training.data import Corpus, encode_pictures, encode_pictures_by, make_corpus
from semct.training.denoiser import DenoiserTraining, Size
from semct.training.export import write_pipeline, write_scorer, write_transformer
from semct.training.scenes import FontNotFound, training_examples
from semct.training.schedule import Budget, load_checkpoint, save_checkpoint
from semct.training.scorer import train_scorer


class Stage(enum.StrEnum):
    """A part of the training."""

    AUTOENCODER = "autoencoder"
    SCORER = "scorer"
    DENOISER = "denoiser"


_SHARE = {Stage.AUTOENCODER: 0.08, Stage.SCORER: 0.05, Stage.DENOISER: 0.87}
_CHECKPOINT_SECONDS = 240
_SHIPPED = Path(__file__).parents[1] / "assets" / "embedded"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.command()
def main(
    *,
    output: Annotated[Path, typer.Option(help="Gets the trained folders and checkpoints/.")] = Path("training"),
    size: Annotated[Size, typer.Option(help="large: embedded/ and scorer/; small: embedded-small/.")] = Size.LARGE,
    beside: Annotated[Path, typer.Option(help="The large model whose latents the small one shares.")] = _SHIPPED,
    minutes: Annotated[float, typer.Option(min=0.01, help="Length of the whole training.")] = 120.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each stage, instead of minutes.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: int = 0,
    pairs: Annotated[int, typer.Option(min=256, help="Pairs of picture and caption to draw.")] = 60_000,
    resume: Annotated[bool, typer.Option(help="Go on from the output folder's checkpoints.")] = False,
    compiled: Annotated[bool, typer.Option(help="Compile the denoiser (on a CPU: needs a C++ compiler).")] = True,
) -> None:
    """Train the autoencoder, the scorer and the denoiser of the embedded model, or a smaller denoiser beside it."""
    checkpoints = output / "checkpoints"
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("This machine has no CUDA device that torch can use.", param_hint="--device")
    with console.status("Drawing scenes and encoding captions"):
        try:
            corpus = make_corpus(pairs, seed, load_sentence_encoder(device=device))
        except (FontNotFound, EncoderNotFound) as error:
            console.print(str(error))
            raise typer.Exit(1) from error
    console.print(f"{len(corpus.pictures)} pictures, {len(corpus.captions)} captions, {pairs} pairs")
    if size is Size.SMALL:
        _train_small(corpus, beside, output, steps, minutes, seed=seed, device=device, resume=resume, compiled=compiled)
        return
    code = fit_patch_code(corpus.pictures)
    latents = encode_pictures(corpus, code)

    def budget(stage: Stage, spent: float = 0.0, step: int = 0) -> Budget:
        share = None if steps else minutes * _SHARE[stage]
        return Budget(steps=steps, minutes=share, spent=spent, step=step)

    autoencoder_folder = checkpoints / "autoencoder"
    if resume and autoencoder_folder.exists():
        autoencoder = AutoencoderTiny.from_pretrained(autoencoder_folder).eval()
    else:
        length = budget(Stage.AUTOENCODER)
        with _Display(Stage.AUTOENCODER, length) as display:
            autoencoder = train_autoencoder(
                corpus.pictures, code, length, seed=seed, device=device, report=display.report
            ).cpu()
        autoencoder.save_pretrained(autoencoder_folder)
        console.print(f"autoencoder: {psnr(autoencoder, latents[:128], corpus.pictures[:128]):.1f} dB")

    if not (resume and (output / "scorer").exists()):
        length = budget(Stage.SCORER)
        with _Display(Stage.SCORER, length) as display:
            examples = training_examples(pairs, seed)
            scorer = train_scorer(corpus, examples, code, length, seed=seed, device=device, report=display.report)
        write_scorer(output / "scorer", scorer)

    training = DenoiserTraining(corpus, latents, seed=seed, device=device, compiled=compiled)
    checkpoint = checkpoints / "denoiser.pt"
    length = budget(Stage.DENOISER, *_resumed(training, checkpoint, resume=resume))
    _train_denoiser(
        training, length, checkpoint, lambda: write_pipeline(output / "embedded", training.average, autoencoder)
    )
    console.print(f"denoiser: {training.samples} examples seen; the model is in {output / 'embedded'}")


def _train_small(
    corpus: Corpus,
    folder: Path,
    output: Path,
    steps: int | None,
    minutes: float,
    *,
    seed: int,
    device: str,
    resume: bool,
    compiled: bool,
) -> None:
    """Train the small denoiser on the latents of the large model in the folder."""
    latents = encode_pictures_by(AutoencoderTiny.from_pretrained(folder / "vae").eval(), corpus.pictures)
    training = DenoiserTraining(corpus, latents, seed=seed, device=device, size=Size.SMALL, compiled=compiled)
    checkpoint = output / "checkpoints" / "denoiser-small.pt"
    spent, step = _resumed(training, checkpoint, resume=resume)
    length = Budget(steps=steps, minutes=None if steps else minutes, spent=spent, step=step)
    written = output / "embedded-small"
    _train_denoiser(training, length, checkpoint, lambda: write_transformer(written, training.average, of=folder.name))
    console.print(f"denoiser: {training.samples} examples seen; the model is in {written}, beside {folder.name!r}")


def _resumed(training: DenoiserTraining, checkpoint: Path, *, resume: bool) -> tuple[float, int]:
    """Go on from a checkpoint, if asked to and there is one: seconds and steps that it has behind it."""
    saved = load_checkpoint(checkpoint) if resume else None
    if saved is None:
        return 0.0, 0
    training.restore(saved["training"])
    return saved["spent"], saved["step"]


def _train_denoiser(training: DenoiserTraining, length: Budget, checkpoint: Path, write: Callable[[], None]) -> None:
    def save() -> None:
        save_checkpoint({"training": training.state(), "spent": length.spent, "step": length.step}, checkpoint)
        write()

    last = time.monotonic()
    with _Display(Stage.DENOISER, length) as display:
        while length.progress < 1:
            display.report(training.step(length.rate()))
            length.step += 1
            if time.monotonic() - last > _CHECKPOINT_SECONDS:
                save()
                last = time.monotonic()
    save()


class _Display:
    """A progress bar with a running mean of the loss; without a terminal, a line every hundred steps."""

    def __init__(self, stage: Stage, length: Budget) -> None:
        self._stage = stage
        self._length = length
        self._mean = 0.0
        self._steps = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("step {task.fields[step]}, loss {task.fields[loss]:.4f}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(stage, total=1.0, step=0, loss=0.0)

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def report(self, loss: float) -> None:
        self._steps += 1
        weight = max(0.01, 1 / self._steps)
        self._mean += weight * (loss - self._mean)
        step = self._length.step + 1
        self._progress.update(self._task, completed=self._length.progress, step=step, loss=self._mean)
        if not console.is_terminal and step % 100 == 0:
            console.print(f"{self._stage} step {step}, {self._length.spent:.0f} s, loss {self._mean:.4f}")


if __name__ == "__main__":
    app()
