"""Data frames that pandas wrote to HDF5, without PyTables and without unpickling what could run.

pandas keeps text in HDF5 as pickled arrays. They are read here by an unpickler that knows numpy
arrays of plain values and nothing else, so that a file cannot run anything.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from phenoseq.errors import DataError

_ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
}


class _Plain(pickle.Unpickler):
    """Unpickles numpy arrays, lists and plain values only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def has_key(path: str | Path, key: str) -> bool:
    """Tell whether a file is HDF5 and has something by that name."""
    try:
        with h5py.File(path) as file:
            return key in file
    except OSError:
        return False


def read_pandas_hdf(path: str | Path, key: str) -> pd.DataFrame:
    """Read the data frame that ``DataFrame.to_hdf(path, key=key)`` wrote; its index is not read.

    Both of pandas' formats are read, ``"fixed"`` and ``"table"``.

    Raises
    ------
    DataError
        Where there is no such data frame, or it holds more than text and numbers.
    """
    try:
        with h5py.File(path) as file:
            group = file[key]
            columns = _table(group["table"]) if "table" in group else _fixed(group)
    except (OSError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(
            f"{path}: no data frame {key!r} of text and numbers ({error}); save it as CSV or "
            "parquet, and give that"
        ) from error
    return pd.DataFrame(columns)


def _fixed(group: h5py.Group) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for number in range(int(group.attrs["nblocks"])):
        names = [name.decode() for name in group[f"block{number}_items"][:]]
        values = group[f"block{number}_values"]
        block = _unpickled(values[0].tobytes()) if values.dtype.hasobject else values[:]
        block = np.asarray(block)  # (rows, columns); pandas 3 keeps text as (rows,)
        columns.update(zip(names, block.reshape(len(block), -1).T, strict=True))
    order = [name.decode() for name in group["axis0"][:]]
    return {name: columns[name] for name in order}


def _table(table: h5py.Dataset) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    rows = table[:]
    for field in rows.dtype.names:
        if field == "index":
            continue
        block = rows[field].reshape(len(rows), -1)
        names = [field]
        if field.startswith("values_block_"):
            names = list(_unpickled(bytes(table.attrs[f"{field}_kind"])))
        if block.dtype.kind == "S":
            block = np.char.decode(block, "utf-8").astype(object)
            block[block == "nan"] = None
        columns.update(zip(names, block.T, strict=True))
    return columns


def _unpickled(raw: bytes) -> Any:
    return _Plain(io.BytesIO(raw)).load()
