"""Baselines, fitted on the training part and predicting the same cells as the model."""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from phenoseq.data.store import Store
from phenoseq.evaluation.report import normalised

_ALPHAS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
_BATCH = 2048


def intensity_statistics(crops: NDArray[Any]) -> NDArray[np.float32]:
    """Return the mean, deviation, median, 99th percentile and centre mean of each channel.

    Parameters
    ----------
    crops
        ``(n, C, H, W)``; the centre is the middle quarter of the width and height.

    Returns
    -------
    ``(n, 5 C)``.
    """
    n, _, height, width = crops.shape
    pixels = crops.reshape(n, crops.shape[1], -1).astype(np.float32)
    middle = crops[..., 3 * height // 8 : 5 * height // 8, 3 * width // 8 : 5 * width // 8]
    median, high = np.percentile(pixels, [50, 99], axis=2).astype(np.float32)
    centre = middle.mean(axis=(2, 3), dtype=np.float32)
    parts = [pixels.mean(axis=2), pixels.std(axis=2), median, high, centre]
    return np.concatenate(parts, axis=1)


def fit_baselines(
    store: Store,
    table: ad.AnnData,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    *,
    median: float,
    seed: int = 0,
) -> dict[str, ad.AnnData]:
    """Fit every baseline on the training cells and predict the test cells.

    Parameters
    ----------
    store, table
        The store and its expression table.
    train, test
        Cells to fit on, and to predict.
    median
        Library size to which counts are scaled.
    seed
        Of the random cells.

    Returns
    -------
    By name, AnnData like a prediction: ``training mean``; ``ridge on intensity statistics`` (its
    penalty chosen by leave-one-out on training cells); ``random training cells``, which ignores the
    image and stands for what a distribution of real profiles scores.
    """
    known = normalised(table.X[train], median)
    scaler = StandardScaler()
    features = scaler.fit_transform(_features(store, train))
    ridge = RidgeCV(alphas=_ALPHAS).fit(features, known)
    drawn = np.random.default_rng(seed).choice(train, len(test))
    real = sparse.csr_matrix(normalised(table.X[drawn], median))
    mean = np.broadcast_to(known.mean(axis=0), (len(test), known.shape[1])).copy()
    predicted = ridge.predict(scaler.transform(_features(store, test))).astype(np.float32)
    obs, var = table.obs[[]].iloc[test], table.var
    return {
        "training mean": _prediction(mean, obs, var),
        "ridge on intensity statistics": _prediction(predicted, obs, var),
        "random training cells": _prediction(real.toarray(), obs, var, draw=real),
    }


def _features(store: Store, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    parts = [
        intensity_statistics(store.take(rows[i : i + _BATCH])) for i in range(0, len(rows), _BATCH)
    ]
    return np.concatenate(parts)


def _prediction(
    mean: NDArray[np.float32],
    obs: pd.DataFrame,
    var: pd.DataFrame,
    draw: sparse.csr_matrix | None = None,
) -> ad.AnnData:
    layers = {} if draw is None else {"draw": draw}
    return ad.AnnData(mean, obs=obs.copy(), var=var.copy(), layers=layers)
