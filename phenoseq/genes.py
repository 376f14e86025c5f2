"""Gene vocabularies: ordered Ensembl ids with their symbols, and how two of them align."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from phenoseq.errors import DataError

_ENSEMBL = r"^ENS[A-Z]*G\d{11}(\.\d+)?$"


def gene_table(ids: Sequence[str], symbols: Sequence[str], where: str) -> pd.DataFrame:
    """Return a table of genes indexed by id, with a column ``symbol``.

    Ensembl versions (``ENSG00000141510.11``) are dropped; a gene without an id goes by its symbol.

    Parameters
    ----------
    ids, symbols
        One of each a gene; an empty id means that there is none.
    where
        The file, for the error.

    Raises
    ------
    DataError
        Where two genes end up with the same id, or one has neither id nor symbol.
    """
    symbol = pd.Series([str(s).strip() for s in symbols], dtype=object)
    index = pd.Series([str(i).strip() for i in ids], dtype=object)
    index = index.where(index != "", symbol)
    versioned = index.str.match(_ENSEMBL)
    index = index.where(~versioned, index.str.split(".").str[0])
    if (index == "").any():
        raise DataError(f"{where}: {int((index == '').sum())} genes have neither id nor symbol")
    if index.duplicated().any():
        twice = sorted(set(index[index.duplicated()]))
        raise DataError(f"{where}: genes listed more than once: {twice[:5]}; keep one row of each")
    return pd.DataFrame({"symbol": symbol.to_numpy()}, index=pd.Index(index, name="gene_id"))


def without_ensembl(var: pd.DataFrame) -> list[str]:
    """Return the genes of ``var`` that go by their symbol because they have no Ensembl id."""
    return list(var.index[~var.index.str.match(_ENSEMBL)])


@dataclass(frozen=True)
class Alignment:
    """Where the genes of one vocabulary stand in another.

    Attributes
    ----------
    have, want
        Positions of the shared genes in each, int64, of equal length.
    missing
        Genes wanted that are not there.
    """

    have: NDArray[np.int64]
    want: NDArray[np.int64]
    missing: list[str]


def align_genes(have: Sequence[str], want: Sequence[str], where: str) -> Alignment:
    """Align two vocabularies by gene id.

    Raises
    ------
    DataError
        Where no gene is shared.
    """
    place = pd.Index(have).get_indexer(pd.Index(want))
    found = place >= 0
    if not found.any():
        raise DataError(
            f"{where}: none of the {len(want)} genes wanted are there (it has {list(have)[:3]}, "
            f"wanted are {list(want)[:3]}); are both indexed by Ensembl id?"
        )
    return Alignment(
        have=place[found].astype(np.int64),
        want=np.flatnonzero(found).astype(np.int64),
        missing=[gene for gene, ok in zip(want, found, strict=True) if not ok],
    )
