"""Metrics against cases worked by hand and independent implementations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from phenoseq.evaluation import pairs
from phenoseq.evaluation.metrics import (
    coexpression_error,
    e_distance,
    mmd_rbf,
    mse,
    pcc_gene,
    variance_ratio,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ------------------------------------------------------------------------------------ correlation


def test_pcc_gene_is_pearson_over_cells(rng):
    true = rng.normal(3, 2, (50, 7)).astype(np.float32)
    predicted = (0.5 * true + rng.normal(0, 1, true.shape)).astype(np.float32)
    want = [stats.pearsonr(true[:, g], predicted[:, g]).statistic for g in range(7)]
    np.testing.assert_allclose(pcc_gene(true, predicted), want, atol=1e-6)


def test_pcc_gene_by_hand():
    true = np.array([[0.0, 1, 5], [1, 0, 5], [2, 2, 5]])
    predicted = np.array([[1.0, 2, 0], [3, 3, 1], [5, 1, 2]])
    np.testing.assert_allclose(pcc_gene(true, predicted), [1, -1, 0], atol=1e-12)


@pytest.mark.parametrize("level", [0.0, 0.1, 1.7, 1e4])
def test_a_constant_has_no_correlation(rng, level):
    """Also where float32 cannot hold the mean of equal numbers."""
    varies = rng.normal(size=(1001, 3)).astype(np.float32)
    constant = np.full((1001, 3), level, dtype=np.float32)
    assert not pcc_gene(varies, constant).any()
    assert not pcc_gene(constant, varies).any()
    assert not pcc_gene(constant, constant).any()


def test_pcc_gene_is_right_for_small_variation_on_a_large_mean(rng):
    true = rng.normal(size=(500, 1))
    predicted = 100 + 0.01 * (true + rng.normal(size=(500, 1)))
    want = np.corrcoef(true[:, 0], predicted[:, 0])[0, 1]
    assert pcc_gene(true, predicted)[0] == pytest.approx(want, abs=1e-9)
    assert pcc_gene(true.astype("f4"), predicted.astype("f4"))[0] == pytest.approx(want, abs=1e-3)


def test_pcc_gene_does_not_care_for_scale(rng):
    true, predicted = rng.normal(size=(2, 40, 5))
    plain = pcc_gene(true, predicted)
    np.testing.assert_allclose(pcc_gene(true, 1e-3 * predicted + 7), plain, atol=1e-9)
    np.testing.assert_allclose(pcc_gene(true, -predicted), -plain, atol=1e-12)


# ------------------------------------------------------------------------------- error and spread


def test_mse_by_hand():
    assert mse(np.array([[1.0, 2], [3, 4]]), np.array([[1.0, 0], [6, 4]])) == (4 + 9) / 4
    assert mse(np.ones((3, 2)), np.ones((3, 2))) == 0


def test_variance_ratio_is_the_median_over_genes_that_vary():
    true = np.array([[0.0, 0, 0, 7], [2, 2, 2, 7]])  # variances 1, 1, 1, 0
    draw = np.array([[0.0, 0, 0, 0], [1, 4, 6, 9]])  # variances 1/4, 4, 9, any
    assert variance_ratio(true, draw) == 4
    assert variance_ratio(true, true) == 1
    assert variance_ratio(true, np.zeros_like(true)) == 0


# -------------------------------------------------------------------------------- energy distance


def off_diagonal(a):
    """The mean of a matrix; without the pairs of a cell with itself, where there are such."""
    if a.shape[0] != a.shape[1]:
        return a.mean()
    return a[~np.eye(len(a), dtype=bool)].mean()


def brute(x, y):
    return 2 * off_diagonal(cdist(x, y)) - off_diagonal(cdist(x, x)) - off_diagonal(cdist(y, y))


@pytest.mark.parametrize(("n", "m"), [(2, 2), (30, 30), (40, 25), (7, 90)])
def test_e_distance_is_the_sum_over_pairs(rng, n, m):
    x, y = rng.normal(size=(n, 6)), rng.normal(0.4, 1.3, (m, 6))
    assert e_distance(x, y)[0] == pytest.approx(brute(x, y), abs=1e-5)


def test_e_distance_by_hand():
    x, y = np.array([[0.0], [1.0]]), np.array([[3.0], [5.0]])
    assert e_distance(x, y)[0] == pytest.approx(2 * (5 + 2) / 2 - 1 - 2)


def test_e_distance_over_several_blocks(rng, monkeypatch):
    x, y = rng.normal(size=(50, 3)), rng.normal(size=(45, 3))
    monkeypatch.setattr(pairs, "_BLOCK", 16)
    assert e_distance(x, y)[0] == pytest.approx(brute(x, y), abs=1e-5)


def test_e_distance_of_equal_distributions_is_zero_within_its_error():
    rng = np.random.default_rng(1)
    z = []
    for _ in range(60):
        value, error = e_distance(rng.normal(size=(80, 4)), rng.normal(size=(80, 4)))
        assert error >= 0
        z.append(value)
    assert abs(np.mean(z)) < 3 * np.std(z) / np.sqrt(60)


def test_e_distance_of_the_very_same_cells_is_zero(rng):
    x = rng.normal(size=(60, 4))
    assert e_distance(x, x)[0] == pytest.approx(0, abs=1e-6)


def test_e_distance_of_right_draws_given_each_image_is_zero():
    """They are nearer to their own cell than to others, which must not count for them."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(60):
        image = 2 * rng.normal(size=(60, 4))
        found.append([e(*image + rng.normal(size=(2, 60, 4)))[0] for e in (e_distance, mmd_rbf)])
    found = np.array(found)
    assert (np.abs(found.mean(axis=0)) < 3 * found.std(axis=0) / np.sqrt(60)).all()


def test_e_distance_grows_with_the_shift(rng):
    x, y = rng.normal(size=(2, 300, 5))
    distances = [e_distance(x, y + shift)[0] for shift in (0.0, 0.3, 1.0, 3.0)]
    assert distances == sorted(distances)
    assert distances[-1] > 5


def test_standard_error_is_that_of_repeated_samples():
    rng = np.random.default_rng(2)
    values, errors = zip(
        *(e_distance(rng.normal(size=(120, 3)), rng.normal(0.8, 1, (150, 3))) for _ in range(120)),
        strict=True,
    )
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.25)


def test_a_single_cell_has_no_distance(rng):
    for x, y in ((1, 5), (5, 1), (1, 1)):
        assert np.isnan(e_distance(rng.normal(size=(x, 2)), rng.normal(size=(y, 2)))).all()


def test_many_cells_are_subsampled_by_the_seed(rng, monkeypatch):
    monkeypatch.setattr(pairs, "PAIR_CELLS", 100)
    x, y = rng.normal(size=(400, 3)), rng.normal(0.5, 1, (300, 3))
    assert e_distance(x, y, seed=1) == e_distance(x, y, seed=1)
    assert e_distance(x, y, seed=1) != e_distance(x, y, seed=2)
    value, error = e_distance(x, y, seed=1)
    assert abs(value - brute(x, y)) < 4 * error


# ------------------------------------------------------------------------- maximum mean discrepancy


def brute_mmd(x, y):
    within = cdist(x, x)[np.triu_indices(len(x), 1)]
    median = np.sort(within)[(len(within) - 1) // 2]
    total = 0.0
    for width in median * np.array([0.25, 0.5, 1, 2, 4]):
        kxx, kyy, kxy = (
            np.exp(-(cdist(*ab) ** 2) / (2 * width**2)) for ab in ((x, x), (y, y), (x, y))
        )
        total += (off_diagonal(kxx) + off_diagonal(kyy) - 2 * off_diagonal(kxy)) / 5
    return total


@pytest.mark.parametrize(("n", "m"), [(30, 30), (40, 25)])
def test_mmd_is_the_sum_over_pairs(rng, n, m):
    x, y = rng.normal(size=(n, 6)), rng.normal(0.4, 1.3, (m, 6))
    assert mmd_rbf(x, y)[0] == pytest.approx(brute_mmd(x, y), abs=1e-5)


def test_mmd_of_equal_distributions_is_zero_within_its_error():
    rng = np.random.default_rng(1)
    found = [mmd_rbf(rng.normal(size=(60, 4)), rng.normal(size=(60, 4))) for _ in range(60)]
    values, errors = np.array(found).T
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(60)
    shifted = [mmd_rbf(rng.normal(size=(80, 3)), rng.normal(1, 1, (90, 3))) for _ in range(60)]
    values, errors = np.array(shifted).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.3)


# ----------------------------------------------------------------------------------- co-expression


def test_coexpression_error_is_that_of_pearson_matrices(rng):
    x, y = rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(80, 5))
    upper = np.triu_indices(5, 1)
    want = np.abs(np.corrcoef(x.T) - np.corrcoef(y.T))[upper].mean()
    assert coexpression_error(x, y) == pytest.approx(want, abs=1e-9)
    assert coexpression_error(x, 3 * x + 1) == pytest.approx(0, abs=1e-9)


def test_a_constant_gene_is_not_co_expressed():
    true = np.array([[0.0, 0, 0], [1, 1, 0], [2, 2, 0]])  # pairs 1, 0, 0
    draw = np.full((3, 3), 1.7, dtype=np.float32)
    assert coexpression_error(true, draw) == pytest.approx(1 / 3)
