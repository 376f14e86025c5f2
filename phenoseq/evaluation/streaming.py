"""Metrics that are updated by batch and reduced over ranks, as torchmetrics.

Each equals the function of the same name in :mod:`phenoseq.evaluation.metrics` on all cells at
once, however these are cut into batches or divided over ranks. A
:class:`~torchmetrics.Metric` follows its module to its device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from phenoseq.evaluation import pairs

#: Deviation over mean below which float32 cannot tell a gene from a constant.
_NOISE = 1e-6


class _Moments(Metric):
    """First and second moments of true and predicted expression of each gene.

    Means and sums of squares about them are merged pairwise (Chan et al. 1983), which stays exact
    in float32 where raw sums do not.

    Parameters
    ----------
    genes
        Which genes count, bool ``(g,)``.
    """

    full_state_update = False
    genes: Tensor
    moments: Tensor

    def __init__(self, genes: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("genes", genes.bool(), persistent=False)
        self.add_state("moments", torch.zeros(6, int(genes.sum())), dist_reduce_fx=_merge)

    def update(self, predicted: Tensor, true: Tensor) -> None:
        """Add cells; both ``(n, g)``, in log1p at the median library size."""
        both = torch.stack([true, predicted])[..., self.genes].float()
        count = both.new_full((1, both.shape[2]), both.shape[1])
        if not both.shape[1]:
            return
        away = both - both[:, :1]  # a constant is then exactly 0
        centred = away - away.mean(dim=1, keepdim=True)
        squares = centred.square().sum(dim=1)
        cross = centred.prod(dim=0).sum(dim=0)
        fresh = torch.cat([count, both[:, 0] + away.mean(dim=1), squares, cross[None]])
        self.moments = _merge(torch.stack([self.moments, fresh]))

    def _constant(self) -> Tensor:
        """Tell which genes do not vary, true and predicted, ``(2, g)``."""
        n, mean, squares = self.moments[0], self.moments[1:3], self.moments[3:5]
        return squares <= n * (_NOISE * mean).square()


class PccGene(_Moments):
    """Pearson correlation over cells, the median over genes; 0 where either is constant.

    Parameters
    ----------
    genes
        Which genes count, bool ``(g,)``; see :func:`phenoseq.evaluation.report.scored_genes`.
    """

    higher_is_better = True
    is_differentiable = False

    def compute(self) -> Tensor:
        """Return the median over genes."""
        squares, cross = self.moments[3:5], self.moments[5]
        norm = squares[0].sqrt() * squares[1].sqrt()
        constant = self._constant().any(dim=0)
        each = cross / norm.where(~constant, torch.ones_like(norm))
        return middle(torch.where(constant, 0.0, each))


class VarianceRatio(_Moments):
    """Variance of one draw over that of the truth, the median over the genes that vary in truth.

    Parameters
    ----------
    genes
        Which genes count, bool ``(g,)``.
    """

    is_differentiable = False

    def compute(self) -> Tensor:
        """Return the median over genes; NaN where no gene varies."""
        varies = ~self._constant()[0]
        return middle(self.moments[4, varies] / self.moments[3, varies])


class EDistance(Metric):
    """Energy distance between true profiles and one draw of each cell.

    Over a subsample of 10,000 cells that depends on (seed, cell numbers) alone; a cell that was
    given twice, as samplers do to even out ranks, counts once.

    Parameters
    ----------
    genes
        Which genes count, bool ``(g,)``.
    seed
        Of the subsample.

    Attributes
    ----------
    error
        Standard error of the last computed value.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    genes: Tensor
    cells: list[Tensor]
    true: list[Tensor]
    draw: list[Tensor]
    error: float = float("nan")

    def __init__(self, genes: Tensor, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed
        self.register_buffer("genes", genes.bool(), persistent=False)
        for name in ("cells", "true", "draw"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, draw: Tensor, true: Tensor, cells: Tensor) -> None:
        """Add cells: one draw and the truth, ``(n, g)``, and their numbers, int64 ``(n,)``."""
        self.cells.append(cells)
        self.true.append(true[:, self.genes].float())
        self.draw.append(draw[:, self.genes].float())
        if sum(map(len, self.cells)) > 2 * pairs.PAIR_CELLS:
            kept, *profiles = self._kept()
            self.cells, self.true, self.draw = [kept], [profiles[0]], [profiles[1]]

    def compute(self) -> Tensor:
        """Return the distance, and keep its standard error in ``error``."""
        if not len(self.cells):
            return torch.tensor(float("nan"), device=self.device)
        _, true, draw = self._kept()
        value, self.error = pairs.energy_distance(true, draw)
        return torch.tensor(value, device=self.device)

    def _kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the subsample's numbers, truth and draws, in the order of their priority."""
        cells = dim_zero_cat(self.cells).long()  # a rank without cells gives an empty float
        order = pairs.priority(cells, self.seed).argsort(stable=True)
        first = torch.ones_like(order, dtype=torch.bool)
        first[1:] = cells[order][1:] != cells[order][:-1]
        rows = order[first][: pairs.PAIR_CELLS]
        width = int(self.genes.sum())
        true, draw = (dim_zero_cat(x).reshape(-1, width)[rows] for x in (self.true, self.draw))
        return cells[rows], true, draw


def middle(values: Tensor) -> Tensor:
    """Return the median, of an even number the mean of the middle two; NaN of nothing."""
    if not len(values):
        return torch.tensor(float("nan"), device=values.device)
    ranked = values.sort().values
    return (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2


def _merge(parts: Tensor) -> Tensor:
    """Merge moments ``(k, 6, g)``: count, means, sums of squares about them, and of products."""
    out = parts[0]
    for part in parts[1:]:
        n = out[0] + part[0]
        share = part[0] / n.clamp(min=1)
        away = part[1:3] - out[1:3]
        weight = out[0] * share
        out = torch.cat(
            [
                n[None],
                out[1:3] + share * away,
                out[3:5] + part[3:5] + weight * away.square(),
                (out[5] + part[5] + weight * away.prod(dim=0))[None],
            ]
        )
    return out
