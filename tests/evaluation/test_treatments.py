"""Changes of groups against scipy, scikit-learn, and cases worked by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import r2_score

from phenoseq.errors import DataError
from phenoseq.evaluation.treatments import (
    changes,
    de_overlap_k,
    discrimination,
    group_means,
    map_replicate,
    pcc_delta,
    r2_weighted_delta,
    t_weights,
    wmse,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_changes_by_hand():
    profiles = np.array([[1.0, 1], [3, 5], [2, 2], [4, 0]])
    groups = np.array(["b", "b", "dmso", "a"])
    names, means = group_means(profiles, groups)
    assert names.tolist() == ["a", "b", "dmso"]
    np.testing.assert_array_equal(means, [[4, 0], [2, 3], [2, 2]])
    names, away = changes(profiles, groups, "dmso")
    assert names.tolist() == ["a", "b"]
    np.testing.assert_array_equal(away, [[2, -2], [0, 1]])
    with pytest.raises(DataError, match="no control 'DMSO'"):
        changes(profiles, groups, "DMSO")


def test_pcc_delta_is_pearson_over_genes(rng):
    true, predicted = rng.normal(size=(2, 4, 30))
    want = [stats.pearsonr(t, p).statistic for t, p in zip(true, predicted, strict=True)]
    np.testing.assert_allclose(pcc_delta(true, predicted), want, atol=1e-9)
    assert pcc_delta(true, np.zeros_like(true)).tolist() == [0, 0, 0, 0]


def test_weights_are_welch_t(rng):
    group, control = rng.normal(0.5, 2, (20, 6)), rng.normal(size=(35, 6))
    t = np.abs(stats.ttest_ind(group, control, equal_var=False).statistic)
    np.testing.assert_allclose(t_weights(group, control), t / t.sum(), rtol=1e-9)
    group[:, 2] = control[:, 2] = 3
    assert t_weights(group, control)[2] == 0
    assert t_weights(control, control).tolist() == [1 / 6] * 6


def test_wmse_by_hand():
    true, predicted = np.array([[1.0, 2], [3, 4]]), np.array([[1.0, 0], [6, 4]])
    assert wmse(true, predicted, np.array([0.25, 0.75])) == 0.25 * 4.5 + 0.75 * 2


def test_r2_of_changes_is_that_of_scikit_learn(rng):
    true, predicted = rng.normal(size=(2, 5, 20))
    weights = rng.random((5, 20))
    mean = true.mean(axis=0)
    want = [
        r2_score(t - mean, p - mean, sample_weight=w)
        for t, p, w in zip(true, predicted, weights, strict=True)
    ]
    np.testing.assert_allclose(r2_weighted_delta(true, predicted, weights), want)
    np.testing.assert_allclose(r2_weighted_delta(true, true, weights), 1)


def test_discrimination_by_hand():
    true = np.array([[0.0], [1.0], [5.0]])
    assert discrimination(true, true) == 1
    # the first lies nearest to the second, the others to themselves: ranks 1, 0, 0
    assert discrimination(true, np.array([[0.9], [1], [5]])) == pytest.approx((0.5 + 1 + 1) / 3)
    assert discrimination(true, true[::-1]) == pytest.approx((0 + 1 + 0) / 3)
    # one answer for all is right on average for half of them
    assert discrimination(true, np.full((3, 1), 0.2)) == pytest.approx(0.5)
    assert discrimination(np.zeros((4, 2)), np.zeros((4, 2))) == 0.5


def test_overlap_of_changed_genes_by_hand():
    true = np.array([5.0, -4, 3, 0, 0.1])
    predicted = np.array([-9.0, -2, 0.1, 3, 0])
    assert de_overlap_k(true, predicted, 2) == (0.5, 0.5)
    assert de_overlap_k(true, true, 3) == (1, 1)
    assert de_overlap_k(true, -true, 3) == (1, 0)


def test_replicates_are_retrieved(rng):
    pytest.importorskip("copairs", reason="replicate retrieval needs copairs")
    effect = {"a": rng.normal(size=30), "b": rng.normal(size=30), "none": np.zeros(30)}
    names = np.repeat(["a", "b", "none", "DMSO"], [5, 5, 5, 12])
    base = {**effect, "DMSO": np.zeros(30)}
    profiles = np.stack([2 * base[n] for n in names]) + rng.normal(size=(27, 30))
    obs = pd.DataFrame({"Metadata_Treatment": names})
    table = map_replicate(
        profiles, obs, "Metadata_Treatment", control="DMSO", null_size=500, seed=1
    )
    assert sorted(table.index) == ["a", "b", "none"]
    assert table.loc[["a", "b"], "map"].min() > 0.95
    assert table.loc[["a", "b"], "corrected_p_value"].max() < 0.02
    assert table.loc["none", "p_value"] > 0.05
    # the definition, for one query: precision at each of its replicates, among the controls
    unit = profiles / np.linalg.norm(profiles, axis=1, keepdims=True)
    rivals = np.isin(names, ["none", "DMSO"])
    each = []
    for i in np.flatnonzero(names == "none"):
        others = rivals & (np.arange(27) != i)
        hits = (names[others] == "none")[np.argsort(-(unit[others] @ unit[i]))]
        each.append((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())
    assert table.loc["none", "map"] == pytest.approx(np.mean(each), abs=1e-5)


def test_single_replicates_cannot_be_retrieved(rng):
    pytest.importorskip("copairs", reason="replicate retrieval needs copairs")
    obs = pd.DataFrame({"t": ["a", "b", "DMSO", "DMSO"]})
    with pytest.raises(DataError, match="no t has two replicates"):
        map_replicate(rng.normal(size=(4, 3)), obs, "t", control="DMSO")
