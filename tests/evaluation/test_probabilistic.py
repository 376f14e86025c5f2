"""Proper scores and coverage against brute force, closed forms, and truths that are draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from phenoseq.evaluation.probabilistic import (
    cdf_of_draws,
    closed_coverage,
    coverage,
    crps,
    energy_score,
    interval,
    randomised_pit,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_crps_by_hand():
    draws = np.array([1.0, 3, 6])[:, None, None]
    # E|S - 2| = (1 + 1 + 4) / 3, E|S - S'| = (2 + 5 + 3) / 3
    assert crps(np.array([[2.0]]), draws)[0, 0] == pytest.approx(2 - 10 / 6)
    assert crps(np.array([[2.0]]), draws[:1])[0, 0] == 1


def test_crps_is_fair(rng):
    """Few draws of a normal give, on average, its closed form."""
    true = np.full((4000, 1), 0.7)
    closed = 0.7 * (2 * stats.norm.cdf(0.7) - 1) + 2 * stats.norm.pdf(0.7) - 1 / np.sqrt(np.pi)
    for k in (2, 5):
        found = crps(true, rng.normal(size=(k, 4000, 1)))
        assert found.mean() == pytest.approx(closed, abs=4 * found.std() / np.sqrt(4000))


def test_energy_score_is_the_sum_over_pairs(rng):
    true, draws = rng.normal(size=(3, 4)), rng.normal(size=(5, 3, 4))
    for i in range(3):
        first = np.mean([np.linalg.norm(d[i] - true[i]) for d in draws])
        pairs = [np.linalg.norm(a[i] - b[i]) for a in draws for b in draws]
        assert energy_score(true, draws)[i] == pytest.approx(first - sum(pairs) / (2 * 5 * 4))
    assert energy_score(true, draws[:1])[0] == pytest.approx(np.linalg.norm(draws[0, 0] - true[0]))


def test_in_one_dimension_the_energy_score_is_the_crps(rng):
    true, draws = rng.normal(size=(20, 1)), rng.normal(size=(7, 20, 1))
    np.testing.assert_allclose(energy_score(true, draws), crps(true, draws)[:, 0], atol=1e-6)


def test_the_right_distribution_scores_best(rng):
    true = rng.normal(size=(3000, 2))
    right = energy_score(true, rng.normal(size=(8, 3000, 2))).mean()
    for scale in (0.0, 0.5, 2.0):
        assert energy_score(true, scale * rng.normal(size=(8, 3000, 2))).mean() > right + 0.02


@pytest.mark.parametrize("k", [4, 31])
def test_the_pit_of_exchangeable_counts_is_uniform(rng, k):
    """Of counts that are mostly zero too, whatever the number of draws."""
    rate = rng.gamma(0.5, 0.6, 40_000)
    counts = rng.poisson(rate, (k + 1, 40_000))[:, :, None]
    pit = randomised_pit(*cdf_of_draws(counts[0], counts[1:]), rng)
    assert stats.kstest(pit.ravel(), "uniform").pvalue > 1e-3
    for level in (0.5, 0.8, 0.9):
        assert coverage(pit, level) == pytest.approx(level, abs=0.01)


def test_draws_that_are_too_narrow_cover_too_little(rng):
    counts = rng.poisson(4, 5000)[:, None]
    narrow = np.rint(4 + rng.normal(0, 0.8, (30, 5000, 1)))
    pit = randomised_pit(*cdf_of_draws(counts, narrow), rng)
    assert coverage(pit, 0.8) < 0.65


@pytest.mark.parametrize(
    ("k", "level", "share"), [(39, 0.9, 0.9), (32, 0.8, 27 / 33), (3, 0.9, 0.5)]
)
def test_intervals_hold_an_exchangeable_truth_as_often_as_they_say(rng, k, level, share):
    values = rng.normal(size=(k + 1, 20_000, 1))
    low, high = interval(values[1:], level)
    assert closed_coverage(values[0], low, high)[0] == pytest.approx(share, abs=0.01)
    assert np.isin(low, values[1:]).all()


def test_closed_intervals_cover_more_than_they_say(rng):
    """Which is why the PIT is randomised."""
    counts = (rng.random((2, 3000, 1)) < 0.04).astype(float)
    assert closed_coverage(counts[0], np.zeros_like(counts[0]), np.zeros_like(counts[0])) == (
        pytest.approx(0.96, abs=0.02),
        0,
    )
    low, high = np.array([[1.0], [1.0]]), np.array([[3.0], [2.0]])
    assert closed_coverage(np.array([[3.0], [2.5]]), low, high) == (0.5, 1.5)
