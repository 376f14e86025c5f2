"""Scores of classifiers trained on images, on predicted and on real expression."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.generic]


def balanced_accuracy(true: Labels, predicted: Labels) -> float:
    """Return the mean recall over the classes that occur in ``true``, both ``(n,)``."""
    classes = np.unique(true)
    return float(np.mean([(predicted[true == c] == c).mean() for c in classes]))


def macro_f1(true: Labels, predicted: Labels) -> float:
    """Return the mean F1 over the classes that occur in ``true``, both ``(n,)``.

    Predictions of a class that does not occur count as misses of the class that it should have
    been, and have no F1 of their own.
    """
    scores = []
    for c in np.unique(true):
        hits = int(((true == c) & (predicted == c)).sum())
        scores.append(2 * hits / int((true == c).sum() + (predicted == c).sum()))
    return float(np.mean(scores))


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
    return (fused - imaging) / gap if gap > 0 else float("nan")


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
    names, group = np.unique(groups, return_inverse=True)
    classes, label = np.unique(true, return_inverse=True)
    cell = group * len(classes) + label

    def counted(some: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        """Count items of each group and class: all, or those that are right."""
        found = np.bincount(cell, some, minlength=len(names) * len(classes))
        return found.reshape(len(names), len(classes)).astype(np.float64)

    of_class = counted()
    right = [counted(p == true) for p in (imaging, fused, real_fused)]
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(names), size=(n, len(names)))
    times = np.stack([np.bincount(some, minlength=len(names)) for some in drawn])
    values = _gaps(times, of_class, right)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where there is no gap at all: NaN
        low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    value = _gaps(np.ones((1, len(names)), dtype=np.int64), of_class, right)[0]
    return float(value), float(low), float(high)


def _gaps(
    times: NDArray[np.int64], of_class: NDArray[np.float64], right: list[NDArray[np.float64]]
) -> list[float]:
    """Return the gap recovered, with each group taken so many ``times``, ``(n, n_groups)``."""
    total = times @ of_class
    with np.errstate(invalid="ignore"):
        scores = [np.nanmean((times @ hits) / total, axis=1) for hits in right]
    return [gap_recovered(*map(float, each)) for each in zip(*scores, strict=True)]
