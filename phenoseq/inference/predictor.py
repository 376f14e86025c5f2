"""Predicts the expression of cells: crops in, draws decoded, summarised into one table."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from phenoseq._version import __version__
from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.inference.inputs import Inputs
from phenoseq.inference.job import Field, Job, Part, Rows, digest_of_table
from phenoseq.inference.randomness import cell_normals, cell_uniforms
from phenoseq.models.config import ImageConfig
from phenoseq.models.expression import ExpressionConfig, ExpressionSpace
from phenoseq.models.files import digest_of_model
from phenoseq.models.phenoseq import ContextDiffusion, PhenoSeq
from phenoseq.models.record import TrainingRecord

#: A cell is flagged as saturated where more than this share of a stain's pixels is at the top.
SATURATED = 0.01
#: Cells encoded, and sampled, at once: large enough for the kernels, small enough for the cache.
BATCH = 128
QUANTILES = {"q05": 0.05, "q95": 0.95}

#: Batches in a block of a file.
_BLOCK = 16


def image_job(
    model: PhenoSeq,
    inputs: Inputs,
    *,
    n_samples: int = 16,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    keep_draws: bool = False,
    batch_size: int = BATCH,
    name: str = "",
) -> Job:
    """Lay out the prediction of all cells of some inputs, to be made in memory or in a file.

    ``name`` is what to call the model in the table; for the rest see :func:`phenoseq.predict`.
    """
    if n_samples < 1:
        raise DataError(f"n_samples is {n_samples}; draw at least one")
    if not len(inputs.obs):
        raise DataError(f"{inputs.name}: zero cells; there is nothing to predict")
    tell_inputs(model.config.image, inputs)
    where = pick_device(device)
    model = model.to(where).eval()
    genes, latent_dim = len(model.config.expression.genes), model.config.expression.latent_dim
    ids = inputs.obs.index
    draws = [f"layers/draw_{k}" for k in range(n_samples)] if keep_draws else []

    def compute(rows: Rows) -> Iterator[Part]:
        for batch in inputs.crops(rows, batch_size):
            if isinstance(batch, tuple):
                yield batch
                continue
            with torch.inference_mode():
                images, present = place_channels(batch.images, inputs, where)
                context = model.encode(images, present)
                names = ids[batch.rows].tolist()
                noise = cell_normals(seed, names, n_samples, latent_dim)
                latent = model.generate(context, torch.from_numpy(noise).to(where), steps=steps)
                mean = model.expected(context, latent)
                values = summarise(model, model.expression, mean, latent, seed, names, draws)
                values["obs/ood_score"] = _numpy(model.strangeness(context, images, present))
                values["obs/draw_spread"] = _numpy(model.disagreement(latent))
            values["obs/saturated"] = _saturated(batch.images)
            values["obs/cut_by_border"] = batch.cut
            yield batch.rows, values

    record = _record(model, inputs, n_samples, steps, seed) | {"model": name}
    obs = inputs.obs.assign(missing_channels=",".join(record["missing_channels"]))
    return Job(
        fields=(
            *(Field(f, genes) for f in ("X", "layers/std", *(f"layers/{q}" for q in QUANTILES))),
            *(Field(f, genes, sparse=True) for f in ("layers/draw", *draws)),
            Field("obsm/X_phenoseq", latent_dim),
            Field("obs/ood_score", 0),
            Field("obs/draw_spread", 0),
            Field("obs/saturated", 0, "bool"),
            Field("obs/cut_by_border", 0, "bool"),
        ),
        order=inputs.order,
        block=_BLOCK * batch_size,
        compute=compute,
        obs=obs,
        var=var_of(model.config.expression, model.config.training),
        uns={"phenoseq": record},
        plan=record | {"cells": digest_of_table(obs), "weights": digest_of_model(model)},
    )


def _record(
    model: PhenoSeq, inputs: Inputs, n_samples: int, steps: int | None, seed: int
) -> dict[str, Any]:
    """Return how a prediction is made, plain JSON."""
    how = model.config.diffusion
    missing = missing_channels(model.config.image, inputs)
    return {
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
        "recalibrated": model.config.recalibration is not None,
        "skipped_cells": [*inputs.skipped, *inputs.unread],
        "problems": list(inputs.problems),
    }


def summarise(
    model: ContextDiffusion,
    space: ExpressionSpace,
    mean: Tensor,
    latent: Tensor,
    seed: int,
    names: Sequence[str],
    draws: list[str],
) -> dict[str, NDArray[Any]]:
    """Decode the mean latent ``(B, D)`` and drawn ones ``(B, K, D)`` of some cells or bags.

    Counts are drawn of the first n draws: one, or those named by ``draws``. What the model has
    learned of its calibration is applied to all of it.
    """
    rates, library = space.decode(latent)
    recalibration = model.config.recalibration
    std, quantiles = space.measured(
        rates, library.mean(dim=1), tuple(QUANTILES.values()), recalibration
    )
    out = {
        "X": _numpy(space.expected(mean)),
        "obsm/X_phenoseq": _numpy(mean),
        "layers/std": _numpy(std),
    }
    for name, values in zip(QUANTILES, quantiles, strict=True):
        out[f"layers/{name}"] = _numpy(values)
    drawn = draws or ["layers/draw"]
    n = len(drawn)
    made = cell_uniforms(
        seed, names, n if recalibration is None else 2 * n, len(space.config.genes)
    )
    uniforms = torch.from_numpy(made).to(latent.device)
    counts = space.draw(rates, library, uniforms, recalibration)
    profiles = _numpy(space.scaled(counts))
    out |= {name: profiles[:, k] for k, name in enumerate(drawn)}
    out["layers/draw"] = out[drawn[0]]
    return out


def var_of(expression: ExpressionConfig, training: TrainingRecord) -> pd.DataFrame:
    """Return ``var`` of predicted genes."""
    index = pd.Index(expression.genes, name="gene_id")
    var = pd.DataFrame({"symbol": expression.symbols}, index=index)
    if training.reliability:
        var["reliability"] = np.array(training.reliability, dtype=np.float32)
    if training.reliability_interval:
        ends = np.array(training.reliability_interval, dtype=np.float32)
        var["reliability_low"], var["reliability_high"] = ends.T
    return var


def pick_device(name: str) -> torch.device:
    """Return the device of that name; ``"auto"`` takes CUDA, then MPS, then the CPU.

    Of several GPUs each process of ``torchrun`` takes its own.

    Raises
    ------
    DataError
        Where there is no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            own = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
            return torch.device("cuda", own)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"no device {name!r} here ({error}); 'auto' takes the best one") from error
    return device


def place_channels(
    crops: NDArray[Any], inputs: Inputs, device: torch.device
) -> tuple[Tensor, Tensor]:
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


def missing_channels(image: ImageConfig, inputs: Inputs) -> list[str]:
    """Return the stains of a model that the inputs lack."""
    pairs = zip(image.channels, inputs.placed, strict=True)
    return [name for name, place in pairs if place is None]


def tell_inputs(image: ImageConfig, inputs: Inputs) -> None:
    """Warn of what makes the prediction worse; each is recorded in the output too."""
    missing = missing_channels(image, inputs)
    if missing:
        warnings.warn(
            f"{inputs.name}: the model's stains {missing} are missing; it predicts without them, "
            "less well (recorded in obs['missing_channels'])",
            PhenoseqWarning,
            stacklevel=4,
        )
    if inputs.dtype.name != image.dtype:
        gains = ", ".join(f"{g:.4g}" for g in inputs.gain)
        warnings.warn(
            f"{inputs.name}: pixels are {inputs.dtype}, the model was trained on "
            f"{image.dtype}; each stain is scaled so that its 99.9th percentile is "
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
