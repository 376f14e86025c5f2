"""Reads image features of cells from an AnnData, of which X may be larger than the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.errors import DataError

#: Bytes of features read from a file at once.
_BLOCK = 64 << 20


@contextmanager
def open_features(source: str | Path | ad.AnnData) -> Iterator[tuple[ad.AnnData, str]]:
    """Open an AnnData of features, without reading X; yield it and what to call it.

    Raises
    ------
    DataError
        Where the file is missing or no ``.h5ad``.
    """
    if isinstance(source, ad.AnnData):
        yield source, f"features of shape {source.shape}"
        return
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        features = ad.read_h5ad(path, backed="r")
    except Exception as error:  # h5py and anndata tell of a broken file in many ways
        raise DataError(f"{path}: not a readable .h5ad file ({error})") from error
    try:
        yield features, str(path)
    finally:
        features.file.close()


def check_features(features: ad.AnnData, size: int, describe: str, where: str) -> None:
    """Check that X has ``size`` finite numbers for each cell.

    Raises
    ------
    DataError
        Where it has not; ``describe`` says which features are expected, ``where`` of what X is.
    """
    if features.X is None:
        raise DataError(f"{where}: has no X; put the features there, one row a cell ({describe})")
    if features.n_vars != size:
        raise DataError(
            f"{where}: {features.n_vars} features a cell, the model reads {size}: {describe}"
        )
    broken, first = 0, ""
    for start, block in _blocks(features, np.arange(features.n_obs)):
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(bad) and not broken:
            first = str(features.obs_names[start[bad[0]]])
        broken += len(bad)
    if broken:
        raise DataError(
            f"{where}: NaN or infinite features in {broken} cells, the first {first!r}; remove "
            "these cells or compute their features again"
        )


def read_rows(features: ad.AnnData, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Read the features of some cells, ``(len(rows), F)``: ``rows`` increasing, each once."""
    out = np.empty((len(rows), features.n_vars), dtype=np.float32)
    done = 0
    for some, block in _blocks(features, rows):
        out[done : done + len(some)] = block
        done += len(some)
    return out


def _blocks(
    features: ad.AnnData, rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield rows and their features; files are read in runs, in which disks are quick."""
    length = max(_BLOCK // (4 * max(features.n_vars, 1)), 1)
    matrix = features.X
    at = 0
    while at < len(rows):
        end = int(np.searchsorted(rows, rows[at] + length))
        some = rows[at:end]
        low, high = int(some[0]), int(some[-1]) + 1
        yield some, _dense(matrix[low:high])[some - low]
        at = end


def _dense(block: Any) -> NDArray[np.float32]:
    whole = block.toarray() if sparse.issparse(block) else np.asarray(block)
    if not (np.issubdtype(whole.dtype, np.number) and not np.iscomplexobj(whole)):
        raise DataError(f"features of type {whole.dtype}; give floats")
    return whole.astype(np.float32, copy=False)
