"""What a model is fine-tuned on: some stains and genes of a store that fits it, or their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.samplemodule import SampleDataModule
from phenoseq.data.samplestore import SampleManifest, pairs_by_sample
from phenoseq.data.selection import SelectedDataModule, SelectedSampleModule
from phenoseq.data.splits import UNASSIGNED, SplitConfig
from phenoseq.data.store import is_store
from phenoseq.disk import on_disk
from phenoseq.errors import DataError
from phenoseq.models.config import ImageConfig
from phenoseq.models.expression import ExpressionConfig
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.sample import SamplePhenoSeq
from phenoseq.progress import bar
from phenoseq.training.build import record_of
from phenoseq.training.cache import (
    CachedDataModule,
    CachedSampleModule,
    cache_image_tokens,
    cache_tokens,
)

Data = SelectedDataModule | SelectedSampleModule
#: RNA cells of a bag, which share the cost of encoding it.
RNA_OF_A_BAG = 8
#: Batches an epoch that few cells are still cut into, and the cells of the least and largest.
_BATCHES, _LEAST, _LARGEST = 16, 16, 128


def open_data(
    store: str | Path,
    base: PhenoSeq | SamplePhenoSeq,
    split: SplitConfig | None,
    *,
    channels: Sequence[str] | None,
    genes: Sequence[str] | None,
    seed: int,
) -> Data:
    """Return the stains and genes of a store that a model is fine-tuned on, set up.

    Batches are of about as many cells, those with RNA, for models of cells and of samples.

    Parameters
    ----------
    store
        Path of a store, of cells or of samples as the model is.
    base
        Whose split is used, where none is given, and whose size of bags.
    split, seed
        See :class:`~phenoseq.data.datamodule.StreamDataModule`.
    channels, genes
        See :class:`~phenoseq.data.selection.SelectedStore`.

    Raises
    ------
    DataError
        Where the store pairs otherwise than the model, holds other things, divides its cells or
        samples otherwise than the model was trained with, or would have it judged by those that
        trained it.
    """
    record = base.config.training
    own = SplitConfig(**record.split)  # type: ignore[arg-type]
    split = split or own
    how: dict[str, Any] = {"channels": channels, "genes": genes, "seed": seed}
    _check_pairing(store, base)
    data: Data
    if isinstance(base, PhenoSeq):
        data = SelectedDataModule(store, split, **how)
        data.setup()
    else:
        data = SelectedSampleModule(store, split, base.config.bag_size, RNA_OF_A_BAG, **how)
        data.setup()
        _check_kind(store, data.opened.manifest, base)
    if record_of(data, seed).identity == record.identity:
        _check_unseen(data, own, record.split_digest)
    size = int(np.clip(data.n_cells("train") // _BATCHES, _LEAST, _LARGEST))
    data.batch_size = size if isinstance(data, SelectedDataModule) else size // RNA_OF_A_BAG
    return data


def _check_unseen(data: Data, own: SplitConfig, digest: str) -> None:
    """Refuse to judge a model on what its base, of the same store, was trained on."""
    as_before = copy(data)
    as_before.split = own
    del as_before.opened
    as_before.setup()
    if as_before.parts.digest != digest:
        raise DataError(
            f"{data.store}: divides its cells otherwise than the base model was trained with, "
            "so that cells it has seen would be tested; prepare the store with the same options"
        )
    judged = ~np.isin(data.parts.part, ("train", UNASSIGNED))
    if seen := int((judged & (as_before.parts.part == "train")).sum()):
        unit = "cells" if isinstance(data, SelectedDataModule) else "samples"
        raise DataError(
            f"{data.store}: {seen} {unit} of validation, calibration or test trained the base "
            "model; divide the store as the base model was trained with (the default), or so that "
            "these are others"
        )


def _check_pairing(store: str | Path, base: PhenoSeq | SamplePhenoSeq) -> None:
    """Refuse a store of cells for a model of samples, and the other way round."""
    of_cells = isinstance(base, PhenoSeq)
    if not is_store(on_disk(store)) or pairs_by_sample(store) != of_cells:
        return  # where there is none, opening it says so
    if of_cells:
        raise DataError(
            f"{store}: pairs images and RNA by sample, and the model is of single cells (pairing "
            "'cell'): give it a store of images and counts of the same cells ('phenoseq prepare "
            "SOURCE'), or start from a model of samples"
        )
    raise DataError(
        f"{store}: pairs images and counts by cell, and the model is of samples (pairing "
        "'sample'): prepare the store with --pair-by sample and --sample-columns, or start from a "
        "model of single cells"
    )


def _check_kind(store: str | Path, there: SampleManifest, base: SamplePhenoSeq) -> None:
    """Refuse a store of samples that holds other things than the model reads and predicts."""
    reads = "crops" if isinstance(base.config.cells, ImageConfig) else "features"
    if there.images != reads:
        raise DataError(
            f"{store}: holds {there.images} of the image cells, and the model reads {reads}; "
            f"prepare the store from {'images' if reads == 'crops' else 'features'}"
        )
    predicts = base.config.expression
    if isinstance(predicts, ExpressionConfig):
        if there.rna != "counts":
            raise DataError(
                f"{store}: holds {there.embedding or 'genes that are no counts'}, and the model "
                "predicts counts of genes; prepare the store with raw counts (--layer counts)"
            )
    elif there.embedding != predicts.name:
        raise DataError(
            f"{store}: holds {there.embedding or 'genes'}, and the model predicts the embedding "
            f"{predicts.name} of {predicts.width} numbers; prepare the store with --embedding "
            f"{predicts.name}"
        )


def with_tokens(
    data: Data, model: PhenoSeq | SamplePhenoSeq, folder: Path
) -> StoreDataModule | SampleDataModule:
    """Encode the crops of training and validation once, and return data that holds the tokens.

    Data of features stays as it is: they have no crops to be encoded.
    """
    with bar("encoding cells") as progress:
        if isinstance(data, SelectedDataModule):
            assert isinstance(model, PhenoSeq)
            rows = np.union1d(data.parts.rows("train"), data.some("val", data.max_val))
            cache = cache_tokens(model, data.opened, rows, folder, progress=progress)
            return CachedDataModule(data, cache)
        if data.opened.manifest.images == "features":
            return data
        assert isinstance(model, SamplePhenoSeq)
        rows = np.concatenate([data.image_rows("train"), data.image_rows("val")])
        tokens = cache_image_tokens(model, data.opened, rows, folder, progress=progress)
        return CachedSampleModule(data, tokens)
