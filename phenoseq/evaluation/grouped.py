"""Metrics as functions of how often each group counts, so that groups can be resampled.

A statistic keeps sums over the cells of each group, and takes weights ``(B, n_groups)``, one row a
resample, to values ``(B,)``. Weights of one give the metric itself; how often a group was drawn
with replacement, its block-bootstrap distribution. With the same weights for two predictions the
difference of their values is that of paired resamples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from phenoseq.evaluation import pairs
from phenoseq.evaluation.metrics import correlations

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
#: Most numbers of the co-moments of all groups; beyond it they are kept of all cells alone.
_CO_MOMENTS = 100_000_000


def resamples(n_groups: int, n: int = 1000, seed: int = 0) -> Array:
    """Return how often each group is drawn in each of ``n`` resamples, ``(n, n_groups)``."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n).astype(np.float64)


def value_of(statistic: Statistic, n_groups: int) -> float:
    """Return the statistic of the groups as they are."""
    return float(statistic(np.ones((1, n_groups)))[0])


def interval(values: Array, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of a statistic, or of a difference of two.

    Parameters
    ----------
    values
        Of the resamples, ``(B,)``.
    level
        Of the interval.

    Returns
    -------
    Its ends, NaN where no resample has a value.
    """
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Means:
    """The mean over cells of a value of each cell."""

    def __init__(self, n_groups: int) -> None:
        self._sums, self._n = np.zeros(n_groups), np.zeros(n_groups)

    def add(self, values: NDArray[np.floating], group: NDArray[np.int64]) -> None:
        """Add values ``(n,)`` of cells of groups ``(n,)``."""
        self._sums += np.bincount(group, values, len(self._n))
        self._n += np.bincount(group, minlength=len(self._n))

    def __call__(self, weights: Array) -> Array:
        """Return the mean for each row of weights."""
        with np.errstate(invalid="ignore"):
            return (weights @ self._sums) / (weights @ self._n)


class Moments:
    """First and second moments of true and predicted values of each gene."""

    def __init__(self, n_groups: int, n_genes: int) -> None:
        self._n = np.zeros(n_groups)
        self._sums = np.zeros((5, n_groups, n_genes))  # t, p, t^2, p^2, tp

    def add(
        self, true: NDArray[np.floating], other: NDArray[np.floating], group: NDArray[np.int64]
    ) -> None:
        """Add cells ``(n, g)`` of groups ``(n,)``."""
        t, p = true.astype(np.float64), other.astype(np.float64)
        for k, values in enumerate((t, p, t * t, p * p, t * p)):
            self._sums[k] += by_group(values, group, len(self._n))
        self._n += np.bincount(group, minlength=len(self._n))

    def by_gene(self, weights: Array) -> Array:
        """Return the Pearson correlation of each gene, ``(B, g)``, 0 where either is constant."""
        tt, pp, tp = self._moments(weights)
        varies = (tt > 0) & (pp > 0)
        out = np.zeros_like(tp)
        np.divide(tp, np.sqrt(tt) * np.sqrt(pp), out=out, where=varies)
        return out

    def pcc(self, weights: Array) -> Array:
        """Return the median over genes of :meth:`by_gene`."""
        return np.median(self.by_gene(weights), axis=1)

    def variance_ratio(self, weights: Array) -> Array:
        """Return the median over genes that vary in truth of the ratio of the variances."""
        tt, pp, _ = self._moments(weights)
        ratio = np.full_like(tt, np.nan)
        np.divide(pp, tt, out=ratio, where=tt > 0)
        return np.nanmedian(ratio, axis=1)

    def _moments(self, weights: Array) -> tuple[Array, ...]:
        """Return variances, zero where they are within rounding of it, and covariances."""
        n = (weights @ self._n)[:, None]
        t, p, tt, pp, tp = (weights @ sums / n for sums in self._sums)
        noise = 1e-12
        var_t, var_p = tt - t * t, pp - p * p
        var_t, var_p = (
            np.where(var_t > noise * tt, var_t, 0),
            np.where(var_p > noise * pp, var_p, 0),
        )
        return var_t, var_p, tp - t * p


class CoMoments:
    """Products of genes, true and predicted, of which the co-expression error follows.

    Values are taken from their mean over the first cells, so that products are exactly 0 of a gene
    that is constant, and float32 is enough. Where groups and genes are many, only of all cells
    together; resamples then give NaN.
    """

    def __init__(self, n_groups: int, n_genes: int) -> None:
        self._whole = n_groups * n_genes**2 > _CO_MOMENTS
        kept = 1 if self._whole else n_groups
        self._n = np.zeros(kept)
        self._from: NDArray[np.float32] | None = None
        self._sums = np.zeros((2, kept, n_genes))
        self._products = np.zeros((2, kept, n_genes, n_genes), dtype=np.float32)

    def add(
        self, true: NDArray[np.floating], draw: NDArray[np.floating], group: NDArray[np.int64]
    ) -> None:
        """Add cells ``(n, g)`` of groups ``(n,)``."""
        if self._whole:
            group = np.zeros_like(group)
        both = np.stack([true, draw]).astype(np.float32)
        if self._from is None:
            self._from = both.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        both -= self._from
        for name in np.unique(group):
            at = group == name
            self._n[name] += at.sum()
            for k, values in enumerate(both[:, at]):
                self._sums[k, name] += values.sum(axis=0, dtype=np.float64)
                self._products[k, name] += values.T @ values

    def __call__(self, weights: Array) -> Array:
        """Return the co-expression error for each row of weights."""
        if self._whole:
            if len(weights) > 1:
                return np.full(len(weights), np.nan)
            weights = np.ones((1, 1))
        upper = np.triu_indices(self._sums.shape[2], 1)
        out = []
        for row in weights:
            true, draw = (self._correlations(row, k)[upper] for k in range(2))
            out.append(np.abs(true - draw).mean())
        return np.array(out)

    def matrices(self) -> tuple[Array, Array]:
        """Return the true and predicted gene-gene correlations of all cells."""
        ones = np.ones(len(self._n))
        return self._correlations(ones, 0), self._correlations(ones, 1)

    def _correlations(self, weights: Array, k: int) -> Array:
        n = weights @ self._n
        mean = weights @ self._sums[k] / n
        product = np.tensordot(weights.astype(np.float32), self._products[k], 1) / n
        product = product.astype(np.float64)
        return correlations(product - np.outer(mean, mean), np.diagonal(product))


class PairDistances:
    """The energy distance over a subsample of cells.

    Parameters
    ----------
    true, draw
        Profiles of the same cells, float32 ``(n, g)``; pairs of a cell with itself count nowhere.
    group
        Their groups, ``(n,)``.
    """

    def __init__(
        self,
        true: NDArray[np.float32],
        draw: NDArray[np.float32],
        group: NDArray[np.int64],
        n_groups: int,
    ) -> None:
        x, y = torch.from_numpy(true), torch.from_numpy(draw)
        self.error = pairs.energy_distance(x, y)[1]
        self._n = np.bincount(group, minlength=n_groups).astype(np.float64)
        place = torch.from_numpy(group)
        self._xy, self._xx, self._yy = (
            pairs.distances_by_group(a, b, place, n_groups) for a, b in ((x, y), (x, x), (y, y))
        )

    def __call__(self, weights: Array) -> Array:
        """Return the energy distance for each row of weights; copies of one cell are no pair."""
        n = weights @ self._n
        own = (weights**2) @ self._n
        between, true, draw = (
            np.einsum("bi,ij,bj->b", weights, sums, weights, optimize=True)
            for sums in (self._xy, self._xx, self._yy)
        )
        out: Array = (2 * between - true - draw) / (n**2 - own)
        return out


def by_group(values: Array, group: NDArray[np.int64], n_groups: int) -> Array:
    """Return the sum over the cells of each group, ``(n, g)`` -> ``(n_groups, g)``."""
    out = np.zeros((n_groups, *values.shape[1:]))
    order = np.argsort(group, kind="stable")
    names, starts = np.unique(group[order], return_index=True)
    out[names] = np.add.reduceat(values[order], starts, axis=0)
    return out
