"""A reference of real cells, opened so that its expression is read a few rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from phenoseq.data.backed import Cells, Matrix, dense
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
        ``(n, D)`` and ``(n, g)``.
    """

    name: str
    ids: NDArray[Any]
    var: pd.DataFrame
    embedding: Matrix
    expression: Matrix

    def expression_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read the expression of some cells, ``(len(rows), g)``, dense.

        Raises
        ------
        DataError
            Where a value is not finite.
        """
        values = dense(self.expression.take(rows))
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            names = self.ids[rows[bad]][:3].tolist()
            raise DataError(
                f"{self.name}: expression (X) of cells {names} has values that are not finite; "
                "remove these cells or fill the values"
            )
        return values


def open_reference(reference: str | Path | ad.AnnData, key: str) -> Reference:
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
    if not isinstance(reference, ad.AnnData) and Path(reference).suffix not in (".h5ad", ".zarr"):
        raise DataError(f"{reference}: name a reference that ends in .h5ad or .zarr")
    cells = Cells(reference)
    embedding, expression = cells.matrix(f"obsm/{key}"), cells.matrix("X")
    if embedding.sparse:
        raise DataError(f"{cells.name}: obsm[{key!r}] is sparse, no plain array of cells x numbers")
    if not expression.shape[1]:
        raise DataError(f"{cells.name}: X has no genes; a reference needs expression")
    in_memory = isinstance(reference, ad.AnnData) and not reference.isbacked
    name = "AnnData in memory" if in_memory else Path(cells.name).name
    ids = cells.obs.index.to_numpy(dtype=object)
    return Reference(name, ids, cells.var, embedding, expression)
