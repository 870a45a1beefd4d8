"""A fit finds the curves that data came from, and is judged on pairs that it has not seen."""

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from semct.quality import QualityModelError, load_quality_model
from semct.quality_fit import Measurements, bands_of, cross_validate, fit, interpolated_bands

STEPS = 28
SHARED = np.arange(0, 29, 4.0)
TRUTH = load_quality_model("sd3-medium")


def drawn(prompts: int, noise: float, *, own: float = 0.0, seed: int = 0) -> Measurements:
    """Every pair of prompts, scored by the shipped SD3 model; `own` is how much ceilings of prompts differ."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(prompts, 6)) + 1.2
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    public, personal = (ids.ravel() for ids in np.meshgrid(np.arange(prompts), np.arange(prompts), indexing="ij"))
    similarity = (vectors @ vectors.T)[public, personal]
    scores = TRUTH.quality(similarity[:, None], SHARED)
    scores += rng.normal(0, noise, scores.shape) + rng.normal(0, own, prompts)[personal, None]
    return Measurements(public, personal, similarity, SHARED, scores)


def fitted(measured: Measurements) -> NDArray[np.float64]:
    model = fit(measured, model="test", scorer="test", steps=STEPS, source="a test")
    return model.quality(np.linspace(0.2, 1, 9)[:, None], SHARED)


def test_a_fit_recovers_the_curves_behind_its_data() -> None:
    truth = TRUTH.quality(np.linspace(0.2, 1, 9)[:, None], SHARED)
    np.testing.assert_allclose(fitted(drawn(12, 0.0)), truth, atol=3e-3)
    np.testing.assert_allclose(fitted(drawn(12, 0.02)), truth, atol=0.02)


def test_a_fit_to_flat_scores_is_flat() -> None:
    flat = drawn(8, 0.0)._replace(scores=np.full((64, len(SHARED)), 0.7))
    np.testing.assert_allclose(fitted(flat), 0.7, atol=1e-3)


def test_errors_are_those_of_the_noise() -> None:
    model = fit(drawn(12, 0.02), model="test", scorer="test", steps=STEPS, source="a test")
    assert model.pairs == 144
    assert model.measurements == 144 * len(SHARED)
    errors = model.errors
    assert errors.fitted == pytest.approx(0.02, rel=0.05)
    assert errors.unseen == pytest.approx(0.02, rel=0.08)
    assert errors.interpolated is not None
    assert errors.mean is not None
    assert errors.unseen < errors.interpolated < errors.mean


def test_the_test_pairs_of_a_fold_share_no_prompt_with_its_training_pairs() -> None:
    measured = drawn(14, 0.01)
    met: list[tuple[set[int], set[int]]] = []
    tested: list[int] = []

    def watching(training: Measurements):  # type: ignore[no-untyped-def]
        known = {*training.public.tolist(), *training.personal.tolist()}

        def predict(test: Measurements) -> NDArray[np.float64]:
            met.append((known, {*test.public.tolist(), *test.personal.tolist()}))
            tested.append(len(test.similarity))
            return np.repeat(test.similarity[:, None], len(SHARED), axis=1)

        return predict

    predicted = cross_validate(measured, watching)
    assert predicted is not None
    assert sum(tested) == 14 * 13  # each pair of two different prompts once
    assert all(not known & asked for known, asked in met)
    different = measured.public != measured.personal
    assert np.isnan(predicted[~different]).all()
    np.testing.assert_array_equal(predicted[different, 0], measured.similarity[different])


def test_what_is_known_of_a_prompt_helps() -> None:
    errors = fit(drawn(14, 0.01, own=0.03), model="test", scorer="test", steps=STEPS, source="a test").errors
    assert errors.inner is not None
    assert errors.ceiling_known is not None
    assert errors.ends_known is not None
    assert errors.ceiling_known < 0.6 * errors.inner
    assert errors.ends_known < 1.02 * errors.ceiling_known


def test_too_few_prompts_cannot_be_cross_validated() -> None:
    few = drawn(4, 0.01)
    model = fit(few, model="test", scorer="test", steps=STEPS, source="a test")
    assert model.errors.unseen is None
    assert msgspec.json.decode(msgspec.json.encode(model), type=type(model)) == model


@pytest.mark.parametrize(("pairs", "steps"), [(7, 8), (16, 3)])
def test_too_few_measurements_are_refused(pairs: int, steps: int) -> None:
    whole = drawn(4, 0.0)
    few = whole.where(np.arange(16) < pairs)._replace(shared=SHARED[:steps], scores=whole.scores[:pairs, :steps])
    with pytest.raises(QualityModelError, match=f"8 pairs at 4 numbers of shared steps; there are {pairs} at {steps}"):
        fit(few, model="test", scorer="test", steps=STEPS, source="a test")


def test_bands_hold_every_pair_once() -> None:
    similarity = np.random.default_rng(1).uniform(-0.2, 1, 200)
    bands = bands_of(similarity)
    assert sum(chosen.sum() for _, chosen in bands) == 200
    assert all(np.abs(similarity[chosen] - band).max() <= 0.05 + 1e-9 for band, chosen in bands)


def test_interpolated_bands_pass_through_their_means() -> None:
    measured = drawn(14, 0.0)
    predict = interpolated_bands(measured)
    for band, chosen in bands_of(measured.similarity):
        if chosen.sum() >= 4:
            means = measured.scores[chosen].mean(axis=0)
            at_band = measured.where(np.arange(len(chosen)) == 0)._replace(similarity=np.array([band]))
            np.testing.assert_allclose(predict(at_band)[0], means, atol=0.012)


def test_what_a_mean_costs_is_recovered() -> None:
    truth = msgspec.structs.replace(TRUTH.coefficients, own_discount=0.3, own_delay=2.0)
    rng = np.random.default_rng(3)
    size = rng.choice([2, 3, 4, 8], 120)
    others = rng.uniform(0, 0.9, 120)
    own = np.where(rng.random(120) < 0.75, 1 / size, 0.0)
    phi = own + (1 - own) * others
    scores = truth.ceiling - truth.losses(phi[:, None], SHARED, STEPS, own[:, None]) + rng.normal(0, 0.01, (120, 8))
    means = Measurements(np.arange(100, 220), rng.integers(0, 12, 120), phi, SHARED, scores, own)
    found = fit(drawn(12, 0.01), means=means, model="test", scorer="test", steps=STEPS, source="a test")
    assert found.coefficients.own_discount == pytest.approx(0.3, abs=0.08)
    assert found.coefficients.own_delay == pytest.approx(2.0, abs=0.4)
    assert found.pairs == 144 + 120
    assert found.errors.means is not None
    assert found.errors.means_as_sentences is not None
    assert found.errors.means == pytest.approx(0.01, rel=0.25)
    assert found.errors.means_as_sentences > 1.2 * found.errors.means
