"""What treatments do to predicted expression: change, its certainty, ranking, similarity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from phenoseq.data.backed import Given
from phenoseq.errors import DataError
from phenoseq.evaluation.screen_page import write_screen_page
from phenoseq.evaluation.treatments import map_replicate
from phenoseq.evaluation.wells import PLATE, Normalisation, normalise_plates, well_profiles

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Screen:
    """A screen, scored.

    Attributes
    ----------
    changes
        Treatments by genes: ``X`` the change against the controls, ``layers`` ``lower`` and
        ``upper`` (95% interval over wells), ``t``, ``p`` and ``q``; ``obs`` the ranking;
        ``obsp["similarity"]`` the correlation of two treatments' changes.
    ranking
        Treatments, the most active first: ``activity``, ``p``, ``q``, ``n_wells``, ``n_cells``,
        ``n_genes`` (those with q below the limit), ``top_genes``.
    wells
        The wells by genes, normalised; ``obs["set_apart"]`` marks those whose images lie too far
        from the training images to be believed, which count nowhere else.
    """

    changes: ad.AnnData
    ranking: pd.DataFrame
    wells: ad.AnnData

    def save(self, folder: str | Path) -> Path:
        """Write ``changes.h5ad``, ``wells.h5ad``, CSV of ranking, genes and gene sets, and a page.

        The page, ``screen.html``, opens offline.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.changes.write_h5ad(folder / "changes.h5ad")
        self.wells.write_h5ad(folder / "wells.h5ad")
        self.ranking.to_csv(folder / "ranking.csv")
        self.genes().to_csv(folder / "genes.csv", index=False)
        for name, scores in self.changes.obsm.items():
            scores.to_csv(folder / f"{name}.csv")
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
    max_ood: float = 2.0,
    q_limit: float = 0.05,
    permutations: int = 2000,
    replicates: bool = False,
    seed: int = 0,
) -> Screen:
    """Rank the treatments of a screen by what they change in predicted expression.

    Wells are the unit: their profiles are means over cells, ``plate + treatment`` is fitted to them
    gene by gene by least squares (variance pooled over treatments), and each treatment is compared
    with the controls by Student's t over wells. ``q`` controls the false discovery rate over all
    treatments and genes together (Benjamini and Hochberg 1995).

    ``activity`` is the mean over genes of the squared t, over what it is when the labels of the
    treatment's and the control's wells are exchanged at random within plates: 1 for nothing. Its
    ``p`` is the share of exchanges that give as much (Phipson and Smyth 2010), ``q`` is over
    treatments.

    Parameters
    ----------
    prediction
        What :func:`phenoseq.predict` returned or wrote, with ``Metadata_Well`` (and
        ``Metadata_Plate``, where there are several).
    treatment, control
        Column of ``obs``, and the value of it that marks the controls.
    normalise
        See :func:`~phenoseq.evaluation.wells.normalise_plates`.
    max_ood
        Wells with a higher mean ``ood_score`` (1 is usual in training images) are set apart.
    q_limit
        False discovery rate of the genes counted in the ranking.
    permutations, seed
        Exchanges of labels, and the seed they are drawn by.
    replicates
        Whether to add ``map`` and its ``map_q``: how well wells of a treatment find each other
        among the controls (:func:`~phenoseq.evaluation.treatments.map_replicate`; needs copairs).

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
    wells = well_profiles(prediction, treatment)
    names = wells.obs[treatment].to_numpy().astype(str)
    if control not in names:
        raise DataError(f"no well of {control!r}; {treatment} has {sorted(set(names))[:20]}")
    apart = np.zeros(len(names), dtype=bool)
    if "ood_score" in wells.obs:
        apart = wells.obs["ood_score"].to_numpy() > max_ood
    wells.X = normalise_plates(wells, treatment, control, normalise)
    wells.obs["set_apart"] = apart
    used = wells[~apart]
    fit = _Fit(used, treatment, control)
    permuted = [
        fit.permuted(name, permutations, np.random.default_rng([seed, i]))
        for i, name in enumerate(fit.names)
    ]
    observed = np.array([values[0] for values in permuted])
    usual = np.array([values[1:].mean() for values in permuted])
    p = np.array([(values >= values[0] * (1 - 1e-9)).mean() for values in permuted])
    p_gene = 2 * stats.t.sf(np.abs(fit.t), fit.freedom)
    q_gene = stats.false_discovery_control(p_gene.ravel()).reshape(p_gene.shape)
    half = stats.t.ppf(0.975, fit.freedom) * fit.error
    groups = used.obs.groupby(treatment, observed=True)
    symbols = wells.var["symbol"].astype(str) if "symbol" in wells.var else wells.var_names
    first = np.argsort(p_gene, axis=1)[:, :5]
    obs = pd.DataFrame(
        {
            "activity": observed / usual,
            "p": p,
            "q": stats.false_discovery_control(p),
            "n_wells": groups.size()[fit.names].to_numpy(),
            "n_cells": groups["n_cells"].sum()[fit.names].to_numpy(),
            "n_genes": (q_gene < q_limit).sum(axis=1),
            "top_genes": [" ".join(np.asarray(symbols)[row]) for row in first],
        },
        index=pd.Index(fit.names, name="treatment"),
    )
    if replicates:
        centred = _centred(used, treatment, control)
        found = map_replicate(centred, used.obs, treatment, control=control, seed=seed)
        obs["map"] = found["map"].reindex(fit.names).to_numpy()
        obs["map_q"] = found["corrected_p_value"].reindex(fit.names).to_numpy()
    layers = {"lower": fit.change - half, "upper": fit.change + half}
    layers |= {"t": fit.t, "p": p_gene, "q": q_gene}
    changes = ad.AnnData(fit.change, obs=obs, var=wells.var.copy(), layers=layers)
    changes.obsp["similarity"] = np.atleast_2d(np.corrcoef(fit.change))
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


def _centred(wells: ad.AnnData, treatment: str, control: str) -> Float:
    """Return the profiles with the mean of each plate's controls subtracted."""
    values = np.array(wells.X, dtype=np.float64)
    label, plate = wells.obs[treatment].to_numpy(), wells.obs[PLATE].to_numpy()
    for one in np.unique(plate):
        values[plate == one] -= values[(plate == one) & (label == control)].mean(axis=0)
    return values


class _Fit:
    """Least squares of ``plate + treatment`` to the profiles of wells, control and plates free.

    Attributes
    ----------
    names
        Treatments with two wells or more, without the control.
    single
        Those with one, which are not scored.
    change, error, t
        Of each against the control, ``(n_treatments, n_genes)``.
    freedom
        Degrees of freedom of the residuals.
    """

    def __init__(self, wells: ad.AnnData, treatment: str, control: str) -> None:
        label = wells.obs[treatment].to_numpy().astype(str)
        plate = wells.obs[PLATE].to_numpy().astype(str)
        bare = sorted(set(plate) - set(plate[label == control]))
        if bare:
            raise DataError(f"plates without a well of {control!r} (or all set apart): {bare}")
        counts = pd.Series(label).value_counts()
        every = sorted(set(label) - {control})
        self.names = [name for name in every if counts[name] > 1]
        self.single = [name for name in every if counts[name] == 1]
        if not self.names:
            raise DataError("no treatment has two wells; a change has no certainty without")
        self._values = np.asarray(wells.X, dtype=np.float64)
        self._label, self._plate, self._control = label, plate, control
        plates = (plate[:, None] == np.unique(plate)).astype(np.float64)
        design = np.hstack([plates, (label[:, None] == np.array(every)).astype(np.float64)])
        inverse = np.linalg.pinv(design.T @ design)
        coefficients = inverse @ design.T @ self._values
        residual = self._values - design @ coefficients
        self.freedom = len(design) - np.linalg.matrix_rank(design)
        if self.freedom < 1:
            raise DataError("as many treatments and plates as wells; nothing is left to compare")
        variance = (residual**2).sum(axis=0) / self.freedom
        variance += 1e-6 * variance.mean() + 1e-30  # genes that do not vary
        self._sd = np.sqrt(variance)
        place = [plates.shape[1] + every.index(name) for name in self.names]
        self.change: Float = coefficients[place]
        self.error: Float = np.sqrt(np.diag(inverse)[place])[:, None] * self._sd
        self.t: Float = self.change / self.error

    def permuted(self, name: str, times: int, rng: np.random.Generator) -> Float:
        """Return the mean squared t of a treatment: as it is, then with labels exchanged.

        Labels are exchanged within plates, and the difference is that to the controls of the same
        plate, plates weighted by their wells.

        Returns
        -------
        ``(1 + times,)``.
        """
        scaled = self._values / self._sd
        differences = np.zeros((1 + times, scaled.shape[1]))
        total = 0.0
        for plate in np.unique(self._plate[self._label == name]):
            here = self._plate == plate
            own, known = (scaled[here & (self._label == x)] for x in (name, self._control))
            pool, n = np.concatenate([own, known]), len(own)
            weight = n * (len(pool) - n) / len(pool)
            order = np.tile(np.arange(len(pool)), (1 + times, 1))
            rng.permuted(order[1:], axis=1, out=order[1:])
            drawn = order < n
            split = drawn / n - ~drawn / (len(pool) - n)
            differences += weight * (split @ pool)
            total += weight
        return np.asarray((differences**2).mean(axis=1) / total)
