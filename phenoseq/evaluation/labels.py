"""Scores of classifiers trained on images, on predicted and on real expression."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.generic]


def balanced_accuracy(true: Labels, predicted: Labels) -> float:
    """Return the mean recall over the classes that occur in ``true``, both ``(n,)``."""
    classes = np.unique(true)
    return float(np.mean([(predicted[true == c] == c).mean() for c in classes]))


def gap_recovered(imaging: float, fused: float, real_fused: float) -> float:
    """Return the share of the gain of real RNA over imaging alone that predicted RNA gives.

    Parameters
    ----------
    imaging, fused, real_fused
        Scores from images alone, with predicted RNA, and with real RNA.

    Returns
    -------
    ``(fused - imaging) / (real_fused - imaging)``; NaN where real RNA adds nothing.
    """
    gap = real_fused - imaging
    return (fused - imaging) / gap if gap else float("nan")


def gap_interval(
    true: Labels,
    imaging: Labels,
    fused: Labels,
    real_fused: Labels,
    groups: Labels,
    *,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Return :func:`gap_recovered` of balanced accuracies and its bootstrap interval over groups.

    Parameters
    ----------
    true
        Class of each item, ``(n,)``.
    imaging, fused, real_fused
        Class predicted by each classifier, ``(n,)``.
    groups
        What is drawn with replacement: block, replicate or plate of each item, ``(n,)``.
    n, seed, level
        Number and seed of the resamples, and level of the interval.

    Returns
    -------
    The value, and the ends of its interval, over resamples in which real RNA adds something.
    """
    members = [np.flatnonzero(groups == name) for name in np.unique(groups)]
    rng = np.random.default_rng(seed)

    def gap(rows: NDArray[np.int64]) -> float:
        scores = (balanced_accuracy(true[rows], p[rows]) for p in (imaging, fused, real_fused))
        return gap_recovered(*scores)

    drawn = rng.integers(len(members), size=(n, len(members)))
    values = [gap(np.concatenate([members[i] for i in some])) for some in drawn]
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return gap(np.arange(len(true))), float(low), float(high)
