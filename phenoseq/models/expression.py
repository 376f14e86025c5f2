"""The expression space: counts <-> the latent that the diffusion model generates.

A cell's counts become the leading principal components of its log1p-normalised expression,
standardised, with its standardised log library size as the last number. A small network turns a
latent back into the rate of every gene (positive, summing to one), fitted by negative-binomial
likelihood of counts that the latent has not seen, so that it is not misled by counting noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from phenoseq.errors import DataError
from phenoseq.models.counts import (
    nb_log_likelihood,
    nb_quantile,
    redraw,
    summarise_mixture,
    thin,
)
from phenoseq.models.recalibration import Recalibration

#: Cells with at least this many counts say what the median library is.
MIN_LIBRARY = 20
#: Share of a cell's counts that judge its decoder, which sees the latent of the others.
_HELD_OUT = 0.1
#: Steps below which the decoder is far from fitted, however few the cells.
_MIN_STEPS = 300


@dataclass(frozen=True)
class ExpressionConfig:
    """Genes and sizes of an expression space.

    Attributes
    ----------
    genes, symbols
        Ensembl id (symbol where there is none) and symbol of every gene, in order.
    components
        Principal components in the latent; the latent has one number more.
    hidden
        Width of the decoder.
    median_library
        Median counts of the training cells with 20 counts or more.
    """

    genes: tuple[str, ...]
    symbols: tuple[str, ...]
    components: int = 32
    hidden: int = 256
    median_library: float = 1.0

    @property
    def latent_dim(self) -> int:
        """Numbers in the latent."""
        return self.components + 1


class ExpressionSpace(nn.Module):
    """Encodes counts to latents and decodes latents to rates, library sizes and dispersions."""

    mean: Tensor
    axes: Tensor
    spread: Tensor
    library: Tensor
    log_theta: Tensor

    def __init__(self, config: ExpressionConfig) -> None:
        super().__init__()
        self.config = config
        genes, k = len(config.genes), config.components
        self.register_buffer("mean", torch.zeros(genes))
        self.register_buffer("axes", torch.zeros(k, genes))
        self.register_buffer("spread", torch.ones(k))
        #: mean, std, lowest and highest log library size of the training cells
        self.register_buffer("library", torch.tensor([0.0, 1.0, 0.0, 1.0]))
        self.decoder = nn.Sequential(
            nn.Linear(k, config.hidden), nn.SiLU(), nn.Linear(config.hidden, genes)
        )
        self.log_theta = nn.Parameter(torch.zeros(genes))
        self.requires_grad_(False)

    def scaled(self, counts: Tensor) -> Tensor:
        """Return log1p of counts ``(..., g)`` scaled to the median library size; 0 of no counts."""
        share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
        return torch.log1p(share * self.config.median_library)

    def encode(self, counts: Tensor) -> Tensor:
        """Turn raw counts ``(..., g)`` into latents ``(..., D)``, both float."""
        total = counts.sum(-1, keepdim=True).clamp(min=1)
        scores = (self.scaled(counts) - self.mean) @ self.axes.T / self.spread
        library = (total.log() - self.library[0]) / self.library[1]
        return torch.cat([scores, library], dim=-1)

    def decode(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Turn latents ``(..., D)`` into rates ``(..., g)``, summing to 1, and library ``(...)``.

        The library size is held within that of the training cells.
        """
        rates = torch.softmax(self.decoder(latent[..., :-1]), dim=-1)
        log_library = self.library[0] + self.library[1] * latent[..., -1]
        return rates, log_library.clamp(self.library[2], self.library[3]).exp()

    def expected(self, latent: Tensor) -> Tensor:
        """Return the expected expression ``(..., g)``, at least 0, of mean latents ``(..., D)``.

        The latent is linear in log1p of counts scaled to the median library size, and so is its
        mean.
        """
        scores = latent[..., :-1] * self.spread
        return (self.mean + scores @ self.axes).clamp(min=0)

    def level(self, rates: Tensor) -> Tensor:
        """Return the predicted level of each gene, ``(B, g)``, of the rates ``(B, K, g)`` of draws.

        Recalibration goes by it: log1p of the counts expected at the median library size.
        """
        return torch.log1p(rates.mean(dim=1) * self.config.median_library)

    def measured(
        self,
        rates: Tensor,
        library: Tensor,
        levels: tuple[float, ...] = (),
        recalibration: Recalibration | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Summarise the values that a measurement would give, counting noise included.

        A value is log1p of a count scaled to the median library size; the count is drawn from the
        equal mixture over draws.

        Parameters
        ----------
        rates
            Of the draws, ``(B, K, g)``.
        library
            Counts of each cell, ``(B,)``.
        levels
            Probabilities of the quantiles wanted.
        recalibration
            Applied to the mixture.

        Returns
        -------
        Standard deviation ``(B, g)``, and for each level its quantile ``(B, g)``.
        """
        warp = None if recalibration is None else recalibration.at(self.level(rates))
        scale = self.config.median_library / library
        mu = rates * library[:, None, None]
        _, std, quantiles = summarise_mixture(mu, self.theta, scale, levels, warp)
        return std, quantiles

    def draw(
        self,
        rates: Tensor,
        library: Tensor,
        uniforms: Tensor,
        recalibration: Recalibration | None = None,
    ) -> Tensor:
        """Draw the counts that a measurement would give, of the first n draws.

        Parameters
        ----------
        rates, library
            Of all draws, ``(B, K, g)`` and ``(B, K)``.
        uniforms
            On [0, 1), ``(B, n, g)``; twice as many where counts are recalibrated.
        recalibration
            Moves each count to the quantile that it is.

        Returns
        -------
        Counts ``(B, n, g)``, float.
        """
        n = uniforms.shape[1] // (1 if recalibration is None else 2)
        mu = rates[:, :n] * library[:, :n, None]
        pieces = [nb_quantile(uniforms[:, k], mu[:, k : k + 1], self.theta) for k in range(n)]
        counts = torch.stack(pieces, dim=1)
        if recalibration is None:
            return counts
        warp = recalibration.at(self.level(rates))
        return redraw(counts, rates, library[:, :n], self.theta, warp, uniforms[:, n:])

    @property
    def theta(self) -> Tensor:
        """Dispersion of every gene, ``(g,)``."""
        return self.log_theta.exp()

    @property
    def weight(self) -> Tensor:
        """Weights ``(D,)`` of the latent's errors: the deviation that each carries, mean 1."""
        spread = torch.cat([self.spread, self.spread.mean()[None]])
        return spread / spread.mean()


def fit_expression_space(
    counts: sparse.csr_matrix,
    genes: tuple[str, ...],
    symbols: tuple[str, ...],
    *,
    components: int = 32,
    hidden: int = 256,
    epochs: int = 60,
    seed: int = 0,
) -> ExpressionSpace:
    """Fit an expression space to training cells.

    Parameters
    ----------
    counts
        Raw counts of the training cells, ``(n, g)``.
    genes, symbols
        Ids and symbols of the g genes.
    components, hidden, epochs, seed
        Size of the latent and of the decoder, passes over the cells (more where these are few),
        and seed of its fit.

    Raises
    ------
    DataError
        Where there are fewer cells or genes than components.
    """
    n, g = counts.shape
    if min(n, g) <= components:
        raise DataError(
            f"{n} training cells and {g} genes are too few for a latent of {components} "
            "components; set 'components' lower, or give more cells"
        )
    total = np.asarray(counts.sum(axis=1)).ravel()
    if total.min() < 1:
        raise DataError("a training cell has no counts; leave such cells out of the store")
    rich = total[total >= MIN_LIBRARY]
    median = float(np.median(rich if len(rich) else total))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        space = ExpressionSpace(ExpressionConfig(genes, symbols, components, hidden, median))
    scaled = counts.multiply(median / total[:, None]).tocsr()
    scaled.data = np.log1p(scaled.data)
    mean = np.asarray(scaled.mean(axis=0)).ravel()
    covariance = (scaled.T @ scaled).toarray() / n - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    order = np.argsort(values)[::-1][:components]
    vectors = vectors[:, order] * np.sign(vectors[np.abs(vectors[:, order]).argmax(0), order])
    log_total = np.log(total)
    space.mean.copy_(torch.from_numpy(mean))
    space.axes.copy_(torch.from_numpy(vectors.T))
    space.spread.copy_(torch.from_numpy(np.sqrt(np.maximum(values[order], 1e-8))))
    low, high = np.quantile(log_total, [0.001, 0.999])
    spread = max(float(log_total.std()), 1e-3)
    space.library.copy_(torch.tensor([log_total.mean(), spread, low, high]))
    with torch.no_grad():
        overall = np.asarray(counts.sum(axis=0)).ravel() + 0.5
        space.decoder[2].bias.copy_(torch.from_numpy(np.log(overall / overall.sum())))  # type: ignore[operator]
        space.decoder[2].weight.mul_(0.1)  # type: ignore[operator]
    _fit_decoder(space, counts, epochs, seed)
    return space


def _fit_decoder(space: ExpressionSpace, counts: sparse.csr_matrix, epochs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch = min(512, counts.shape[0])
    steps = max(epochs * counts.shape[0] // batch, _MIN_STEPS)
    space.requires_grad_(True)
    groups: list[dict[str, Any]] = [
        {"params": space.decoder.parameters()},
        {"params": [space.log_theta]},
    ]
    optimiser = torch.optim.Adam(groups)
    highest = [4e-3, 4e-2]  # dispersions span decades, out of reach of small steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, highest, total_steps=steps)
    for _ in range(steps):
        loss = decoding_loss(space, counts[rng.integers(counts.shape[0], size=batch)], rng)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            space.log_theta.clamp_(-4.0, 8.0)
    optimiser.zero_grad()
    space.requires_grad_(False)


def decoding_loss(
    space: ExpressionSpace, counts: sparse.csr_matrix, rng: np.random.Generator
) -> Tensor:
    """Return the mean negative log likelihood of cells, from latents of other counts of theirs.

    Part of a cell's counts, drawn at random, is judged by the rates that the latent of the rest
    gives, and scaled up to all. From a latent of the same counts the decoder would learn to
    give their counting noise back, and every draw would have that noise twice.

    Parameters
    ----------
    space
        Whose decoder is judged.
    counts
        Of the cells, ``(n, g)``.
    rng
        Divides the counts.
    """
    seen, held = thin(counts, _HELD_OUT, rng)
    rates, _ = space.decode(space.encode(seen))
    mu = rates * (_HELD_OUT * (seen + held).sum(1, keepdim=True)) + 1e-8
    return -nb_log_likelihood(held, mu, space.theta).sum(1).mean() / _HELD_OUT
