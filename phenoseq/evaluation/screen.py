"""What treatments do to predicted expression: change, its certainty, ranking, similarity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from phenoseq.data.backed import Given
from phenoseq.errors import DataError
from phenoseq.evaluation.exchange import Fit, first_and_p, retrieval
from phenoseq.evaluation.genesets import ulm, weight_matrix
from phenoseq.evaluation.screen_page import write_screen_page
from phenoseq.evaluation.wells import (
    PLATE,
    Mask,
    Normalisation,
    hold_out,
    normalise_plates,
    usual_limit,
    well_profiles,
)

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Screen:
    """A screen, scored.

    Attributes
    ----------
    changes
        Treatments by genes: ``X`` the change against the controls, ``layers`` ``lower`` and
        ``upper`` (95% interval over wells), ``t``, ``p`` and ``q``; ``obs`` the ranking;
        ``obsp["similarity"]`` the correlation of two treatments' changes; of gene sets S,
        ``obsm["S"]`` the scores and ``obsm["S_q"]`` their q.
    ranking
        Treatments, the most active first: ``activity``, ``p``, ``q``, ``n_wells``, ``n_cells``,
        ``n_genes`` (those with q below the limit), ``top_genes``.
    wells
        The wells by genes, normalised; ``obs["set_apart"]`` marks those whose images lie too far
        from the training images to be believed, and ``obs["fitted_on"]`` the controls that the
        normalisation was fitted on: neither count elsewhere.
    """

    changes: ad.AnnData
    ranking: pd.DataFrame
    wells: ad.AnnData

    def save(self, folder: str | Path) -> Path:
        """Write ``changes.h5ad``, ``wells.h5ad``, CSV of ranking and genes, and a page.

        Scores of gene sets go into ``gene_sets/``. The page, ``screen.html``, opens offline.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.changes.write_h5ad(folder / "changes.h5ad")
        self.wells.write_h5ad(folder / "wells.h5ad")
        self.ranking.to_csv(folder / "ranking.csv")
        self.genes().to_csv(folder / "genes.csv", index=False)
        for name, scores in self.changes.obsm.items():
            (folder / "gene_sets").mkdir(exist_ok=True)
            scores.to_csv(folder / "gene_sets" / f"{name}.csv")
        write_screen_page(folder / "screen.html", self)
        return folder

    def genes(self) -> pd.DataFrame:
        """Return one row a treatment and gene, the most certain changes of each first."""
        n, g = self.changes.shape
        columns = {
            "treatment": np.repeat(self.changes.obs_names, g),
            "gene_id": np.tile(self.changes.var_names, n),
            "change": np.asarray(self.changes.X).ravel(),
        }
        if "symbol" in self.changes.var:
            columns["symbol"] = np.tile(self.changes.var["symbol"].astype(str), n)
        columns |= {k: np.asarray(self.changes.layers[k]).ravel() for k in self.changes.layers}
        table = pd.DataFrame(columns)
        return table.sort_values(["treatment", "p"], kind="stable", ignore_index=True)


def screen(
    prediction: Given,
    *,
    treatment: str = "Metadata_Treatment",
    control: str,
    normalise: Normalisation = "none",
    max_ood: float | None = None,
    q_limit: float = 0.05,
    permutations: int = 2000,
    gene_sets: Mapping[str, pd.DataFrame] | None = None,
    replicates: bool = False,
    seed: int = 0,
) -> Screen:
    """Rank the treatments of a screen by what they change in predicted expression.

    Wells are the unit: their profiles are means over cells, ``plate + treatment`` is fitted to them
    gene by gene by least squares (variance pooled over treatments), and each treatment is compared
    with the controls by Student's t over wells. ``q`` of genes controls the false discovery rate
    over all treatments and genes together (Benjamini and Hochberg 1995).

    All else is tested by exchanging the labels of the treatment's and the control's wells at random
    within plates, and fitting anew each time: ``p`` is the share of exchanges that give as much
    (Phipson and Smyth 2010), which is exact where a treatment does nothing, whatever the genes
    share. ``activity`` is the mean over genes of the squared t, over what it is under exchange: 1
    for nothing. Its ``q`` is over treatments, that of gene sets over treatments and sets of a file.

    Parameters
    ----------
    prediction
        What :func:`phenoseq.predict` returned or wrote, with ``Metadata_Well`` (and
        ``Metadata_Plate``, where there are several).
    treatment, control
        Column of ``obs``, and the value of it that marks the controls.
    normalise
        See :func:`~phenoseq.evaluation.wells.normalise_plates`. Half of each plate's control wells
        are fitted on, and treatments compared with the other half
        (:func:`~phenoseq.evaluation.wells.hold_out`).
    max_ood
        Wells with a higher mean ``ood_score`` are set apart; by default
        :func:`~phenoseq.evaluation.wells.usual_limit` of the control wells.
    q_limit
        False discovery rate of the genes counted in the ranking.
    permutations
        Exchanges of labels of each treatment. No p is below one over their number.
    gene_sets
        By name, from :func:`~phenoseq.evaluation.genesets.read_gene_sets`, scored by
        :func:`~phenoseq.evaluation.genesets.ulm`.
    replicates
        Whether to add ``map`` and its ``map_q``: how well wells of a treatment find each other
        among the controls (:func:`~phenoseq.evaluation.exchange.retrieval`).
    seed
        Of all that is drawn.

    Raises
    ------
    DataError
        Where columns, controls or wells are missing, or no treatment has two wells.

    Examples
    --------
    >>> import phenoseq
    >>> from phenoseq.data.simulate import simulate_plate
    >>> from phenoseq.evaluation.screen import screen
    >>> plate = simulate_plate(seed=1, wells_per_treatment=2, sites_per_well=1, cells_per_site=4)
    >>> prediction = phenoseq.predict(plate.source, model="simulated-plate", n_samples=2)
    >>> ", ".join(sorted(screen(prediction, control="DMSO").ranking.index))
    'drugA, drugB, drugC'
    """
    if permutations < 1:
        raise DataError(f"{permutations} permutations; a p takes one exchange of labels or more")
    sets = gene_sets or {}
    for name in sets:
        if f"{name}_q" in sets:
            raise DataError(f"gene sets {name!r} and '{name}_q': rename one, _q marks q values")
    wells = well_profiles(prediction, treatment)
    label, plate = (wells.obs[column].to_numpy().astype(str) for column in (treatment, PLATE))
    if control not in label:
        raise DataError(f"no well of {control!r}; {treatment} has {np.unique(label)[:20].tolist()}")
    is_control = label == control
    apart, max_ood = _set_apart(wells, is_control, max_ood)
    fitted = np.zeros(len(label), dtype=bool)
    if normalise != "none":
        draw = np.random.default_rng(seed)
        fitted[~apart] = hold_out(plate[~apart], is_control[~apart], draw)
        wells.X = normalise_plates(np.asarray(wells.X), plate, fitted, normalise)
    wells.obs["set_apart"], wells.obs["fitted_on"] = apart, fitted
    used = ~(apart | fitted)
    values, plate = np.asarray(wells.X)[used], plate[used]
    fit = Fit(values, label[used], plate, control)
    symbols = pd.Index(wells.var.get("symbol", wells.var_names)).astype(str)
    once = np.flatnonzero(~symbols.duplicated())
    weights = {name: weight_matrix(table, symbols[once]) for name, table in sets.items()}
    activity, maps = [], []
    scored: dict[str, list[Float]] = {name: [] for name in sets}
    for i in range(len(fit.names)):
        pool, drawn = fit.exchange(i, permutations, np.random.default_rng([seed, i]))
        t = fit.exchanged(i, pool, drawn)
        squares = (t**2).mean(axis=1)
        activity.append(first_and_p(squares / squares[1:].mean()))
        for name, table in weights.items():
            scored[name].append(first_and_p(ulm(t[:, once], table.to_numpy())))
        if replicates:
            maps.append(first_and_p(retrieval(values[pool], plate[pool], drawn)))
    p_gene = 2 * stats.t.sf(np.abs(fit.t), fit.freedom)
    q_gene = _q(p_gene)
    half = stats.t.ppf(0.975, fit.freedom) * fit.error
    groups = wells.obs[used].groupby(treatment, observed=True)
    first = np.argsort(p_gene, axis=1)[:, :5]
    tested = np.array(activity)
    obs = pd.DataFrame(
        {
            "activity": tested[:, 0],
            "p": tested[:, 1],
            "q": _q(tested[:, 1]),
            "n_wells": groups.size()[fit.names].to_numpy(),
            "n_cells": groups["n_cells"].sum()[fit.names].to_numpy(),
            "n_genes": (q_gene < q_limit).sum(axis=1),
            "top_genes": [" ".join(symbols[row]) for row in first],
        },
        index=pd.Index(fit.names, name="treatment"),
    )
    if replicates:
        obs["map"], p_map = np.array(maps).T
        obs["map_q"] = _q(p_map)
    layers = {"lower": fit.change - half, "upper": fit.change + half}
    layers |= {"t": fit.t, "p": p_gene, "q": q_gene}
    changes = ad.AnnData(fit.change, obs=obs, var=wells.var.copy(), layers=layers)
    changes.obsp["similarity"] = np.atleast_2d(np.corrcoef(fit.change))
    for name, table in weights.items():
        score, p = np.array(scored[name]).swapaxes(0, 1)
        changes.obsm[name] = pd.DataFrame(score, fit.names, table.columns)
        changes.obsm[f"{name}_q"] = pd.DataFrame(_q(p), fit.names, table.columns)
    changes.uns["screen"] = {
        "treatment": treatment,
        "control": control,
        "normalise": normalise,
        "max_ood": max_ood,
        "q_limit": q_limit,
        "permutations": permutations,
        "seed": seed,
        "wells_set_apart": wells.obs_names[apart].tolist(),
        "treatments_of_one_well": fit.single,
    }
    ranking = obs.sort_values(["p", "activity"], ascending=[True, False])
    return Screen(changes, ranking, wells)


def _set_apart(wells: ad.AnnData, is_control: Mask, max_ood: float | None) -> tuple[Mask, float]:
    """Return which wells are set apart, and the limit of their mean ``ood_score``."""
    if "ood_score" not in wells.obs:
        return np.zeros(len(is_control), dtype=bool), np.inf
    scores = wells.obs["ood_score"].to_numpy()
    limit = usual_limit(scores[is_control]) if max_ood is None else max_ood
    return scores > limit, limit


def _q(p: Float) -> Float:
    """Return the q values of Benjamini and Hochberg over all of an array."""
    return np.asarray(stats.false_discovery_control(p.ravel())).reshape(p.shape)
