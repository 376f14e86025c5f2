"""Takes an expression space over to other genes: kept and refitted, or as a turn of its latent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from phenoseq.models.expression import ExpressionSpace, decoding_loss

#: Deviation, in log units, by which a shared gene's rate and dispersion are expected to move.
_SHIFT = 0.5
#: Steps in which the decoder of a kept space is refitted, and the cells in each.
_STEPS, _BATCH = 300, 512


def components_for(most: int, cells: int, genes: int) -> int:
    """Return the size of a latent: that of the base, or less where cells or genes are few.

    Beyond half the genes, or a tenth of the cells, components are noise of single genes or cells.
    """
    return max(min(most, genes // 2, cells // 10), 1)


def keep_space(
    space: ExpressionSpace,
    counts: sparse.csr_matrix,
    genes: pd.DataFrame,
    have: NDArray[np.int64],
    want: NDArray[np.int64],
    seed: int,
) -> ExpressionSpace:
    """Take over a space for another panel that holds most of its genes."""
    total = np.asarray(counts.sum(axis=1)).ravel()
    # Counts are scaled so that those of a usual cell at the shared genes stay what they were.
    usual = space.decode(torch.zeros(space.config.latent_dim))[0][have].sum()
    share = float(usual) / float(counts[:, want].sum() / total.sum())
    config = replace(
        space.config,
        genes=tuple(genes.index),
        symbols=tuple(genes["symbol"]),
        median_library=space.config.median_library * share,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = ExpressionSpace(config)
    scaled = counts.multiply(config.median_library / total[:, None]).tocsr()
    scaled.data = np.log1p(scaled.data)
    logs = np.log(total)
    low, high = np.quantile(logs, [0.001, 0.999])
    rate = np.asarray(counts.sum(axis=0)).ravel() + 0.5
    log_rate = torch.from_numpy(np.log(rate / rate.sum())).float()
    last, old = _last(out), _last(space)
    out.spread.copy_(space.spread)
    out.library.copy_(torch.tensor([logs.mean(), max(float(logs.std()), 1e-3), low, high]))
    out.mean.copy_(torch.from_numpy(np.asarray(scaled.mean(axis=0)).ravel()))
    out.mean[want] = space.mean[have]
    out.axes[:, want] = space.axes[:, have]
    with torch.no_grad():
        out.decoder[0].load_state_dict(space.decoder[0].state_dict())
        # A new gene starts at its mean rate, on the scale of the shared genes' logits.
        last.weight.zero_()
        last.bias.copy_(log_rate + (old.bias[have] - log_rate[want]).mean())
        last.weight[want] = old.weight[have]
        last.bias[want] = old.bias[have]
        out.log_theta[want] = space.log_theta[have]
    fresh = torch.ones(len(genes), dtype=torch.bool)
    fresh[want] = False
    _refit_decoder(out, counts, fresh, seed)
    return out


def _refit_decoder(
    space: ExpressionSpace, counts: sparse.csr_matrix, fresh: Tensor, seed: int
) -> None:
    """Fit rates and dispersions of a kept decoder to new cells, under a prior around what it knows.

    All genes get a shift of log rate and log dispersion, that of a shared gene with a normal prior;
    a fresh gene gets weights too, with a prior as wide as the weights of the others are.
    """
    rng = np.random.default_rng(seed)
    last = _last(space)
    weights, bias, log_theta = last.weight, last.bias, space.log_theta
    width = weights[~fresh].std()
    start = torch.cat([bias, log_theta]).clone()
    known = torch.cat([~fresh, ~fresh])
    n = counts.shape[0]
    batch = min(_BATCH, n)
    for tensor in (bias, log_theta, weights):
        tensor.requires_grad_(True)
    groups: list[dict[str, Any]] = [
        {"params": [bias, log_theta], "lr": 2e-2},
        {"params": [weights], "lr": 4e-3},
    ]
    optimiser = torch.optim.Adam(groups)
    for _ in range(_STEPS):
        loss = decoding_loss(space, counts[rng.integers(n, size=batch)], rng)
        shift = torch.cat([bias, log_theta]) - start
        prior = (
            (shift / _SHIFT)[known].square().sum() + (weights[fresh] / width).square().sum()
        ) / 2
        optimiser.zero_grad()
        (prior / n + loss).backward()  # type: ignore[no-untyped-call]
        assert weights.grad is not None
        weights.grad[~fresh] = 0
        optimiser.step()
        with torch.no_grad():
            log_theta.clamp_(-4.0, 8.0)
    space.requires_grad_(False)


def _last(space: ExpressionSpace) -> nn.Linear:
    layer = space.decoder[2]
    assert isinstance(layer, nn.Linear)
    return layer


def turn_between(
    old: ExpressionSpace, new: ExpressionSpace, have: NDArray[np.int64], want: NDArray[np.int64]
) -> Tensor:
    """Return the map with orthonormal columns from a new latent to the old one, ``(k_old, k_new)``.

    Of all such maps the one under which the loadings of the shared genes agree best.
    """
    before = old.axes[:, have] * old.spread[:, None]
    after = new.axes[:, want] * new.spread[:, None]
    left, _, right = torch.linalg.svd(before @ after.T, full_matrices=False)
    turn: Tensor = left @ right
    return turn
