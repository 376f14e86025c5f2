"""What a trained model learns about itself: where its contexts lie, how far to trust a gene."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phenoseq.data.datamodule import StoreDataModule
from phenoseq.evaluation.metrics import pcc_gene
from phenoseq.models.expression import MIN_LIBRARY
from phenoseq.models.phenoseq import PhenoSeq, pool

_CELLS, _BATCH, _DRAWS = 8192, 256, 16
#: Added to the covariance of contexts, as a share of its mean variance.
_RIDGE = 1e-2


@torch.inference_mode()
def finalise(model: PhenoSeq, data: StoreDataModule, seed: int = 0) -> PhenoSeq:
    """Fit the out-of-distribution score and compute the reliability of each gene.

    The score is fitted on training cells; the reliability is the Pearson correlation of predicted
    (mean of 16 draws) and true expression over validation cells, 0 for a constant.

    Returns
    -------
    The model, in evaluation mode, with both in it.
    """
    model.eval()
    pooled = [pool(*model.encode(x)) for x in _batches(model, data, data.some("train", _CELLS))]
    contexts = torch.cat(pooled).double()
    covariance = torch.cov(contexts.T)
    covariance += _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    model.context_mean.copy_(contexts.mean(dim=0))
    whiten = torch.linalg.cholesky(torch.linalg.inv(covariance))
    score = ((contexts - contexts.mean(dim=0)) @ whiten).square().mean().sqrt()
    model.context_whiten.copy_(whiten / score)  # 1 over training cells, whatever the ridge took

    rows = data.some("val", _CELLS)
    counts = data.opened.counts(rows).toarray()
    rich = counts.sum(axis=1) >= MIN_LIBRARY
    generator = torch.Generator().manual_seed(seed)
    rates = []
    for images in _batches(model, data, rows):
        shape = (len(images), _DRAWS, model.config.expression.latent_dim)
        latent = model.generate(model.encode(images), torch.randn(shape, generator=generator))
        rates.append(model.expression.decode(latent)[0].mean(dim=1))
    median = model.config.expression.median_library
    predicted = torch.log1p(torch.cat(rates) * median).numpy()[rich]
    total = counts[rich].sum(axis=1, keepdims=True)
    reliability = pcc_gene(np.log1p(counts[rich] / total * median), predicted)
    training = replace(model.config.training, reliability=tuple(np.round(reliability, 4).tolist()))
    return model.with_record(training)


def _batches(model: PhenoSeq, data: StoreDataModule, rows: NDArray[np.int64]) -> list[Tensor]:
    device = model.image_mean.device
    images = data.opened.take(rows)
    return [
        torch.from_numpy(images[i : i + _BATCH].astype(np.float32)).to(device)
        for i in range(0, len(rows), _BATCH)
    ]
