"""`semct quality`: measures content quality against shared steps, fits the curves, writes and draws them."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.measuring import Course, Journal, Row, Setting, measure, personal_prompt
from experiments.scenario import load_prompt_set
from semct.diffusion import Denoiser
from semct.prompts import SentenceEncoder, load_sentence_encoder
from semct.public_prompt import embed_prompts
from semct.quality import QualityModel, load_quality_model, load_scorer
from semct.quality_fit import BAND, Measurements, bands_of, fit
from semct.routes import Prompt, blend, part

COURSES = (("public", "personal"), ("root", "public", "personal"))
"""The columns that a file of prompts has: pairs, or triples that share steps at two levels."""

BLENDED = (2, 3, 4, 8, 16)
"""How many prompts the blends have that are drawn from a set."""

_STRANGERS = 0.25  # of the drawn blends do not hold the personal prompt


class BadQualityOrder(ValueError):
    """What to measure or to fit cannot be read, or does not go together."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure, on what, and how.

    `courses` are pairs or triples of prompts (see `read_courses`), each measured with every seed; `cuts` the steps at
    which the prompts hand over, () for every fourth step (and of triples, the first until T / 2). `rows` bounds the
    courses of a denoiser call.
    """

    model: str
    scorer: str
    courses: tuple[Course, ...]
    seeds: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...] = ()
    steps: int = 28
    rows: int = 12
    device: str = "cpu"
    dtype: str = "float32"


def read_courses(path: Path) -> tuple[Course, ...]:
    """Return the pairs or triples of prompts of a CSV file, whose first line names its columns.

    A cell of several prompts with " | " between them is their blend; the personal prompt is one in words.

    Raises:
        BadQualityOrder: The file cannot be read, has other columns, or a line without a prompt.
    """
    header, lines = _read_csv(path)
    if header not in COURSES:
        msg = f"{path} has the columns {','.join(header)}; pairs have public,personal, triples root,public,personal."
        raise BadQualityOrder(msg)
    for number, line in enumerate(lines, 2):
        if len(line) != len(header) or not all(cell.strip() for cell in line):
            msg = f"{path}, line {number}: there should be {len(header)} prompts, but there is {','.join(line)!r}."
            raise BadQualityOrder(msg)
    return tuple(dict.fromkeys((*(blend(cell.split(" | ")) for cell in line[:-1]), line[-1]) for line in lines))


def draw_pairs(prompts: Sequence[str], encoder: SentenceEncoder, most: int, seed: int) -> tuple[tuple[str, str], ...]:
    """Draw up to `most` pairs (public, personal) of different prompts from each band of similarity."""
    distinct = list(dict.fromkeys(prompts))
    likeness = encoder.similarity(distinct, distinct).astype(np.float64)
    public, personal = np.nonzero(~np.eye(len(distinct), dtype=bool))
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(inside))[:most] for _, inside in bands_of(likeness[public, personal])] or [
        np.empty(0, int)
    ]
    return tuple((distinct[public[i]], distinct[personal[i]]) for i in np.concatenate(chosen))


def draw_blends(prompts: Sequence[str], encoder: SentenceEncoder, most: int, seed: int) -> tuple[Course, ...]:
    """Draw `most` blends of each number of prompts (`BLENDED`), with a personal prompt each.

    The prompts of a blend come from the neighbourhood of one of them, wide or narrow by lot, so that some are near to
    each other and some are not. The personal prompt is one of them as in a cluster, or, for a quarter, another of that
    neighbourhood, as when a request comes later.
    """
    distinct = list(dict.fromkeys(prompts))
    likeness = encoder.similarity(distinct, distinct)
    rng = np.random.default_rng(seed)
    drawn: list[Course] = []
    for size in BLENDED:
        for _ in range(most if size < len(distinct) else 0):
            reach = round(np.exp(rng.uniform(np.log(size + 1), np.log(len(distinct)))))
            near = np.argsort(-likeness[rng.integers(len(distinct))])[:reach]
            personal, *others = (distinct[i] for i in rng.permutation(near)[: size + 1])
            members = others if rng.random() < _STRANGERS else [personal, *others[: size - 1]]
            drawn.append((blend(members), personal))
    return tuple(dict.fromkeys(drawn))


def parse_cuts(text: str, levels: int, steps: int) -> tuple[tuple[int, ...], ...]:
    """Return the cuts of "0 4 8" (pairs) or "0-0 4-12" (triples); every fourth step where there is no text.

    Raises:
        BadQualityOrder: A cut is not of so many rising steps in 0..T.
    """
    if not text.strip():
        grid = [*range(0, steps, 4), steps]
        if levels == 1:
            return tuple((k,) for k in grid)
        return tuple((a, b) for a in grid for b in grid if a <= b and a <= steps / 2)
    cuts = []
    for place in text.replace(",", " ").split():
        stops = place.split("-")
        cut = tuple(int(stop) for stop in stops if stop.isdecimal())
        if len(cut) != len(stops) or len(cut) != levels or list(cut) != sorted(cut) or cut[-1] > steps:
            form = "'8'" if levels == 1 else "'4-12'"
            msg = f"{place!r} is no place to hand over: it should be like {form}, rising, within {steps} steps."
            raise BadQualityOrder(msg)
        cuts.append(cut)
    return tuple(dict.fromkeys(cuts))


def measure_all(order: Order, journal: Path, console: Console) -> tuple[Setting, list[Row]]:
    """Measure what the journal does not hold yet, and return all that was ordered.

    Raises:
        BadQualityOrder: There is nothing to measure.
        JournalError: The journal holds another measurement, or cannot be written.
        ModelNotFound: There is no such diffusion model.
        ScorerError: There is no such scorer.
    """
    if not order.courses:
        msg = "There are no pairs to measure: give other prompts."
        raise BadQualityOrder(msg)
    denoiser = Denoiser.load(order.model, device=order.device, dtype=getattr(torch, order.dtype))
    scorer = load_scorer(order.scorer, device=order.device)
    setting = Setting(
        model=order.model,
        scorer=order.scorer,
        steps=order.steps,
        guidance=denoiser.guidance,
        dtype=order.dtype,
        cuts=order.cuts,
    )
    wanted = [(course, seed) for seed in order.seeds for course in order.courses]
    with Journal(journal, setting) as kept:
        done = {(row.prompts, row.seed) for row in kept.rows}
        left = [job for job in wanted if job not in done]
        with _shown(console, len(wanted), len(wanted) - len(left)) as advance:
            for start in range(0, len(left), order.rows):
                batch = left[start : start + order.rows]
                kept.add(measure(denoiser, scorer, batch, setting))
                advance(len(batch))
        asked = set(wanted)
        return setting, [row for row in kept.rows if (row.prompts, row.seed) in asked]


def tabulate(
    setting: Setting, rows: Sequence[Row], encoder: SentenceEncoder
) -> tuple[Measurements, Measurements | None]:
    """Return rows of pairs as what a quality model is fitted to: those in words, and those of means."""
    number: dict[Prompt, int] = {}
    for prompt in (prompt for row in rows for prompt in row.prompts):
        number.setdefault(prompt, len(number))
    means = [row for row in rows if not isinstance(row.prompts[0], str)]
    words = [row for row in rows if isinstance(row.prompts[0], str)]
    return _tabulated(setting, words, encoder, number), _tabulated(setting, means, encoder, number) if means else None


def _tabulated(
    setting: Setting, rows: Sequence[Row], encoder: SentenceEncoder, number: Mapping[Prompt, int]
) -> Measurements:
    return Measurements(
        public=np.array([number[row.prompts[0]] for row in rows], np.int64),
        personal=np.array([number[row.prompts[-1]] for row in rows], np.int64),
        similarity=_cosines(encoder, rows, 0),
        shared=np.array([cut[0] for cut in setting.cuts], np.float64),
        scores=np.array([row.scores for row in rows]).reshape(-1, len(setting.cuts)),
        own=_parts(rows, 0),
    )


def read_published(path: Path, similarity: Path | None, encoder: Callable[[], SentenceEncoder]) -> Measurements:
    """Return the measurements of a CSV file with the columns public, personal, k0, k1, ...

    Args:
        path: The file. It names prompts by their words, or by numbers where there is `similarity`.
        similarity: A CSV file with a line and a column for each prompt after the first of each, or None.
        encoder: Makes the encoder, where it is needed.

    Raises:
        BadQualityOrder: A file cannot be read, or does not hold that.
    """
    header, lines = _read_csv(path)
    shared = [name[1:] for name in header[2:]]
    if header[:2] != ("public", "personal") or not shared or not all(k.isdecimal() for k in shared):
        msg = f"{path} should have the columns public,personal,k0,k1,...; it has {','.join(header[:6])}."
        raise BadQualityOrder(msg)
    scores = _numbers(path, [line[2:] for line in lines], len(shared))
    if similarity is None:
        prompts = sorted({prompt for line in lines for prompt in line[:2]})
        number = {prompt: i for i, prompt in enumerate(prompts)}
        pairs = np.array([[number[prompt] for prompt in line[:2]] for line in lines])
        vectors = encoder().embed(prompts).astype(np.float64)
        likeness = vectors @ vectors.T
    else:
        likeness = _numbers(similarity, [line[1:] for line in _read_csv(similarity)[1]], None)
        pairs = _numbers(path, [line[:2] for line in lines], 2).astype(int)
        if likeness.shape[0] != likeness.shape[1] or pairs.min() < 0 or pairs.max() >= len(likeness):
            msg = f"{similarity} holds no similarity of every two prompts that {path} names by number."
            raise BadQualityOrder(msg)
    return Measurements(
        public=pairs[:, 0],
        personal=pairs[:, 1],
        similarity=likeness[pairs[:, 0], pairs[:, 1]],
        shared=np.array([float(k) for k in shared]),
        scores=scores,
    )


def fit_different(
    measured: Measurements,
    *,
    means: Measurements | None = None,
    model: str,
    scorer: str,
    steps: int,
    source: str,
) -> QualityModel:
    """Fit a quality model to the pairs of different prompts; the family knows that one's own prompt costs nothing."""
    different = measured.where(measured.public != measured.personal)
    return fit(different, means=means, model=model, scorer=scorer, steps=steps, source=source)


def write_model(model: QualityModel, path: Path) -> None:
    """Write a quality model's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(model), indent=2) + b"\n")


def errors_table(model: QualityModel) -> Table:
    """What the model's errors are, in words."""
    said = {
        "fitted": "on the pairs of the fit",
        "unseen": "on unseen pairs",
        "interpolated": "  sigmoids of bands, interpolated",
        "mean": "  the mean, whatever the similarity",
        "inner": "on unseen pairs, between the first and last k",
        "ceiling_known": "  and the personal prompt's own score is known",
        "ends_known": "  and the public prompt's, against the personal one",
        "means": "means of prompts, of unseen personal prompts",
        "means_as_sentences": "  if they counted as sentences",
    }
    table = Table("root mean square error of single scores", "", box=None, pad_edge=False)
    for name, words in said.items():
        value = getattr(model.errors, name)
        if value is not None:
            table.add_row(words, f"{value:.4f}")
    if model.errors.unseen is None:
        table.add_row("on unseen pairs", "unknown: too few prompts")
    return table


def choose(pairs: Path | None, prompts: str, per_band: int, blends: int) -> tuple[Course, ...]:
    """Return the courses of a CSV file, or pairs and blends drawn from a prompt set (a name, or a YAML file).

    Raises:
        BadQualityOrder: The file is not right, or the set holds no two prompts.
        BadScenario: There is no such set.
    """
    if pairs is not None:
        return read_courses(pairs)
    path, found = load_prompt_set(prompts, Path())
    there, encoder = [p for group in found.groups for p in group.prompts], load_sentence_encoder()
    drawn = (*draw_pairs(there, encoder, per_band, seed=0), *draw_blends(there, encoder, blends, seed=0))
    if not drawn:
        msg = f"Prompt set {path} holds no two different prompts to make a pair of."
        raise BadQualityOrder(msg)
    return drawn


def fit_file(
    path: Path,
    similarity: Path | None,
    folder: Path,
    console: Console,
    *,
    model: str,
    scorer: str,
    steps: int,
    source: str,
) -> None:
    """What `semct quality --fit` does: fit the measurements of a CSV file.

    Raises:
        BadQualityOrder: A file cannot be read, or holds something else.
        QualityModelError: There are too few pairs.
    """
    measured = read_published(path, similarity, load_sentence_encoder)
    if measured.shared.max() > steps:
        msg = f"{path} holds scores after {measured.shared.max():.0f} shared steps, more than the {steps} of --steps."
        raise BadQualityOrder(msg)
    source = source or f"measurements of {path.name}, fitted by semct quality --fit"
    deliver(fit_different(measured, model=model, scorer=scorer, steps=steps, source=source), measured, folder, console)


def measure_and_fit(order: Order, folder: Path, console: Console, *, against: str) -> None:
    """What `semct quality` does with prompts: measure, fit (pairs) or compare (triples), and say where it went.

    The folder gets `measurements.jsonl` and, of pairs, `curves.json`, `curves.svg` and `curves.png`.

    Raises:
        BadQualityOrder: There is nothing to measure.
        JournalError: The journal holds another measurement, or cannot be written.
        ModelNotFound: There is no such diffusion model.
        QualityModelError: There are too few pairs to fit, or there is no quality model `against`.
        ScorerError: There is no such scorer.
    """
    levels = len(order.cuts[0])
    known = load_quality_model(against) if levels == 2 else None  # before hours of measuring
    setting, rows = measure_all(order, folder / "measurements.jsonl", console)
    encoder = load_sentence_encoder()
    if rows[0].fidelity:
        fidelity = np.array([row.fidelity for row in rows]).mean(axis=0)
        said = ", ".join(f"{'-'.join(map(str, cut))}: {f:.3f}" for cut, f in zip(setting.cuts, fidelity, strict=True))
        console.print(f"mean fidelity (CLIP-IQA) by shared steps: {said}", highlight=False)
    if known is not None:
        console.print(levels_table(check_levels(known, setting, rows, encoder)))
        return
    measured, means = tabulate(setting, rows, encoder)
    source = f"{measured.pairs} pairs and {means.pairs if means else 0} means of prompts with {len(order.seeds)} "
    source += f"seed(s) each, measured by semct quality ({order.dtype})"
    model = fit_different(
        measured, means=means, model=order.model, scorer=order.scorer, steps=order.steps, source=source
    )
    deliver(model, measured, folder, console)


def deliver(model: QualityModel, measured: Measurements, folder: Path, console: Console) -> None:
    """Write and draw a fitted model, and print its errors."""
    write_model(model, folder / "curves.json")
    plot(model, measured, folder / "curves.svg", folder / "curves.png")
    console.print(errors_table(model))
    console.print(
        f"curves: {folder / 'curves.json'}, drawn in {folder / 'curves.svg'}", highlight=False, soft_wrap=True
    )


class LevelError(msgspec.Struct, frozen=True):
    """At one cut of routes with two shared segments: mean score, the model's, and errors with and without bias."""

    cut: tuple[int, ...]
    measured: float
    predicted: float
    error: float
    unexplained: float


def check_levels(
    model: QualityModel, setting: Setting, rows: Sequence[Row], encoder: SentenceEncoder
) -> list[LevelError]:
    """Compare measured triples with `QualityModel.quality_of_segments`.

    `error` is the root mean square error of single scores, `unexplained` their standard deviation at that cut,
    which is what a model that knows only the cut's mean would reach.
    """
    phi = np.stack([_cosines(encoder, rows, level) for level in range(len(setting.cuts[0]))], axis=-1)
    scores = np.array([row.scores for row in rows])
    stops = np.array(setting.cuts) * (model.steps / setting.steps)
    own = np.stack([_parts(rows, level) for level in range(len(setting.cuts[0]))], axis=-1)
    predicted = model.quality_of_segments(phi[:, None, :], stops, own[:, None, :])
    return [
        LevelError(
            cut=cut,
            measured=float(scores[:, i].mean()),
            predicted=float(predicted[:, i].mean()),
            error=float(np.sqrt(np.mean((predicted[:, i] - scores[:, i]) ** 2))),
            unexplained=float(scores[:, i].std()),
        )
        for i, cut in enumerate(setting.cuts)
    ]


def levels_table(errors: Sequence[LevelError]) -> Table:
    """The comparison of triples, a line for each cut."""
    table = Table("root until", "public until", "measured", "predicted", "error", "spread", box=None, pad_edge=False)
    for e in errors:
        figures = (e.measured, e.predicted, e.error, e.unexplained)
        table.add_row(*(str(stop) for stop in e.cut), *(f"{value:.3f}" for value in figures))
    return table


def plot(model: QualityModel, measured: Measurements, *paths: Path) -> None:
    """Draw quality against shared steps as the paper's Fig. 3 does: means of bands with standard errors, and curves."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    full = [chosen for _, chosen in bands_of(measured.similarity) if chosen.sum() >= 2]
    fine = np.linspace(0, model.steps, 200)
    for chosen, colour in zip(full, colormaps["viridis"](np.linspace(0, 0.9, len(full))), strict=True):
        scores = measured.scores[chosen]
        errors = scores.std(axis=0, ddof=1) / np.sqrt(len(scores))
        axes.errorbar(measured.shared, scores.mean(axis=0), errors, fmt="o", markersize=4, color=colour)
        near = float(measured.similarity[chosen].mean())
        axes.plot(fine, model.quality(near, fine), color=colour, label=f"{near:.2f} ({chosen.sum()} pairs)")
    axes.set(
        title=f"{model.model}, scored by {model.scorer}",
        xlabel=f"shared steps k of {model.steps}",
        ylabel="score against the personal prompt",
    )
    axes.grid(alpha=0.3)
    if full:
        axes.legend(title=f"similarity, bands of {BAND}", frameon=False, fontsize="small")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


@contextmanager
def _shown(console: Console, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line for each tenth elsewhere; yields what says that so many more are done."""
    if done:
        console.print(f"{done} of {total} are in the journal already", highlight=False)
    if console.is_terminal:
        columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("measuring", total=total, completed=done)
            yield lambda more: bar.advance(task, more)
        return
    started, first, said = time.monotonic(), done, done * 10 // total

    def advance(more: int) -> None:
        nonlocal done, said
        done += more
        if done * 10 // total > said:
            said = done * 10 // total
            left = (time.monotonic() - started) / (done - first) * (total - done)
            console.print(f"{done} of {total} measured, {left / 60:.0f} min left", highlight=False)

    yield advance


def _cosines(encoder: SentenceEncoder, rows: Sequence[Row], level: int) -> NDArray[np.float64]:
    """The similarity of each row's prompt at a level to its personal one, mean cosine where it is a blend."""
    vectors = [embed_prompts(encoder, [row.prompts[at] for row in rows]) for at in (level, -1)]
    return np.asarray((vectors[0] * vectors[1]).sum(axis=1), np.float64)


def _parts(rows: Sequence[Row], level: int) -> NDArray[np.float64]:
    """The part of each row's personal prompt in its prompt at a level."""
    return np.array([part(personal_prompt(row.prompts), row.prompts[level]) for row in rows], np.float64)


def _read_csv(path: Path) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [tuple(line) for line in csv.reader(file) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        msg = f"{path} cannot be read: {error}"
        raise BadQualityOrder(msg) from error
    if len(lines) < 2:
        msg = f"{path} holds no lines below its header."
        raise BadQualityOrder(msg)
    return lines[0], lines[1:]


def _numbers(path: Path, cells: Sequence[Sequence[str]], width: int | None) -> NDArray[np.float64]:
    try:
        numbers = np.array([[float(cell) for cell in line] for line in cells])
    except ValueError as error:
        msg = f"{path} should hold equally many numbers on every line: {error}."
        raise BadQualityOrder(msg) from error
    if numbers.ndim != 2 or not np.isfinite(numbers).all() or (width is not None and numbers.shape[1] != width):
        msg = f"{path} should hold {width or 'equally many'} numbers on every line."
        raise BadQualityOrder(msg)
    return numbers
