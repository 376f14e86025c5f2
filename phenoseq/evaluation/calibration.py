"""Whether the draws of a prediction cover the truth as often as they say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phenoseq.evaluation import probabilistic
from phenoseq.evaluation.grouped import by_group
from phenoseq.evaluation.probabilistic import GROUP_CELLS, LEVELS
from phenoseq.evaluation.tables import Truth

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
    closed, width
        Share of values inside the closed interval, and its mean width.
    empty, empty_crps
        Share of values that the empty answer [0, 0] covers by itself, and its CRPS.
    group_means
        Share of the PIT of means of groups of 50 cells or more, which are close to continuous,
        inside the central interval of each level (draws of different cells are independent given
        their images, so that the k-th draws of all cells of a group are a draw of the group); and
        the number of these groups.
    by_total, by_level
        The same as ``coverage`` by total counts of the cell (quarters, between ``total_edges``) and
        by predicted level (``X``, upper ends in ``level_edges``).
    level_shares
        Share of the values at each predicted level.
    """

    pit: list[float]
    pit_common: list[float]
    coverage: dict[str, float]
    coverage_common: dict[str, float]
    closed: dict[str, float]
    width: dict[str, float]
    empty: float
    empty_crps: float
    group_means: dict[str, float]
    n_groups: int
    by_total: dict[str, list[float]]
    by_level: dict[str, list[float]]
    total_edges: list[float]
    level_shares: list[float]
    level_edges: tuple[float, ...] = _MEAN_EDGES


class Covered:
    """Counts how often intervals hold the truth.

    Parameters
    ----------
    truth
        Whose cells are added, all of them once.
    n_draws
        Draws of each.
    seed
        Of the randomised PIT.
    """

    def __init__(self, truth: Truth, n_draws: int, seed: int) -> None:
        self._truth = truth
        self._rng = np.random.default_rng([seed, 1])
        self._edges = np.quantile(truth.total, np.arange(1, _TOTAL_BINS) / _TOTAL_BINS)
        self._pit = np.zeros((2, PIT_BINS))
        self._inside = np.zeros((2, len(LEVELS)))
        self._closed, self._width = np.zeros(len(LEVELS)), np.zeros(len(LEVELS))
        self._zero = self._sum = 0.0
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
        self._sum += true.sum(dtype=np.float64)
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
        """Return what was found over all cells."""
        size = np.bincount(self._truth.group, minlength=len(self._true))
        many = size >= GROUP_CELLS
        n = self._pit.sum(axis=1)
        true, draws = self._true[many], self._draws[:, many]
        means = probabilistic.cdf_of_draws(true / size[many, None], draws / size[many, None])
        of_means = probabilistic.randomised_pit(*means, self._rng)
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
            empty_crps=float(self._sum / n[0]),
            group_means={
                name: probabilistic.coverage(of_means, share)
                for name, share in zip(names, LEVELS, strict=True)
            },
            n_groups=int(many.sum()),
            by_total=dict(zip(names, by_total.tolist(), strict=True)),
            by_level=dict(zip(names, by_level.tolist(), strict=True)),
            total_edges=self._edges.tolist(),
            level_shares=(self._binned[1][1, 0] / n[0]).tolist(),
        )
