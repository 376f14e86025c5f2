"""Scores of classifiers."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from phenoseq.evaluation.labels import balanced_accuracy, gap_interval, gap_recovered, macro_f1


def test_balanced_accuracy_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    true, predicted = rng.choice(["a", "b", "c"], (2, 60), p=[0.7, 0.2, 0.1])
    want = balanced_accuracy_score(true, predicted)
    assert balanced_accuracy(true, predicted) == pytest.approx(want)


def test_macro_f1_is_that_of_scikit_learn_over_the_classes_that_occur():
    rng = np.random.default_rng(0)
    true, predicted = rng.choice(["a", "b", "c"], 60), rng.choice(["a", "b", "c", "d"], 60)
    want = f1_score(true, predicted, labels=["a", "b", "c"], average="macro")
    assert macro_f1(true, predicted) == pytest.approx(want)


def test_classes_that_do_not_occur_do_not_count():
    assert balanced_accuracy(np.array([1, 1, 2]), np.array([1, 9, 2])) == 0.75


def test_gap_recovered_by_hand():
    assert gap_recovered(0.4, 0.5, 0.8) == pytest.approx(0.25)
    assert gap_recovered(0.4, 0.3, 0.8) == pytest.approx(-0.25)
    assert np.isnan(gap_recovered(0.4, 0.5, 0.4))
    assert np.isnan(gap_recovered(0.4, 0.3, 0.2))


def test_the_interval_holds_the_value_and_is_of_groups():
    rng = np.random.default_rng(1)
    true = rng.integers(3, size=600)
    groups = np.repeat(np.arange(20), 30)

    def guess(right):
        return np.where(rng.random(600) < right, true, (true + 1) % 3)

    predictions = guess(0.5), guess(0.65), guess(0.9)
    value, low, high = gap_interval(true, *predictions, groups, n=200, seed=3)
    assert low < value < high
    assert 0.1 < value < 0.7
    assert gap_interval(true, *predictions, groups, n=200, seed=3) == (value, low, high)
    # the same items in fewer, larger groups of like fate are less sure
    order = np.argsort(predictions[1] == true, kind="stable")
    again = gap_interval(true[order], *(p[order] for p in predictions), groups, n=200, seed=3)
    assert again[2] - again[1] > 1.5 * (high - low)


def test_the_interval_is_that_of_items_drawn_by_group():
    rng = np.random.default_rng(5)
    true, groups = rng.integers(4, size=200), rng.integers(6, size=200)
    predictions = [np.where(rng.random(200) < p, true, 9) for p in (0.3, 0.5, 0.8)]
    drawn = np.random.default_rng(2).integers(6, size=(50, 6))
    by_hand = []
    for some in drawn:
        rows = np.concatenate([np.flatnonzero(groups == g) for g in some])
        scores = [balanced_accuracy_score(true[rows], p[rows]) for p in predictions]
        by_hand.append((scores[1] - scores[0]) / (scores[2] - scores[0]))
    _, low, high = gap_interval(true, *predictions, groups, n=50, seed=2)
    np.testing.assert_allclose([low, high], np.quantile(by_hand, [0.025, 0.975]))
