"""Negative-binomial counts: likelihood, quantiles, and summaries of mixtures of them.

A count of mean ``mu`` and dispersion ``theta`` has variance ``mu + mu**2 / theta``. A cell's
predictive distribution is the equal mixture, over draws, of such distributions, and everything here
is exact for it but for a tail of :data:`TAIL`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from phenoseq.models.recalibration import Warp

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


def thin(
    counts: sparse.csr_matrix, share: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Divide counts at random in two, of which the second gets each count with chance ``share``.

    Where counts are negative binomial so are both parts, of the same dispersion and their share of
    the mean, and what the one holds of counting noise tells nothing of that in the other. (Binomial
    thinning, as in Batson et al., "Molecular cross-validation for single-cell RNA-seq", 2019.)

    Parameters
    ----------
    counts
        Whole numbers, ``(n, g)``.
    share
        Between 0 and 1.
    rng
        Divides.

    Returns
    -------
    Both parts, float32 ``(n, g)``, which add up to the counts.
    """
    second = counts.copy()
    second.data = rng.binomial(counts.data.astype(np.int64), share).astype(np.float32)
    held = torch.from_numpy(second.toarray())
    return torch.from_numpy(counts.toarray()).float() - held, held


def nb_quantile(level: Tensor, mu: Tensor, theta: Tensor, warp: Warp | None = None) -> Tensor:
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
    warp
        Recalibrates the mixture, at ``(B, g)``.

    Returns
    -------
    Counts, float ``(B, g)``.
    """
    wanted = level.flatten().clamp(max=1 - TAIL)
    out = torch.zeros_like(wanted)
    for count, at, cdf, _ in _walk(mu, theta, warp):
        out[at] = torch.where(cdf < wanted[at], count + 1.0, out[at])
    return out.view_as(level)


def nb_cdf(counts: Tensor, mu: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cumulative mixture below counts, and at them, each ``(B, g)``.

    Parameters
    ----------
    counts
        Float ``(B, g)``.
    mu
        Means ``(B, K, g)`` of the components.
    theta
        Dispersions ``(g,)``.
    """
    wanted = counts.flatten()
    below, at_most = torch.ones_like(wanted), torch.ones_like(wanted)
    highest = float(wanted.max()) if len(wanted) else -1.0
    for count, at, cdf, own in _walk(mu, theta):
        if count > highest:
            break
        here = wanted[at] == count
        below[at] = torch.where(here, cdf - own, below[at])
        at_most[at] = torch.where(here, cdf, at_most[at])
    return below.clamp(0, 1).view_as(counts), at_most.clamp(0, 1).view_as(counts)


def matching_nb(rates: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean rate and the dispersion of a negative binomial like a mixture, ``(B, g)``.

    It has the mixture's mean and variance, at any library size that all components share.

    Parameters
    ----------
    rates
        Of the components, ``(B, K, g)``.
    theta
        Their dispersions ``(g,)``.
    """
    mean = rates.mean(dim=1)
    spread = rates.square().mean(dim=1) / mean.square()
    return mean, 1 / (spread * (1 + 1 / theta.clamp(min=1e-3)) - 1).clamp(min=1e-6)


def redraw(
    counts: Tensor, rates: Tensor, library: Tensor, theta: Tensor, warp: Warp, uniforms: Tensor
) -> Tensor:
    """Turn draws of a mixture into draws of the recalibrated one, by their ranks.

    A draw at rank u of F becomes the quantile of R(F) at u, and where R is the identity it stays.
    For F, only the measure of ranks here, stands the negative binomial that is like the mixture.

    Parameters
    ----------
    counts
        n draws, each at a library size ``(B, n)`` of its own, ``(B, n, g)``.
    rates, library
        Rates ``(B, K, g)`` of the components; library sizes ``(B, n)`` of the draws.
    theta
        Dispersions ``(g,)``.
    warp
        R, at ``(B, g)``.
    uniforms
        Ranks of draws among those of the same count, uniform, ``(B, n, g)``.
    """
    rate, size = (values[:, None] for values in matching_nb(rates, theta))
    mu = rate * library[..., None]
    zero = torch.exp(-size * torch.log1p(mu / size))
    recalibrated = Warp(warp.shares, warp.stratum[:, None].expand_as(zero))(zero)
    b, k, g = torch.nonzero((counts > 0) | (uniforms * zero > recalibrated), as_tuple=True)
    some, mean, of_size = counts[b, k, g][None], mu[b, k, g][None, None], size[b, 0, g]
    below, at_most = nb_cdf(some, mean, of_size)
    rank = below + uniforms[b, k, g] * (at_most - below)
    moved = nb_quantile(rank, mean, of_size, warp.take(b, g))
    out = counts.clone()
    out[b, k, g] = torch.where(below < 1 - TAIL, moved, some)[0]
    return out


def summarise_mixture(
    mu: Tensor,
    theta: Tensor,
    scale: Tensor,
    levels: tuple[float, ...],
    warp: Warp | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
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
    warp
        Recalibrates the mixture, at ``(B, g)``.

    Returns
    -------
    Mean and standard deviation ``(B, g)``, and for each level its quantile ``(B, g)``.
    """
    shape = (mu.shape[0], mu.shape[2])
    per_pair = scale[:, None].expand(shape).flatten()
    first = torch.zeros_like(per_pair)
    second = torch.zeros_like(per_pair)
    counts = [torch.zeros_like(per_pair) for _ in levels]
    for count, at, cdf, pmf in _walk(mu, theta, warp):
        value = torch.log1p(per_pair[at] * count)
        first[at] += pmf * value
        second[at] += pmf * value**2
        for quantile, level in zip(counts, levels, strict=True):
            quantile[at] = torch.where(cdf < level, count + 1.0, quantile[at])
    std = (second - first**2).clamp(min=0).sqrt().view(shape)
    return first.view(shape), std, [torch.log1p(per_pair * q).view(shape) for q in counts]


def _walk(
    mu: Tensor, theta: Tensor, warp: Warp | None = None
) -> Iterator[tuple[int, Tensor | slice, Tensor, Tensor]]:
    """Walk the counts 0, 1, ... with those (cell, gene) pairs that are not yet at their tail.

    Yields the count, the pairs as indices into the flattened ``(B, g)``, and their cumulative and
    own probability at this count, recalibrated by ``warp``. Pairs at their tail leave once they are
    many; until then their own probability is 0, so that no pair depends on the others.
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
    warped = cdf
    if warp is not None:
        warp = warp.flat()
    for count in range(MAX_COUNT):
        own = pmf.mean(dim=1) * below
        cdf = cdf + own
        if warp is None:
            yield count, at, cdf, own
        else:
            before, warped = warped, warp(cdf.clamp(max=1))
            yield count, at, warped, warped - before
        below = cdf < 1 - TAIL
        going = torch.nonzero(below).squeeze(1)
        if not len(going):
            return
        if len(going) < 0.7 * len(cdf):
            pmf, failure, size, cdf = pmf[going], failure[going], size[going], cdf[going]
            below = below[going]
            if warp is not None:
                warp, warped = warp.take(going), warped[going]
            at = going if isinstance(at, slice) else at[going]
        pmf = pmf * failure * ((size + count) / (count + 1))
