"""Appearance: what crops look like by a few statistics of their pixels, and how unusual that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from phenoseq.errors import ModelError

#: Added to a standardised mean or deviation before its logarithm is taken: of nothing it is finite.
_FLOOR = 0.05
#: Added to each variance, as a share of it, so that the covariance can be inverted.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Appearance:
    """Where the pixel statistics of training crops lie.

    A network learns to ignore what does not matter in its training images, and so what would give
    others away: an empty crop has an ordinary context. Its pixels tell.

    Attributes
    ----------
    mean, covariance
        Of :func:`pixel_statistics` over training crops, ``(k,)`` and ``(k, k)``.
    """

    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]

    @classmethod
    def fit(cls, statistics: Tensor) -> Self:
        """Fit to the statistics of training crops, ``(n, k)``."""
        values = statistics.double()
        covariance = torch.cov(values.T)
        covariance = (covariance + covariance.T) / 2  # to the last bit
        covariance += torch.diag(_RIDGE * covariance.diagonal() + 1e-6)
        return cls(_short(values.mean(dim=0)), tuple(map(_short, covariance)))

    def check(self, n_channels: int, where: str) -> None:
        """Check that the numbers are a mean and a covariance of crops with that many stains.

        Raises
        ------
        ModelError
            Where they are not; ``where`` says of what.
        """
        n = _size(n_channels)
        if len(self.mean) != n or [len(row) for row in self.covariance] != [n] * n:
            raise ModelError(f"{where}: image: appearance: {n_channels} stains have {n} statistics")
        covariance = torch.tensor(self.covariance, dtype=torch.float64)
        positive = torch.linalg.cholesky_ex(covariance)[1] == 0
        if not positive or not torch.equal(covariance, covariance.T):
            raise ModelError(f"{where}: image: appearance: is no covariance")

    def distance(self, statistics: Tensor, present: Tensor) -> Tensor:
        """Return how far crops lie from the training crops, about 1 for such as these.

        The Mahalanobis distance, over the root of the number of statistics; where stains are
        missing, that of the statistics of the others.

        Parameters
        ----------
        statistics
            From :func:`pixel_statistics`, ``(B, k)``.
        present
            Which stains each crop has, bool ``(B, C)``.

        Returns
        -------
        ``(B,)``; 0 where there is no stain.
        """
        mean = torch.tensor(self.mean, dtype=torch.float64)
        covariance = torch.tensor(self.covariance, dtype=torch.float64)
        out = statistics.new_zeros(len(statistics))
        patterns, which = np.unique(present.cpu().numpy(), axis=0, return_inverse=True)
        for i, pattern in enumerate(torch.from_numpy(patterns)):
            rows = torch.from_numpy(which.reshape(-1) == i).to(statistics.device)
            first, second = torch.triu_indices(len(pattern), len(pattern), 1)
            known = torch.cat([pattern.repeat(3), pattern[first] & pattern[second]])
            if not known.any():
                continue
            whiten = torch.linalg.cholesky(torch.linalg.inv(covariance[known][:, known]))
            away = statistics[rows][:, known.to(statistics.device)] - mean[known].to(statistics)
            out[rows] = (away @ whiten.to(statistics)).square().mean(dim=1).sqrt()
        return out


def pixel_statistics(images: Tensor, std: Tensor) -> Tensor:
    """Return statistics of each crop's pixels: how bright, how varied, how sharp, how alike.

    Parameters
    ----------
    images
        Raw pixels ``(B, C, H, W)``, any dtype.
    std
        Standard deviation of each stain's training pixels, ``(C, 1, 1)``.

    Returns
    -------
    ``(B, k)``, with k = 3 C + C (C - 1) / 2: the logarithms of each stain's mean, standard
    deviation and root mean square difference of neighbours; and the Pearson correlation of each two
    stains.
    """
    height, width = images.shape[2:]
    mean = images.float().mean(dim=(2, 3), keepdim=True)
    away = images - mean
    flat = away.flatten(2)
    size, scale = height * width, std.flatten()
    covariance = flat @ flat.mT / size / scale[:, None] / scale
    spread = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    steps = [torch.linalg.vector_norm(away.diff(dim=d), dim=(2, 3)) for d in (2, 3)]
    sharp = torch.hypot(*steps) / size**0.5 / scale
    mean = mean.flatten(1) / scale
    logs = [torch.log(x.clamp(min=0) + _FLOOR) for x in (mean, spread, sharp)]
    known = spread + _FLOOR**2  # of a constant stain nothing is alike
    alike = covariance / known[:, :, None] / known[:, None]
    first, second = torch.triu_indices(len(std), len(std), 1)
    return torch.cat([*logs, alike[:, first, second]], dim=1)


def _size(n_channels: int) -> int:
    return 3 * n_channels + n_channels * (n_channels - 1) // 2


def _short(values: Tensor) -> tuple[float, ...]:
    """Return numbers of seven digits, as they stand in a configuration."""
    return tuple(float(f"{x:.7g}") for x in values.tolist())
