"""Scores of gene sets and pathways on the changes that treatments make."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import stats

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
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file of gene sets") from error
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: neither a .gmt nor a CSV with source, target and weight ({error})"
        ) from error
    if table.empty:
        raise DataError(f"{path}: no gene sets in it")
    return table.drop_duplicates(["source", "target"], ignore_index=True)


def score_gene_sets(changes: ad.AnnData, sets: pd.DataFrame, name: str | Path) -> None:
    """Score each set on each treatment's t statistics, by a univariate linear model.

    The score is the t of the slope of the genes' statistics on their weights in the set, zero
    outside it (decoupleR's ulm; Badia-i-Mompel et al. 2022). Sets with fewer than five of the
    predicted genes are left out. Only predicted genes are the background: a score tells whether a
    set moves more than the rest of the panel.

    Parameters
    ----------
    changes
        Of :func:`~phenoseq.evaluation.screen.screen`.
    sets
        From :func:`read_gene_sets`.
    name
        Their file; its stem S names what is added to ``changes``: ``obsm["S"]``, the scores,
        treatments by sets, and ``obsm["S_q"]``, their q values (Benjamini-Hochberg, over all).

    Raises
    ------
    DataError
        Where decoupler is not installed, or no set has enough of the genes.
    """
    try:
        import decoupler
    except ImportError as error:
        raise DataError("gene sets need decoupler: pip install 'phenoseq[evaluation]'") from error
    symbols = changes.var.get("symbol", pd.Series(changes.var_names, index=changes.var_names))
    t = pd.DataFrame(
        np.asarray(changes.layers["t"]), index=changes.obs_names, columns=symbols.astype(str)
    )
    t = t.loc[:, ~t.columns.duplicated()]
    known = sets[sets["target"].isin(t.columns)]
    enough = known.groupby("source")["target"].transform("size") >= MIN_GENES
    known = known[enough]
    if known.empty:
        raise DataError(
            f"no gene set has {MIN_GENES} of the {t.shape[1]} predicted genes; are its targets "
            "symbols?"
        )
    score, _ = decoupler.mt.ulm(data=t, net=known, tmin=MIN_GENES, verbose=False)
    p = 2 * stats.t.sf(np.abs(score.to_numpy()), t.shape[1] - 2)
    q = stats.false_discovery_control(p.ravel()).reshape(p.shape)
    changes.obsm[Path(name).stem] = score
    changes.obsm[f"{Path(name).stem}_q"] = pd.DataFrame(q, score.index, score.columns)
