"""What a trained model learns about itself: where its contexts lie, how far to trust a gene."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phenoseq.data.datamodule import StreamDataModule
from phenoseq.data.handover import Batch
from phenoseq.evaluation.metrics import pcc_gene
from phenoseq.models.expression import MIN_LIBRARY, ExpressionSpace
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.sample import SamplePhenoSeq

_CELLS, _DRAWS = 8192, 16
#: Samples below which a correlation over them says nothing.
_SAMPLES = 8
#: Added to the covariance of contexts, as a share of its mean variance.
_RIDGE = 1e-2


@torch.inference_mode()
def finalise(
    model: PhenoSeq | SamplePhenoSeq, data: StreamDataModule, seed: int = 0
) -> PhenoSeq | SamplePhenoSeq:
    """Fit the out-of-distribution score and compute the reliability of each gene.

    The score is fitted on training cells or bags. The reliability is the Pearson correlation of
    predicted (mean of 16 draws) and true expression over validation cells, 0 for a constant; of a
    model of samples over the means of validation samples, where there are eight and more.

    Returns
    -------
    The model, in evaluation mode, with both in it.
    """
    model.eval()
    pooled = [model.pooled(_encode(model, b)) for b in data.fixed("train", _CELLS, alone=True)]
    contexts = torch.cat([cells[own] for cells, own in pooled]).double()
    covariance = torch.cov(contexts.T)
    covariance += _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    model.context_mean.copy_(contexts.mean(dim=0))
    whiten = torch.linalg.cholesky(torch.linalg.inv(covariance))
    score = ((contexts - contexts.mean(dim=0)) @ whiten).square().mean().sqrt()
    model.context_whiten.copy_(whiten / score)  # 1 over training cells, whatever the ridge took
    if not isinstance(model.expression, ExpressionSpace):
        return model

    parts = list(zip(*_profiles(model, model.expression, data, seed), strict=True))
    truth, predicted, sample = (np.concatenate(part) for part in parts)
    if isinstance(model, SamplePhenoSeq):
        truth, predicted = (_means(values, sample) for values in (truth, predicted))
        if len(truth) < _SAMPLES:
            return model
    reliability = np.round(pcc_gene(truth, predicted), 4)
    training = replace(model.config.training, reliability=tuple(reliability.tolist()))
    return model.with_record(training)


def _encode(model: PhenoSeq | SamplePhenoSeq, batch: Batch) -> tuple[Tensor, Tensor]:
    if isinstance(model, PhenoSeq):
        return model.encode(batch["images"])
    return model.encode(batch["images" if "images" in batch else "features"], keep=batch["keep"])


def _profiles(
    model: PhenoSeq | SamplePhenoSeq, space: ExpressionSpace, data: StreamDataModule, seed: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]]:
    """Yield true and predicted expression of validation cells, and the sample each is of."""
    generator = torch.Generator().manual_seed(seed)
    median = space.config.median_library
    for batch in data.fixed("val", _CELLS, alone=True):
        counts = batch["counts"]
        latent_dim = space.config.latent_dim
        noise = torch.randn(len(counts), _DRAWS, latent_dim, generator=generator)
        rates = space.decode(model.generate(_encode(model, batch), noise))[0].mean(dim=1)
        rows = batch["rows"]
        sample = batch.get("sample", torch.zeros(len(counts), dtype=torch.long))
        keep = batch.get("keep_rna", torch.ones_like(rows, dtype=torch.bool))
        if counts.ndim == 3:
            each = counts.shape[1]
            rates, sample = (x.repeat_interleave(each, dim=0) for x in (rates, sample))
            counts, keep = counts.flatten(0, 1), keep.flatten()
        keep = keep & (counts.sum(dim=1) >= MIN_LIBRARY)
        counts, rates, sample = counts[keep], rates[keep], sample[keep]
        truth = torch.log1p(counts / counts.sum(dim=1, keepdim=True) * median)
        yield truth.numpy(), torch.log1p(rates * median).numpy(), sample.numpy()


def _means(values: NDArray[np.float32], sample: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.stack([values[sample == one].mean(axis=0) for one in np.unique(sample)])
