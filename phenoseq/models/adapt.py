"""Fits a trained model to other data: another gene panel, other stains, another crop.

The new model starts from all that the base model knows and that still has a meaning. Nothing in the
base model is changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from phenoseq.errors import DataError, ModelError
from phenoseq.genes import match_genes
from phenoseq.models.config import ImageConfig
from phenoseq.models.counts import nb_log_likelihood
from phenoseq.models.denoiser import Denoiser
from phenoseq.models.encoder import Encoder
from phenoseq.models.expression import ExpressionSpace, fit_expression_space
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.record import TrainingRecord

#: The expression space is kept where the shared genes carry this share of the latent's variance.
KEEP_SPACE = 0.9
#: Deviation, in log units, by which a shared gene's rate and dispersion are expected to move.
_SHIFT = 0.5
#: Steps in which the decoder of a kept space is refitted, and the cells in each.
_STEPS, _BATCH = 300, 512
#: Pixel sizes closer than this are taken for the same.
_SAME_SIZE = 0.01


@dataclass(frozen=True)
class Overlap:
    """Names in the base model and the new data, in the data alone, and in the base alone."""

    shared: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class Adaptation:
    """What of a base model was kept.

    Attributes
    ----------
    genes, stains
        Genes (by symbol) and stains.
    by_symbol
        Shared genes that match by symbol alone.
    captured
        Share of the variance of the base model's latent that the shared genes carry.
    space_kept
        Whether the expression space is the base model's; else a new one was fitted.
    pixel_size, crop_px
        Of the base model and of the new data.
    """

    genes: Overlap
    stains: Overlap
    by_symbol: int
    captured: float
    space_kept: bool
    pixel_size: tuple[float, float]
    crop_px: tuple[int, int]

    @property
    def rescaled(self) -> bool:
        """Whether the pixels of the new data are of another size."""
        old, new = self.pixel_size
        return abs(math.log(new / old)) > _SAME_SIZE

    def __str__(self) -> str:
        """Tell what was kept, a line for genes, expression space, stains and crops each."""
        space = (
            f"kept: the shared genes carry {self.captured:.0%} of its variance"
            if self.space_kept
            else f"fitted anew: the shared genes carry {self.captured:.0%} of the old one's "
            f"variance, below {KEEP_SPACE:.0%}"
        )
        lines = [
            f"genes: {_told(self.genes)}; {self.by_symbol} of the shared by symbol alone",
            f"expression space: {space}",
            f"stains: {_told(self.stains)}",
        ]
        if self.rescaled or self.crop_px[0] != self.crop_px[1]:
            old, new = (
                f"{px} px at {um} um" for px, um in zip(self.crop_px, self.pixel_size, strict=True)
            )
            lines.append(f"crops: {new}, the base model's were {old}")
        return "\n".join(lines)


def adapt(
    base: PhenoSeq,
    image: ImageConfig,
    counts: sparse.csr_matrix,
    genes: Sequence[str],
    symbols: Sequence[str],
    training: TrainingRecord,
    *,
    seed: int = 0,
) -> tuple[PhenoSeq, Adaptation]:
    """Make a new model for other data from a trained one, to be trained on.

    Genes are matched by Ensembl id, then by symbol. Where the shared ones carry at least 90% of the
    variance of the latent, the **expression space is kept**: its axes, and the decoder's rows of
    shared genes; the rows of new genes, and a shift of every gene's rate and dispersion, are fitted
    to the new cells by their likelihood, the shift under a normal prior around the base model's.
    Else a **space is fitted anew**, and the denoiser's projections in and out of the latent are
    turned, by orthogonal Procrustes (Schoenemann 1966) on the loadings of the shared genes, so that
    its directions mean what they meant as far as these tell. A rotation leaves the noise of the
    diffusion as it is.

    A shared stain keeps its channel of the stem (``joint``) and its embedding; a new stain starts
    from the mean over the base model's. Positions of tokens are interpolated where the crop has
    another size.

    Parameters
    ----------
    base
        The trained model, which is left as it is.
    image
        Crops of the new data.
    counts, genes, symbols
        Raw counts of the new training cells, ``(n, g)``, and their genes.
    training
        Record of the training to come.
    seed
        Of the fit of the expression space.

    Returns
    -------
    The new model, and what was kept.

    Raises
    ------
    ModelError
        Where the backbone cannot read crops of that size with the weights that it has.
    DataError
        Where cells or genes are too few for an expression space.
    """
    old, new = base.config.expression, _table(genes, symbols)
    have, want = _shared_genes(_table(old.genes, old.symbols), new)
    space = base.expression
    variance = (space.axes[:, have].square().sum(1) * space.spread**2).sum()
    captured = float(variance / (space.spread**2).sum())
    kept = captured >= KEEP_SPACE
    if kept:
        fitted = _keep_space(space, counts, new, have, want, seed)
        turn = torch.eye(old.components)
    else:
        fitted = fit_expression_space(
            counts,
            tuple(new.index),
            tuple(new["symbol"]),
            components=_components(old.components, *counts.shape),
            hidden=old.hidden,
            seed=seed,
        )
        turn = _turn(space, fitted, have, want)
    config = replace(base.config, image=image, expression=fitted.config, training=training)
    model = PhenoSeq(config, fitted)
    _take_denoiser(model.denoiser, base.denoiser, turn)
    stains = base.config.image.channels
    _take_encoder(model.encoder, base.encoder, stains, image)
    model.context_mean.copy_(base.context_mean)
    model.context_whiten.copy_(base.context_whiten)
    renamed = new.index[want] != pd.Index(old.genes)[have]
    return model, Adaptation(
        genes=_overlap(new["symbol"], old.symbols, want, have),
        stains=Overlap(
            shared=tuple(c for c in image.channels if c in stains),
            new=tuple(c for c in image.channels if c not in stains),
            dropped=tuple(c for c in stains if c not in image.channels),
        ),
        by_symbol=int(renamed.sum()),
        captured=captured,
        space_kept=kept,
        pixel_size=(base.config.image.pixel_size, image.pixel_size),
        crop_px=(base.config.image.crop_px, image.crop_px),
    )


# --------------------------------------------------------------------------------------- expression


def _table(genes: Sequence[str], symbols: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame({"symbol": list(symbols)}, index=pd.Index(list(genes), name="gene_id"))


def _shared_genes(
    have: pd.DataFrame, want: pd.DataFrame
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of the shared genes in both tables, none where none is shared."""
    try:
        match = match_genes(have, want, "the base model", min_share=0.0)
    except DataError:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    return match.have, match.want


def _components(most: int, cells: int, genes: int) -> int:
    """Return the size of a latent: that of the base, or less where cells or genes are few.

    Beyond half the genes, or a tenth of the cells, components are noise of single genes or cells.
    """
    return max(min(most, genes // 2, cells // 10), 1)


def _keep_space(
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
    generator = torch.Generator().manual_seed(seed)
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
        rows = torch.randint(n, (batch,), generator=generator).numpy()
        some = torch.from_numpy(counts[rows].toarray()).float()
        rates, _ = space.decode(space.encode(some))
        mu = rates * some.sum(1, keepdim=True) + 1e-8
        likelihood = nb_log_likelihood(some, mu, space.theta).sum(1).mean()
        shift = torch.cat([bias, log_theta]) - start
        prior = (
            (shift / _SHIFT)[known].square().sum() + (weights[fresh] / width).square().sum()
        ) / 2
        optimiser.zero_grad()
        (prior / n - likelihood).backward()  # type: ignore[no-untyped-call]
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


def _turn(
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


# ----------------------------------------------------------------------------- denoiser and encoder


@torch.no_grad()
def _take_denoiser(new: Denoiser, old: Denoiser, turn: Tensor) -> None:
    """Take over a denoiser, its latent turned; the library size, last in the latent, stays."""
    whole = torch.block_diag(turn, torch.ones(1, 1))  # type: ignore[no-untyped-call]
    tensors = dict(old.state_dict())
    tensors["inward.weight"] = tensors["inward.weight"] @ whole
    tensors["outward.weight"] = whole.T @ tensors["outward.weight"]
    tensors["outward.bias"] = whole.T @ tensors["outward.bias"]
    new.load_state_dict(tensors)


@torch.no_grad()
def _take_encoder(new: Encoder, old: Encoder, stains: tuple[str, ...], image: ImageConfig) -> None:
    """Take over an encoder of the ``stains`` for those of ``image``."""
    places = [stains.index(name) if name in stains else None for name in image.channels]

    def by_stain(tensor: Tensor, dim: int) -> Tensor:
        mean = tensor.mean(dim, keepdim=True)
        parts = [mean if at is None else tensor.narrow(dim, at, 1) for at in places]
        return torch.cat(parts, dim)

    tensors = dict(old.state_dict())
    tensors["stain"] = by_stain(tensors["stain"], 0)
    if not old.separate and image.channels != stains:
        stem = f"backbone.{stem_name(old)}.weight"
        tensors[stem] = by_stain(tensors[stem], 1)
    tensors["position"] = _resize(tensors["position"], len(new.position))
    for name, tensor in new.state_dict().items():
        if tensors[name].shape != tensor.shape:
            raise ModelError(
                f"the backbone {old.config.backbone} has weights for crops of another size than "
                f"{image.crop_px} px ({name}); prepare the store with --crop-px of the base model"
            )
    new.load_state_dict(tensors)


def stem_name(encoder: Encoder) -> str:
    """Return the name in the backbone of the layer that the stains enter.

    Raises
    ------
    ModelError
        Where timm does not know.
    """
    facts = timm.get_pretrained_cfg(encoder.config.backbone)
    if facts is None or not isinstance(facts.first_conv, str):
        raise ModelError(
            f"{encoder.config.backbone}: timm does not say where its channels enter, so that other "
            "stains cannot; fine-tune on the stains of the model"
        )
    return facts.first_conv


def _resize(positions: Tensor, n: int) -> Tensor:
    """Interpolate positions of a square grid of tokens ``(n_old, dim)`` to one of ``n`` tokens."""
    side, wanted = math.isqrt(len(positions)), math.isqrt(n)
    if len(positions) == n or side**2 != len(positions) or wanted**2 != n:
        return positions
    grid = rearrange(positions, "(h w) d -> 1 d h w", h=side)
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bilinear", align_corners=False)
    return rearrange(grid, "1 d h w -> (h w) d")


# --------------------------------------------------------------------------------------- the report


def _overlap(
    new: pd.Series, old: Sequence[str], want: NDArray[np.int64], have: NDArray[np.int64]
) -> Overlap:
    return Overlap(
        shared=tuple(new.iloc[want]),
        new=tuple(np.delete(new.to_numpy(), want)),
        dropped=tuple(np.delete(np.array(old), have).tolist()),
    )


def _told(overlap: Overlap) -> str:
    parts = []
    for kind in ("shared", "new", "dropped"):
        names = getattr(overlap, kind)
        some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        parts.append(f"{len(names)} {kind}" + (f" ({some})" if names else ""))
    return ", ".join(parts)
