"""Measures content quality against shared steps: runs prompts in turn on the loaded model and scores the pictures.

A *course* is the prompts that take their turns in one inference, the personal one last: (public, personal), or
(root, public, personal) where steps are shared at two levels; all but the personal one may be blends. A *cut* says at
which steps they hand over, so (4, 12) of three prompts means [0, 4), [4, 12), [12, T). Every finished course goes to
a journal at once, so that a measurement that was stopped goes on where it was.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from semct.diffusion import Denoiser
from semct.quality import ClipScorer, Scorer
from semct.routes import Prompt

Course = tuple[Prompt, ...]

VERSION = 1
"""The version of the journal's format."""


class JournalError(ValueError):
    """A journal cannot be read or written, or holds another measurement."""


class Setting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line of a journal: what is measured, and how. `cuts` is the order of a row's scores."""

    version: int = VERSION
    model: str
    scorer: str
    steps: int
    guidance: float
    dtype: str
    cuts: tuple[tuple[int, ...], ...]


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One course with one seed: scores against the personal prompt, at the setting's cuts.

    `fidelity` is the objective, no-reference quality of the same pictures, where the scorer is a CLIP model.
    """

    prompts: Course
    seed: int
    scores: tuple[float, ...]
    fidelity: tuple[float, ...] = ()


class Journal:
    """The rows measured so far, in a file of one JSON document a line; a ``with`` block writes to it.

    Args:
        path: The file; it is made at the first row.
        setting: What is measured.
    """

    def __init__(self, path: Path, setting: Setting) -> None:
        self._path = path
        self._setting = setting
        self._file: IO[bytes] | None = None
        self.rows: list[Row] = []

    def __enter__(self) -> Self:
        """Read what is there, drop a line that was cut off (its first one, too), and go on behind it.

        Raises:
            JournalError: The file cannot be read or written, or holds rows of another setting.
        """
        whole = b""
        try:
            if self._path.exists() and not _line(self._setting)[:-1].startswith(self._path.read_bytes()):
                setting, self.rows, whole = _read(self._path)
                if setting != self._setting:
                    msg = f"{self._path} holds another measurement ({_difference(setting, self._setting)}); "
                    msg += "give another folder, or remove the file."
                    raise JournalError(msg)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("r+b" if whole else "wb")
            self._file.truncate(len(whole))
            self._file.seek(len(whole))
        except OSError as error:
            msg = f"The journal {self._path} cannot be written: {error.strerror}."
            raise JournalError(msg) from error
        if not whole:
            self._write([self._setting])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, on the disk when this returns."""
        self._write(rows)
        self.rows += rows

    def _write(self, documents: Sequence[msgspec.Struct]) -> None:
        assert self._file is not None  # noqa: S101 (inside the with block only)
        self._file.write(b"".join(_line(document) for document in documents))
        self._file.flush()
        os.fsync(self._file.fileno())


def _line(document: msgspec.Struct) -> bytes:
    return msgspec.json.encode(document) + b"\n"


def read_journal(path: Path) -> tuple[Setting, list[Row]]:
    """Return what a journal holds.

    Raises:
        JournalError: It cannot be read, or is no journal.
    """
    try:
        setting, rows, _ = _read(path)
    except OSError as error:
        msg = f"The journal {path} cannot be read: {error.strerror}."
        raise JournalError(msg) from error
    return setting, rows


def _read(path: Path) -> tuple[Setting, list[Row], bytes]:
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]  # a killed run may leave half a line
    first, *others = whole.splitlines() or [b""]
    try:
        setting = msgspec.json.decode(first, type=Setting)
        rows = [msgspec.json.decode(line, type=Row) for line in others]
    except msgspec.MsgspecError as error:
        msg = f"{path} is no journal of a quality measurement: {error}"
        raise JournalError(msg) from error
    return setting, rows, whole


def _difference(there: Setting, wanted: Setting) -> str:
    names = [name for name in Setting.__struct_fields__ if getattr(there, name) != getattr(wanted, name)]
    return "; ".join(f"{name} {getattr(there, name)}, not {getattr(wanted, name)}" for name in names)


def pictures_of(
    denoiser: Denoiser,
    courses: Sequence[Course],
    seeds: Sequence[int],
    cuts: Sequence[Sequence[int]],
    steps: int,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Run courses of equally many prompts side by side, computing every common beginning of cuts once.

    Args:
        denoiser: The model.
        courses: n courses; rows of one denoiser call.
        seeds: The noise's seed of each.
        cuts: Steps at which the prompts hand over; each as long as a course less one, not falling.
        steps: T.

    Yields:
        The index of a cut and its pictures, uint8 (n, height, width, 3), in no particular order of cuts.
    """

    def go_on(
        latents: list[Tensor], at: int, level: int, left: Sequence[int]
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        prompts = [course[level] for course in courses]
        if level == len(courses[0]) - 1:
            finished = denoiser.decode(denoiser.run(latents, at, steps, steps, prompts))
            for cut in left:
                yield cut, finished
            return
        for stop in sorted({cuts[i][level] for i in left}):
            latents, at = denoiser.run(latents, at, stop, steps, prompts), stop
            yield from go_on(latents, at, level + 1, [i for i in left if cuts[i][level] == stop])

    yield from go_on([denoiser.noise(seed) for seed in seeds], 0, 0, range(len(cuts)))


def personal_prompt(course: Course) -> str:
    """The last prompt of a course, which is one in words."""
    last = course[-1]
    assert isinstance(last, str)  # noqa: S101 (whoever makes a course sees to it)
    return last


def noise_seed(personal: str, seed: int) -> int:
    """The seed of a course's noise: its own for every personal prompt, so that errors of pairs are independent."""
    return (zlib.crc32(personal.encode()) + seed * 0x9E3779B1) % 2**32


def measure(denoiser: Denoiser, scorer: Scorer, courses: Sequence[tuple[Course, int]], setting: Setting) -> list[Row]:
    """Measure courses, each with its seed, in one batch."""
    prompts = [course for course, _ in courses]
    personals = [personal_prompt(course) for course in prompts]
    seeds = [noise_seed(personal, seed) for personal, (_, seed) in zip(personals, courses, strict=True)]
    scores = np.empty((len(courses), len(setting.cuts)))
    fidelity = np.empty((len(courses), len(setting.cuts) if isinstance(scorer, ClipScorer) else 0))
    for cut, pictures in pictures_of(denoiser, prompts, seeds, setting.cuts, setting.steps):
        if isinstance(scorer, ClipScorer):
            scores[:, cut], fidelity[:, cut] = scorer.assess(pictures, personals)
        else:
            scores[:, cut] = scorer.score(pictures, personals)
    return [
        Row(course, seed, _rounded(mine), _rounded(objective))
        for (course, seed), mine, objective in zip(courses, scores, fidelity, strict=True)
    ]


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values)
