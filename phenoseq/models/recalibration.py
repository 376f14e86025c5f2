"""Recalibration: predicted distributions of counts made right on cells that were kept for it.

Where a distribution F is wrong in the same way at all values of about one predicted level, the
randomised PIT of the truth is not uniform there but follows some R, and R(F) is calibrated
(Kuleshov et al. 2018). R is the empirical distribution of the PIT in each of a few strata by
predicted level, beside that of the model's own draws. It rises, so that quantiles stay in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phenoseq.errors import DataError, ModelError

#: Predicted levels between the strata: log1p of the counts expected in a cell of median library.
EDGES = (0.05, 0.2, 0.5, 1.0, 2.0, 3.0)
#: Steps of R, and how many values that are uniform are added to those of a stratum.
STEPS, PRIOR = 40, 500
#: Cells below which nothing is fitted.
LEAST = 200
#: Most strata, and most steps, of a configuration.
_MOST = 1 << 10


@dataclass(frozen=True)
class Recalibration:
    """A map of probabilities for each stratum of predicted level.

    Attributes
    ----------
    edges
        Predicted levels between the S strata, S - 1 that rise.
    shares
        For each stratum what share of the truth lies below, at probabilities of F that are evenly
        spaced from 0 to 1, both included; rising from 0 to 1.
    """

    edges: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]

    def check(self, where: str) -> None:
        """Check that strata and maps rise, and go together.

        Raises
        ------
        ModelError
            Where they do not; ``where`` says of what.
        """
        lengths = {len(share) for share in self.shares}
        if (
            len(self.shares) != len(self.edges) + 1
            or len(lengths) != 1
            or not len(self.shares) <= _MOST
            or not 2 <= max(lengths) <= _MOST + 1
        ):
            raise ModelError(
                f"{where}: recalibration has {len(self.shares)} maps of {sorted(lengths)} numbers "
                f"for {len(self.edges)} edges, not one map more than edges, all of one length"
            )
        ends = all((share[0], share[-1]) == (0, 1) for share in self.shares)
        if not ends or not all(map(_rises, (self.edges, *self.shares))):
            raise ModelError(f"{where}: recalibration: edges rise, and maps from 0 to 1")

    def at(self, level: Tensor) -> Warp:
        """Return the map of values of these predicted levels, of any shape."""
        edges, shares = (level.new_tensor(values) for values in (self.edges, self.shares))
        return Warp(shares, torch.bucketize(level, edges))


@dataclass(frozen=True)
class Warp:
    """R at some values.

    Attributes
    ----------
    shares
        Of each stratum, ``(S, steps + 1)``.
    stratum
        Of each value, int64.
    """

    shares: Tensor
    stratum: Tensor

    def __call__(self, probability: Tensor) -> Tensor:
        """Return calibrated probabilities, one a value, in the shape of ``stratum``."""
        steps = self.shares.shape[1] - 1
        place = probability * steps
        low = place.long().clamp(0, steps - 1)
        at = self.stratum * (steps + 1) + low
        flat = self.shares.flatten()
        return torch.lerp(flat[at], flat[at + 1], place - low)

    def take(self, *places: Tensor) -> Warp:
        """Return the map of some of the values, by their index in each dimension."""
        return Warp(self.shares, self.stratum[places])

    def flat(self) -> Warp:
        """Return the map of all values, in one dimension."""
        return Warp(self.shares, self.stratum.flatten())


def fit_recalibration(
    true: NDArray[np.floating], drawn: NDArray[np.floating], level: NDArray[np.floating]
) -> Recalibration:
    """Fit a recalibration to cells that trained nothing.

    Parameters
    ----------
    true
        Randomised PIT (Czado et al. 2009) of each gene of each cell, ``(n, g)``.
    drawn
        The same of a draw of the model. F is known from a few draws, and so narrower than it is
        for a truth that none of them is; a draw that F was not made of tells by how much.
    level
        Predicted level of each, ``(n, g)``.

    Raises
    ------
    DataError
        Where values lie outside 0 to 1.
    """
    if not all(pit.min() >= 0 and pit.max() <= 1 for pit in (true, drawn)):
        raise DataError("PIT values lie between 0 and 1; these do not")
    even = np.linspace(0, 1, STEPS + 1)
    stratum = np.searchsorted(EDGES, level)
    shares = []
    for k in range(len(EDGES) + 1):
        below, expected = (_shares(pit[stratum == k], even) for pit in (true, drawn))
        share = np.interp(below, expected, even)
        shares.append(tuple(np.round(share, 5).tolist()))
    return Recalibration(EDGES, tuple(shares))


def _shares(pit: NDArray[np.floating], even: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of values up to each of some probabilities, drawn to these themselves."""
    below = np.searchsorted(np.sort(pit), even, side="right")
    share = (below + PRIOR * even) / (len(pit) + PRIOR)
    share[0], share[-1] = 0.0, 1.0
    return np.asarray(share)


def _rises(values: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in pairwise(values))
