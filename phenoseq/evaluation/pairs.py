"""Distances between pairs of cells, over a subsample that does not depend on order or rank.

Where two matrices have as many rows, row i of both is of one cell, and that pair counts nowhere: a
profile that was drawn from a cell's own image is nearer to that cell than to others, and would make
the distance too small.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Most cells over which distances between pairs are taken.
PAIR_CELLS = 10_000
_BLOCK = 1024
#: Cells whose distances set the bandwidth of a kernel.
_MEDIAN_CELLS = 2000


def priority(cells: Tensor, seed: int) -> Tensor:
    """Return a pseudo-random number of every cell, from its number and the seed alone.

    The cells of lowest priority are a random subsample, the same one however the cells are
    ordered, cut in batches or divided over ranks.

    Parameters
    ----------
    cells
        Numbers of the cells, int64 ``(n,)``.
    seed
        Of the subsample.

    Returns
    -------
    Int64 ``(n,)``, different for different cells (splitmix64, Steele et al. 2014).
    """
    z = cells + _signed((seed + 1) * 0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def subsample(n: int, seed: int, most: int | None = None) -> Tensor:
    """Return the rows of up to ``most`` (10,000) of ``n`` cells, ascending, int64."""
    order = priority(torch.arange(n), seed).argsort()
    return order[: PAIR_CELLS if most is None else most].sort().values


def mean_distances(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean Euclidean distance of each row to the rows of the other matrix.

    Parameters
    ----------
    a, b
        Float ``(n, g)`` and ``(m, g)``; if n = m, pairs of a row with its own are left out.

    Returns
    -------
    Float64 ``(n,)`` and ``(m,)``, on the CPU.
    """
    same = len(a) == len(b)
    rows = torch.empty(len(a), dtype=torch.float64)
    columns = torch.zeros(len(b), dtype=torch.float64)
    for start, distance in _distances(a, b):
        rows[start : start + _BLOCK] = distance.sum(dim=1).cpu().double()
        columns += distance.sum(dim=0).cpu().double()
    return rows / (len(b) - same), columns / (len(a) - same)


def distances_by_group(a: Tensor, b: Tensor, group: Tensor, n_groups: int) -> NDArray[np.float64]:
    """Return the sum of the distances between the rows of any two groups.

    Parameters
    ----------
    a, b
        As for :func:`mean_distances`, of the same rows.
    group
        Group of every row, int64 ``(n,)``.

    Returns
    -------
    ``(n_groups, n_groups)``: rows of a group of ``a`` to those of a group of ``b``.
    """
    member = torch.nn.functional.one_hot(group, n_groups).float()
    out = torch.zeros(n_groups, n_groups, dtype=torch.float64)
    for start, distance in _distances(a, b):
        out += (member[start : start + _BLOCK].T @ (distance @ member)).double()
    return out.numpy()


def mean_kernels(a: Tensor, b: Tensor, bandwidths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean Gaussian kernel of each row with the rows of the other matrix.

    Parameters
    ----------
    a, b
        As for :func:`mean_distances`.
    bandwidths
        Of the kernels, whose mean is taken, ``(k,)``.
    """
    same = len(a) == len(b)
    rows = torch.empty(len(a), dtype=torch.float64)
    columns = torch.zeros(len(b), dtype=torch.float64)
    for start, distance in _distances(a, b):
        kernel = torch.zeros_like(distance)
        for width in bandwidths:
            kernel += torch.exp(-0.5 * (distance / width).square()) / len(bandwidths)
        if same:
            kernel.diagonal(start).zero_()
        rows[start : start + _BLOCK] = kernel.sum(dim=1).cpu().double()
        columns += kernel.sum(dim=0).cpu().double()
    return rows / (len(b) - same), columns / (len(a) - same)


def energy_distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the energy distance between two samples, and its standard error over cells.

    ``2 E|X - Y| - E|X - X'| - E|Y - Y'|``, Euclidean (Szekely and Rizzo 2013), pairs of a cell
    with itself left out of each: it is 0 on average where both have one distribution, also where
    ``y`` is drawn given the image of each cell of ``x``.

    Parameters
    ----------
    x, y
        Profiles, float ``(n, g)`` and ``(m, g)``; if n = m, of the same cells in the same order.
        NaN where either has fewer than two.
    """
    if min(len(x), len(y)) < 2:
        return float("nan"), float("nan")
    xy, yx = mean_distances(x, y)
    xx, yy = mean_distances(x, x)[0], mean_distances(y, y)[0]
    value = 2 * xy.mean() - xx.mean() - yy.mean()
    error = 2 * ((xy - xx).var() / len(x) + (yx - yy).var() / len(y)).sqrt()
    return float(value), float(error)


def _distances(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the Euclidean distances of some rows of ``a``, from which on, to all of ``b``."""
    same = len(a) == len(b)
    centre = a.mean(dim=0)  # so that squares do not drown the differences
    a, b = a - centre, b - centre
    squares = b.square().sum(dim=1)
    for start in range(0, len(a), _BLOCK):
        some = a[start : start + _BLOCK]
        square = some.square().sum(dim=1)[:, None] + squares - 2 * some @ b.T
        distance = square.clamp(min=0).sqrt()
        if same:
            distance.diagonal(start).zero_()
        yield start, distance


def maximum_mean_discrepancy(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the squared, unbiased maximum mean discrepancy, and its standard error over cells.

    Gaussian kernels at the median distance of true cells times 1/4, 1/2, 1, 2 and 4, averaged
    (Gretton et al. 2012).

    Parameters
    ----------
    x, y
        True and predicted profiles, as for :func:`energy_distance`.
    """
    if min(len(x), len(y)) < 2:
        return float("nan"), float("nan")
    some = x[:_MEDIAN_CELLS]
    pairs = torch.triu_indices(len(some), len(some), offset=1)
    full = torch.cat([distance for _, distance in _distances(some, some)])
    median = full[pairs[0], pairs[1]].median().clamp(min=1e-6)
    widths = median * 2.0 ** torch.arange(-2, 3, device=x.device)
    xy, yx = mean_kernels(x, y, widths)
    xx, yy = mean_kernels(x, x, widths)[0], mean_kernels(y, y, widths)[0]
    value = xx.mean() + yy.mean() - 2 * xy.mean()
    error = 2 * ((xx - xy).var() / len(x) + (yy - yx).var() / len(y)).sqrt()
    return float(value), float(error)


def _signed(word: int) -> int:
    """Wrap an integer to a signed one of 64 bits."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shift the bits to the right, filling with zeros."""
    return (z >> by) & ((1 << (64 - by)) - 1)
