"""Metrics over cells by genes, each one definition.

``T`` is true and ``P`` predicted expression: log1p of counts scaled to the median library size of
training cells, ``(n_cells, n_genes)``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating]

#: Most cells over which distances between pairs are taken.
PAIR_CELLS = 10_000


def pcc_gene(true: Matrix, predicted: Matrix) -> NDArray[np.float64]:
    """Return the Pearson correlation over cells of each gene, 0 where either is constant."""
    a = true - true.mean(axis=0, dtype=np.float64)
    b = predicted - predicted.mean(axis=0, dtype=np.float64)
    norm = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    constant = norm < 1e-9 * max(len(true), 1)
    product = (a * b).sum(axis=0)
    out = np.zeros(a.shape[1])
    np.divide(product, norm, out=out, where=~constant)
    return out


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

    ``2 E|X - Y| - E|X - X'| - E|Y - Y'|``, Euclidean, pairs of a cell with itself left out
    (Szekely and Rizzo 2013); one draw a cell. Over more than 10,000 cells, a seeded subsample of
    them. The standard error is that of the U-statistic over cells.
    """
    rng = np.random.default_rng(seed)
    x, y = (_subsample(m, rng) for m in (true, draw))
    n, m = len(x), len(y)
    if min(n, m) < 2:
        return float("nan"), float("nan")
    xx, yy = _distance_sums(x, x) / (n - 1), _distance_sums(y, y) / (m - 1)
    xy, yx = _distance_sums(x, y) / m, _distance_sums(y, x) / n
    value = 2 * xy.mean() - xx.mean() - yy.mean()
    error = 2 * np.sqrt((xy - xx).var(ddof=1) / n + (yx - yy).var(ddof=1) / m)
    return float(value), float(error)


def _subsample(matrix: Matrix, rng: np.random.Generator) -> Matrix:
    if len(matrix) <= PAIR_CELLS:
        return matrix.astype(np.float32)
    rows = np.sort(rng.choice(len(matrix), PAIR_CELLS, replace=False))
    return matrix[rows].astype(np.float32)


def _distance_sums(a: Matrix, b: Matrix, block: int = 1024) -> NDArray[np.float64]:
    """For each row of ``a`` the sum of its Euclidean distances to the rows of ``b``."""
    same = a is b
    squares = (b**2).sum(axis=1)
    out = np.empty(len(a))
    for start in range(0, len(a), block):
        some = a[start : start + block]
        square = (some**2).sum(axis=1)[:, None] + squares - 2 * some @ b.T
        distance = np.sqrt(np.maximum(square, 0))
        if same:
            distance[np.arange(len(some)), np.arange(start, start + len(some))] = 0
        out[start : start + block] = distance.sum(axis=1, dtype=np.float64)
    return out
