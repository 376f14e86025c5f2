"""Distances between pairs of cells, over a subsample that does not depend on order or rank."""

from __future__ import annotations

import torch
from torch import Tensor

#: Most cells over which distances between pairs are taken.
PAIR_CELLS = 10_000
_BLOCK = 1024


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
        Float ``(n, g)`` and ``(m, g)``; the same object leaves out the pairs of a row with itself.

    Returns
    -------
    Float64 ``(n,)`` and ``(m,)``, on the CPU.
    """
    same = a is b
    centre = a.mean(dim=0)  # so that squares do not drown the differences
    a, b = a - centre, b - centre
    squares = b.square().sum(dim=1)
    rows = torch.empty(len(a), dtype=torch.float64)
    columns = torch.zeros(len(b), dtype=torch.float64)
    for start in range(0, len(a), _BLOCK):
        some = a[start : start + _BLOCK]
        square = some.square().sum(dim=1)[:, None] + squares - 2 * some @ b.T
        distance = square.clamp(min=0).sqrt()
        if same:
            distance.diagonal(start).zero_()
        rows[start : start + _BLOCK] = distance.sum(dim=1).cpu().double()
        columns += distance.sum(dim=0).cpu().double()
    return rows / (len(b) - same), columns / (len(a) - same)


def energy_distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the energy distance between two samples, and its standard error over cells.

    ``2 E|X - Y| - E|X - X'| - E|Y - Y'|``, Euclidean, pairs of a cell with itself left out
    (Szekely and Rizzo 2013).

    Parameters
    ----------
    x, y
        Profiles, float ``(n, g)`` and ``(m, g)``; NaN where either has fewer than two.
    """
    if min(len(x), len(y)) < 2:
        return float("nan"), float("nan")
    xy, yx = mean_distances(x, y)
    xx, yy = mean_distances(x, x)[0], mean_distances(y, y)[0]
    value = 2 * xy.mean() - xx.mean() - yy.mean()
    error = 2 * ((xy - xx).var() / len(x) + (yx - yy).var() / len(y)).sqrt()
    return float(value), float(error)


def _signed(word: int) -> int:
    """Wrap an integer to a signed one of 64 bits."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shift the bits to the right, filling with zeros."""
    return (z >> by) & ((1 << (64 - by)) - 1)
