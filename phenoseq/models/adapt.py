"""Fits a trained model to other data: another gene panel, other stains, another crop.

The new model starts from all that the base model knows and that still has a meaning. Nothing in the
base model is changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
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
from phenoseq.models.denoiser import Denoiser
from phenoseq.models.embedding import EmbeddingSpace, standardise
from phenoseq.models.encoder import Encoder
from phenoseq.models.expression import ExpressionSpace, fit_expression_space
from phenoseq.models.givenfeatures import FeatureEncoder, GivenFeatures
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.record import TrainingRecord
from phenoseq.models.sample import SamplePhenoSeq
from phenoseq.models.transfer import components_for, keep_space, turn_between

#: The expression space is kept where the shared genes carry this share of the latent's variance.
KEEP_SPACE = 0.9
#: Pixel sizes closer than this are taken for the same.
_SAME_SIZE = 0.01


@dataclass(frozen=True)
class Overlap:
    """Names in the base model and the new data, in the data alone, and in the base alone."""

    shared: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class GenesKept:
    """What of a base model's genes and expression space was kept.

    Attributes
    ----------
    genes
        By symbol.
    by_symbol
        Shared genes that match by symbol alone.
    captured
        Share of the variance of the base model's latent that the shared genes carry.
    space_kept
        Whether the expression space is the base model's; else a new one was fitted.
    """

    genes: Overlap
    by_symbol: int
    captured: float
    space_kept: bool

    def __str__(self) -> str:
        """Tell it, a line for genes and for the space."""
        space = (
            f"kept: the shared genes carry {self.captured:.0%} of its variance"
            if self.space_kept
            else f"fitted anew: the shared genes carry {self.captured:.0%} of the old one's "
            f"variance, below {KEEP_SPACE:.0%}"
        )
        return (
            f"genes: {_told(self.genes)}; {self.by_symbol} of the shared by symbol alone\n"
            f"expression space: {space}"
        )


@dataclass(frozen=True)
class CropsKept:
    """What of a base model's stains was kept, and how its crops differ from the new ones.

    Attributes
    ----------
    stains
        By name.
    pixel_size, crop_px
        Of the base model and of the new data.
    pixels_kept
        Whether the pixels of shared stains are scaled as by the base model; else by the new cells.
    """

    stains: Overlap
    pixel_size: tuple[float, float]
    crop_px: tuple[int, int]
    pixels_kept: bool = False

    @property
    def rescaled(self) -> bool:
        """Whether the pixels of the new data are of another size."""
        old, new = self.pixel_size
        return abs(math.log(new / old)) > _SAME_SIZE

    def __str__(self) -> str:
        """Tell it, a line for stains, one for pixels, and one for crops that are not alike."""
        text = f"stains: {_told(self.stains)}\npixels: scaled "
        text += "as by the base model" if self.pixels_kept else "by your cells"
        if self.rescaled or self.crop_px[0] != self.crop_px[1]:
            old, new = (
                f"{px} px at {um} um" for px, um in zip(self.crop_px, self.pixel_size, strict=True)
            )
            text += f"\ncrops: {new}, the base model's were {old}"
        return text


@dataclass(frozen=True)
class Adaptation:
    """What of a base model was kept.

    Attributes
    ----------
    expression
        Of the genes; None of an embedding, whose space stays as it is.
    cells
        Of the crops; None of features, which are read as they were.
    """

    expression: GenesKept | None
    cells: CropsKept | None

    def __str__(self) -> str:
        """Tell it, line by line."""
        expression = self.expression or "embedding: as the base model's"
        return f"{expression}\n{self.cells or 'features: as many a cell as the base model reads'}"


def adapt(
    base: PhenoSeq | SamplePhenoSeq,
    cells: ImageConfig | NDArray[np.float32],
    counts: sparse.csr_matrix | None,
    genes: Sequence[str],
    symbols: Sequence[str],
    training: TrainingRecord,
    *,
    seed: int = 0,
) -> tuple[PhenoSeq | SamplePhenoSeq, Adaptation]:
    """Make a new model for other data from a trained one, to be trained on.

    Genes are matched by Ensembl id, then by symbol. Where the shared ones carry at least 90% of the
    variance of the latent, the **expression space is kept**: its axes, and the decoder's rows of
    shared genes; the rows of new genes, and a shift of every gene's rate and dispersion, are fitted
    to the new cells by their likelihood, the shift under a normal prior around the base model's.
    Else a **space is fitted anew**, and the denoiser's projections in and out of the latent are
    turned, by orthogonal Procrustes (Schoenemann 1966) on the loadings of the shared genes, so that
    its directions mean what they meant as far as these tell. A rotation leaves the noise of the
    diffusion as it is. The space of an embedding stays as it is, for the same embedding.

    A shared stain keeps its channel of the stem (``joint``) and its embedding; a new stain starts
    from the mean over the base model's. Positions of tokens are interpolated where the crop has
    another size. Features are standardised by the new cells.

    Parameters
    ----------
    base
        The trained model, which is left as it is.
    cells
        Crops of the new data; or features of its training cells, ``(n, width)``.
    counts, genes, symbols
        Raw counts of the new training cells, ``(n, g)``, and their genes; None, and none, where the
        base model predicts an embedding.
    training
        Record of the training to come.
    seed
        Of the fit of the expression space.

    Returns
    -------
    The new model, of the base model's class, and what was kept.

    Raises
    ------
    ModelError
        Where the backbone cannot read crops of that size with the weights that it has, or features
        are not as many as the base model reads.
    DataError
        Where cells or genes are too few for an expression space.
    """
    space, turn, of_genes = _take_space(base, counts, _table(genes, symbols), seed)
    changed: dict[str, Any] = {
        "expression": space.config,
        "training": training,
        "recalibration": None,  # which is of the base model's errors
    }
    model: PhenoSeq | SamplePhenoSeq
    if isinstance(base, PhenoSeq):
        assert isinstance(space, ExpressionSpace)
        assert isinstance(cells, ImageConfig)
        model = PhenoSeq(replace(base.config, image=cells, **changed), space)
    else:
        read = cells if isinstance(cells, ImageConfig) else base.config.cells
        model = SamplePhenoSeq(replace(base.config, cells=read, **changed), space)
    _take_denoiser(model.denoiser, base.denoiser, turn)
    if base.config.diffusion.centred:
        _take_mean(model.mean_head, base.mean_head, turn)
    model.context_mean.copy_(base.context_mean)
    model.context_whiten.copy_(base.context_whiten)
    if not isinstance(cells, ImageConfig):
        _take_features(model, base, cells)
        return model, Adaptation(of_genes, None)
    old = base.config.image if isinstance(base, PhenoSeq) else base.config.cells
    assert isinstance(old, ImageConfig)
    assert isinstance(model.encoder, Encoder)
    assert isinstance(base.encoder, Encoder)
    _take_encoder(model.encoder, base.encoder, old.channels, cells)
    stains = Overlap(
        shared=tuple(c for c in cells.channels if c in old.channels),
        new=tuple(c for c in cells.channels if c not in old.channels),
        dropped=tuple(c for c in old.channels if c not in cells.channels),
    )
    crops = CropsKept(stains, (old.pixel_size, cells.pixel_size), (old.crop_px, cells.crop_px))
    return model, Adaptation(of_genes, crops)


# --------------------------------------------------------------------------------------- expression


def _take_space(
    base: PhenoSeq | SamplePhenoSeq, counts: sparse.csr_matrix | None, new: pd.DataFrame, seed: int
) -> tuple[ExpressionSpace | EmbeddingSpace, Tensor, GenesKept | None]:
    """Return the space of the new model, the turn of its latent, and what of its genes was kept.

    The turn is the map from the new latent to the old one, ``(D_old, D_new)``.
    """
    space = base.expression
    if isinstance(space, EmbeddingSpace):
        return deepcopy(space), torch.eye(space.config.latent_dim), None
    assert counts is not None
    old = space.config
    have, want = _shared_genes(_table(old.genes, old.symbols), new)
    variance = (space.axes[:, have].square().sum(1) * space.spread**2).sum()
    captured = float(variance / (space.spread**2).sum())
    kept = captured >= KEEP_SPACE
    if kept:
        fitted = keep_space(space, counts, new, have, want, seed)
        turn = torch.eye(old.components)
    else:
        fitted = fit_expression_space(
            counts,
            tuple(new.index),
            tuple(new["symbol"]),
            components=components_for(old.components, *counts.shape),
            hidden=old.hidden,
            seed=seed,
        )
        turn = turn_between(space, fitted, have, want)
    renamed = new.index[want] != pd.Index(old.genes)[have]
    of_genes = GenesKept(
        genes=_overlap(new["symbol"], old.symbols, want, have),
        by_symbol=int(renamed.sum()),
        captured=captured,
        space_kept=kept,
    )
    library = torch.ones(1, 1)  # last in the latent, which stays
    return fitted, torch.block_diag(turn, library), of_genes  # type: ignore[no-untyped-call]


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


# ----------------------------------------------------------------------------- denoiser and encoder


@torch.no_grad()
def _take_denoiser(new: Denoiser, old: Denoiser, turn: Tensor) -> None:
    """Take over a denoiser, its latent turned."""
    tensors = dict(old.state_dict())
    tensors["inward.weight"] = tensors["inward.weight"] @ turn
    tensors["outward.weight"] = turn.T @ tensors["outward.weight"]
    tensors["outward.bias"] = turn.T @ tensors["outward.bias"]
    new.load_state_dict(tensors)


@torch.no_grad()
def _take_mean(new: nn.Sequential, old: nn.Sequential, turn: Tensor) -> None:
    """Take over the regression of the mean, its latent turned."""
    tensors = dict(old.state_dict())
    for name in ("2.weight", "2.bias"):
        tensors[name] = turn.T @ tensors[name]
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


@torch.no_grad()
def _take_features(
    new: PhenoSeq | SamplePhenoSeq, old: PhenoSeq | SamplePhenoSeq, features: NDArray[np.float32]
) -> None:
    """Take over an encoder of features, which the new ones standardise."""
    assert isinstance(old, SamplePhenoSeq)
    assert isinstance(old.config.cells, GivenFeatures)
    assert isinstance(new.encoder, FeatureEncoder)
    width = old.config.cells.width
    if features.shape[1] != width:
        raise ModelError(
            f"the store holds {features.shape[1]} features a cell, and the model reads {width}: "
            f"give it features made alike, by {old.config.cells.extractor} of "
            f"{list(old.config.cells.channels) or 'the whole cell'}"
        )
    new.encoder.load_state_dict(old.encoder.state_dict())
    mean, std = standardise(features)
    new.encoder.mean.copy_(mean)
    new.encoder.std.copy_(std)


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
