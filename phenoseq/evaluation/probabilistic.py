"""Scores of predictive distributions, of which draws are given: proper scores and coverage."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating]

#: Central intervals that are reported.
LEVELS = (0.5, 0.8, 0.9)
#: Least cells of a group for its mean to count as continuous.
GROUP_CELLS = 50


def crps(true: Matrix, draws: Matrix) -> NDArray[np.float64]:
    """Return the continuous ranked probability score of each value, lower is better.

    ``E|S - y| - 1/2 E|S - S'|``, the fair estimator over K draws (Ferro 2014); a single draw is a
    point forecast, whose score is its absolute error.

    Parameters
    ----------
    true
        ``(n, g)``.
    draws
        ``(K, n, g)``.

    Returns
    -------
    ``(n, g)``.
    """
    k = len(draws)
    out: NDArray[np.float64] = np.abs(draws - true).mean(axis=0, dtype=np.float64)
    if k > 1:
        weight = (2 * np.arange(k) - k + 1.0) / (k * (k - 1))
        out -= np.tensordot(weight, np.sort(draws, axis=0), axes=1)
    return out


def energy_score(true: Matrix, draws: Matrix) -> NDArray[np.float64]:
    """Return the energy score of each cell, lower is better.

    ``E|S - y| - 1/2 E|S - S'|``, Euclidean over genes, the fair estimator over K draws (Gneiting
    and Raftery 2007); a single draw is a point forecast, whose score is its distance.

    Parameters
    ----------
    true
        ``(n, g)``.
    draws
        ``(K, n, g)``.

    Returns
    -------
    ``(n,)``.
    """
    k = len(draws)
    away = (draws - true).transpose(1, 0, 2)
    square = np.einsum("nkg,nkg->nk", away, away, dtype=np.float64)
    out: NDArray[np.float64] = np.sqrt(square).mean(axis=1)
    if k > 1:
        between = square[:, :, None] + square[:, None] - 2 * (away @ away.transpose(0, 2, 1))
        between[:, np.arange(k), np.arange(k)] = 0
        out -= np.sqrt(np.maximum(between, 0)).sum(axis=(1, 2)) / (2 * k * (k - 1))
    return out


def randomised_pit(below: Matrix, at_most: Matrix, rng: np.random.Generator) -> Matrix:
    """Return ``u = F(y-) + v (F(y) - F(y-))``, v uniform: uniform where F is right.

    Czado et al. 2009; for discrete values, whose plain intervals cover too much.

    Parameters
    ----------
    below, at_most
        ``F(y-)`` and ``F(y)`` of each true value.
    rng
        Draws v.
    """
    return below + rng.random(below.shape) * (at_most - below)


def cdf_of_draws(true: Matrix, draws: Matrix) -> tuple[Matrix, Matrix]:
    """Return ``F(y-)`` and ``F(y)`` at the true values.

    The truth itself counts as one more draw, so that the PIT of a truth that is exchangeable with
    the draws is exactly uniform, however few they are.

    Parameters
    ----------
    true
        ``(n, g)``.
    draws
        ``(K, n, g)``.
    """
    below = (draws < true).sum(axis=0)
    at_most = (draws <= true).sum(axis=0) + 1
    return below / (len(draws) + 1), at_most / (len(draws) + 1)


def coverage(pit: Matrix, level: float) -> float:
    """Return the share of randomised PIT values inside the central interval; NaN of none."""
    return float((np.abs(pit - 0.5) <= level / 2).mean()) if pit.size else float("nan")


def interval(draws: Matrix, level: float) -> tuple[Matrix, Matrix]:
    """Return the lower and upper end ``(n, g)`` of the central interval of draws ``(K, n, g)``.

    The ends are draws, so wide apart that a truth which is exchangeable with the draws lies between
    them at least as often as the level says; or the lowest and highest, where K is too small.
    """
    ordered, k, tail = np.sort(draws, axis=0), len(draws), (1 - level) / 2
    low = max(math.floor((k + 1) * tail + 1e-9), 1)
    high = min(math.ceil((k + 1) * (1 - tail) - 1e-9), k)
    return ordered[low - 1], ordered[high - 1]


def closed_coverage(true: Matrix, low: Matrix, high: Matrix) -> tuple[float, float]:
    """Return the share of true values inside closed intervals, and the mean width of these."""
    return float(((true >= low) & (true <= high)).mean()), float((high - low).mean())
