"""Baselines: what they predict, and that they are fitted on the training cells alone."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from phenoseq.evaluation.report import normalised
from phenoseq.training.baselines import fit_baselines, intensity_statistics


@pytest.fixture(scope="module")
def parts(store):
    rows = np.random.default_rng(0).permutation(len(store))
    return np.sort(rows[:300]), np.sort(rows[300:])


def test_intensity_statistics_by_hand():
    crops = np.zeros((1, 2, 8, 8), dtype=np.uint16)
    crops[0, 0] = 5
    crops[0, 1, 3:5, 3:5] = 32  # the middle quarter of each side
    mean, std, median, high, centre = intensity_statistics(crops)[0].reshape(5, 2)
    np.testing.assert_allclose(mean, [5, 2])
    np.testing.assert_allclose(std, [0, np.sqrt(32 * 32 * 4 / 64 - 4)], rtol=1e-6)
    np.testing.assert_allclose(median, [5, 0])
    np.testing.assert_allclose(high, [5, 32])
    np.testing.assert_allclose(centre, [5, 32])


def test_each_baseline_is_what_it_says(store, parts):
    train, test = parts
    table = store.table()
    made = fit_baselines(store, table, train, test, median=250.0, seed=3)
    known = normalised(table.X[train], 250.0)
    np.testing.assert_allclose(made["training mean"].X, np.tile(known.mean(0), (len(test), 1)))

    scaler = StandardScaler()
    x = scaler.fit_transform(intensity_statistics(store.take(train)))
    ridge = RidgeCV(alphas=(0.1, 1, 10, 100, 1000, 10000)).fit(x, known)
    expected = ridge.predict(scaler.transform(intensity_statistics(store.take(test))))
    np.testing.assert_allclose(
        made["ridge on intensity statistics"].X, expected, rtol=1e-3, atol=1e-4
    )

    drawn = made["random training cells"]
    profiles = {tuple(row) for row in known}
    assert all(tuple(row) in profiles for row in drawn.X)
    np.testing.assert_array_equal(drawn.layers["draw"].toarray(), drawn.X)
    assert list(drawn.obs_names) == list(table.obs_names[test])
