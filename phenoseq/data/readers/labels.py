"""Label images: one number a cell, read block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

#: Least side of the blocks that are read at a time, in pixels.
BLOCK = 1024


def centroids(
    read: Callable[[int, int, int, int], NDArray[Any]],
    shape: tuple[int, int],
    chunk: tuple[int, int],
) -> pd.DataFrame:
    """Return the centroid of every label, in one pass over blocks of bounded size.

    Memory grows with the number of labels, and not with the size of the image.

    Parameters
    ----------
    read
        ``read(y0, y1, x0, x1)`` returns the labels of that region, 0 where there is none.
    shape
        Height and width in pixels.
    chunk
        Height and width of what is decoded at once; blocks are whole multiples of it.

    Returns
    -------
    Indexed by label, ascending: ``y`` and ``x`` in pixels from the upper left corner of the image
    (the centre of its first pixel is at 0.5, 0.5), and ``area`` in pixels.
    """
    tall, wide = (max(side, side * (BLOCK // side)) for side in chunk)
    labels, sums = np.empty(0, dtype=np.uint64), np.empty((0, 3))
    for y0 in range(0, shape[0], tall):
        parts = [(labels, sums)]
        for x0 in range(0, shape[1], wide):
            y1, x1 = min(y0 + tall, shape[0]), min(x0 + wide, shape[1])
            block = read(y0, y1, x0, x1)
            y, x = np.nonzero(block > 0)
            inside = np.stack([np.ones(len(y)), y + (y0 + 0.5), x + (x0 + 0.5)], axis=1)
            parts.append(_sum(block[y, x].astype(np.uint64), inside))
        labels, sums = _sum(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return pd.DataFrame(
        {"y": sums[:, 1] / sums[:, 0], "x": sums[:, 2] / sums[:, 0], "area": sums[:, 0]},
        index=labels,
    )


def _sum(
    labels: NDArray[np.uint64], values: NDArray[np.float64]
) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
    """Return each label once, ascending, with the sum of its rows of ``values`` ``(n, k)``."""
    unique, place = np.unique(labels, return_inverse=True)
    total = [np.bincount(place, weights=column, minlength=len(unique)) for column in values.T]
    return unique, np.stack(total, axis=1)
