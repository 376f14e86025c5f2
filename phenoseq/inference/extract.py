"""Image features of every cell of some images, by a frozen extractor, as one AnnData."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
import torchvision
from numpy.typing import NDArray

from phenoseq._version import __version__
from phenoseq.data.crops import by_field, iter_crops, outside
from phenoseq.data.source import Source
from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.inference.eightbit import (
    EightBit,
    Scale,
    check_eight_bit,
    fit_scale,
    warn_eight_bit,
)
from phenoseq.inference.predictor import pick_device
from phenoseq.models.features import FeatureExtractor

#: Cells in a batch; each is one image a stain.
BATCH = 16


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


def image_features(
    source: Source,
    extractor: FeatureExtractor,
    *,
    pixel_size: float | None = None,
    eight_bit: EightBit | None = None,
    sample: str | None = None,
    device: str = "auto",
    batch_size: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> ad.AnnData:
    """Make the features of every cell that lies inside its image.

    A cell's crop has the extractor's ``image_size`` pixels a side, its centroid in the middle.
    Crops that leave the image are reflected there and flagged. A field that cannot be read is
    left out with its cells, in a warning and in the record.

    Parameters
    ----------
    source
        Images with all stains of the extractor, and cells.
    extractor
        What makes the features, see :func:`phenoseq.models.features.load_extractor`.
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
    progress
        Called with (cells done, cells in all).

    Returns
    -------
    AnnData ``(n_obs, n_channels * hidden_dim)``: ``X`` float32, ``var`` with ``channel``, ``obs``
    with positions in micrometres, ``Metadata_*`` and ``cut_by_border``, ``obsm["spatial"]``, and
    ``uns["phenoseq"]`` how it was made. Nothing is written.

    Raises
    ------
    DataError
        As :func:`check_source`; where no field can be read, or most cells lie outside the images.
    """
    config = extractor.config
    check_source(source, config.channels, eight_bit=eight_bit, sample=sample)
    if pixel_size is not None and not 0.01 < pixel_size < 100:
        raise DataError(f"crops: a pixel size of {pixel_size} micrometres cannot be right")
    where = pick_device(device)
    away = outside(source)
    if away.any():
        _warn(
            f"{source.name}: {away.sum()} cells lie outside the image and are left out, e.g. "
            f"{list(source.obs.index[away][:3])} (recorded in uns)"
        )
    failed: dict[str, str] = {}
    places = [source.channels.index(name) for name in config.channels]
    scale = fit_scale(source, places, eight_bit, failed.__setitem__)
    warn_eight_bit(source, scale)

    obs = source.obs[~away]
    extractor = extractor.to(where).eval()
    x = np.empty((len(obs), config.n_features), dtype=np.float32)
    cut = np.zeros(len(obs), dtype=bool)
    darkest, brightest = np.full(len(places), 255), np.zeros(len(places))
    size = source.pixel_size if pixel_size is None else pixel_size
    done = 0
    for name, rows in by_field(obs):
        if name in failed:
            continue
        one = replace(source, obs=obs.iloc[rows])
        try:
            for batch in iter_crops(one, size, config.image_size, batch_size=batch_size):
                crops = scale(batch.images[:, places])
                with torch.inference_mode():
                    features = extractor(torch.from_numpy(crops).to(where))
                x[rows[batch.rows]] = features.cpu().numpy()
                cut[rows[batch.rows]] = batch.cut
                darkest = np.minimum(darkest, crops.min(axis=(0, 2, 3)))
                brightest = np.maximum(brightest, crops.max(axis=(0, 2, 3)))
                done += len(batch.rows)
                if progress is not None:
                    progress(done, len(obs))
        except DataError as error:
            failed[name] = str(error)
    good = ~obs["field"].isin(list(failed)).to_numpy()
    if not good.any():
        raise DataError(next(iter(failed.values())))
    if failed:
        _warn(
            f"{source.name}: {len(failed)} of {len(source.fields)} fields are left out (recorded "
            f"in uns), e.g. {next(iter(failed.values()))}"
        )
    flat = [config.channels[c] for c in np.flatnonzero(darkest == brightest)]
    if flat:
        _warn(
            f"{source.name}: the stain(s) {flat} have one value everywhere in all crops; their "
            "features say nothing of the cells"
        )
    if not good.all():
        x, cut, obs = x[good], cut[good], obs[good]
    record = _record(source, extractor, scale, size)
    record["skipped_cells"] = list(source.obs.index[away])
    before = {problem.where: problem.reason for problem in source.problems}
    record["problems"] = [f"{where}: {why}" for where, why in {**before, **failed}.items()]
    return _anndata(x, obs, cut, extractor, record, sample)


def _record(
    source: Source, extractor: FeatureExtractor, scale: Scale, pixel_size: float
) -> dict[str, Any]:
    config = extractor.config
    return {
        "phenoseq_version": __version__,
        "torch_version": str(torch.__version__),
        "torchvision_version": str(torchvision.__version__),
        "source": source.name,
        "source_identity": source.identity,
        "source_pixel_size": source.pixel_size,
        "extractor": config.name,
        "weights_sha256": extractor.sha256,
        "channels": list(config.channels),
        "crop_px": config.image_size,
        "crop_pixel_size": pixel_size,
        "pixel_type": source.dtype.name,
        "eight_bit": scale.mode,
        "eight_bit_top": [float(top) for top in scale.top],
    }


def _anndata(
    x: NDArray[np.float32],
    source_obs: pd.DataFrame,
    cut: NDArray[np.bool_],
    extractor: FeatureExtractor,
    record: dict[str, Any],
    sample: str | None,
) -> ad.AnnData:
    kept = [
        name
        for name in source_obs
        if name in ("field", "x_centroid", "y_centroid", sample)
        or str(name).startswith("Metadata_")
    ]
    obs = source_obs[kept].copy()
    obs["cut_by_border"] = cut
    config = extractor.config
    channel = np.repeat(config.channels, config.hidden_dim)
    names = [f"{c}_{k}" for c in config.channels for k in range(config.hidden_dim)]
    var = pd.DataFrame({"channel": channel}, index=pd.Index(names, name="feature"))
    spatial = obs[["x_centroid", "y_centroid"]].to_numpy(np.float64)
    return ad.AnnData(x, obs=obs, var=var, obsm={"spatial": spatial}, uns={"phenoseq": record})


def _warn(message: str) -> None:
    warnings.warn(message, PhenoseqWarning, stacklevel=3)
