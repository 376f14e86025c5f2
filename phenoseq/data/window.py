"""Cells of a store in memory, out of which a stream gathers its batches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from phenoseq.data.csr import stored
from phenoseq.data.store import Store

Rows = NDArray[np.int64]


class Window:
    """Crops and counts of some cells, decoded into memory that is used again.

    A system gives memory page by page, and at every first touch: for new arrays that takes about
    as long as decoding them.

    Parameters
    ----------
    store
        Where the cells are.
    cells
        Cells that there is room for at first; it grows where that is too few.
    """

    def __init__(self, store: Store, cells: int) -> None:
        self._crops, self._counts = store.images, store.rna
        crops = self._crops.array
        self._images: NDArray[Any] = np.empty((cells, *crops.shape[1:]), dtype=crops.dtype)
        self._values, self._columns = (
            np.empty(0, dtype=part.array.dtype)
            for part in (self._counts.values, self._counts.columns)
        )
        self._used = self._stored = 0
        # The cells that are here in order, the place of each, and where its counts begin.
        self._rows, self._places, self._first = (np.empty(0, dtype=np.int64) for _ in range(3))

    def load(self, rows: Rows) -> None:
        """Read cells, each of which is not here yet.

        Raises
        ------
        DataError
            Where a chunk is corrupt.
        """
        for run, start, stop in self._crops.runs(rows):
            some = np.sort(rows[run])
            # Of chunks that are hardly wanted, only what is wanted is kept.
            if 2 * len(some) > stop - start:
                self._crops.read(start, stop, self._room(stop - start))
                places = self._used + some - start
                self._used += stop - start
            else:
                self._room(len(some))[:] = self._crops.read(start, stop)[some - start]
                places = self._used + np.arange(len(some))
                self._used += len(some)
            self._add(some, places, self._load_counts(some))

    def _load_counts(self, rows: Rows) -> Rows:
        """Read the counts from the first to the last of ``rows``; return where each begin."""
        ends = self._counts.indptr
        begin, end = int(ends[rows[0]]), int(ends[rows[-1] + 1])
        at, self._stored = self._stored, self._stored + end - begin
        self._values, self._columns = (
            _grown(array, at, self._stored) for array in (self._values, self._columns)
        )
        self._counts.values.read(begin, end, self._values[at : self._stored])
        self._counts.columns.read(begin, end, self._columns[at : self._stored])
        return at + ends[rows] - begin

    def _room(self, cells: int) -> NDArray[Any]:
        self._images = _grown(self._images, self._used, self._used + cells)
        return self._images[self._used : self._used + cells]

    def _add(self, rows: Rows, places: Rows, first: Rows) -> None:
        rows = np.concatenate([self._rows, rows])
        order = np.argsort(rows)
        self._rows = rows[order]
        self._places = np.concatenate([self._places, places])[order]
        self._first = np.concatenate([self._first, first])[order]

    def gather(self, rows: Rows, images: NDArray[Any], counts: NDArray[np.float32]) -> None:
        """Write cells that are here, in that order, to ``(n, C, H, W)`` and ``(n, g)``."""
        at = np.searchsorted(self._rows, rows)
        np.take(self._images, self._places[at], axis=0, out=images, mode="clip")
        size = self._sizes(rows)
        values = stored(self._first[at], size)
        counts[:] = 0
        begins = np.repeat(np.arange(0, counts.size, counts.shape[1]), size)
        counts.reshape(-1)[begins + self._columns[values]] = self._values[values]

    def _sizes(self, rows: Rows) -> Rows:
        return self._counts.indptr[rows + 1] - self._counts.indptr[rows]

    def forget(self, rows: Rows) -> None:
        """Make room: drop some of the cells that are here, and move the others together."""
        rows = np.setdiff1d(self._rows, rows, assume_unique=True)
        at = np.searchsorted(self._rows, rows)
        size = self._sizes(rows)
        values = stored(self._first[at], size)
        self._used, self._stored = len(rows), len(values)
        self._images[: len(rows)] = self._images[self._places[at]]
        for array in (self._values, self._columns):
            array[: len(values)] = array[values]
        self._rows, self._places, self._first = rows, np.arange(len(rows)), np.cumsum(size) - size


def _grown(array: NDArray[Any], used: int, needed: int) -> NDArray[Any]:
    """Return an array with room for ``needed`` rows, with the first ``used`` in it."""
    if needed <= len(array):
        return array
    more = np.empty((max(needed, len(array) + len(array) // 2), *array.shape[1:]), array.dtype)
    more[:used] = array[:used]
    return more
