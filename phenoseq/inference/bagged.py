"""Predicts RNA embeddings of samples from bags of their cells' image features."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from phenoseq._version import __version__
from phenoseq.data.backed import Cells, Matrix, dense
from phenoseq.data.bags import Bags, constant_metadata, make_bags
from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.inference.job import Field, Job, Part, Rows, digest_of_table
from phenoseq.inference.predictor import pick_device
from phenoseq.inference.randomness import bag_normals
from phenoseq.models.files import digest_of_model
from phenoseq.models.givenfeatures import GivenFeatures
from phenoseq.models.published import PublishedPhenoSeq, published_times
from phenoseq.models.sample import SamplePhenoSeq

#: Bags encoded, and sampled, at once.
BATCH = 32
#: Batches in a block of a file.
BLOCK = 8
#: Bytes of features held in memory, and of those that are checked at once.
_HELD, _CHECKED = 512 << 20, 64 << 20
#: Deviations of features from the training ones between which nothing is said.
_FAMILIAR = (1 / 3, 3.0)


def bag_job(
    model: PublishedPhenoSeq,
    features: Cells,
    sample: str,
    *,
    n_samples: int = 16,
    steps: int | None = None,
    published_steps: bool = False,
    seed: int = 0,
    device: str = "auto",
    batch_size: int = BATCH,
    name: str = "",
) -> Job:
    """Lay out the prediction of embeddings of samples; see :func:`phenoseq.predict`.

    Parameters
    ----------
    model
        The network.
    features
        One row a cell, image features in ``X`` in their own scale, in memory or in files.
    sample
        Column of ``obs`` that says which sample a cell is of.
    n_samples
        Draws a bag.
    steps, published_steps
        See :meth:`~phenoseq.models.published.PublishedPhenoSeq.generate`.
    seed
        Of bags and draws.
    device, batch_size
        Where, and how many bags at once; neither changes the result but in its last bits.
    name
        What the model is called.

    Raises
    ------
    DataError
        Where the features cannot be used as they are.
    ModelError
        Where ``steps`` is impossible.
    """
    if n_samples < 1:
        raise DataError(f"n_samples is {n_samples}; draw at least one")
    config, where = model.config, features.name
    bags = make_bags(features.obs, sample, size=config.bag_size, seed=seed, where=where)
    place = pick_device(device)
    matrix, what = checked(features, reads(model)), describe_features(reads(model))
    model = model.to(place).eval()
    width = config.sizes.embedding

    def compute(rows: Rows) -> Iterator[Part]:
        parts = batches(rows_of(matrix), 4 * matrix.shape[1], bags, rows, batch_size)
        for number, (some, cells) in enumerate(parts):
            with torch.inference_mode():
                read = torch.from_numpy(cells).to(place)
                away = (read - model.features_mean) / model.features_std
                strange = away.square().mean(dim=(1, 2)).sqrt().cpu().numpy()
                noise = bag_normals(seed, [bags.names[i] for i in some], n_samples, width)
                made = model.generate(
                    model.encode(read),
                    torch.from_numpy(noise).to(place),
                    steps=steps,
                    published_steps=published_steps,
                )
            if number == 0:
                tell_strange(strange, what, where)
            draws = made.transpose(0, 1).float().cpu().numpy()
            layers = {f"layers/draw_{k}": draw for k, draw in enumerate(draws)}
            yield some, {"X": draws[0], **layers, "obs/ood_score": strange}

    record = {
        "phenoseq_version": __version__,
        "torch_version": str(torch.__version__),
        "model": name,
        "source": where,
        "pairing": config.pairing,
        "sample_column": sample,
        "bag_size": config.bag_size,
        "embedding": config.embedding,
        "seed": seed,
        "n_samples": n_samples,
        **_sampling(model, steps, published_steps),
        "origin": plain(asdict(config.origin)),
    }
    if features.record:  # what they were made of, and how
        record["features"] = features.record
    obs = bag_obs(features.obs, bags, sample)
    return Job(
        fields=(
            Field("X", width),
            *(Field(f"layers/draw_{k}", width) for k in range(n_samples)),
            Field("obs/ood_score", 0),
        ),
        order=np.arange(len(bags.names)),
        block=BLOCK * batch_size,
        compute=compute,
        obs=obs,
        var=pd.DataFrame(index=pd.Index([f"{config.embedding}_{i}" for i in range(width)])),
        uns={"phenoseq": record},
        plan=plain(record) | {"cells": digest_of_table(obs), "weights": digest_of_model(model)},
    )


def reads(model: PublishedPhenoSeq | SamplePhenoSeq) -> GivenFeatures:
    """Return which features a model reads."""
    if isinstance(model, PublishedPhenoSeq):
        how = model.config.features
        width = model.config.sizes.features
        return GivenFeatures(how.extractor, how.channels, how.crop_px, width)
    assert isinstance(model.config.cells, GivenFeatures)
    return model.config.cells


def describe_features(how: GivenFeatures) -> str:
    """Say in a line which image features a model reads."""
    if not how.channels:
        return f"{how.extractor}, not normalised"
    return (
        f"{how.extractor} on crops of {how.crop_px} px, one stain at a time in the order "
        f"{', '.join(how.channels)}, not normalised"
    )


def checked(features: Cells, how: GivenFeatures) -> Matrix:
    """Return the features of the cells, of which each must be a finite number."""
    matrix, size = features.matrix("X"), how.width
    if matrix.shape[1] != size:
        raise DataError(
            f"{features.name}: {matrix.shape[1]} features a cell, the model reads {size}: "
            f"{describe_features(how)}"
        )
    broken, first, step = 0, "", max(_CHECKED // (4 * size), 1)
    for start in range(0, matrix.shape[0], step):
        bad = np.flatnonzero(~np.isfinite(dense(matrix[start : start + step])).all(axis=1))
        if len(bad) and not broken:
            first = str(features.obs.index[start + bad[0]])
        broken += len(bad)
    if broken:
        raise DataError(
            f"{features.name}: NaN or infinite features in {broken} cells, the first {first!r}; "
            "remove these cells or compute their features again"
        )
    return matrix


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record as plain JSON, as files have arrays for lists."""
    plain: dict[str, Any] = json.loads(
        json.dumps(record, default=lambda value: np.asarray(value).tolist())
    )
    return plain


def rows_of(matrix: Matrix) -> Callable[[Rows], NDArray[np.float32]]:
    """Return what reads rows of a matrix, dense."""
    return lambda rows: dense(matrix.take(rows))


def batches(
    read: Callable[[Rows], NDArray[np.float32]],
    cell_bytes: int,
    bags: Bags,
    chosen: Rows,
    batch_size: int,
) -> Iterator[tuple[Rows, NDArray[np.float32]]]:
    """Yield bags and what is read of their cells, ``(B, N, ...)``, holding only some in memory.

    ``read`` is asked for rows that rise, each of them once, and a row is of ``cell_bytes``.
    """
    fit = _HELD // (cell_bytes * bags.rows.shape[1])
    at_once = max(fit // batch_size, 1) * batch_size
    for first in range(0, len(chosen), at_once):
        some = chosen[first : first + at_once]
        wanted, places = np.unique(bags.rows[some], return_inverse=True)
        held = read(wanted)
        places = places.reshape(len(some), -1)
        for start in range(0, len(some), batch_size):
            yield some[start : start + batch_size], held[places[start : start + batch_size]]
        del held  # before the next are read


def _sampling(model: PublishedPhenoSeq, steps: int | None, published: bool) -> dict[str, Any]:
    how = model.config.noise
    if published:
        times = published_times(how.timesteps, 50 if steps is None else steps)
        return {"sampler": "ddim", "steps": len(times) - 1, "published_steps": True}
    steps = how.steps if steps is None else steps
    return {"sampler": how.sampler, "steps": steps, "published_steps": False}


def tell_strange(strange: NDArray[np.float32], what: str, where: str) -> None:
    """Warn where cells are unlike the training ones, by the median of their score."""
    middle = float(np.median(strange))
    if not _FAMILIAR[0] <= middle <= _FAMILIAR[1]:
        warnings.warn(
            f"{where}: features are off the training ones by {middle:.2g} deviations, about 1 for "
            f"features like them (recorded in obs['ood_score']); the model reads {what}",
            PhenoseqWarning,
            stacklevel=4,
        )


def bag_obs(cells: pd.DataFrame, bags: Bags, sample: str) -> pd.DataFrame:
    """Return ``obs`` of bags: their sample, what it says alike of its cells, and their cells."""
    ids = cells.index.to_numpy()
    obs = constant_metadata(cells, bags).drop(columns=sample, errors="ignore")
    obs.insert(0, sample, bags.samples)
    obs["n_cells"] = bags.n_cells
    obs["filled"] = bags.n_cells < bags.rows.shape[1]
    if "cut_by_border" in cells:
        cut = cells["cut_by_border"].to_numpy(bool)
        obs["n_cut_by_border"] = [
            int(cut[rows[:own]].sum()) for rows, own in zip(bags.rows, bags.n_cells, strict=True)
        ]
    pairs = list(zip(bags.rows, bags.n_cells, strict=True))
    obs["cells"] = [json.dumps(ids[rows[:own]].tolist()) for rows, own in pairs]
    obs["filled_with"] = [json.dumps(ids[rows[own:]].tolist()) for rows, own in pairs]
    return obs
