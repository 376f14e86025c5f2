"""Arrays of a store with one row a cell: written shard by shard, read by rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from phenoseq.errors import DataError

#: What an error says of a store whose files do not belong together.
DAMAGED = "the store is damaged: copy it again, or prepare it again"


@contextmanager
def reading(what: Path | str) -> Iterator[None]:
    """Turn what a library raises for a broken file into an error that says which."""
    try:
        yield
    except Exception as error:  # each codec has errors of its own
        raise DataError(f"{what}: cannot be read ({error}); {DAMAGED}") from error


class RowReader:
    """An array of a store, read by rows.

    Parameters
    ----------
    group
        The store's root, or a group in it.
    name
        Of the array.
    path
        Where the group is.

    Attributes
    ----------
    array
        The Zarr array, ``(n, ...)``.

    Raises
    ------
    DataError
        Where the array or one of its files is missing.
    """

    def __init__(self, group: zarr.Group, name: str, path: Path) -> None:
        self.path = path / name
        array = group.get(name)
        if not isinstance(array, zarr.Array):
            raise DataError(f"{self.path}: missing; {DAMAGED}")
        self.array = array
        shards = [
            -(-n // s) for n, s in zip(array.shape, array.shards or array.chunks, strict=True)
        ]
        for place in itertools.product(*map(range, shards)):
            file = self.path.joinpath("c", *map(str, place))
            if not file.exists():  # zarr would read zeros
                raise DataError(f"{file}: missing; {DAMAGED}")

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.array.shape[0])

    @property
    def chunk(self) -> int:
        """Rows that are decoded together."""
        return int(self.array.chunks[0])

    @property
    def shard(self) -> int:
        """Rows in a shard, which is one file."""
        return int((self.array.shards or self.array.chunks)[0])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows ``start`` to ``stop``.

        Raises
        ------
        DataError
            Where a chunk is corrupt.
        """
        with reading(f"{self.path}, cells {start} to {stop}"):
            return np.asarray(self.array[start:stop])

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return ``rows`` in that order; chunks side by side are read at once."""
        out = np.empty((len(rows), *self.array.shape[1:]), dtype=self.array.dtype)
        for run, start, stop in self.runs(rows):
            out[run] = self.read(start, stop)[rows[run] - start]
        return out

    def runs(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int, int]]:
        """Yield positions in ``rows`` that are read at once, and from which row to which.

        These are whole chunks side by side, within one shard.
        """
        size = self.chunk
        order = np.argsort(rows, kind="stable")
        chunk = rows[order] // size
        new = (np.diff(chunk) > 1) | (np.diff(chunk * size // self.shard) > 0)
        for run in np.split(order, np.flatnonzero(new) + 1):
            if len(run):
                start, stop = int(rows[run[0]] // size), int(rows[run[-1]] // size + 1)
                yield run, start * size, min(stop * size, len(self))


class RowWriter:
    """Appends rows to an empty array of a store, in whole shards."""

    def __init__(self, array: zarr.Array[Any]) -> None:
        self._array = array
        shard = (array.shards or array.chunks)[0]
        self._buffer = np.empty((shard, *array.shape[1:]), dtype=array.dtype)
        self._filled = self.written = 0

    def add(self, rows: NDArray[Any]) -> None:
        """Append rows ``(n, ...)``."""
        at = 0
        while at < len(rows):
            n = min(len(self._buffer) - self._filled, len(rows) - at)
            self._buffer[self._filled : self._filled + n] = rows[at : at + n]
            self._filled, at = self._filled + n, at + n
            if self._filled == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        """Write what is waiting; after less than a shard, nothing may be added."""
        if self._filled:
            end = self.written + self._filled
            if end > self._array.shape[0]:
                self._array.resize((end, *self._array.shape[1:]))
            self._array[self.written : end] = self._buffer[: self._filled]
            self.written, self._filled = end, 0
