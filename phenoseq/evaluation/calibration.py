"""Recalibration of predictive distributions by their PIT on cells kept for it.

Where a distribution F is wrong in the same way everywhere, the randomised PIT of the truth is not
uniform but follows some R, and R(F) is calibrated (Kuleshov et al. 2018). R is the empirical
distribution of the PIT on the calibration part, of each gene where it has cells enough, drawn
towards that of all genes where it has few. It rises, so that quantiles stay in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from phenoseq.errors import DataError

Array = NDArray[np.floating]

#: Knots of the map, and how many cells the map of all genes counts for beside a gene's own.
KNOTS, PRIOR_CELLS = 101, 500
#: Least values to fit to.
_LEAST = 200


@dataclass(frozen=True)
class Recalibration:
    """A map of probabilities for each gene.

    Attributes
    ----------
    levels
        Probabilities that the distribution says, at the knots, ``(K,)`` from 0 to 1.
    shares
        What share of the truth lies below, ``(g, K)``, rising from 0 to 1.
    """

    levels: NDArray[np.float64]
    shares: NDArray[np.float64]

    def apply(self, probability: Array) -> NDArray[np.float64]:
        """Turn ``F(y)`` into calibrated probabilities; ``(..., g)``."""
        out = np.empty(probability.shape)
        for k, share in enumerate(self.shares):
            out[..., k] = np.interp(probability[..., k], self.levels, share)
        return out

    def level_for(self, probability: float) -> NDArray[np.float64]:
        """Return at which level of F the calibrated quantile of a probability lies, ``(g,)``."""
        return np.array([np.interp(probability, share, self.levels) for share in self.shares])


def fit_recalibration(pit: Array) -> Recalibration:
    """Fit a recalibration to the randomised PIT of cells that trained nothing.

    Parameters
    ----------
    pit
        ``(n, g)``, from :func:`~phenoseq.evaluation.probabilistic.randomised_pit`; NaN where a
        value is unknown.

    Raises
    ------
    DataError
        Where there are fewer than 200 values, or some lie outside 0 to 1.
    """
    known = np.isfinite(pit)
    if known.sum() < _LEAST:
        raise DataError(
            f"{int(known.sum())} values to recalibrate by, of {_LEAST} at least; give the "
            "calibration part more groups"
        )
    if pit[known].min() < 0 or pit[known].max() > 1:
        raise DataError("PIT values lie between 0 and 1; these do not")
    levels = ndtr(np.linspace(-4, 4, KNOTS))  # close together in the tails
    levels[0], levels[-1] = 0.0, 1.0
    overall = _shares(pit[known], levels)
    shares = []
    for gene, there in zip(pit.T, known.T, strict=True):
        n = int(there.sum())
        own = _shares(gene[there], levels) if n else overall
        shares.append((n * own + PRIOR_CELLS * overall) / (n + PRIOR_CELLS))
    return Recalibration(levels, np.stack(shares))


def _shares(values: Array, levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of values up to each level, and a little more than before at each."""
    found = np.searchsorted(np.sort(values), levels, side="right") / len(values)
    found = (1 - 1e-6) * found + 1e-6 * levels  # so that it can be inverted
    found[0], found[-1] = 0.0, 1.0
    return found
