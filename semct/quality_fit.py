"""Fits the family of `semct.quality.QualityModel` to measurements, and tells how well it predicts unseen pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import curve_fit, least_squares
from scipy.special import expit

from semct.quality import Coefficients, QualityModel, QualityModelError

GROUPS = 11
"""Into so many groups cross-validation deals the prompts."""

BAND = 0.1
"""Width of a band of similarity."""

_LEAST_PROMPTS = 6
_LEAST_PAIRS = 8

Predictor = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From similarities, (n,), to scores at the measured shared steps, (n, steps measured)."""


class Measurements(NamedTuple):
    """Scores of n pairs at m numbers of shared steps.

    `public` and `personal` (n,) name the prompts by number, `similarity` (n,) is their cosine, `shared` (m,) the
    numbers of shared steps, `scores` (n, m) against the personal prompt.
    """

    public: NDArray[np.int64]
    personal: NDArray[np.int64]
    similarity: NDArray[np.float64]
    shared: NDArray[np.float64]
    scores: NDArray[np.float64]

    def where(self, chosen: NDArray[np.bool_]) -> Measurements:
        """Return the chosen pairs only."""
        return Measurements(
            self.public[chosen], self.personal[chosen], self.similarity[chosen], self.shared, self.scores[chosen]
        )


def fit(measured: Measurements, *, model: str, scorer: str, steps: int, source: str) -> QualityModel:
    """Fit a quality model by least squares on single scores, and cross-validate it over prompts.

    Args:
        measured: What was measured.
        model: The diffusion model, by the name or id it was loaded by.
        scorer: The scorer.
        steps: T.
        source: Where the measurements are from, in a sentence.

    Raises:
        QualityModelError: There are too few pairs, or too few numbers of shared steps.
    """
    if len(measured.similarity) < _LEAST_PAIRS or len(np.unique(measured.shared)) < 4:
        msg = f"A quality model needs {_LEAST_PAIRS} pairs at 4 numbers of shared steps; there are "
        msg += f"{len(measured.similarity)} at {len(np.unique(measured.shared))}."
        raise QualityModelError(msg)
    coefficients = fit_coefficients(measured, steps)

    def ours(training: Measurements) -> Predictor:
        partial = _family_of(fit_coefficients(training, steps, start=coefficients), steps)
        return lambda phi: partial.quality(phi[:, None], training.shared)

    return QualityModel(
        model=model,
        scorer=scorer,
        steps=steps,
        source=source,
        pairs=len(measured.similarity),
        measurements=int(measured.scores.size),
        rmse=rmse(_family_of(coefficients, steps), measured),
        cross_validated=cross_validate(measured, ours),
        interpolated=cross_validate(measured, interpolated_bands),
        coefficients=coefficients,
    )


def fit_coefficients(measured: Measurements, steps: int, *, start: Coefficients | None = None) -> Coefficients:
    """Return the coefficients of least squared error on single scores, searched from `start`."""
    span = max(float(np.ptp(measured.scores)), 1e-6)
    start = start or Coefficients(
        ceiling=float(measured.scores[:, measured.shared.argmin()].mean()),
        fall=span / 2,
        power=1.5,
        bend=0.5,
        middle=steps / 2,
        middle_slope=0,
        steepness=float(np.log(6 / steps)),
        steepness_slope=0,
    )
    # Bounds keep what few measurements leave open in a sane range: the midpoint near the steps, and the
    # steepness between a straight line and a single step.
    lower = np.array([-np.inf, 0, 0.2, 0, -steps, -2 * steps, np.log(1 / steps), -3])
    upper = np.array([np.inf, 20 * span, 12, 1e4, 2 * steps, 2 * steps, np.log(40 / steps), 3])
    phi = measured.similarity[:, None]

    def errors(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return (_family(values, steps).quality(phi, measured.shared) - measured.scores).ravel()

    inside = np.clip(msgspec.structs.astuple(start), lower + 1e-9, upper - 1e-9)
    found = least_squares(errors, inside, bounds=(lower, upper), x_scale="jac", max_nfev=300)
    return _family(found.x, steps).coefficients


def interpolated_bands(training: Measurements) -> Predictor:
    """Return the peer: a sigmoid fitted to the means of each band, coefficients interpolated over similarity.

    It is how the paper's Fig. 3 gives quality: L / (1 + exp(K (k - B))) + D at similarities 0.1 apart.
    """
    full = [(band, chosen) for band, chosen in bands_of(training.similarity) if chosen.sum() >= 4]
    bands = [band for band, _ in full]
    curves = np.array([_sigmoid_of(training.shared, training.scores[chosen].mean(axis=0)) for _, chosen in full])

    def predict(phi: NDArray[np.float64]) -> NDArray[np.float64]:
        coefficients = [np.interp(phi, bands, column)[:, None] for column in curves.T]
        return _sigmoid(training.shared, *coefficients)

    return predict


def bands_of(similarity: NDArray[np.float64]) -> list[tuple[float, NDArray[np.bool_]]]:
    """Return the bands of similarity that hold pairs: their middles, 0.1 apart, and which pairs are in them."""
    nearest = np.round(similarity / BAND).astype(int)
    return [(float(band * BAND), nearest == band) for band in np.unique(nearest)]


def cross_validate(measured: Measurements, predictor: Callable[[Measurements], Predictor]) -> float | None:
    """Return the root mean square error on pairs of which neither prompt took part in the fit.

    Prompts are dealt into groups; for every two groups, the pairs between these are predicted from the pairs
    that have no prompt in either. Pairs of a prompt with itself are left out: they tell nothing about sharing.
    None where there are too few prompts for it.
    """
    prompts = np.unique(np.concatenate([measured.public, measured.personal]))
    if len(prompts) < _LEAST_PROMPTS:
        return None
    dealt = np.random.default_rng(0).permutation(len(prompts)) % min(GROUPS, len(prompts))
    public, personal = (dealt[np.searchsorted(prompts, ids)] for ids in (measured.public, measured.personal))
    squares, count = 0.0, 0
    for pair in itertools.combinations_with_replacement(range(dealt.max() + 1), 2):
        mine = np.isin(public, pair), np.isin(personal, pair)
        # Both groups, in either order; the same group twice is a pair of groups too.
        between = (np.minimum(public, personal) == pair[0]) & (np.maximum(public, personal) == pair[1])
        test = measured.where(between & (measured.public != measured.personal))
        training = measured.where(~(mine[0] | mine[1]))
        if not len(test.similarity):
            continue
        if len(training.similarity) < _LEAST_PAIRS:
            return None
        errors = predictor(training)(test.similarity) - test.scores
        squares, count = squares + float((errors**2).sum()), count + errors.size
    return float(np.sqrt(squares / count)) if count else None


def rmse(model: QualityModel, measured: Measurements) -> float:
    """Return a model's root mean square error on single scores."""
    return _rms(model.quality(measured.similarity[:, None], measured.shared) - measured.scores)


def _family(values: NDArray[np.float64], steps: int) -> QualityModel:
    names = Coefficients.__struct_fields__
    numbers = (float(value) for value in values)
    return _family_of(Coefficients(**dict(zip(names, numbers, strict=True))), steps)


def _family_of(coefficients: Coefficients, steps: int) -> QualityModel:
    """A model with coefficients only, to predict with."""
    return QualityModel(
        model="",
        scorer="",
        steps=steps,
        source="",
        pairs=0,
        measurements=0,
        rmse=0,
        cross_validated=None,
        interpolated=None,
        coefficients=coefficients,
    )


def _sigmoid(shared: NDArray[np.float64], fall: Any, slope: Any, middle: Any, floor: Any) -> NDArray[np.float64]:
    return np.asarray(fall * expit(-slope * (shared - middle)) + floor)


def _sigmoid_of(shared: NDArray[np.float64], means: NDArray[np.float64]) -> NDArray[np.float64]:
    span, top = max(float(np.ptp(means)), 1e-6), max(float(shared.max()), 1.0)
    guess = (span, 6 / top, top / 2, float(means.min()))
    found, _ = curve_fit(
        _sigmoid,
        shared,
        means,
        p0=guess,
        bounds=((0, 0, 0, -np.inf), (4 * span, 5, 1.5 * top, np.inf)),
        max_nfev=20_000,
    )
    return np.asarray(found)


def _rms(errors: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(errors**2)))
