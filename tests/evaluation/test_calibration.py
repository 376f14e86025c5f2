"""Recalibration makes wrong distributions right on cells that it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from phenoseq.errors import DataError
from phenoseq.evaluation.calibration import fit_recalibration
from phenoseq.evaluation.probabilistic import coverage, randomised_pit


def pits(n, rng):
    """PIT of sparse counts under the wrong rate, and of normal values under the wrong width."""
    rate = rng.gamma(1, 1, n)
    counts = rng.poisson(rate)
    below, at_most = (stats.poisson.cdf(counts - k, 1.6 * rate) for k in (1, 0))
    sparse_ = randomised_pit(below, at_most, rng)
    narrow = stats.norm.cdf(rng.normal(size=n), scale=0.6)
    return np.column_stack([sparse_, narrow, rng.random(n)])


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_untouched_cells_are_covered(level):
    rng = np.random.default_rng(0)
    found = fit_recalibration(pits(8000, rng))
    fresh = pits(8000, rng)
    mended = found.apply(fresh)
    assert abs(coverage(fresh[:, 1], level) - level) > 0.08
    for gene in range(3):
        assert coverage(mended[:, gene], level) == pytest.approx(level, abs=0.02)


def test_quantiles_are_the_inverse():
    found = fit_recalibration(pits(2000, np.random.default_rng(1)))
    for probability in (0.05, 0.5, 0.95):
        level = found.level_for(probability)
        np.testing.assert_allclose(found.apply(level[None])[0], probability, atol=1e-6)
    assert found.level_for(0.05)[1] < 0.02  # too narrow: the quantile lies further out
    assert (np.diff(found.shares, axis=1) > 0).all()


def test_a_gene_with_few_cells_follows_the_others():
    rng = np.random.default_rng(2)
    pit = stats.norm.cdf(rng.normal(size=(5000, 4)), scale=0.6)
    pit[:, 3] = np.nan
    pit[:20, 3] = 0.9
    found = fit_recalibration(pit)
    np.testing.assert_allclose(found.shares[3], found.shares[0], atol=0.06)


def test_what_is_no_pit_is_refused():
    with pytest.raises(DataError, match="30 values to recalibrate by, of 200"):
        fit_recalibration(np.full((10, 3), 0.5))
    with pytest.raises(DataError, match="between 0 and 1"):
        fit_recalibration(np.full((300, 1), 1.5))
