"""The parts of a model that follow from its data, fitted on training cells alone."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from phenoseq._version import __version__
from phenoseq.data.datamodule import StreamDataModule
from phenoseq.data.samplestore import SampleManifest
from phenoseq.errors import DataError
from phenoseq.evaluation.report import scored_genes
from phenoseq.models.config import ImageConfig
from phenoseq.models.embedding import EmbeddingSpace, fit_embedding_space
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.expression import ExpressionSpace, fit_expression_space
from phenoseq.models.pretrained import Pretrained, read_pretrained
from phenoseq.models.record import TrainingRecord

#: Training crops, and features, that set statistics of pixels and features.
STATISTICS_CELLS = 4096
#: Most training RNA cells of samples that the space of expression is fitted to.
RNA_CELLS = 1 << 16


def record_of(data: StreamDataModule, seed: int) -> TrainingRecord:
    """Return what a model is trained on."""
    manifest = data.opened.manifest
    source, identity = manifest.source, manifest.identity
    if isinstance(manifest, SampleManifest):
        source = f"{source} + {manifest.rna_source}"
        both = f"{identity} {manifest.rna_identity}"
        identity = hashlib.sha256(both.encode()).hexdigest()
    return TrainingRecord(
        source=source,
        identity=identity,
        split=asdict(data.split),
        split_digest=data.parts.digest,
        n_cells=data.n_cells("train"),
        seed=seed,
        version=__version__,
    )


def image_of(data: StreamDataModule) -> ImageConfig:
    """Return stains and scale of the crops, with statistics of training pixels."""
    manifest = data.opened.manifest
    assert manifest.pixel_size is not None
    assert manifest.crop_px is not None
    pixels = data.image_sample("train", STATISTICS_CELLS).astype(np.float32)
    return ImageConfig(
        channels=manifest.channels,
        pixel_size=manifest.pixel_size,
        crop_px=manifest.crop_px,
        dtype=manifest.dtype,
        mean=tuple(pixels.mean(axis=(0, 2, 3)).tolist()),
        std=tuple(np.maximum(pixels.std(axis=(0, 2, 3)), 1e-6).tolist()),
        p999=tuple(np.quantile(pixels, 0.999, axis=(0, 2, 3)).tolist()),
    )


def pretrained_for(
    data: StreamDataModule, encoder: EncoderConfig, weights: str | None
) -> Pretrained | None:
    """Return what the encoder of the store's crops starts from; None where no weights are asked.

    Raises
    ------
    DataError
        Where the store holds features.
    ModelError
        See :func:`~phenoseq.models.pretrained.read_pretrained`.
    """
    if weights is None:
        return None
    crop_px = data.opened.manifest.crop_px
    if crop_px is None:
        raise DataError(
            f"{data.store}: holds features, of which no backbone could start from pretrained "
            "weights: leave out 'encoder_weights'"
        )
    return read_pretrained(encoder, crop_px, weights)


def space_of(
    data: StreamDataModule, *, components: int, hidden: int, seed: int
) -> tuple[ExpressionSpace | EmbeddingSpace, Tensor]:
    """Fit the space of the store's genes or embeddings.

    Returns
    -------
    The space, and which genes or dimensions are scored, bool ``(g,)``.

    Raises
    ------
    DataError
        Where the store holds genes that are no counts.
    """
    manifest = data.opened.manifest
    if not isinstance(manifest, SampleManifest):
        counts = data.rna_sample("train", data.n_cells("train"))
    elif manifest.rna == "embedding":
        return embedding_of(data)
    elif manifest.rna == "expression":
        raise DataError(
            f"{data.store}: holds genes that are no counts; prepare it with raw counts (--layer "
            "counts), or with an embedding (--embedding NAME)"
        )
    else:
        counts = data.rna_sample("train", RNA_CELLS)
    assert sparse.issparse(counts)
    space = fit_expression_space(
        counts,
        manifest.genes,
        manifest.symbols,
        components=components,
        hidden=hidden,
        seed=seed,
    )
    return space, torch.from_numpy(scored_genes(counts))


def embedding_of(data: StreamDataModule) -> tuple[EmbeddingSpace, Tensor]:
    """Fit the space of the store's embeddings; see :func:`space_of`."""
    manifest = data.opened.manifest
    assert isinstance(manifest, SampleManifest)
    assert manifest.embedding is not None
    found = data.rna_sample("train", RNA_CELLS)
    space = fit_embedding_space(manifest.embedding, np.asarray(found))
    return space, torch.ones(space.config.width, dtype=torch.bool)
