"""Negative-binomial counts: likelihood, quantiles, and summaries of mixtures of them.

A count of mean ``mu`` and dispersion ``theta`` has variance ``mu + mu**2 / theta``. A cell's
predictive distribution is the equal mixture, over draws, of such distributions, and everything here
is exact for it but for a tail of :data:`TAIL`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Probability at which a distribution is cut off.
TAIL = 1e-4
#: Highest count considered.
MAX_COUNT = 2000


def nb_log_likelihood(counts: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """Log probability of counts, elementwise, without the terms that depend on counts alone.

    Parameters
    ----------
    counts, mu
        Float, of one shape ``(..., g)``; ``mu`` is positive.
    theta
        Dispersions ``(g,)``, positive.
    """
    return (
        torch.lgamma(counts + theta)
        - torch.lgamma(theta)
        + theta * (theta.log() - (theta + mu).log())
        + counts * (mu.log() - (theta + mu).log())
    )


def nb_quantile(level: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """Return the smallest counts at which the cumulative mixture reaches ``level``.

    With ``level`` uniform on (0, 1) and one component, that is a draw.

    Parameters
    ----------
    level
        Probabilities in (0, 1), ``(B, g)``.
    mu
        Means ``(B, K, g)`` of the components.
    theta
        Dispersions ``(g,)``.

    Returns
    -------
    Counts, float ``(B, g)``.
    """
    wanted = level.flatten().clamp(max=1 - TAIL)
    out = torch.zeros_like(wanted)
    for count, at, cdf, _ in _walk(mu, theta):
        out[at] = torch.where(cdf < wanted[at], count + 1.0, out[at])
    return out.view_as(level)


def summarise_mixture(
    mu: Tensor, theta: Tensor, scale: Tensor, levels: tuple[float, ...]
) -> tuple[Tensor, list[Tensor]]:
    """Summarise ``log1p(scale * counts)`` under a mixture.

    Parameters
    ----------
    mu
        Means ``(B, K, g)`` of the components.
    theta
        Dispersions ``(g,)``.
    scale
        What counts are multiplied by, ``(B,)``.
    levels
        Probabilities of the quantiles wanted.

    Returns
    -------
    Standard deviation ``(B, g)``, and for each level its quantile ``(B, g)``.
    """
    shape = (mu.shape[0], mu.shape[2])
    per_pair = scale[:, None].expand(shape).flatten()
    first = torch.zeros_like(per_pair)
    second = torch.zeros_like(per_pair)
    counts = [torch.zeros_like(per_pair) for _ in levels]
    for count, at, cdf, pmf in _walk(mu, theta):
        value = torch.log1p(per_pair[at] * count)
        first[at] += pmf * value
        second[at] += pmf * value**2
        for quantile, level in zip(counts, levels, strict=True):
            quantile[at] = torch.where(cdf < level, count + 1.0, quantile[at])
    std = (second - first**2).clamp(min=0).sqrt().view(shape)
    return std, [torch.log1p(per_pair * q).view(shape) for q in counts]


def _walk(mu: Tensor, theta: Tensor) -> Iterator[tuple[int, Tensor | slice, Tensor, Tensor]]:
    """Walk the counts 0, 1, ... with those (cell, gene) pairs that are not yet at their tail.

    Yields the count, the pairs as indices into the flattened ``(B, g)``, and their cumulative and
    own probability at this count. Pairs at their tail leave once they are many; until then their
    own probability is 0, so that no pair depends on the others.
    """
    cells, draws, genes = mu.shape
    theta = theta.to(mu).clamp(min=1e-3)
    failure = mu / (mu + theta)
    pmf = torch.exp(theta * torch.log1p(-failure)).transpose(1, 2).reshape(cells * genes, draws)
    failure = failure.transpose(1, 2).reshape(cells * genes, draws)
    size = theta.repeat(cells)[:, None]
    at: Tensor | slice = slice(None)
    cdf = torch.zeros(cells * genes, device=mu.device, dtype=mu.dtype)
    below = torch.ones_like(cdf, dtype=torch.bool)
    for count in range(MAX_COUNT):
        own = pmf.mean(dim=1) * below
        cdf = cdf + own
        yield count, at, cdf, own
        below = cdf < 1 - TAIL
        going = torch.nonzero(below).squeeze(1)
        if not len(going):
            return
        if len(going) < 0.7 * len(cdf):
            pmf, failure, size, cdf = pmf[going], failure[going], size[going], cdf[going]
            below = below[going]
            at = going if isinstance(at, slice) else at[going]
        pmf = pmf * failure * ((size + count) / (count + 1))
