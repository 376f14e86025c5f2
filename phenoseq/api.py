"""The call that most people need: predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
from numpy.typing import NDArray

from phenoseq.data.backed import Cells, is_anndata
from phenoseq.data.readers import open_source
from phenoseq.data.source import Source
from phenoseq.data.store import Store, is_store
from phenoseq.errors import DataError, ModelError
from phenoseq.inference.bagged import bag_job, describe_features, reads
from phenoseq.inference.eightbit import EightBit
from phenoseq.inference.extract import check_source, feature_job
from phenoseq.inference.inputs import Inputs, open_inputs
from phenoseq.inference.predictor import image_job
from phenoseq.inference.samples import sample_job
from phenoseq.inference.table import make_table
from phenoseq.inference.writer import check_out
from phenoseq.models.config import ImageConfig
from phenoseq.models.features import Extractor, load_extractor
from phenoseq.models.load import Model
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.models.sample import SamplePhenoSeq
from phenoseq.zoo.registry import load_model


def predict(
    source: str | Path | Source | Store | NDArray[Any] | ad.AnnData,
    *,
    model: str | Path | Model,
    n_samples: int = 16,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    channels: Sequence[str] | None = None,
    pixel_size: float | None = None,
    format: str | None = None,
    cells: str | Path | pd.DataFrame | None = None,
    keep_draws: bool = False,
    sample: str | None = None,
    published_steps: bool = False,
    eight_bit: EightBit | None = None,
    extractor: str | Path | Extractor | None = None,
) -> ad.AnnData:
    """Predict the gene expression of every cell of some images, or embeddings of samples.

    A model of images predicts the genes of each cell. A model of imaging features (its ``pairing``
    is ``"sample"``) predicts RNA embeddings of each sample, from bags of its cells.

    Parameters
    ----------
    source
        A Xenium output folder (with or without its count matrix) or any other layout of
        :data:`phenoseq.data.readers.READERS`, a store made by ``phenoseq prepare``, an array of
        crops ``(n, C, H, W)`` with one cell in the middle of each, or an opened source or store.
        Where the pixel type is not that of the training images, each stain is scaled by
        percentiles of the whole source. For a model of features an AnnData of them, one row a
        cell, or its ``.h5ad`` or ``.zarr`` file, which is never read whole; or images, of which
        the features are made first.
    model
        A name of the zoo, a folder, or a loaded model.
    n_samples
        Draws a cell, or a bag.
    steps
        Evaluations of the denoiser a draw; by default the model's own number.
    seed
        Of the draws. They depend on (seed, cell id) alone, and not on batches or order. Which cells
        share a bag depends on (seed, sample, cell ids).
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
    out
        ``.h5ad`` or ``.zarr`` to write, whole or not at all, block by block, so that memory does
        not grow with the number of cells. A run that was stopped goes on when it is called again.
        The table returned is open on the file: ``X`` and layers are read where they are sliced,
        and ``.to_memory()`` reads them all.
    channels
        For an array: the stain of each channel.
    pixel_size
        Micrometres a pixel: for an array, or a folder that does not say.
    format
        For a folder: its layout, the name of a reader, where it should not be guessed.
    cells
        For a folder: CSV (or table indexed by ``cell_id``) of ``cell_id``, ``x_centroid``,
        ``y_centroid`` in micrometres, the positions to predict at in place of the folder's own;
        and ``field``, the name of their image, where there are several. Other columns are kept.
    keep_draws
        Keep every draw, as ``layers["draw_0"]`` and so on; those of samples are always kept.
    sample
        For a model of features: the column of ``obs`` that says which sample a cell is of.
    published_steps
        For a model of features: sample as the published project does, to reproduce its numbers; see
        :meth:`phenoseq.models.published.PublishedPhenoSeq.generate`.
    eight_bit, extractor
        For a model of features and a source of images: how pixels become 8 bits, see
        :func:`phenoseq.embed`; and the network that makes the features, or the file of its
        weights, by default where torchvision keeps them.

    Returns
    -------
    From images AnnData ``(n_obs, n_vars)``, every value on the scale of log1p of counts at the
    median library size of the training cells:

    - ``X`` expected expression: the mean of what a measurement would give, float32;
    - ``layers["std"]``, ``["q05"]``, ``["q95"]`` of the predictive distribution of a measured
      value, counting noise included, at the cell's predicted library size;
    - ``layers["draw"]`` one draw of a measured profile (CSR), counts divided by their own sum;
    - ``obsm["X_phenoseq"]`` mean latent; ``obsm["spatial"]`` micrometres;
    - ``obs`` positions, ``Metadata_*``, ``ood_score`` (about 1 for images like the training ones),
      ``draw_spread`` (1 where draws differ as much as training cells do, 0 where they agree),
      ``missing_channels``, ``saturated``, ``cut_by_border``;
    - ``var`` indexed by Ensembl id, with ``symbol``, and ``reliability``, the correlation over
      validation cells, with its 95% interval ``reliability_low`` to ``reliability_high``;
    - ``uns["phenoseq"]`` how it was made.

    From features AnnData ``(n_bags, D)`` of embeddings in their own scale, each as of a cell of the
    sample, and not of any one imaged cell:

    - ``layers["draw_0"]`` and so on the draws, float32; ``X`` is the first, nothing is averaged;
    - ``obs`` the sample, its ``Metadata_*`` that are the same for all its cells, ``n_cells`` and
      ``cells`` (JSON lists of ids) of the bag's own, ``filled`` and ``filled_with`` for a bag that
      was short, ``n_cut_by_border`` of its own cells where images were given, ``ood_score`` (1 for
      features that spread like the training ones);
    - ``uns["phenoseq"]`` how it was made, and where the weights came from.

    Raises
    ------
    DataError
        Where the source cannot be used as it is.
    ModelError
        Where there is no such model, or it does not fit.

    Examples
    --------
    >>> import phenoseq
    >>> from phenoseq.data.simulate import simulate_plate
    >>> plate = simulate_plate(seed=1, wells_per_treatment=1, sites_per_well=1, cells_per_site=4)
    >>> prediction = phenoseq.predict(plate.source, model="simulated-plate", n_samples=2)
    >>> prediction.shape, sorted(prediction.layers)
    ((16, 60), ['draw', 'q05', 'q95', 'std'])
    """
    path = check_out(out) if out is not None else None
    name = str(model) if isinstance(model, str | Path) else ""
    loaded = load_model(model) if isinstance(model, str | Path) else model
    how: dict[str, Any] = {"n_samples": n_samples, "steps": steps, "seed": seed, "device": device}
    how["name"] = name
    if isinstance(loaded, PublishedPhenoSeq):
        how["published_steps"] = published_steps
    else:
        _refuse({"published_steps": published_steps or None}, "this network")
        how["keep_draws"] = keep_draws
    if not isinstance(loaded, PhenoSeq) and not _of_crops(loaded):
        _refuse({"channels": channels, "cells": cells}, "a model of imaging features")
        if is_table(source):
            given = {"pixel_size": pixel_size, "format": format, "eight_bit": eight_bit}
            _refuse(given | {"extractor": extractor}, "a table of features")
        else:
            source = _features_of(
                source,
                loaded,
                sample,
                pixel_size=pixel_size,
                format=format,
                eight_bit=eight_bit,
                extractor=extractor,
                device=device,
            )
        return _predict_bags(source, loaded, sample, path, **how)
    of_cells = {"sample": sample} if isinstance(loaded, PhenoSeq) else {}
    _refuse({**of_cells, "eight_bit": eight_bit, "extractor": extractor}, "a model of images")
    if is_table(source):
        raise DataError(
            f"{_called(source)}: a table of features, but {name or 'this model'} reads images: "
            "give their folder, store or crops, or choose a model of imaging features "
            "('phenoseq models' lists them)"
        )
    inputs = open_inputs(
        source,
        _image_of(loaded),
        channels=channels,
        pixel_size=pixel_size,
        format=format,
        cells=cells,
    )
    if isinstance(loaded, PhenoSeq):
        return make_table(image_job(loaded, inputs, **how), path, "predicting")
    assert isinstance(loaded, SamplePhenoSeq)
    job = sample_job(loaded, inputs, _named(sample, inputs), **how)
    return make_table(job, path, "predicting")


def _of_crops(model: Model) -> bool:
    """Tell whether a model of samples reads crops."""
    return isinstance(model, SamplePhenoSeq) and isinstance(model.config.cells, ImageConfig)


def _image_of(model: Model) -> ImageConfig:
    image = model.config.image if isinstance(model, PhenoSeq) else model.config.cells  # type: ignore[union-attr]
    assert isinstance(image, ImageConfig)
    return image


def _named(sample: str | None, cells: Cells | Inputs) -> str:
    if sample is None:
        raise DataError(
            f"{cells.name}: say which sample each cell is of: sample= (--sample) names a column "
            f"of obs, one of {[str(column) for column in cells.obs.columns][:20]}"
        )
    return sample


def _predict_bags(
    source: Any,
    model: PublishedPhenoSeq | SamplePhenoSeq,
    sample: str | None,
    path: Path | None,
    **how: Any,
) -> ad.AnnData:
    features = Cells(source)
    named = _named(sample, features)
    if isinstance(model, PublishedPhenoSeq):
        job = bag_job(model, features, named, **how)
    else:
        job = sample_job(model, features, named, **how)
    del features  # with the names of all cells, before the work
    return make_table(job, path, "predicting")


def _features_of(
    source: Any,
    model: PublishedPhenoSeq | SamplePhenoSeq,
    sample: str | None,
    *,
    pixel_size: float | None,
    format: str | None,
    eight_bit: EightBit | None,
    extractor: str | Path | Extractor | None,
    device: str,
) -> ad.AnnData:
    """Make the features that a model reads from images and positions of cells."""
    wanted = reads(model)
    if not isinstance(source, str | Path | Source) or is_store(str(source)):
        raise DataError(
            f"{_called(source)}: this model reads imaging features of cells: give a folder of "
            f"images and positions, or a table of {wanted.width} features a cell: "
            f"{describe_features(wanted)}"
        )
    if not isinstance(source, Source):
        source = open_source(source, format=format, pixel_size=pixel_size)
    if sample is None:
        raise DataError(
            f"{source.name}: say which sample each cell is of: sample= (--sample) names a column "
            f"of obs, one of {[str(c) for c in source.obs if str(c).startswith('Metadata_')]}"
        )
    check_source(source, wanted.channels, eight_bit=eight_bit, sample=sample)
    if not isinstance(extractor, Extractor):
        extractor = load_extractor(weights=extractor)
    made = extractor.n_features
    if extractor.channels != wanted.channels or made != wanted.width:
        raise ModelError(
            f"{extractor.name}: makes {made} features of {list(extractor.channels)}, "
            f"the model reads {wanted.width}: {describe_features(wanted)}"
        )
    job = feature_job(source, extractor, eight_bit=eight_bit, sample=sample, device=device)
    return make_table(job, None, "making features")


def _refuse(given: dict[str, Any], kind: str) -> None:
    """Refuse options that have no meaning for a kind of model."""
    for option, value in given.items():
        if value is not None:
            raise DataError(f"{option!r} has no meaning for {kind}; leave it out")


def is_table(source: Any) -> bool:
    """Tell whether a source is an AnnData, or a file of one."""
    if isinstance(source, ad.AnnData):
        return True
    path = Path(source) if isinstance(source, str | Path) else Path()
    return path.suffix == ".h5ad" or (path.suffix == ".zarr" and is_anndata(path))


def _called(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__} given"
