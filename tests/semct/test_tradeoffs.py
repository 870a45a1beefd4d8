"""The shipped curves of fewer steps and of a smaller model: factors of 1 where nothing is saved, and sane below."""

import numpy as np
import pytest

from semct.diffusion import EMBEDDED, EMBEDDED_SMALL, Denoiser
from semct.quality import load_scorer
from semct.tradeoffs import Point, Tradeoffs, load_tradeoffs
from semct.training.scenes import held_out_captions


def test_nothing_saved_costs_nothing() -> None:
    curves = load_tradeoffs()
    assert (curves.model, curves.small_model) == (EMBEDDED, EMBEDDED_SMALL)
    assert float(curves.steps_factor(curves.full)) == 1.0
    assert float(curves.switch_factor(curves.full, curves.full)) == 1.0
    assert float(curves.switch_factor(10, 10)) == 1.0
    assert curves.steps_factor(np.arange(1, 40)).min() > 0
    # Who stops far too early gets a worse picture.
    assert float(curves.steps_factor(curves.fewest)) < 1


def test_between_measurements_lie_straight_lines() -> None:
    points = tuple(Point(at=n, score=s, error=0.0) for n, s in ((2, 0.4), (4, 0.6), (8, 0.8)))
    curves = Tradeoffs(model="a", small_model="b", scorer="c", source="here", full=8, by_steps=points, by_switch=points)
    assert curves.steps_factor([1, 2, 3, 6, 8]) == pytest.approx([0.5, 0.5, 0.625, 0.875, 1.0])
    assert curves.switch_factor([1, 2, 4], 4) == pytest.approx([0.5, 0.75, 1.0])
    assert curves.fewest == 2


def test_the_small_model_goes_on_from_the_large_ones_latents() -> None:
    large, small = Denoiser.load(EMBEDDED), Denoiser.load(EMBEDDED_SMALL)
    captions = [example.caption for example in held_out_captions(4)]
    noise = [large.noise(i) for i in range(4)]
    mixed = small.run(large.run(noise, 0, 6, 12, captions), 6, 12, 12, captions)
    scores = load_scorer("embedded").score(large.decode(mixed), captions)
    others = load_scorer("embedded").score(large.decode(mixed), captions[1:] + captions[:1])
    assert scores.mean() - others.mean() > 0.3
