"""Gene vocabularies: ordered Ensembl ids with their symbols, and how two of them align."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.symbols import ensembl_ids

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


def tell_symbols(var: pd.DataFrame, where: str) -> None:
    """Warn of the genes of ``var`` that go by their symbol because they have no Ensembl id."""
    unnamed = list(var.index[~var.index.str.match(_ENSEMBL)])
    if unnamed:
        unknown = [name for name, i in zip(unnamed, ensembl_ids(unnamed), strict=True) if not i]
        warnings.warn(
            f"{where}: {len(unnamed)} genes have no Ensembl id and go by their symbol: "
            f"{unnamed[:5]}; HGNC's table knows the ids of {len(unnamed) - len(unknown)} of them"
            + (f", not of {unknown[:5]}" if unknown else ""),
            PhenoseqWarning,
            stacklevel=4,
        )


#: Columns of ``var`` in which files keep Ensembl ids, and symbols, in the order they are tried.
_ID_COLUMNS = ("gene_ids", "gene_id", "ensembl", "ensembl_id", "ensembl_gene_id", "feature_id")
_SYMBOL_COLUMNS = ("symbol", "gene_symbols", "gene_symbol", "gene_name", "feature_name")


def genes_of(var: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the genes of an AnnData's ``var`` as :func:`gene_table` does.

    Ids are its index where that holds Ensembl ids, else a column such as ``gene_ids``; symbols a
    column such as ``gene_name``, else the index. A gene without an id goes by its symbol.
    """
    names = pd.Series(var.index.astype(str), dtype=object)
    ids, symbols = (_column(var, columns) for columns in (_ID_COLUMNS, _SYMBOL_COLUMNS))
    ids = names.where(names.str.match(_ENSEMBL), "" if ids is None else ids)
    return gene_table(list(ids), list(names if symbols is None else symbols), where)


def read_gene_list(path: str | Path) -> pd.DataFrame:
    """Read a text file of Ensembl ids or symbols, one a line, as :func:`gene_table` does."""
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable list of genes ({error})") from error
    names = pd.Series([line for line in lines if line], dtype=object)
    if not len(names):
        raise DataError(f"{path}: an empty list of genes; write one id or symbol a line")
    return gene_table(list(names), list(names), str(path))


def _column(var: pd.DataFrame, names: Sequence[str]) -> pd.Series | None:
    found = next((name for name in names if name in var), None)
    if found is None:
        return None
    return var[found].astype(object).fillna("").astype(str).reset_index(drop=True)


@dataclass(frozen=True)
class GeneMatch:
    """How the genes of two tables match.

    Attributes
    ----------
    have, want
        Positions of the shared genes in each, int64, of equal length; ``want`` rises.
    by_symbol
        How many of them match by an equal symbol alone.
    missing
        Symbols of the genes wanted that are not there.
    by_table
        How many of them match by the id that HGNC's table knows for their symbol.
    """

    have: NDArray[np.int64]
    want: NDArray[np.int64]
    by_symbol: int
    missing: list[str]
    by_table: int = 0

    def __str__(self) -> str:
        """Tell in a line how many match."""
        n, total = len(self.want), len(self.want) + len(self.missing)
        text = f"{n:,} of {total:,} genes matched, {self.by_symbol:,} of them by symbol"
        text += f", {self.by_table:,} by HGNC's table" if self.by_table else ""
        return text + (f"; missing are {', '.join(self.missing[:5])}" if self.missing else "")


def match_genes(
    have: pd.DataFrame, want: pd.DataFrame, where: str, *, min_share: float = 0.5
) -> GeneMatch:
    """Match two gene tables by id, else by symbol, else through HGNC's table.

    A gene that has an id on one side only is matched by its symbol, where that is no one else's;
    then by the Ensembl id that :func:`phenoseq.symbols.ensembl_ids` knows for the symbol, which may
    be a former one or an alias.

    Parameters
    ----------
    have, want
        Tables as :func:`gene_table` returns them.
    where
        What ``have`` is called in an error.
    min_share
        Least share of the genes wanted that must be there.

    Raises
    ------
    DataError
        Where fewer are.

    Examples
    --------
    >>> have = gene_table(["ENSG00000141510.11", ""], ["TP53", "MYC"], "have")
    >>> want = gene_table(["ENSG00000136997", "ENSG00000141510"], ["MYC", "TP53"], "want")
    >>> match = match_genes(have, want, "have")
    >>> match.have.tolist(), str(match)
    ([1, 0], '2 of 2 genes matched, 1 of them by symbol')
    """
    ids = pd.Series(have.index), pd.Series(want.index)
    place = _places(*ids)
    # Two Ensembl ids that differ are two genes, whatever their symbols.
    named = [np.asarray(one.index.str.match(_ENSEMBL), dtype=bool) for one in (have, want)]
    free = ~np.isin(np.arange(len(have)), place), place < 0
    by_symbol = _places(have["symbol"], want["symbol"], *free)
    by_symbol[np.append(named[0], False)[by_symbol] & named[1]] = -1  # -1 is the False
    place = np.where(place < 0, by_symbol, place)
    free = ~np.isin(np.arange(len(have)), place), place < 0
    by_table = _places(_resolved(have, named[0]), _resolved(want, named[1]), *free)
    place = np.where(place < 0, by_table, place)
    there = place >= 0
    match = GeneMatch(
        have=place[there].astype(np.int64),
        want=np.flatnonzero(there).astype(np.int64),
        by_symbol=int((by_symbol >= 0).sum()),
        missing=list(want["symbol"][~there]),
        by_table=int((by_table >= 0).sum()),
    )
    if there.sum() < min_share * len(want) or not there.any():
        raise DataError(
            f"{where}: only {match} (it has genes such as {list(have.index[:3])}, wanted are such "
            f"as {list(want.index[:3])}), and at least {min_share:.0%} must be there; are both of "
            "one species, and by Ensembl id or symbol?"
        )
    return match


def _resolved(genes: pd.DataFrame, named: NDArray[np.bool_]) -> pd.Series:
    """Return the Ensembl id of each gene, that of HGNC's table where it has none, "" without."""
    return pd.Series(np.where(named, genes.index, ensembl_ids(list(genes["symbol"]))), dtype=object)


def _places(
    have: pd.Series,
    want: pd.Series,
    free: NDArray[np.bool_] | None = None,
    sought: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """Return where each of ``want`` stands in ``have``, -1 where it does not or not clearly.

    Only those of ``have`` that are ``free`` and those of ``want`` that are ``sought`` count, each
    of which no other on its side is equal to.
    """
    clear = [(~one.duplicated(keep=False) & (one != "")).to_numpy() for one in (have, want)]
    at = np.flatnonzero(clear[0] if free is None else clear[0] & free)
    found = pd.Index(have.iloc[at]).get_indexer(want)
    found = np.where(found >= 0, at[found] if len(at) else -1, -1)
    return np.where(clear[1] if sought is None else clear[1] & sought, found, -1)


def merged_genes(have: pd.DataFrame, want: pd.DataFrame, match: GeneMatch) -> pd.DataFrame:
    """Return the table of the matched genes, in the order of ``want``.

    Each goes by the id wanted, or by the id it has where only that is an Ensembl id.
    """
    theirs, ours = have.iloc[match.have], want.iloc[match.want]
    better = theirs.index.str.match(_ENSEMBL) & ~ours.index.str.match(_ENSEMBL)
    ids = np.where(better, theirs.index, ours.index)
    symbols = np.where(better, theirs["symbol"], ours["symbol"])
    return gene_table(list(ids), list(symbols), "genes matched")
