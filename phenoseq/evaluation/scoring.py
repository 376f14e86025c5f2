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
from phenoseq.evaluation.grouped import (
    CoMoments,
    Means,
    Moments,
    PairDistances,
    Statistic,
    by_group,
    value_of,
)
from phenoseq.evaluation.metrics import mmd_rbf
from phenoseq.evaluation.probabilistic import GROUP_CELLS, LEVELS, group_mean_coverage
from phenoseq.evaluation.tables import Prediction, Truth, blocks

#: Bins of the histogram of the PIT.
PIT_BINS = 20
#: Bins of cells by total counts, and of values by predicted level, for which coverage is told.
_TOTAL_BINS, _MEAN_EDGES = 4, (0.05, 0.2, 0.5, 1.0)


@dataclass
class Calibration:
    """Whether the draws of a prediction cover the truth as often as they say.

    Attributes
    ----------
    pit, pit_common
        Histogram of the randomised PIT, of all scored genes and of those in more than 20% of the
        cells, each divided by its mean.
    coverage, coverage_common
        Share of the PIT inside the central interval of each level.
    closed, width, empty
        Share of values inside the closed interval, its mean width, and the share that the answer
        [0, 0] covers by itself.
    group_means
        Share of means of groups of 50 cells or more inside their interval, and their number.
    by_total, by_level
        Coverage by total counts of the cell (quarters) and by predicted level (upper ends in
        ``level_edges``).
    """

    pit: list[float]
    pit_common: list[float]
    coverage: dict[str, float]
    coverage_common: dict[str, float]
    closed: dict[str, float]
    width: dict[str, float]
    empty: float
    group_means: dict[str, float]
    n_groups: int
    by_total: dict[str, list[float]]
    by_level: dict[str, list[float]]
    level_edges: tuple[float, ...] = _MEAN_EDGES


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
    covered = _Covered(truth, n_draws, seed) if n_draws > 1 else None
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


class _Covered:
    """Counts how often intervals hold the truth."""

    def __init__(self, truth: Truth, n_draws: int, seed: int) -> None:
        self._truth = truth
        self._rng = np.random.default_rng([seed, 1])
        self._edges = np.quantile(truth.total, np.arange(1, _TOTAL_BINS) / _TOTAL_BINS)
        self._pit = np.zeros((2, PIT_BINS))
        self._inside = np.zeros((2, len(LEVELS)))
        self._closed, self._width = np.zeros(len(LEVELS)), np.zeros(len(LEVELS))
        self._zero = 0.0
        self._binned = [np.zeros((2, len(LEVELS), k)) for k in (_TOTAL_BINS, len(_MEAN_EDGES) + 1)]
        n_groups, g = len(truth.groups), int(truth.genes.sum())
        self._true, self._draws = np.zeros((n_groups, g)), np.zeros((n_draws, n_groups, g))

    def add(
        self,
        cells: NDArray[np.int64],
        true: NDArray[np.float32],
        mean: NDArray[np.float32],
        draws: NDArray[np.float32],
    ) -> None:
        """Add cells, whose draws are in rising order."""
        common = self._truth.common
        pit = probabilistic.randomised_pit(*probabilistic.cdf_of_draws(true, draws), self._rng)
        for k, some in enumerate((pit, pit[:, common])):
            self._pit[k] += np.histogram(some, PIT_BINS, (0, 1))[0]
        total = np.searchsorted(self._edges, self._truth.total[cells], side="right")
        total = np.broadcast_to(total[:, None], true.shape)
        level = np.searchsorted(_MEAN_EDGES, mean)
        self._zero += (true == 0).sum()
        for i, share in enumerate(LEVELS):
            inside = np.abs(pit - 0.5) <= share / 2
            self._inside[:, i] += inside.sum(), inside[:, common].sum()
            low, high = probabilistic.interval(draws, share)
            part, width = probabilistic.closed_coverage(true, low, high)
            self._closed[i] += part * true.size
            self._width[i] += width * true.size
            for binned, place in zip(self._binned, (total, level), strict=True):
                k = binned.shape[2]
                binned[0, i] += np.bincount(place.ravel(), inside.ravel(), k)
                binned[1, i] += np.bincount(place.ravel(), minlength=k)

    def add_group_means(
        self, group: NDArray[np.int64], true: NDArray[np.float32], draws: NDArray[np.float32]
    ) -> None:
        """Add cells, whose draws are each one of the whole cell."""
        n_groups = len(self._true)
        self._true += by_group(true.astype(np.float64), group, n_groups)
        for k, draw in enumerate(draws):
            self._draws[k] += by_group(draw.astype(np.float64), group, n_groups)

    def result(self) -> Calibration:
        size = np.bincount(self._truth.group, minlength=len(self._true))
        many = size >= GROUP_CELLS
        n = self._pit.sum(axis=1)
        true, draws = self._true[many], self._draws[:, many]
        true, draws = true / size[many, None], draws / size[many, None]
        with np.errstate(invalid="ignore"):
            by_total, by_level = (inside / of for inside, of in self._binned)
            pit = self._pit / self._pit.mean(axis=1, keepdims=True)
            inside = self._inside / n[:, None]
        names = [f"{share:g}" for share in LEVELS]
        return Calibration(
            pit=pit[0].tolist(),
            pit_common=pit[1].tolist(),
            coverage=dict(zip(names, inside[0].tolist(), strict=True)),
            coverage_common=dict(zip(names, inside[1].tolist(), strict=True)),
            closed=dict(zip(names, (self._closed / n[0]).tolist(), strict=True)),
            width=dict(zip(names, (self._width / n[0]).tolist(), strict=True)),
            empty=float(self._zero / n[0]),
            group_means={
                name: group_mean_coverage(true, draws, share)
                for name, share in zip(names, LEVELS, strict=True)
            },
            n_groups=int(many.sum()),
            by_total=dict(zip(names, by_total.tolist(), strict=True)),
            by_level=dict(zip(names, by_level.tolist(), strict=True)),
        )
