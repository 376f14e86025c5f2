"""Scores of gene sets and pathways on the changes that treatments make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from phenoseq.errors import DataError

#: Fewest genes of a set that must be among those predicted.
MIN_GENES = 5


def read_gene_sets(path: str | Path) -> pd.DataFrame:
    """Read gene sets: ``.gmt`` (as MSigDB gives Hallmark) or ``.csv`` (as PROGENy's weights).

    Returns
    -------
    One row a set and gene: ``source``, ``target`` (symbol), ``weight`` (1 in a ``.gmt``).

    Raises
    ------
    DataError
        Where the file is missing or of another form.
    """
    path = Path(path)
    try:
        if path.suffix == ".gmt":
            lines = [line.split("\t") for line in path.read_text().splitlines() if line.strip()]
            rows = [(line[0], gene, 1.0) for line in lines for gene in line[2:] if gene]
            table = pd.DataFrame(rows, columns=["source", "target", "weight"])
        else:
            table = pd.read_csv(path).rename(columns={"pathway": "source", "gene": "target"})
            table = table[["source", "target", "weight"]]
    except OSError as error:
        raise DataError(f"{path}: no file of gene sets there ({error.strerror})") from error
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: neither a .gmt nor a CSV with source, target and weight ({error})"
        ) from error
    if table.empty:
        raise DataError(f"{path}: no gene sets in it")
    weight = pd.to_numeric(table["weight"], errors="coerce")
    bad = table[~np.isfinite(weight)]
    if len(bad):
        first = bad.iloc[0]
        raise DataError(
            f"{path}: {len(bad)} weights are no numbers, e.g. '{first['weight']}' of "
            f"{first['target']} in {first['source']}; correct them or leave their rows out"
        )
    table["weight"] = weight.astype(np.float64)
    return table.drop_duplicates(["source", "target"], ignore_index=True)


def weight_matrix(sets: pd.DataFrame, symbols: pd.Index) -> pd.DataFrame:
    """Return the weight of each gene in each set, zero outside it.

    Sets with fewer than five of the genes are left out.

    Parameters
    ----------
    sets
        From :func:`read_gene_sets`.
    symbols
        Of the predicted genes, each once.

    Returns
    -------
    Genes by sets.

    Raises
    ------
    DataError
        Where no set has enough of the genes.
    """
    known = sets[sets["target"].isin(symbols)]
    known = known[known.groupby("source")["target"].transform("size") >= MIN_GENES]
    if known.empty:
        raise DataError(
            f"no gene set has {MIN_GENES} of the {len(symbols)} predicted genes; are its targets "
            "symbols?"
        )
    table = known.pivot_table("weight", "target", "source")
    return table.reindex(symbols).fillna(0.0)


def ulm(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the t of the slope of values on weights over genes, for each profile and set.

    The univariate linear model of decoupleR (Badia-i-Mompel et al. 2022). The genes given are the
    background: a score tells whether a set moves more than the rest of them. Genes are not
    independent, so the score is compared with what it is where labels of wells are exchanged, not
    with Student's distribution.

    Parameters
    ----------
    values
        Statistics of genes, ``(n, n_genes)``.
    weights
        ``(n_genes, n_sets)``.

    Returns
    -------
    ``(n, n_sets)``; 0 where values or weights are constant.
    """
    y = values - values.mean(axis=1, keepdims=True)
    x = weights - weights.mean(axis=0)
    scale = np.linalg.norm(y, axis=1)[:, None] * np.linalg.norm(x, axis=0)
    r = (y @ x) / scale.clip(1e-12)
    return np.asarray(r * np.sqrt((len(x) - 2) / (1 - r**2).clip(1e-12)))
