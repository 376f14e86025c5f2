"""Scores one prediction, some cells at a time, so that memory does not grow with their number."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from phenoseq.errors import PhenoseqWarning
from phenoseq.evaluation import pairs, probabilistic
from phenoseq.evaluation.calibration import Calibration, Covered
from phenoseq.evaluation.grouped import (
    CoMoments,
    Means,
    Moments,
    PairDistances,
    Statistic,
    value_of,
)
from phenoseq.evaluation.metrics import mmd_rbf
from phenoseq.evaluation.tables import Prediction, Truth, blocks


@dataclass
class Result:
    """What scoring one prediction gives.

    Attributes
    ----------
    name
        Of the model or baseline.
    n_draws
        Draws a cell; 0 for a point forecast.
    statistics
        The metrics of METRICS by name, as functions of weights of groups; those that can be
        resampled.
    values
        All metrics, by name.
    pcc_gene
        Of each scored gene.
    cell_scores
        Energy score of each cell.
    coexpression
        True and predicted gene-gene correlations.
    calibration
        None for a point forecast, or a single draw.
    """

    name: str
    n_draws: int
    statistics: dict[str, Statistic]
    values: dict[str, float]
    pcc_gene: NDArray[np.float64]
    cell_scores: NDArray[np.float64]
    coexpression: tuple[NDArray[np.float64], NDArray[np.float64]]
    calibration: Calibration | None = field(default=None)


def score(
    truth: Truth,
    prediction: Prediction,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Score one prediction.

    Parameters
    ----------
    truth, prediction
        Of the same cells.
    seed
        Of the subsample of pairs and of the randomised PIT.
    progress
        Called with (cells done, cells in all).

    Returns
    -------
    The metrics; those of the mean are of ``X``, those of one draw of the first one (of the mean
    for a point forecast), and the proper scores of all draws. Of a single draw, which is no
    predictive distribution, there are no proper scores, with a warning.
    """
    n, n_groups, g = len(truth), len(truth.groups), int(truth.genes.sum())
    moments, spread = Moments(n_groups, g), Moments(n_groups, g)
    together = CoMoments(n_groups, g)
    means = {name: Means(n_groups) for name in ("mse", "crps", "energy_score")}
    cell_scores = np.full(n, np.nan)
    n_draws = len(prediction.draws)
    covered = Covered(truth, n_draws, seed) if n_draws > 1 else None
    if n_draws == 1:
        warnings.warn(
            f"{prediction.name}: has a single draw, so that there is no crps, energy_score or "
            "coverage; predict with keep_draws (--keep-draws)",
            PhenoseqWarning,
            stacklevel=2,
        )
    for cells in blocks(n):
        true, mean, group = truth.take(cells), prediction.take_mean(cells), truth.group[cells]
        draws = prediction.take_draws(cells)
        moments.add(true, mean, group)
        spread.add(true, draws[0], group)
        together.add(true, draws[0], group)
        means["mse"].add(((true - mean).astype(np.float64) ** 2).mean(axis=1), group)
        if n_draws != 1:
            ordered = np.sort(draws, axis=0)
            cell_scores[cells] = probabilistic.energy_score(true, draws)
            means["energy_score"].add(cell_scores[cells], group)
            means["crps"].add(probabilistic.crps(true, ordered).mean(axis=1), group)
            if covered is not None:
                covered.add(cells, true, mean, ordered)
                covered.add_group_means(group, true, draws)
        if progress is not None:
            progress(int(cells[-1]) + 1, n)
    kept = pairs.subsample(n, seed).numpy()
    profiles = truth.take(kept), prediction.take_draw(kept)
    distance = PairDistances(*profiles, truth.group[kept], n_groups)
    statistics: dict[str, Statistic] = {
        "pcc_gene_median": moments.pcc,
        "pcc_gene_mean": partial(_over_genes, moments, top=g),
        "pcc_gene_top50": partial(_over_genes, moments, top=50),
        "variance_ratio": spread.variance_ratio,
        "coexpression_error": together,
        "e_distance": distance,
        **(means if n_draws != 1 else {"mse": means["mse"]}),
    }
    values = {name: value_of(statistic, n_groups) for name, statistic in statistics.items()}
    values["e_distance_se"] = distance.error
    values["mmd_rbf"], values["mmd_rbf_se"] = mmd_rbf(*profiles, seed=seed)
    return Result(
        name=prediction.name,
        n_draws=n_draws,
        statistics=statistics,
        values=values,
        pcc_gene=moments.by_gene(np.ones((1, n_groups)))[0],
        cell_scores=cell_scores,
        coexpression=together.matrices(),
        calibration=None if covered is None else covered.result(),
    )


def _over_genes(moments: Moments, weights: NDArray[np.float64], *, top: int) -> NDArray[np.float64]:
    return np.asarray(np.sort(moments.by_gene(weights), axis=1)[:, -top:].mean(axis=1))
