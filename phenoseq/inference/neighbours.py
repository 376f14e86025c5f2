"""Exact nearest neighbours of some points among cells that need not fit in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phenoseq.errors import DataError

Backend = Literal["exact", "faiss"]
Search = Callable[[NDArray[np.float32], NDArray[np.float32], int], NDArray[np.int64]]

#: Numbers of the reference read at once, 32 MiB of float32.
BLOCK = 2**23
#: Numbers of the candidates compared at once, 32 MiB of float64.
CHUNK = 2**22
#: Candidates of a block besides the k nearest, among which equal distances are put in order.
SPARE = 16


class Neighbours(NamedTuple):
    """The k nearest, nearest first: rows, int64, and Euclidean distances, float64, ``(..., k)``."""

    rows: NDArray[np.int64]
    distance: NDArray[np.float64]


def make_search(backend: Backend) -> Search:
    """Return the function that finds the rows of a block that are nearest to each query.

    "exact" is scikit-learn's brute force, which computes in float64; "faiss" is that of faiss, in
    float32. Neither builds an index.

    Raises
    ------
    DataError
        Where faiss is not installed.
    """
    if backend == "exact":
        return _brute
    try:
        import faiss
    except ImportError as error:
        raise DataError(
            "backend 'faiss' needs the package of that name: pip install 'phenoseq[faiss]', or "
            "choose backend 'exact'"
        ) from error
    return lambda queries, block, m: faiss.knn(queries, block, m)[1]  # type: ignore[no-any-return]


def _brute(queries: NDArray[np.float32], block: NDArray[np.float32], m: int) -> NDArray[np.int64]:
    from sklearn.neighbors import NearestNeighbors

    fitted = NearestNeighbors(n_neighbors=m, algorithm="brute").fit(block)
    return fitted.kneighbors(queries, return_distance=False)  # type: ignore[no-any-return]


def nearest(
    queries: NDArray[np.float32],
    reference: Any,
    k: int,
    *,
    search: Search,
    without: NDArray[np.int64],
    progress: Callable[[int, int], None] | None = None,
) -> Neighbours:
    """Find the k nearest rows of a reference by Euclidean distance, reading it once in blocks.

    The candidates of each block are compared again in float64, number by number, so distances do
    not depend on what else is asked. Equal distances go by the row, the first row first; of more
    than ``SPARE`` rows at one distance that compete for the last places, any may win.

    Parameters
    ----------
    queries
        Points, ``(n, D)``, finite.
    reference
        ``(n_ref, D)``, an array or its like on disk, sliced by rows. Read as float32.
    k
        Less than n_ref.
    search
        From :func:`make_search`.
    without
        For each query a row that is left out, ``(n,)``; -1 for none.
    progress
        Called with (rows done, rows in all).

    Raises
    ------
    DataError
        Where a row of the reference is not finite.
    """
    total, width = reference.shape
    rows = np.full((len(queries), k), total, dtype=np.int64)
    distance = np.full((len(queries), k), np.inf)
    step = max(1, BLOCK // width)
    for start in range(0, total, step):
        block = np.ascontiguousarray(reference[start : start + step], dtype=np.float32)
        bad = ~np.isfinite(block).all(axis=1)
        if bad.any():
            first = (start + np.flatnonzero(bad))[:3].tolist()
            raise DataError(
                f"the reference's embedding has values that are not finite in {bad.sum():,} cells, "
                f"e.g. rows {first}; leave these cells out"
            )
        m = min(k + SPARE, len(block))
        at_once = max(1, CHUNK // (m * width))
        for low in range(0, len(queries), at_once):
            some = slice(low, low + at_once)
            found = search(queries[some], block, m)
            away = block[found].astype(np.float64)
            away -= queries[some, None]
            far = np.sqrt(np.einsum("qmd,qmd->qm", away, away))
            found = found + start
            far[found == without[some, None]] = np.inf
            both = np.concatenate([rows[some], found], axis=1)
            far = np.concatenate([distance[some], far], axis=1)
            order = np.lexsort((both, far), axis=1)[:, :k]
            rows[some] = np.take_along_axis(both, order, axis=1)
            distance[some] = np.take_along_axis(far, order, axis=1)
        if progress is not None:
            progress(min(start + step, total), total)
    return Neighbours(rows, distance)
