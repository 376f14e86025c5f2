"""CSR matrices of a store, as anndata lays them out: appended by rows, read by rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.data.arrays import DAMAGED, RowReader, RowWriter, create_sharded
from phenoseq.errors import DataError

#: Stored values of a matrix in a chunk, and in a shard.
NNZ_CHUNK, NNZ_SHARD = 1 << 14, 1 << 21
Ints = NDArray[np.int64]


class CsrReader:
    """A CSR matrix of a store, read by rows.

    Parameters
    ----------
    group
        The store's root.
    name
        Of the matrix in it.
    path
        Where the store is.

    Attributes
    ----------
    shape
        ``(n, g)``.
    indptr
        Where the values of each row begin, and where the last ends, ``(n + 1,)``.

    Raises
    ------
    DataError
        Where it is not whole.
    """

    def __init__(self, group: zarr.Group, name: str, path: Path) -> None:
        found, at = group.get(name), path / name
        if not isinstance(found, zarr.Group):
            raise DataError(f"{at}: missing; {DAMAGED}")
        shape: Any = found.attrs["shape"]
        self.shape = (int(shape[0]), int(shape[1]))
        indptr = RowReader(found, "indptr", at)
        self.indptr: Ints = indptr.read(0, len(indptr)).astype(np.int64)
        self.values, self.columns = (RowReader(found, part, at) for part in ("data", "indices"))

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Return rows ``start`` to ``stop``.

        Raises
        ------
        DataError
            Where a chunk is corrupt.
        """
        ends = self.indptr[start : stop + 1]
        first, last = int(ends[0]), int(ends[-1])
        values, columns = (array.read(first, last) for array in (self.values, self.columns))
        shape = (stop - start, self.shape[1])
        return sparse.csr_matrix((values, columns, ends - first), shape=shape)


class CsrWriter:
    """Appends rows to a new CSR matrix of a store, values float32.

    Parameters
    ----------
    group
        An empty group.
    width
        Columns.
    """

    def __init__(self, group: zarr.Group, width: int) -> None:
        self._group, self._width = group, width
        self._values, self._columns = (
            RowWriter(_flat(group, name, kind))
            for name, kind in (("data", "f4"), ("indices", "i4"))
        )
        self._ends = [np.zeros(1, dtype=np.int64)]

    def add(self, rows: Any) -> None:
        """Append rows, of any kind that :class:`scipy.sparse.csr_matrix` takes."""
        rows = sparse.csr_matrix(rows)
        rows.sort_indices()
        self._values.add(rows.data)
        self._columns.add(rows.indices)
        self._ends.append(rows.indptr[1:].astype(np.int64) + self._ends[-1][-1])

    def finish(self) -> None:
        """Write what is waiting, and where rows begin."""
        for writer in (self._values, self._columns):
            writer.flush()
        ends = np.concatenate(self._ends)
        small = (
            ends[-1] <= np.iinfo(np.int32).max
        )  # then of the type of the columns, as scipy wants
        last = RowWriter(_flat(self._group, "indptr", "i4" if small else "i8"))
        last.add(ends)
        last.flush()
        self._group.attrs.update(
            {
                "encoding-type": "csr_matrix",
                "encoding-version": "0.1.0",
                "shape": [len(ends) - 1, self._width],
            }
        )


def _flat(group: zarr.Group, name: str, kind: str) -> zarr.Array[Any]:
    return create_sharded(group, name, (0,), np.dtype(kind), chunk=NNZ_CHUNK, shard=NNZ_SHARD)


def stored(first: Ints, size: Ints) -> Ints:
    """Return where the values of some rows stand, given where each row's begin and their number."""
    ends = np.cumsum(size)
    return np.repeat(first - ends + size, size) + np.arange(size.sum())
