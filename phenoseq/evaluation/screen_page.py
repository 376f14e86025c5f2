"""The page of a screen: ranking, genes, gene sets, similarity and wells in one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from phenoseq.evaluation.html import write_html

if TYPE_CHECKING:
    from phenoseq.evaluation.screen import Screen

#: Most treatments, genes of each and of all together; so that the page stays small.
_TREATMENTS, _GENES, _ALL_GENES = 2000, 50, 40_000
#: Most treatments and sets of a map.
_MAP, _SETS = 80, 50
#: What is shown of a change beside it, in this order.
_LAYERS = ("lower", "upper", "p", "q")


def write_screen_page(path: Path, screen: Screen) -> None:
    """Write a screen as one page that opens offline, whole or not at all."""
    changes, ranking = screen.changes, screen.ranking
    shown = ranking.index[:_TREATMENTS]
    first = changes[ranking.index[:_MAP]]
    stated = changes.uns["screen"]
    facts = stated | {
        "n_treatments": len(ranking),
        "n_wells": int(ranking["n_wells"].sum()),
        "n_cells": int(ranking["n_cells"].sum()),
        "n_genes": changes.n_vars,
        "n_single": len(stated["treatments_of_one_well"]),
    }
    rows = ranking.loc[shown].reset_index().to_dict("records")
    data = {
        "facts": facts,
        "ranking": [{k: _number(v) for k, v in row.items()} for row in rows],
        "genes": _genes(changes[shown]),
        "sets": [_sets(first, n) for n in changes.obsm if f"{n}_q" in changes.obsm],
        "similarity": _similarity(first),
        "wells": _wells(screen.wells, stated["treatment"]),
    }
    write_html(path, "screen", f"Screen of {stated['treatment']}", data)


def _genes(changes: ad.AnnData) -> list[list[list[Any]]]:
    """Return symbol, change, interval, p and q of the most certain genes of each treatment."""
    most = min(_ALL_GENES // changes.n_obs, _GENES)
    symbols = changes.var["symbol"] if "symbol" in changes.var else changes.var.index.to_series()
    names = symbols.astype(str).to_numpy()
    values = [np.asarray(changes.X), *(np.asarray(changes.layers[k]) for k in _LAYERS)]
    out = []
    for i in range(changes.n_obs):
        top = np.argsort(values[3][i], kind="stable")[:most]
        out.append([[names[g], *(_number(v[i, g]) for v in values)] for g in top])
    return out


def _sets(changes: ad.AnnData, name: str) -> dict[str, Any]:
    """Return the scores of the gene sets of a file that move most."""
    score, q = changes.obsm[name], changes.obsm[f"{name}_q"]
    strongest = score.abs().max().sort_values(ascending=False, kind="stable").index[:_SETS]
    return {
        "name": name,
        "treatments": changes.obs_names.tolist(),
        "sets": strongest.tolist(),
        "score": np.round(score[strongest].to_numpy(dtype=float).T, 2).tolist(),
        "q": np.round(q[strongest].to_numpy(dtype=float).T, 4).tolist(),
    }


def _similarity(changes: ad.AnnData) -> dict[str, Any]:
    """Return the correlations of changes, like beside like."""
    values = np.nan_to_num(np.asarray(changes.obsp["similarity"], dtype=np.float64))
    order: NDArray[Any] = np.arange(len(values))
    if len(values) > 2:
        apart = np.clip(1 - (values + values.T) / 2, 0, 2)
        np.fill_diagonal(apart, 0)
        order = leaves_list(linkage(squareform(apart), "average"))
    return {
        "names": changes.obs_names[order].tolist(),
        "values": np.round(values[np.ix_(order, order)], 3).tolist(),
    }


def _wells(wells: ad.AnnData, treatment: str) -> list[list[Any]]:
    """Return name, treatment, cells, score, whether set apart and fitted on, of each well."""
    obs = wells.obs
    scores = obs["ood_score"] if "ood_score" in obs else np.full(len(obs), np.nan)
    marks = (obs["set_apart"], obs["fitted_on"])
    columns = zip(obs.index, obs[treatment], obs["n_cells"], scores, *marks, strict=True)
    return [[w, str(t), int(n), _number(s), bool(a), bool(f)] for w, t, n, s, a, f in columns]


def _number(value: Any) -> Any:
    """Return a number of four digits; what is none as it is."""
    return float(f"{value:.4g}") if isinstance(value, float | np.floating) else value
