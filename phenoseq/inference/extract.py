"""Image features of every cell of some images, by a frozen network, as one AnnData."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch

from phenoseq._version import __version__
from phenoseq.data.crops import crop_order, iter_crops, outside
from phenoseq.data.readers import open_source
from phenoseq.data.source import Source
from phenoseq.data.store import is_store
from phenoseq.errors import DataError, ModelError, PhenoseqWarning
from phenoseq.inference.eightbit import (
    EightBit,
    check_eight_bit,
    fit_scale,
    warn_eight_bit,
)
from phenoseq.inference.inputs import known_columns
from phenoseq.inference.job import Field, Job, Part, Rows, digest_of_table
from phenoseq.inference.predictor import pick_device
from phenoseq.inference.table import make_table
from phenoseq.inference.writer import check_out
from phenoseq.models.features import VIT_L_16, Extractor, FeatureExtractor, load_extractor
from phenoseq.models.timm_features import load_timm

#: Cells in a batch, each of which is one image a stain; and batches in a block of a file.
BATCH, _BLOCK = 16, 64
#: The network that is torchvision's.
_PUBLISHED = "vit_l_16"


def embed(
    source: str | Path | Source,
    *,
    backbone: str,
    weights: str | Path | None = None,
    image_size: int | None = None,
    crop_pixel_size: float | None = None,
    eight_bit: EightBit | None = None,
    sample: str | None = None,
    pixel_size: float | None = None,
    format: str | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    yes: bool = False,
) -> ad.AnnData:
    """Make features of every cell of some images by a frozen network, one token a cell and channel.

    Each stain of a cell's crop is a grey image to the network, three equal channels; the token is
    the network's pooled feature of it.

    Parameters
    ----------
    source
        A folder or an opened source, as for :func:`phenoseq.predict`.
    backbone
        Any network of timm by its name, whose images are standardised as those that it was trained
        on were; or ``"vit_l_16"``, torchvision's, as the published PhenoSeq takes it: five stains
        of Cell Painting, pixels divided by 255 and nothing else.
    weights
        File of its weights, ``.pth`` or ``.safetensors``; by default those that are published.
    image_size
        Side of the crops in pixels; by default, and always for ``"vit_l_16"``, the network's own.
    crop_pixel_size
        Micrometres a pixel of the crops; by default the source's own, so that nothing is resampled.
    eight_bit
        How pixels become 8 bits, which must be said where they are not: ``"full"`` makes the full
        range of their type to 0..255, ``"percentile"`` makes 0 to the 99.9th percentile of each
        stain, over all pixels of the source, to 0..255 and clips what is brighter.
    sample
        A column of the source's ``obs`` to keep, besides positions and ``Metadata_*``.
    pixel_size, format, device, out
        As for :func:`phenoseq.predict`: a file is written block by block, and a run that was
        stopped goes on.
    yes
        Download the weights where they are not there yet.

    Returns
    -------
    AnnData ``(n_obs, C * D)``: ``X`` float32, of which ``X.reshape(n_obs, C, D)`` are the tokens;
    ``var`` with ``channel``; ``obs`` with positions, ``Metadata_*`` and ``cut_by_border``;
    ``obsm["spatial"]``; ``uns["phenoseq"]`` how it was made.

    Raises
    ------
    DataError
        Where the source cannot be used as it is.
    ModelError
        Where there is no such network, or its weights cannot be had; it says which file is wanted.
    """
    path = check_out(out) if out is not None else None
    if not isinstance(source, Source):
        if is_store(source):
            raise DataError(f"{source}: a store of crops; give the folder of images it is made of")
        source = open_source(source, format=format, pixel_size=pixel_size)
    published = backbone == _PUBLISHED
    channels = VIT_L_16.channels if published else source.channels
    check_source(source, channels, eight_bit=eight_bit, sample=sample)
    if not published:
        extractor: Extractor = load_timm(
            backbone, channels, image_size=image_size, weights=weights, yes=yes
        )
    elif image_size is not None:
        raise ModelError(f"{backbone}: takes crops of {VIT_L_16.image_size} pixels, no others")
    else:
        extractor = load_extractor(weights=weights, yes=yes)
    job = feature_job(
        source,
        extractor,
        pixel_size=crop_pixel_size,
        eight_bit=eight_bit,
        sample=sample,
        device=device,
    )
    return make_table(job, path, "making features")


def check_source(
    source: Source,
    channels: Sequence[str],
    *,
    eight_bit: EightBit | None = None,
    sample: str | None = None,
) -> None:
    """Check, before any weights are fetched, that features can be made of a source.

    Raises
    ------
    DataError
        Where it has no cells, lacks one of the stains ``channels`` or the column ``sample`` of
        ``obs``, or its pixels need a choice of ``eight_bit``.
    """
    if source.obs.empty:
        raise DataError(f"{source.name}: zero cells; there is nothing to make features of")
    missing = [name for name in channels if name not in source.channels]
    if missing:
        raise DataError(
            f"{source.name}: lacks the stain(s) {missing}; the features are of {list(channels)}, "
            f"all of them, and here are {list(source.channels)}"
        )
    if sample is not None and sample not in source.obs:
        raise DataError(
            f"{source.name}: its cells have no {sample!r}; they have {list(source.obs.columns)}"
        )
    check_eight_bit(source, eight_bit)


def feature_job(
    source: Source,
    extractor: Extractor,
    *,
    pixel_size: float | None = None,
    eight_bit: EightBit | None = None,
    sample: str | None = None,
    device: str = "auto",
    batch_size: int = BATCH,
) -> Job:
    """Lay out the features of every cell that lies inside its image.

    A cell's crop has the extractor's ``image_size`` pixels a side, its centroid in the middle.
    Crops that leave the image are reflected there and flagged. A field that cannot be read is
    left out with its cells, in a warning and in the record.

    Parameters
    ----------
    source
        Images with all stains of the extractor, and cells.
    extractor
        What makes the features, see :func:`phenoseq.models.features.load_extractor` and
        :func:`phenoseq.models.timm_features.load_timm`.
    pixel_size
        Micrometres a pixel of the crops; by default the source's own, so that nothing is resampled.
    eight_bit
        How pixels become 8 bits, which must be said where they are not: ``"full"`` makes the full
        range of their type to 0..255, ``"percentile"`` makes 0 to the 99.9th percentile of each
        stain, over all pixels of the source, to 0..255 and clips what is brighter.
    sample
        Column of ``source.obs`` that says of which sample a cell is, such as ``Metadata_Well``;
        kept, and its absence is an error before the work and not after.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
    batch_size
        Cells at once. Features do not depend on it beyond rounding.

    Returns
    -------
    The job of an AnnData ``(n_obs, n_channels * width)``: ``X`` float32, ``var`` with ``channel``,
    ``obs`` with positions in micrometres, ``Metadata_*`` and ``cut_by_border``,
    ``obsm["spatial"]``, and ``uns["phenoseq"]`` how it was made. ``X.reshape(n_obs, n_channels,
    width)`` are the tokens of each cell and channel.

    Raises
    ------
    DataError
        Where the source lacks cells, a stain or the column ``sample``, or no field can be read.
    """
    check_source(source, extractor.channels, eight_bit=eight_bit, sample=sample)
    size = source.pixel_size if pixel_size is None else pixel_size
    if not 0 < size < 1000:
        raise DataError(f"{source.name}: a pixel size of {size} micrometres cannot be right")
    where = pick_device(device)
    away = outside(source)
    skipped = list(source.obs.index[away])
    if skipped:
        _warn(
            f"{source.name}: {len(skipped)} cells lie outside the image and are left out, e.g. "
            f"{skipped[:3]} (recorded in uns)"
        )
    source = replace(source, obs=source.obs[~away], counts=None, var=None)
    places = [source.channels.index(name) for name in extractor.channels]
    failed: dict[str, str] = {}
    scale = fit_scale(source, places, eight_bit, failed.__setitem__)
    warn_eight_bit(source, scale, published=isinstance(extractor, FeatureExtractor))
    extractor = extractor.to(where).eval()
    field = source.obs["field"].astype(str).to_numpy()

    def compute(rows: Rows) -> Iterator[Part]:
        darkest, brightest = np.full(len(places), 255), np.zeros(len(places))
        lost = np.isin(field[rows], list(failed))
        for name in np.unique(field[rows[lost]]):
            yield rows[lost & (field[rows] == name)], f"{name}: {failed[name]}"
        broken: list[Part] = []
        for batch in iter_crops(
            source,
            size,
            extractor.image_size,
            batch_size=batch_size,
            rows=rows[~lost],
            failed=lambda some, why: broken.append((some, str(why))),
        ):
            crops = scale(batch.images[:, places])
            with torch.inference_mode():
                features = extractor(torch.from_numpy(crops).to(where)).cpu().numpy()
            yield batch.rows, {"X": features, "obs/cut_by_border": batch.cut}
            yield from broken
            broken.clear()
            darkest = np.minimum(darkest, crops.min(axis=(0, 2, 3)))
            brightest = np.maximum(brightest, crops.max(axis=(0, 2, 3)))
        yield from broken
        flat = [extractor.channels[c] for c in np.flatnonzero(darkest == brightest)]
        if flat:
            _warn(
                f"{source.name}: the stain(s) {flat} have one value everywhere in all crops; their "
                "features say nothing of the cells"
            )

    record = {
        "phenoseq_version": __version__,
        "torch_version": str(torch.__version__),
        "source": source.name,
        "source_identity": source.identity,
        "source_pixel_size": source.pixel_size,
        "extractor": extractor.name,
        "weights_sha256": extractor.sha256,
        "channels": list(extractor.channels),
        "crop_px": extractor.image_size,
        "crop_pixel_size": size,
        "pixel_type": source.dtype.name,
        "eight_bit": scale.mode,
        "eight_bit_top": [float(top) for top in scale.top],
        "skipped_cells": skipped,
        "problems": [str(problem) for problem in source.problems],
    }
    obs = source.obs[known_columns(source.obs, sample)]
    names = [f"{c}_{k}" for c in extractor.channels for k in range(extractor.width)]
    channel = np.repeat(extractor.channels, extractor.width)
    return Job(
        fields=(Field("X", extractor.n_features), Field("obs/cut_by_border", 0, "bool")),
        order=crop_order(source, size, extractor.image_size),
        block=_BLOCK * batch_size,
        compute=compute,
        obs=obs,
        var=pd.DataFrame({"channel": channel}, index=pd.Index(names, name="feature")),
        uns={"phenoseq": record},
        plan=record | {"cells": digest_of_table(obs), "weights": extractor.digest()},
    )


def _warn(message: str) -> None:
    warnings.warn(message, PhenoseqWarning, stacklevel=3)
