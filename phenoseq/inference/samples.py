"""Predicts the expression of samples from bags of their cells, crops or features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from phenoseq._version import __version__
from phenoseq.data.backed import Cells
from phenoseq.data.bags import make_bags
from phenoseq.errors import DataError
from phenoseq.inference.bagged import (
    BATCH,
    BLOCK,
    bag_obs,
    batches,
    checked,
    describe_features,
    plain,
    reads,
    rows_of,
    tell_strange,
)
from phenoseq.inference.inputs import Inputs
from phenoseq.inference.job import Field, Job, Part, Rows, digest_of_table
from phenoseq.inference.predictor import (
    QUANTILES,
    missing_channels,
    pick_device,
    place_channels,
    summarise,
    tell_inputs,
    var_of,
)
from phenoseq.inference.randomness import bag_normals
from phenoseq.models.config import ImageConfig
from phenoseq.models.embedding import EmbeddingSpace
from phenoseq.models.expression import ExpressionSpace
from phenoseq.models.files import digest_of_model
from phenoseq.models.sample import SamplePhenoSeq


def sample_job(
    model: SamplePhenoSeq,
    source: Cells | Inputs,
    sample: str,
    *,
    n_samples: int = 16,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    keep_draws: bool = False,
    batch_size: int = BATCH,
    name: str = "",
) -> Job:
    """Lay out the prediction of the expression of samples; see :func:`phenoseq.predict`.

    Parameters
    ----------
    model
        The network.
    source
        Cells with features in ``X``, or with crops, as the model reads.
    sample
        Column of ``obs`` that says which sample a cell is of.
    n_samples, steps, seed, device, batch_size, name
        See :func:`phenoseq.inference.bagged.bag_job`.
    keep_draws
        Keep every draw of genes; those of embeddings are always kept.

    Raises
    ------
    DataError
        Where the source cannot be used as it is.
    """
    if n_samples < 1:
        raise DataError(f"n_samples is {n_samples}; draw at least one")
    place = pick_device(device)
    model = model.to(place).eval()
    config, space, where = model.config, model.expression, source.name
    bags = make_bags(source.obs, sample, size=config.bag_size, seed=seed, where=where)
    given = _Features(model, source) if isinstance(source, Cells) else _Crops(model, source)
    draws = [f"layers/draw_{k}" for k in range(n_samples)]
    if isinstance(space, ExpressionSpace) and not keep_draws:
        draws = []

    def compute(rows: Rows) -> Iterator[Part]:
        parts = batches(given.read, given.cell_bytes, bags, rows, batch_size)
        for number, (some, cells) in enumerate(parts):
            lost = np.array([given.lost.get(cell, "") for cell in bags.rows[some].ravel().tolist()])
            keep = np.arange(config.bag_size) < bags.n_cells[some, None]
            keep &= (lost == "").reshape(keep.shape)
            good = keep.any(axis=1)
            for bag in np.flatnonzero(~good):
                yield some[bag : bag + 1], str(lost.reshape(keep.shape)[bag, 0])
            some, cells, keep = some[good], cells[good], keep[good]
            if not len(some):
                continue
            names = [bags.names[i] for i in some]
            with torch.inference_mode():
                read = torch.from_numpy(cells).to(place)
                present = given.present.expand(len(some), -1).to(place)
                context = model.encode(read, present, torch.from_numpy(keep).to(place))
                strange = model.strangeness(context, read, present).float().cpu().numpy()
                noise = bag_normals(seed, names, n_samples, config.expression.latent_dim)
                latent = model.generate(context, torch.from_numpy(noise).to(place), steps=steps)
                values = _values(model, context, latent, draws, seed, names)
            if number == 0:
                tell_strange(strange, given.described, where)
            yield some, {**values, "obs/ood_score": strange}

    record = {
        "phenoseq_version": __version__,
        "torch_version": str(torch.__version__),
        "model": name,
        "source": where,
        "pairing": config.pairing,
        "sample_column": sample,
        "bag_size": config.bag_size,
        "seed": seed,
        "n_samples": n_samples,
        "sampler": config.diffusion.sampler,
        "steps": config.diffusion.steps if steps is None else steps,
        **given.facts,
    }
    if isinstance(space, EmbeddingSpace):
        record["embedding"] = space.config.name
        var = pd.DataFrame(index=[f"{space.config.name}_{i}" for i in range(space.config.width)])
    else:
        record["median_library"] = space.config.median_library
        record["recalibrated"] = config.recalibration is not None
        var = var_of(space.config, config.training)
    obs = bag_obs(source.obs, bags, sample)
    return Job(
        fields=(*_fields(space, draws), Field("obs/ood_score", 0)),
        order=np.arange(len(bags.names)),
        block=BLOCK * batch_size,
        compute=compute,
        obs=obs,
        var=var,
        uns={"phenoseq": record},
        plan=plain(record) | {"cells": digest_of_table(obs), "weights": digest_of_model(model)},
    )


class _Features:
    """Cells with features.

    Attributes
    ----------
    read
        Reads rows that rise, each once.
    lost
        Why cells could not be read, by row.
    cell_bytes, present, described, facts
        Bytes of a cell; stains that there are, bool ``(1, C)``; what the model reads, in words;
        and what to record.
    """

    def __init__(self, model: SamplePhenoSeq, cells: Cells) -> None:
        how = reads(model)
        self.read: Callable[[Rows], NDArray[np.float32]] = rows_of(checked(cells, how))
        self.lost: dict[int, str] = {}
        self.cell_bytes = 4 * how.width
        self.present = torch.ones(1, model.n_stains, dtype=torch.bool)
        self.described = describe_features(how)
        self.facts: dict[str, Any] = {"features": cells.record} if cells.record else {}


class _Crops:
    """Cells with crops; attributes as of :class:`_Features`."""

    def __init__(self, model: SamplePhenoSeq, inputs: Inputs) -> None:
        image = model.config.cells
        assert isinstance(image, ImageConfig)
        tell_inputs(image, inputs)
        self._inputs = inputs
        self._rank = np.empty(len(inputs.order), dtype=np.int64)
        self._rank[inputs.order] = np.arange(len(inputs.order))
        self._shape = (len(image.channels), image.crop_px, image.crop_px)
        self.lost: dict[int, str] = {}
        self.cell_bytes = 4 * int(np.prod(self._shape))
        self.present = torch.tensor([[at is not None for at in inputs.placed]])
        self.described = (
            f"crops of {image.crop_px} px at {image.pixel_size} um of {', '.join(image.channels)}"
        )
        self.facts: dict[str, Any] = {
            "source_identity": inputs.identity,
            "missing_channels": missing_channels(image, inputs),
            "intensity_gain": [float(gain) for gain in inputs.gain],
            "skipped_cells": [*inputs.skipped, *inputs.unread],
            "problems": list(inputs.problems),
        }

    def read(self, rows: Rows) -> NDArray[np.float32]:
        out = np.zeros((len(rows), *self._shape), dtype=np.float32)
        for batch in self._inputs.crops(rows[np.argsort(self._rank[rows])], BATCH):
            if isinstance(batch, tuple):
                self.lost.update(dict.fromkeys(batch[0].tolist(), batch[1]))
                continue
            images, _ = place_channels(batch.images, self._inputs, torch.device("cpu"))
            out[np.searchsorted(rows, batch.rows)] = images.numpy()
        return out


def _values(
    model: SamplePhenoSeq,
    context: tuple[Tensor, Tensor],
    latent: Tensor,
    draws: list[str],
    seed: int,
    names: list[str],
) -> dict[str, NDArray[Any]]:
    space = model.expression
    if isinstance(space, EmbeddingSpace):
        made = space.decode(latent).transpose(0, 1).float().cpu().numpy()
        return {"X": made[0], **dict(zip(draws, made, strict=True))}
    return summarise(model, space, model.expected(context, latent), latent, seed, names, draws)


def _fields(space: ExpressionSpace | EmbeddingSpace, draws: list[str]) -> tuple[Field, ...]:
    if isinstance(space, EmbeddingSpace):
        return tuple(Field(name, space.config.width) for name in ("X", *draws))
    genes = len(space.config.genes)
    dense = ("X", "layers/std", *(f"layers/{q}" for q in QUANTILES))
    return (
        *(Field(name, genes) for name in dense),
        *(Field(name, genes, sparse=True) for name in ("layers/draw", *draws)),
        Field("obsm/X_phenoseq", space.config.latent_dim),
    )
