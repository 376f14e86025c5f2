"""Scores of classifiers."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from phenoseq.evaluation.labels import balanced_accuracy, gap_interval, gap_recovered


def test_balanced_accuracy_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    true, predicted = rng.choice(["a", "b", "c"], (2, 60), p=[0.7, 0.2, 0.1])
    want = balanced_accuracy_score(true, predicted)
    assert balanced_accuracy(true, predicted) == pytest.approx(want)


def test_classes_that_do_not_occur_do_not_count():
    assert balanced_accuracy(np.array([1, 1, 2]), np.array([1, 9, 2])) == 0.75


def test_gap_recovered_by_hand():
    assert gap_recovered(0.4, 0.5, 0.8) == pytest.approx(0.25)
    assert gap_recovered(0.4, 0.3, 0.8) == pytest.approx(-0.25)
    assert np.isnan(gap_recovered(0.4, 0.5, 0.4))


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
