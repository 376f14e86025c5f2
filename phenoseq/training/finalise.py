"""What a trained model learns about itself: its contexts, its calibration, its trust in a gene."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phenoseq.data.datamodule import StreamDataModule
from phenoseq.data.handover import Batch
from phenoseq.evaluation.grouped import Moments, by_group, resamples
from phenoseq.models.appearance import Appearance
from phenoseq.models.counts import nb_cdf, nb_quantile
from phenoseq.models.expression import MIN_LIBRARY, ExpressionSpace
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.recalibration import LEAST, Recalibration, fit_recalibration
from phenoseq.models.record import TrainingRecord
from phenoseq.models.sample import SamplePhenoSeq

#: Counts, mean and drawn latents, and group of some cells; see :func:`_drawn`.
Drawn = tuple[Tensor, Tensor, Tensor, Tensor]

_CELLS, _DRAWS = 8192, 16
#: Calibration cells, and draws of each, by which a model is recalibrated.
_CALIBRATION_CELLS, _CALIBRATION_DRAWS = 4096, 32
#: Rounds in which the levels of genes are fitted.
_LEVEL_STEPS = 3
#: Samples below which a correlation over them says nothing.
_SAMPLES = 8
#: Added to the covariance of contexts, as a share of its mean variance.
_RIDGE = 1e-2


@torch.inference_mode()
def finalise(
    model: PhenoSeq | SamplePhenoSeq, data: StreamDataModule, seed: int = 0
) -> PhenoSeq | SamplePhenoSeq:
    """Fit the out-of-distribution score and recalibration; compute the reliability of each gene.

    The score, and the level of each gene (:func:`fit_levels`), are fitted on training cells or
    bags. The reliability is the Pearson correlation of predicted and true expression over
    validation cells, 0 for a constant, with its interval by resampling their groups; of a model of
    samples over the means of validation samples, where there are eight and more. For the
    recalibration see :func:`recalibration_of`. All is computed where the model is.

    Returns
    -------
    The model, in evaluation mode, with all of it in it.
    """
    model.eval()
    fit_strangeness(model, data)
    if not isinstance(model.expression, ExpressionSpace):
        return model

    space = model.expression
    drawn = list(_drawn(model, data, "train", 2 * _CELLS, _DRAWS, seed))
    fit_levels(space, drawn, None, seed)
    recalibration = recalibration_of(model, space, data, seed)
    model.config = replace(model.config, recalibration=recalibration)
    if recalibration is not None:
        fit_levels(space, drawn, recalibration, seed)
    return model.with_record(with_reliability(model, space, data, seed))


@torch.inference_mode()
def with_reliability(
    model: PhenoSeq | SamplePhenoSeq, space: ExpressionSpace, data: StreamDataModule, seed: int = 0
) -> TrainingRecord:
    """Return the record of a model of genes with how far to trust each; see :func:`finalise`."""
    record = model.config.training
    profiles = _profiles(model, space, data, seed)
    truth, predicted, group = (np.concatenate(part) for part in zip(*profiles, strict=True))
    names, group = np.unique(group, return_inverse=True)
    if isinstance(model, SamplePhenoSeq):
        if len(names) < _SAMPLES:
            return record
        size = np.bincount(group)[:, None]
        truth, predicted = (by_group(x, group, len(names)) / size for x in (truth, predicted))
        group = np.arange(len(names))
    moments = Moments(len(names), truth.shape[1])
    moments.add(truth, predicted, group)
    each = moments.by_gene(np.ones((1, len(names))))[0]
    ends = np.zeros((0, 2))
    if len(names) > 1:
        again = moments.by_gene(resamples(len(names), seed=seed))
        ends = np.quantile(again, [0.025, 0.975], axis=0).T
    return replace(
        record,
        reliability=tuple(each.round(4).tolist()),
        reliability_interval=tuple(map(tuple, ends.round(4).tolist())),
    )


@torch.inference_mode()
def fit_strangeness(model: PhenoSeq | SamplePhenoSeq, data: StreamDataModule) -> None:
    """Let a model know where contexts and pixel statistics of up to 8192 training cells lie."""
    pooled, pixels = [], []
    for batch in data.fixed("train", _CELLS, alone=True):
        batch = _placed(model, batch)
        cells, own = model.pooled(_encode(model, batch))
        pooled.append(cells[own].cpu())
        if "images" in batch:
            pixels.append(model.pixels(batch["images"])[own.flatten()].cpu())
    if pixels:
        model.with_image(appearance=Appearance.fit(torch.cat(pixels)))
    contexts = torch.cat(pooled).double()
    covariance = torch.cov(contexts.T)
    covariance += _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    model.context_mean.copy_(contexts.mean(dim=0))
    whiten = torch.linalg.cholesky(torch.linalg.inv(covariance))
    score = ((contexts - contexts.mean(dim=0)) @ whiten).square().mean().sqrt()
    model.context_whiten.copy_(whiten / score)  # 1 over training cells, whatever the ridge took


@torch.inference_mode()
def fit_levels(
    space: ExpressionSpace, drawn: list[Drawn], recalibration: Recalibration | None, seed: int = 0
) -> None:
    """Shift each gene's log rate, so that draws of up to 16,384 training cells have its mean.

    The decoder was fitted to latents of real cells; drawn ones differ a little, and with them the
    mean of a gene; so does a recalibration that all genes share. The mean is that of log1p of
    counts scaled to the median library size.
    """
    bias = space.decoder[2].bias
    assert isinstance(bias, Tensor)
    truth = sum(space.scaled(counts).sum(dim=0) for counts, *_ in drawn)
    generator = torch.Generator().manual_seed(seed)
    each = 2  # draws
    for _ in range(_LEVEL_STEPS):
        total = torch.zeros_like(bias)
        for _, _, latent, _ in drawn:
            rates, library = space.decode(latent)
            numbers = each if recalibration is None else 2 * each
            uniform = torch.rand(len(latent), numbers, len(bias), generator=generator)
            counts = space.draw(rates, library, uniform.to(bias.device), recalibration)
            total += space.scaled(counts).sum(dim=(0, 1)) / each
        bias += ((truth + 1) / (total + 1)).log().clamp(-1, 1)  # of a gene never seen it stays


@torch.inference_mode()
def recalibration_of(
    model: PhenoSeq | SamplePhenoSeq,
    space: ExpressionSpace,
    data: StreamDataModule,
    seed: int = 0,
) -> Recalibration | None:
    """Fit a recalibration of a model of genes to up to 4096 calibration cells.

    The PIT is of a count under the mixture over 31 draws, at the cell's own library size: so it
    tells how counts are spread, whatever library size a cell turns out to have. Beside it stands
    that of a count of the 32nd draw.

    Returns
    -------
    The recalibration, or None where there is no calibration part, or it has fewer than 200 cells of
    20 counts and more.
    """
    if not (data.parts.part == "cal").any() or data.n_cells("cal") < LEAST:
        return None
    generator = torch.Generator().manual_seed(seed)
    theta = space.theta
    cells, draws = _CALIBRATION_CELLS, _CALIBRATION_DRAWS
    found: list[tuple[NDArray[np.float32], ...]] = []
    for counts, _, latent, _ in _drawn(model, data, "cal", cells, draws, seed):
        rates, _ = space.decode(latent)
        mu = rates * counts.sum(dim=1)[:, None, None]
        u, *v = torch.rand(3, *counts.shape, generator=generator).to(mu.device)
        drawn = nb_quantile(u, mu[:, :1], theta)
        pits = []
        for some, place in zip((counts, drawn), v, strict=True):
            below, at_most = nb_cdf(some, mu[:, 1:], theta)
            pits.append((below + place * (at_most - below)).cpu().numpy())
        found.append((*pits, space.level(rates).cpu().numpy()))
    true, own, level = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return fit_recalibration(true, own, level) if len(true) >= LEAST else None


def _placed(model: PhenoSeq | SamplePhenoSeq, batch: Batch) -> Batch:
    """Return a batch where the model is."""
    return {name: values.to(model.context_mean.device) for name, values in batch.items()}


def _encode(model: PhenoSeq | SamplePhenoSeq, batch: Batch) -> tuple[Tensor, Tensor]:
    if isinstance(model, PhenoSeq):
        return model.encode(batch["images"])
    return model.encode(batch["images" if "images" in batch else "features"], keep=batch["keep"])


def _profiles(
    model: PhenoSeq | SamplePhenoSeq, space: ExpressionSpace, data: StreamDataModule, seed: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]]:
    """Yield true and predicted expression of validation cells, and the group each is of."""
    for counts, mean, _, group in _drawn(model, data, "val", _CELLS, _DRAWS, seed):
        values = space.scaled(counts), space.expected(mean)
        truth, predicted = (x.cpu().numpy() for x in values)
        yield truth, predicted, group.cpu().numpy()


def _drawn(
    model: PhenoSeq | SamplePhenoSeq,
    data: StreamDataModule,
    part: str,
    n_cells: int,
    n_draws: int,
    seed: int,
) -> Iterator[Drawn]:
    """Yield counts ``(n, g)``, mean and drawn latents ``(n, [K,] D)``, and group of some cells.

    A group is what was held out together, as a number: such as a block, of samples each its own.
    """
    _, group_of = np.unique(data.parts.group, return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    for batch in data.fixed(part, n_cells, alone=True):
        batch = _placed(model, batch)
        counts, rows = batch["counts"], batch["rows"]
        dim = model.expression.config.latent_dim
        noise = torch.randn(len(counts), n_draws, dim, generator=generator)
        context = _encode(model, batch)
        latent = model.generate(context, noise.to(counts.device))
        mean = model.expected(context, latent)
        if "sample" in batch:
            group = batch["sample"]
        else:
            group = torch.from_numpy(group_of[rows.cpu().numpy()]).to(rows)
        keep = batch.get("keep_rna", torch.ones_like(rows, dtype=torch.bool))
        if counts.ndim == 3:
            each = counts.shape[1]
            mean, latent, group = (x.repeat_interleave(each, dim=0) for x in (mean, latent, group))
            counts, keep = counts.flatten(0, 1), keep.flatten()
        keep = keep & (counts.sum(dim=1) >= MIN_LIBRARY)
        yield counts[keep], mean[keep], latent[keep], group[keep]
