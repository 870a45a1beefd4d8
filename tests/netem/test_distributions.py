"""The tables of jitter against what they stand for."""

from typing import Literal

import numpy as np
import pytest
from scipy import stats

from netem.distributions import SCALE, table


@pytest.mark.parametrize("distribution", ["normal", "pareto"])
def test_a_table_is_what_netem_takes(distribution: Literal["normal", "pareto"]) -> None:
    values = table(distribution)
    assert len(values) == 4096
    assert list(values) == sorted(values)
    assert -(2**15) <= values[0] < values[-1] < 2**15
    assert np.mean(values) / SCALE == pytest.approx(0, abs=1e-4)
    assert np.std(values) / SCALE == pytest.approx(1, rel=1e-4)


def test_normal_is_normal() -> None:
    assert stats.kstest(np.array(table("normal")) / SCALE, stats.norm.cdf).statistic < 1e-3


def test_pareto_has_its_shape_below_the_cut() -> None:
    uncut = np.array(table("pareto"))[:-100] / SCALE
    wanted = stats.pareto.ppf((np.arange(len(uncut)) + 0.5) / 4096, b=3)
    assert np.corrcoef(uncut, wanted)[0, 1] == pytest.approx(1, abs=1e-6)  # a stretched and shifted one
