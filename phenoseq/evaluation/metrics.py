"""Metrics over cells by genes, each one definition.

``T`` is true and ``P`` predicted expression: log1p of counts scaled to the median library size of
training cells, ``(n_cells, n_genes)``.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phenoseq.evaluation.pairs import energy_distance, maximum_mean_discrepancy, subsample

Matrix = NDArray[np.floating]
#: Variance over mean square up to which a gene is a constant.
_ROUNDING = 1e-12


def pcc_gene(true: Matrix, predicted: Matrix) -> NDArray[np.float64]:
    """Return the Pearson correlation over cells of each gene, 0 where either is constant.

    Examples
    --------
    >>> import numpy as np
    >>> true = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
    >>> pcc_gene(true, np.array([[0.0, 3.0], [2.0, 3.0], [4.0, 3.0]])).tolist()
    [1.0, 0.0]
    """
    a = true - true.mean(axis=0, dtype=np.float64)
    b = predicted - predicted.mean(axis=0, dtype=np.float64)
    varies = _varies((a**2).mean(axis=0), true) & _varies((b**2).mean(axis=0), predicted)
    norm = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    out = np.zeros(a.shape[1])
    np.divide((a * b).sum(axis=0), norm, out=out, where=varies)
    return out


def _varies(variance: NDArray[np.float64], values: Matrix) -> NDArray[np.bool_]:
    """Tell which genes vary by more than rounding."""
    square: NDArray[np.float64] = (values**2).mean(axis=0, dtype=np.float64)
    return np.greater(variance, _ROUNDING * square)


def mse(true: Matrix, predicted: Matrix) -> float:
    """Return the mean squared error over cells and genes."""
    return float(np.mean((true.astype(np.float64) - predicted) ** 2))


def variance_ratio(true: Matrix, draw: Matrix) -> float:
    """Return the median of var(draw) / var(true) over the genes that vary in truth."""
    spread = true.var(axis=0, dtype=np.float64)
    some = spread > 0
    return float(np.median(draw.var(axis=0, dtype=np.float64)[some] / spread[some]))


def e_distance(true: Matrix, draw: Matrix, seed: int = 0) -> tuple[float, float]:
    """Return the energy distance between true and drawn profiles, and its standard error.

    ``2 E|X - Y| - E|X - X'| - E|Y - Y'|``, Euclidean, pairs of a cell with itself left out of all
    three (Szekely and Rizzo 2013); one draw a cell. Over more than 10,000 cells, a seeded
    subsample of them. The standard error is that of the U-statistic over cells.
    """
    return energy_distance(pair_cells(true, seed), pair_cells(draw, seed))


def mmd_rbf(true: Matrix, draw: Matrix, seed: int = 0) -> tuple[float, float]:
    """Return the squared, unbiased maximum mean discrepancy, and its standard error.

    Gaussian kernels of five bandwidths about the median distance; cells as for
    :func:`e_distance`. See :func:`~phenoseq.evaluation.pairs.maximum_mean_discrepancy`.
    """
    return maximum_mean_discrepancy(pair_cells(true, seed), pair_cells(draw, seed))


def coexpression(profiles: Matrix) -> NDArray[np.float64]:
    """Return the Pearson correlations between genes, ``(g, g)``, 0 where one is constant."""
    away = profiles - profiles.mean(axis=0, dtype=np.float64)
    return correlations(away.T @ away / len(away), (profiles**2).mean(axis=0, dtype=np.float64))


def correlations(
    covariance: NDArray[np.float64], square: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Turn covariances ``(..., g, g)`` to correlations, 0 for genes that are constant.

    ``square`` is the mean of the squares of each gene, ``(..., g)``, which tells rounding from
    variance.
    """
    variance = np.diagonal(covariance, axis1=-2, axis2=-1)
    varies = variance > _ROUNDING * square
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1)), 0)
    return covariance * scale[..., None] * scale[..., None, :]


def coexpression_error(true: Matrix, draw: Matrix) -> float:
    """Return the mean absolute difference of the gene-gene correlations, upper triangle."""
    upper = np.triu_indices(true.shape[1], 1)
    return float(np.abs(coexpression(true) - coexpression(draw))[upper].mean())


def pair_cells(matrix: Matrix, seed: int = 0) -> Tensor:
    """Return the cells over which distances between pairs are taken, float32 ``(n, g)``."""
    return torch.from_numpy(matrix[subsample(len(matrix), seed).numpy()].astype(np.float32))
