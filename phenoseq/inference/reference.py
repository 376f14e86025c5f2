"""A reference of real cells, opened so that its expression is read a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.errors import DataError


@dataclass(frozen=True)
class Reference:
    """Cells with an embedding and expression, in memory or on disk.

    Attributes
    ----------
    name
        File name, or a word for what came from memory.
    ids
        Names of the n cells.
    var
        Table of the g genes.
    embedding, expression
        ``(n, D)`` and ``(n, g)``: arrays, sparse matrices, or their kin on disk.
    """

    name: str
    ids: NDArray[Any]
    var: pd.DataFrame
    embedding: Any
    expression: Any

    def expression_rows(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Read the expression of some cells, ``(len(rows), g)``, dense; rows must rise.

        Raises
        ------
        DataError
            Where a value is not finite.
        """
        taken = take_rows(self.expression, rows)
        values: NDArray[Any] = taken.toarray() if sparse.issparse(taken) else np.asarray(taken)
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            names = self.ids[rows[bad]][:3].tolist()
            raise DataError(
                f"{self.name}: expression (X) of cells {names} has values that are not finite; "
                "remove these cells or fill the values"
            )
        return values


def take_rows(array: Any, rows: NDArray[np.int64]) -> Any:
    """Read rising rows of an array in memory, in HDF5 or in Zarr, and nothing besides."""
    return array.oindex[rows] if isinstance(array, zarr.Array) else array[rows]


@contextmanager
def open_reference(reference: str | Path | ad.AnnData, key: str) -> Iterator[Reference]:
    """Open an AnnData, or an ``.h5ad`` or ``.zarr`` file of one without reading its matrices.

    Parameters
    ----------
    reference
        The AnnData, in memory or backed, or its path.
    key
        Of the embedding in ``obsm``.

    Raises
    ------
    DataError
        Where the file is no AnnData, has no such embedding, or no expression that can be read by
        rows.
    """
    if isinstance(reference, ad.AnnData):
        name = Path(reference.filename).name if reference.isbacked else "AnnData in memory"
        yield Reference(
            name,
            reference.obs_names.to_numpy(dtype=object),
            reference.var,
            _embedding(reference.obsm, key, name),
            _expression(reference.X, name),
        )
        return
    path = Path(reference)
    with _opened(path) as group:
        try:
            ids = ad.io.read_elem(group["obs"][group["obs"].attrs["_index"]])
            var = ad.io.read_elem(group["var"])
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: holds no AnnData that can be read ({error})") from error
        matrix = group.get("X")
        if isinstance(matrix, h5py.Group | zarr.Group):
            matrix = _sparse(matrix, path.name)
        yield Reference(
            path.name,
            np.asarray(ids).astype(object),
            var,
            _embedding(group.get("obsm", {}), key, path.name),
            _expression(matrix, path.name),
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.suffix not in (".h5ad", ".zarr"):
        raise DataError(f"{path}: name a reference that ends in .h5ad or .zarr")
    if not path.exists():
        raise DataError(f"{path}: there is no such reference")
    try:
        group = h5py.File(path) if path.suffix == ".h5ad" else zarr.open_group(path, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be opened ({error})") from error
    try:
        yield group
    finally:
        if isinstance(group, h5py.File):
            group.close()


def _embedding(obsm: Mapping[str, Any], key: str, name: str) -> Any:
    if key not in obsm:
        keys = ", ".join(map(repr, sorted(obsm.keys()))) or "none"
        raise DataError(
            f"{name}: no obsm[{key!r}]; its embeddings: {keys}. Give the key of the embedding that "
            "was predicted, made by the same embedding model"
        )
    array = obsm[key]
    if not isinstance(array, np.ndarray | h5py.Dataset | zarr.Array) or array.ndim != 2:
        raise DataError(f"{name}: obsm[{key!r}] is no plain array of cells x numbers")
    return array


def _sparse(group: Any, name: str) -> Any:
    try:
        return ad.io.sparse_dataset(group)
    except (KeyError, ValueError, AssertionError) as error:
        raise DataError(f"{name}: X is neither an array nor a sparse matrix ({error})") from error


def _expression(matrix: Any, name: str) -> Any:
    """Return what rows can be read from."""
    if matrix is None or len(matrix.shape) != 2 or not matrix.shape[1]:
        raise DataError(f"{name}: has no expression (X); a reference needs it, cells x genes")
    if getattr(matrix, "format", "csr") != "csr":
        if not sparse.issparse(matrix):
            raise DataError(
                f"{name}: X is stored gene by gene (CSC), so that reading a few cells would read "
                "all of it; store it cell by cell: adata.X = adata.X.tocsr()"
            )
        matrix = matrix.tocsr()
    return matrix
