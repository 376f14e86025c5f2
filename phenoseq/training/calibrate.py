"""Finishes anew a model that is trained already: recalibration, and the score of strangeness."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from phenoseq.data.selection import SelectedDataModule
from phenoseq.data.splits import SplitConfig
from phenoseq.errors import DataError, ModelError
from phenoseq.models.load import Model
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.recalibration import LEAST
from phenoseq.training.finalise import fit_strangeness, recalibration_of
from phenoseq.training.finetune import check_free


def calibrate(
    base: Model, store: str | Path, *, seed: int = 0, out: str | Path | None = None
) -> PhenoSeq:
    """Recalibrate a model; see :func:`phenoseq.calibrate`, which loads it by name."""
    if not isinstance(base, PhenoSeq):
        raise ModelError(
            "only models of single cells are calibrated on a store; a model of samples is when it "
            "is trained"
        )
    target = check_free(out)
    model = deepcopy(base).cpu().eval()
    config = model.config
    data = SelectedDataModule(
        store,
        SplitConfig(**config.training.split),  # type: ignore[arg-type]
        seed=seed,
        channels=config.image.channels,
        genes=config.expression.genes,
    )
    data.setup()
    same = data.opened.manifest.identity == config.training.identity
    if same and data.parts.digest != config.training.split_digest:
        raise DataError(
            f"{store}: divides its cells otherwise than the model was trained with, so that it "
            "would be calibrated on training cells; prepare the store with the same options"
        )
    found = recalibration_of(model, model.expression, data, seed)
    if found is None:
        raise DataError(
            f"{store}: the calibration part has {data.n_cells('cal')} cells, of which at least "
            f"{LEAST} need 20 counts and more; give it more groups"
        )
    if same:  # for models of versions that knew less of their training cells
        fit_strangeness(model, data)
    model.config = replace(model.config, recalibration=found)
    if target is not None:
        model.save(target)
    return model
