"""Predicts the expression of cells: crops in, draws decoded, summarised into one AnnData."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from phenoseq._version import __version__
from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.inference.inputs import Inputs
from phenoseq.inference.randomness import cell_normals, cell_uniforms
from phenoseq.models.counts import nb_quantile, summarise_mixture
from phenoseq.models.phenoseq import PhenoSeq

#: A cell is flagged as saturated where more than this share of a stain's pixels is at the top.
SATURATED = 0.01
#: Cells encoded, and sampled, at once: large enough for the kernels, small enough for the cache.
BATCH = 128
QUANTILES = {"q05": 0.05, "q95": 0.95}


def run(
    model: PhenoSeq,
    inputs: Inputs,
    *,
    n_samples: int = 16,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    keep_draws: bool = False,
    batch_size: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> ad.AnnData:
    """Predict all cells of some inputs; see :func:`phenoseq.predict` for what comes out."""
    if n_samples < 1:
        raise DataError(f"n_samples is {n_samples}; draw at least one")
    if not len(inputs.obs):
        raise DataError(f"{inputs.name}: zero cells; there is nothing to predict")
    _tell(model, inputs)
    where = pick_device(device)
    model = model.to(where).eval()
    result = _Result(model, inputs, n_samples if keep_draws else 1)
    ids = inputs.obs.index.to_numpy(dtype=str)
    done = 0
    for batch in inputs.batches(batch_size):
        with torch.inference_mode():
            images, present = _place(batch.images, inputs, where)
            context = model.encode(images, present)
            names = ids[batch.rows].tolist()
            noise = cell_normals(seed, names, n_samples, model.config.expression.latent_dim)
            latent = model.generate(context, torch.from_numpy(noise).to(where), steps=steps)
            uniforms = cell_uniforms(seed, names, result.n_draws, len(result.genes))
            result.latent[batch.rows] = _numpy(latent.mean(dim=1))
            result.ood[batch.rows] = _numpy(model.strangeness(context))
            result.add_expression(batch.rows, latent, torch.from_numpy(uniforms).to(where))
        result.cut[batch.rows] = batch.cut
        result.saturated[batch.rows] = _saturated(batch.images)
        done += len(batch.rows)
        if progress is not None:
            progress(done, len(ids))
    how = model.config.diffusion
    missing = _missing(model, inputs)
    return result.anndata(
        {
            "phenoseq_version": __version__,
            "torch_version": str(torch.__version__),
            "source": inputs.name,
            "source_identity": inputs.identity,
            "pairing": model.config.pairing,
            "seed": seed,
            "n_samples": n_samples,
            "sampler": how.sampler,
            "steps": how.steps if steps is None else steps,
            "channels": [c for c in model.config.image.channels if c not in missing],
            "missing_channels": missing,
            "intensity_gain": [float(g) for g in inputs.gain],
            "median_library": model.config.expression.median_library,
            "skipped_cells": list(inputs.skipped),
            "problems": list(inputs.problems),
        }
    )


def pick_device(name: str) -> torch.device:
    """Return the device of that name; ``"auto"`` takes CUDA, then MPS, then the CPU.

    Raises
    ------
    DataError
        Where there is no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"no device {name!r} here ({error}); 'auto' takes the best one") from error
    return device


class _Result:
    """Collects what is predicted, in the order of the source's cells."""

    def __init__(self, model: PhenoSeq, inputs: Inputs, n_draws: int) -> None:
        self.model, self.inputs, self.n_draws = model, inputs, n_draws
        self.genes = model.config.expression.genes
        n, g = len(inputs.obs), len(self.genes)
        self.mean = np.empty((n, g), dtype=np.float32)
        self.std = np.empty((n, g), dtype=np.float32)
        self.quantiles = {name: np.empty((n, g), dtype=np.float32) for name in QUANTILES}
        self.latent = np.empty((n, model.config.expression.latent_dim), dtype=np.float32)
        self.ood = np.empty(n, dtype=np.float32)
        self.cut = np.zeros(n, dtype=bool)
        self.saturated = np.zeros(n, dtype=bool)
        self.rows: list[NDArray[np.int64]] = []
        self.draws: list[list[sparse.csr_matrix]] = [[] for _ in range(n_draws)]

    def add_expression(self, rows: NDArray[np.int64], latent: Tensor, uniforms: Tensor) -> None:
        """Decode the draws ``(B, K, D)`` of some cells and summarise them."""
        space = self.model.expression
        median = space.config.median_library
        rates, library = space.decode(latent)
        self.mean[rows] = _numpy(torch.log1p(rates.mean(dim=1) * median))
        expected = library.mean(dim=1)
        std, quantiles = summarise_mixture(
            rates * expected[:, None, None],
            space.theta,
            median / expected,
            tuple(QUANTILES.values()),
        )
        self.std[rows] = _numpy(std)
        for name, values in zip(QUANTILES, quantiles, strict=True):
            self.quantiles[name][rows] = _numpy(values)
        self.rows.append(rows)
        for k in range(self.n_draws):
            mu = rates[:, k : k + 1] * library[:, k : k + 1, None]
            counts = nb_quantile(uniforms[:, k], mu, space.theta)
            share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
            self.draws[k].append(sparse.csr_matrix(_numpy(torch.log1p(share * median))))

    def anndata(self, record: dict[str, Any]) -> ad.AnnData:
        source = self.inputs.obs
        kept = [c for c in source if c in ("field", "x_centroid", "y_centroid")]
        obs = source[kept + [c for c in source if str(c).startswith("Metadata_")]].copy()
        obs["ood_score"] = self.ood
        obs["missing_channels"] = ",".join(record["missing_channels"])
        obs["saturated"] = self.saturated
        obs["cut_by_border"] = self.cut
        config = self.model.config
        var = pd.DataFrame(
            {"symbol": config.expression.symbols}, index=pd.Index(self.genes, name="gene_id")
        )
        if config.training.reliability:
            var["reliability"] = np.array(config.training.reliability, dtype=np.float32)
        back = np.argsort(np.concatenate(self.rows))
        draws = [sparse.vstack(parts, format="csr")[back] for parts in self.draws]
        layers = {"std": self.std, **self.quantiles, "draw": draws[0]}
        if len(draws) > 1:
            layers |= {f"draw_{k}": draw for k, draw in enumerate(draws)}
        obsm = {"X_phenoseq": self.latent}
        if {"x_centroid", "y_centroid"} <= set(obs):
            obsm["spatial"] = obs[["x_centroid", "y_centroid"]].to_numpy(np.float64)
        return ad.AnnData(
            self.mean, obs=obs, var=var, layers=layers, obsm=obsm, uns={"phenoseq": record}
        )


def _place(crops: NDArray[Any], inputs: Inputs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Put the crops' channels where the model has them, zeros where it lacks one."""
    shape = (len(crops), len(inputs.placed), *crops.shape[2:])
    images = np.zeros(shape, dtype=np.float32)
    for c, place in enumerate(inputs.placed):
        if place is not None:
            images[:, c] = crops[:, place] * inputs.gain[c]
    there = torch.tensor([place is not None for place in inputs.placed], device=device)
    return torch.from_numpy(images).to(device), there.expand(len(crops), -1)


def _saturated(crops: NDArray[Any]) -> NDArray[np.bool_]:
    if not np.issubdtype(crops.dtype, np.integer):
        return np.zeros(len(crops), dtype=bool)
    top = (crops == np.iinfo(crops.dtype).max).mean(axis=(2, 3))
    return np.asarray((top > SATURATED).any(axis=1))


def _missing(model: PhenoSeq, inputs: Inputs) -> list[str]:
    pairs = zip(model.config.image.channels, inputs.placed, strict=True)
    return [name for name, place in pairs if place is None]


def _tell(model: PhenoSeq, inputs: Inputs) -> None:
    """Warn of what makes the prediction worse; each is recorded in the output too."""
    missing = _missing(model, inputs)
    if missing:
        warnings.warn(
            f"{inputs.name}: the model's stains {missing} are missing; it predicts without them, "
            "less well (recorded in obs['missing_channels'])",
            PhenoseqWarning,
            stacklevel=4,
        )
    if inputs.dtype.name != model.config.image.dtype:
        gains = ", ".join(f"{g:.4g}" for g in inputs.gain)
        warnings.warn(
            f"{inputs.name}: pixels are {inputs.dtype}, the model was trained on "
            f"{model.config.image.dtype}; each stain is scaled so that its 99.9th percentile is "
            f"that of the training images (by {gains}; recorded in uns)",
            PhenoseqWarning,
            stacklevel=4,
        )
    if inputs.skipped:
        warnings.warn(
            f"{inputs.name}: {len(inputs.skipped)} cells lie outside the image and are left out, "
            f"e.g. {list(inputs.skipped[:3])} (recorded in uns)",
            PhenoseqWarning,
            stacklevel=4,
        )


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()
