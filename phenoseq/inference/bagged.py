"""Predicts RNA embeddings of samples from bags of their cells' image features."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from phenoseq._version import __version__
from phenoseq.data.bags import Bags, constant_metadata, make_bags
from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.inference.features import check_features, read_rows
from phenoseq.inference.predictor import pick_device
from phenoseq.inference.randomness import bag_normals
from phenoseq.models.published import PublishedPhenoSeq, published_times

#: Bags encoded, and sampled, at once.
BATCH = 32
#: Bytes of features held in memory.
_HELD = 512 << 20
#: Deviations of features from the training ones between which nothing is said.
_FAMILIAR = (1 / 3, 3.0)


def run_bags(
    model: PublishedPhenoSeq,
    features: ad.AnnData,
    sample: str,
    *,
    n_samples: int = 16,
    steps: int | None = None,
    published_steps: bool = False,
    seed: int = 0,
    device: str = "auto",
    batch_size: int = BATCH,
    where: str = "features",
    progress: Callable[[int, int], None] | None = None,
) -> ad.AnnData:
    """Predict the embeddings of samples; see :func:`phenoseq.predict` for what comes out.

    Parameters
    ----------
    model
        The network.
    features
        One row a cell, image features in X in their own scale; X may be backed by a file.
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
    where
        What the features are called in messages.
    progress
        Called with (bags done, bags in all).

    Raises
    ------
    DataError
        Where the features cannot be used as they are.
    ModelError
        Where ``steps`` is impossible.
    """
    if n_samples < 1:
        raise DataError(f"n_samples is {n_samples}; draw at least one")
    config = model.config
    size, what = config.sizes.features, describe_features(model)
    bags = make_bags(features.obs, sample, size=config.bag_size, seed=seed, where=where)
    place = pick_device(device)
    check_features(features, size, what, where)
    model = model.to(place).eval()
    shape = (n_samples, len(bags.names), config.sizes.embedding)
    draws = np.empty(shape, dtype=np.float32)
    strange = np.empty(len(bags.names), dtype=np.float32)
    for some, cells in _batches(features, bags, batch_size):
        with torch.inference_mode():
            read = torch.from_numpy(cells).to(place)
            away = (read - model.features_mean) / model.features_std
            strange[some] = away.square().mean(dim=(1, 2)).sqrt().cpu().numpy()
            names = [bags.names[i] for i in some]
            noise = bag_normals(seed, names, n_samples, config.sizes.embedding)
            made = model.generate(
                model.encode(read),
                torch.from_numpy(noise).to(place),
                steps=steps,
                published_steps=published_steps,
            )
            draws[:, some] = made.transpose(0, 1).float().cpu().numpy()
        if progress is not None:
            progress(int(some[-1]) + 1, len(bags.names))
    _tell(strange, what, where)
    record = {
        "phenoseq_version": __version__,
        "torch_version": str(torch.__version__),
        "source": where,
        "pairing": config.pairing,
        "sample_column": sample,
        "bag_size": config.bag_size,
        "embedding": config.embedding,
        "seed": seed,
        "n_samples": n_samples,
        **_sampling(model, steps, published_steps),
        "origin": asdict(config.origin),
    }
    return _anndata(features, bags, draws, strange, sample, record)


def describe_features(model: PublishedPhenoSeq) -> str:
    """Say in a line which image features a model reads."""
    how = model.config.features
    return (
        f"{how.extractor} on crops of {how.crop_px} px, one stain at a time in the order "
        f"{', '.join(how.channels)}, not normalised"
    )


def _batches(
    features: ad.AnnData, bags: Bags, batch_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield bags and their cells' features, ``(B, N, F)``, holding only some cells in memory."""
    at_once = max(_HELD // (4 * features.n_vars * bags.rows.shape[1]), batch_size)
    for first in range(0, len(bags.names), at_once):
        rows = bags.rows[first : first + at_once]
        wanted, places = np.unique(rows, return_inverse=True)
        held = read_rows(features, wanted)
        places = places.reshape(rows.shape)
        for start in range(0, len(rows), batch_size):
            some = places[start : start + batch_size]
            yield np.arange(len(some)) + first + start, held[some]


def _sampling(model: PublishedPhenoSeq, steps: int | None, published: bool) -> dict[str, Any]:
    how = model.config.noise
    if published:
        times = published_times(how.timesteps, 50 if steps is None else steps)
        return {"sampler": "ddim", "steps": len(times) - 1, "published_steps": True}
    steps = how.steps if steps is None else steps
    return {"sampler": how.sampler, "steps": steps, "published_steps": False}


def _tell(strange: NDArray[np.float32], what: str, where: str) -> None:
    middle = float(np.median(strange))
    if not _FAMILIAR[0] <= middle <= _FAMILIAR[1]:
        warnings.warn(
            f"{where}: features are off the training ones by {middle:.2g} deviations, about 1 for "
            f"features like them (recorded in obs['ood_score']); the model reads {what}",
            PhenoseqWarning,
            stacklevel=4,
        )


def _anndata(
    features: ad.AnnData,
    bags: Bags,
    draws: NDArray[np.float32],
    strange: NDArray[np.float32],
    sample: str,
    record: dict[str, Any],
) -> ad.AnnData:
    ids = features.obs_names.to_numpy(dtype=str)
    obs = constant_metadata(features.obs, bags).drop(columns=sample, errors="ignore")
    obs.insert(0, sample, bags.samples)
    obs["n_cells"] = bags.n_cells
    obs["filled"] = bags.n_cells < bags.rows.shape[1]
    obs["ood_score"] = strange
    pairs = list(zip(bags.rows, bags.n_cells, strict=True))
    obs["cells"] = [json.dumps(ids[rows[:own]].tolist()) for rows, own in pairs]
    obs["filled_with"] = [json.dumps(ids[rows[own:]].tolist()) for rows, own in pairs]
    name = record["embedding"]
    var = pd.DataFrame(index=pd.Index([f"{name}_{i}" for i in range(draws.shape[2])]))
    layers = {f"draw_{k}": draw for k, draw in enumerate(draws)}
    return ad.AnnData(draws[0].copy(), obs=obs, var=var, layers=layers, uns={"phenoseq": record})
