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

from semct.quality import Coefficients, Errors, QualityModel, QualityModelError

GROUPS = 11
"""Into so many groups cross-validation deals the prompts."""

BAND = 0.1
"""Width of a band of similarity."""

_OF_MEANS = ("own_discount", "own_delay")  # coefficients that pairs of sentences say nothing of
_OF_PAIRS = tuple(name for name in Coefficients.__struct_fields__ if name not in _OF_MEANS)
_LEAST_PROMPTS = 6
_LEAST_PAIRS = 8

Floats = NDArray[np.float64]


class Measurements(NamedTuple):
    """Scores of n pairs at m numbers of shared steps.

    `public` and `personal` (n,) name the prompts by number, `similarity` (n,) is their cosine, `shared` (m,) the
    numbers of shared steps, `scores` (n, m) against the personal prompt. Where public prompts are means, each has a
    number of its own, `similarity` is the mean cosine to its prompts, and `own` (n,) the personal prompt's part in it.
    """

    public: NDArray[np.int64]
    personal: NDArray[np.int64]
    similarity: Floats
    shared: Floats
    scores: Floats
    own: Floats | float = 0.0

    def where(self, chosen: NDArray[np.bool_]) -> Measurements:
        """Return the chosen pairs only."""
        own = self.own if isinstance(self.own, float) else self.own[chosen]
        mine = (self.public[chosen], self.personal[chosen], self.similarity[chosen])
        return Measurements(*mine, self.shared, self.scores[chosen], own)

    @property
    def pairs(self) -> int:
        """The number of different pairs; a pair may stand here with several seeds."""
        return len(np.unique(np.stack([self.public, self.personal]), axis=1).T)


Predictor = Callable[[Measurements], Floats]
"""From pairs to predictions of their scores, (..., n, m). One that looks at their scores says so."""


def fit(
    measured: Measurements, *, means: Measurements | None = None, model: str, scorer: str, steps: int, source: str
) -> QualityModel:
    """Fit a quality model by least squares on single scores, and cross-validate it over prompts.

    Args:
        measured: What was measured of pairs of prompts in words.
        means: What was measured with means as public prompts, or None where nothing was: then a mean counts as a
            sentence of its similarity.
        model: The diffusion model, by the name or id it was loaded by.
        scorer: The scorer.
        steps: T.
        source: Where the measurements are from, in a sentence.

    Raises:
        QualityModelError: There are too few pairs, or too few numbers of shared steps.
    """
    if measured.pairs < _LEAST_PAIRS or len(np.unique(measured.shared)) < 4:
        msg = f"A quality model needs {_LEAST_PAIRS} pairs at 4 numbers of shared steps; there are "
        msg += f"{measured.pairs} at {len(np.unique(measured.shared))}."
        raise QualityModelError(msg)
    coefficients = fit_coefficients(measured, steps)
    fitted = _rms(_predicted(coefficients, steps, measured) - measured.scores)
    errors = _errors(measured, steps, coefficients, fitted)
    count, scores = measured.pairs, measured.scores.size
    if means is not None:
        errors = _with_means(errors, means, steps, coefficients)
        coefficients = fit_means(means, steps, coefficients)
        count, scores = count + means.pairs, scores + means.scores.size
    return QualityModel(
        model=model,
        scorer=scorer,
        steps=steps,
        source=source,
        pairs=count,
        measurements=int(scores),
        errors=errors,
        coefficients=coefficients,
    )


def _errors(measured: Measurements, steps: int, start: Coefficients, fitted: float) -> Errors:
    def learn(training: Measurements) -> Predictor:
        coefficients = fit_coefficients(training, steps, start=start)
        known = [_with_known(training, steps, coefficients, ends=ends) for ends in (1, 2)]
        bands = interpolated_bands(training)
        mean = training.scores.mean(axis=0)

        def predict(test: Measurements) -> Floats:
            ours, means = _predicted(coefficients, steps, test), np.broadcast_to(mean, test.scores.shape)
            return np.stack([ours, bands(test), means, *(predictor(test) for predictor in known)])

        return predict

    predicted = cross_validate(measured, learn)
    if predicted is None:
        return Errors(fitted=fitted)
    tested = ~np.isnan(predicted[0, :, 0])
    off = predicted[:, tested] - measured.scores[tested]
    inner = (measured.shared > measured.shared.min()) & (measured.shared < measured.shared.max())
    return Errors(
        fitted=fitted,
        unseen=_rms(off[0]),
        interpolated=_rms(off[1]),
        mean=_rms(off[2]),
        inner=_rms(off[0][:, inner]),
        ceiling_known=_rms(off[3][:, inner]),
        ends_known=_rms(off[4][:, inner]),
    )


def fit_means(means: Measurements, steps: int, coefficients: Coefficients) -> Coefficients:
    """Return the coefficients of pairs with those of means: of least squared error on the scores of ``means``."""

    def made(values: Floats) -> Coefficients:
        return msgspec.structs.replace(coefficients, **dict(zip(_OF_MEANS, map(float, values), strict=True)))

    def errors(values: Floats) -> Floats:
        return np.asarray((_predicted(made(values), steps, means) - means.scores).ravel())

    found = least_squares(errors, (0.1, steps / 28), bounds=((0, 0), (10, steps)), x_scale=(0.1, steps / 28))
    return made(found.x)


def _with_means(errors: Errors, means: Measurements, steps: int, coefficients: Coefficients) -> Errors:
    """The errors with those on means: each predicted from those of other personal prompts, and as sentences."""
    prompts = np.unique(means.personal)
    dealt = (np.random.default_rng(0).permutation(len(prompts)) % GROUPS)[np.searchsorted(prompts, means.personal)]
    off = np.full(means.scores.shape, np.nan)
    for group in np.unique(dealt):
        others, test = means.where(dealt != group), means.where(dealt == group)
        if len(others.scores):
            off[dealt == group] = _predicted(fit_means(others, steps, coefficients), steps, test) - test.scores
    plain = _predicted(coefficients, steps, means) - means.scores
    return msgspec.structs.replace(
        errors,
        means=None if np.isnan(off).any() else _rms(off),
        means_as_sentences=_rms(plain),
    )


def fit_coefficients(measured: Measurements, steps: int, *, start: Coefficients | None = None) -> Coefficients:
    """Return the coefficients of least squared error on single scores, searched from `start`.

    Scores that share a prompt err together, so n scores of p prompts tell less than n independent ones, and what the
    curves' shape does with similarity is easily read out of chance. Coefficients of that are drawn towards a drop
    linear in similarity and one shape for all similarities, as strongly as if each prompt had been scored once.
    """
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
    lower = np.array([-np.inf, 0, 0.2, 0, -steps, -2 * steps, np.log(1 / steps), -3, 0.1])
    upper = np.array([np.inf, 20 * span, 12, 1e4, 2 * steps, 2 * steps, np.log(40 / steps), 3, 5])
    prompts = len(np.union1d(measured.public, measured.personal))
    scatter = float(np.std(measured.scores - measured.scores.mean(axis=0)))
    strength = scatter * np.sqrt(measured.scores.size / prompts)

    def errors(values: Floats) -> Floats:
        c = _coefficients(values)
        shape = [(c.power - 1) / 1.5, c.middle_slope / (steps / 2), c.steepness_slope]
        off = _predicted(c, steps, measured) - measured.scores
        return np.concatenate([off.ravel(), strength * np.array(shape)])

    inside = np.clip([getattr(start, name) for name in _OF_PAIRS], lower + 1e-9, upper - 1e-9)
    found = least_squares(errors, inside, bounds=(lower, upper), x_scale="jac", max_nfev=300)
    return _coefficients(found.x)


def interpolated_bands(training: Measurements) -> Predictor:
    """Return the peer: a sigmoid fitted to the means of each band, coefficients interpolated over similarity.

    It is how the paper's Fig. 3 gives quality: L / (1 + exp(K (k - B))) + D at similarities 0.1 apart.
    """
    full = [(band, chosen) for band, chosen in bands_of(training.similarity) if chosen.sum() >= 4]
    full = full or [(0.0, np.ones(len(training.similarity), bool))]
    bands = [band for band, _ in full]
    curves = np.array([_sigmoid_of(training.shared, training.scores[chosen].mean(axis=0)) for _, chosen in full])

    def predict(test: Measurements) -> Floats:
        coefficients = [np.interp(test.similarity, bands, column)[:, None] for column in curves.T]
        return _sigmoid(test.shared, *coefficients)

    return predict


def bands_of(similarity: Floats) -> list[tuple[float, NDArray[np.bool_]]]:
    """Return the bands of similarity that hold pairs: their middles, 0.1 apart, and which pairs are in them."""
    nearest = np.round(similarity / BAND).astype(int)
    return [(float(band * BAND), nearest == band) for band in np.unique(nearest)]


def cross_validate(measured: Measurements, learn: Callable[[Measurements], Predictor]) -> Floats | None:
    """Predict every pair from pairs that share no prompt with it.

    Prompts are dealt into groups; for every two groups, the pairs between these are predicted from the pairs
    that have no prompt in either. Pairs of a prompt with itself are left out: they tell nothing about sharing.

    Args:
        measured: The n pairs.
        learn: Makes a predictor from some of them.

    Returns:
        What the predictors gave, (..., n, m), NaN where a pair was left out; None where there are too few
        prompts to do it.
    """
    prompts = np.unique(np.concatenate([measured.public, measured.personal]))
    if len(prompts) < _LEAST_PROMPTS:
        return None
    dealt = np.random.default_rng(0).permutation(len(prompts)) % min(GROUPS, len(prompts))
    public, personal = (dealt[np.searchsorted(prompts, ids)] for ids in (measured.public, measured.personal))
    lower, upper = np.minimum(public, personal), np.maximum(public, personal)
    different = measured.public != measured.personal
    predicted: Floats | None = None
    for pair in itertools.combinations_with_replacement(range(dealt.max() + 1), 2):
        chosen = (lower == pair[0]) & (upper == pair[1]) & different
        training = measured.where(~np.isin(public, pair) & ~np.isin(personal, pair))
        if not chosen.any():
            continue
        if training.pairs < _LEAST_PAIRS:
            return None
        found = learn(training)(measured.where(chosen))
        if predicted is None:
            predicted = np.full((*found.shape[:-2], *measured.scores.shape), np.nan)
        predicted[..., chosen, :] = found
    return predicted


def _with_known(training: Measurements, steps: int, coefficients: Coefficients, *, ends: int) -> Predictor:
    """The family, corrected by what a pair's score at the first measured k, or at the first and last, is off by.

    How much of that carries over to other k is learnt: a share of it that changes with what is lost by then.
    The predictor looks at those scores of its test pairs, so only what is between them tells anything.
    """
    known = [training.shared.argmin(), training.shared.argmax()][:ends]

    def features(pairs: Measurements, base: Floats) -> Floats:
        lost = 1 - (base - base.min(axis=1, keepdims=True)) / np.maximum(np.ptp(base, axis=1, keepdims=True), 1e-12)
        off = [(pairs.scores - base)[:, [k]] for k in known]
        return np.stack([part for o in off for part in (o * (1 - lost), o * lost)], axis=-1)

    base = _predicted(coefficients, steps, training)
    inner = np.ones(len(training.shared), bool)
    inner[[training.shared.argmin(), training.shared.argmax()]] = False
    given = features(training, base)[:, inner].reshape(-1, 2 * ends)
    weights = np.linalg.lstsq(given, (training.scores - base)[:, inner].ravel(), rcond=None)[0]

    def predict(test: Measurements) -> Floats:
        base = _predicted(coefficients, steps, test)
        return np.asarray(base + features(test, base) @ weights)

    return predict


def _coefficients(values: Floats) -> Coefficients:
    return Coefficients(**dict(zip(_OF_PAIRS, map(float, values), strict=True)))


def _predicted(coefficients: Coefficients, steps: int, pairs: Measurements) -> Floats:
    own = np.broadcast_to(np.asarray(pairs.own, np.float64), pairs.similarity.shape)
    lost = coefficients.losses(pairs.similarity[:, None], pairs.shared, steps, own[:, None])
    return np.asarray(coefficients.ceiling - lost)


def _sigmoid(shared: Floats, fall: Any, slope: Any, middle: Any, floor: Any) -> Floats:
    return np.asarray(fall * expit(-slope * (shared - middle)) + floor)


def _sigmoid_of(shared: Floats, means: Floats) -> Floats:
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


def _rms(errors: Floats) -> float:
    return float(np.sqrt(np.mean(errors**2)))
