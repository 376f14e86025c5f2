"""Count matrices: their rows in the order of the cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import sparse

from phenoseq.errors import DataError

#: Least share of the cells that must stand in the count matrix.
MIN_MATCHED = 0.9


def align_counts(
    matrix: sparse.csr_matrix, barcodes: pd.Index, cells: pd.Index, where: str
) -> sparse.csr_matrix:
    """Return the rows of ``matrix`` in the order of ``cells``; one that it lacks has no counts.

    Parameters
    ----------
    matrix
        Counts ``(n_barcodes, n_vars)``, float32 CSR.
    barcodes
        Cell ids of its rows, text.
    cells
        Cell ids wanted.
    where
        The file, for the error.

    Raises
    ------
    DataError
        Where a barcode stands there twice, or too few cells are in the matrix.
    """
    if not barcodes.is_unique:
        twice = list(barcodes[barcodes.duplicated()][:3])
        raise DataError(f"{where}: barcodes stand there twice, e.g. {twice}; export it again")
    place = barcodes.get_indexer(cells)
    matched = float((place >= 0).mean())
    if matched < MIN_MATCHED:
        raise DataError(
            f"{where}: {matched:.0%} of the {len(cells)} cells of the table are in the count "
            f"matrix (cells such as {list(cells[:2])}, matrix such as {list(barcodes[:2])}); are "
            "both from one run?"
        )
    empty = sparse.csr_matrix((1, matrix.shape[1]), dtype=np.float32)
    rows = np.where(place >= 0, place, matrix.shape[0])
    counts = sparse.vstack([matrix, empty], format="csr")[rows]
    counts.sort_indices()
    return counts
