"""What a run's pictures are worth: content quality, fidelity, and how far they are from device-only ones."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from semct.quality import ClipScorer, Scorer, ScorerError, load_scorer
from semct.runs import RequestRow

REFERENCE = "device-only"
"""The framework whose pictures the others' are compared with: each user's own model, prompt and noise alone."""


class Judgement(NamedTuple):
    """A picture's score against its prompt, and its fidelity where there is a scorer of that."""

    quality: float
    fidelity: float | None = None


class Judge:
    """Scores pictures: against their prompts, and by themselves where a CLIP model is named for that.

    Args:
        scorer: Gives the content quality.
        objective: Gives the fidelity (CLIP-IQA), or None. Where it is the scorer, too, it sees each picture once.
    """

    def __init__(self, scorer: Scorer, objective: ClipScorer | None = None) -> None:
        self._scorer = scorer
        self._objective = objective

    @classmethod
    def load(cls, scorer: str, objective: str | None) -> Self:
        """Load the two by their names.

        Raises:
            ScorerError: There is no such scorer, or ``objective`` is no CLIP model.
        """
        found = load_scorer(scorer)
        if objective is None:
            return cls(found)
        second = found if objective == scorer else load_scorer(objective)
        if not isinstance(second, ClipScorer):
            msg = f"{objective!r} cannot judge a picture by itself; name a CLIP model as `objective_scorer`."
            raise ScorerError(msg)
        return cls(found, second)

    def judge(self, pictures: Mapping[str, bytes], prompts: Mapping[str, str]) -> dict[str, Judgement]:
        """The judgement of each picture (an encoded image) by its request; ``prompts`` has the requests' prompts.

        Raises:
            ScorerError: The pictures differ in size.
        """
        if not pictures:
            return {}
        names = list(pictures)
        pixels = np.stack([_pixels(io.BytesIO(pictures[name])) for name in names])
        asked = [prompts[name] for name in names]
        if self._objective is None:
            return {n: Judgement(float(s)) for n, s in zip(names, self._scorer.score(pixels, asked), strict=True)}
        score, fidelity = self._objective.assess(pixels, asked)
        if self._scorer is not self._objective:
            score = self._scorer.score(pixels, asked)
        return {n: Judgement(float(s), float(f)) for n, s, f in zip(names, score, fidelity, strict=True)}


def with_difference(rows: Sequence[RequestRow], folder: Path) -> list[RequestRow]:
    """The rows with how far their pictures are from those of the same user, repetition and noise under `REFERENCE`.

    ``pixel_difference`` is the mean absolute difference of the channels, 0 to 255; None where one of the two has no
    picture in the run's ``folder`` that can be read, or they differ in prompt, noise or size, and of the reference.
    """

    def of(row: RequestRow) -> tuple[int, str, int, str]:
        return row.repetition, row.device, row.seed, row.prompt

    references = {of(row): row for row in rows if row.framework == REFERENCE}
    done = []
    for row in rows:
        reference = references.get(of(row)) if row.framework != REFERENCE else None
        found = _difference(folder, row.image, reference.image if reference else None)
        done.append(row if found is None else msgspec.structs.replace(row, pixel_difference=found))
    return done


def _difference(folder: Path, one: str | None, other: str | None) -> float | None:
    if one is None or other is None:
        return None
    try:
        seen, wanted = (_pixels(folder / name).astype(np.int16) for name in (one, other))
    except (OSError, UnidentifiedImageError):
        return None
    return float(np.abs(seen - wanted).mean()) if seen.shape == wanted.shape else None


def _pixels(source: Path | io.BytesIO) -> NDArray[np.uint8]:
    with Image.open(source) as image:
        return np.asarray(image.convert("RGB"))
