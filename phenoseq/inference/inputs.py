"""What can be predicted from, as one thing: cells with ids, and crops in model pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from phenoseq.channels import canonical_channels, match_channels
from phenoseq.data.crops import CropBatch, crop_order, iter_crops, outside, resample
from phenoseq.data.readers import open_source, read_cells
from phenoseq.data.readers.cells import check_cells, place_cells
from phenoseq.data.source import Source
from phenoseq.data.store import Store, is_store
from phenoseq.errors import DataError
from phenoseq.models.config import ImageConfig

Rows = NDArray[np.int64]
#: Cells whose pixels tell the intensity scale of images of another pixel type.
_SCALE_CELLS = 512
#: Cells read from a store at once.
_READ = 2048


@dataclass(frozen=True)
class Inputs:
    """Cells to predict.

    Attributes
    ----------
    name, identity
        What they are called, and a digest of them (for an array of up to 512 of its cells).
    obs
        One row a cell, indexed by cell id: positions and ``Metadata_*``, and all columns of a table
        of cells that the user gave.
    placed
        For each stain of the model its channel in the crops, or None where it is missing.
    dtype
        Pixel type.
    gain
        For each stain of the model what its pixels are multiplied by; ones where the pixel type is
        that of the training images.
    skipped
        Cells that cannot be predicted since they lie outside the image.
    unread
        Cells of the user's table whose field could not be read.
    problems
        Fields that could not be read, each with the reason.
    order
        All rows of ``obs``, in the order in which their crops are best read.
    crops
        ``crops(rows, batch_size)`` yields crops of rows in a part of this order, at the model's
        pixel size and crop size; rows whose image cannot be decoded come with the reason instead.
    """

    name: str
    identity: str
    obs: pd.DataFrame
    placed: tuple[int | None, ...]
    dtype: np.dtype[Any]
    gain: NDArray[np.float32]
    skipped: tuple[str, ...]
    unread: tuple[str, ...]
    problems: tuple[str, ...]
    order: Rows
    crops: Callable[[Rows, int], Iterator[CropBatch | tuple[Rows, str]]]


def open_inputs(
    source: str | Path | Source | Store | NDArray[Any],
    image: ImageConfig,
    *,
    channels: Sequence[str] | None = None,
    pixel_size: float | None = None,
    format: str | None = None,
    cells: str | Path | pd.DataFrame | None = None,
    rows: NDArray[np.int64] | None = None,
) -> Inputs:
    """Open whatever a user gives to ``predict``; see :func:`phenoseq.predict`.

    ``rows`` are the cells of a store to predict, all by default.
    """
    if format is not None and not _is_folder(source):
        raise DataError("'format' is the layout of a folder, file or URL of images; leave it out")
    if isinstance(source, np.ndarray):
        if cells is not None:
            raise DataError("an array has one crop a cell already; 'cells' goes with a folder")
        return _from_array(source, image, channels, pixel_size)
    if channels is not None:
        raise DataError("'channels' names the channels of an array; this source names its own")
    given = None if cells is None else _given(cells)
    if isinstance(source, str | Path):
        if _is_folder(source):
            source = open_source(source, format=format, pixel_size=pixel_size, cells=cells is None)
        else:
            source = Store(source)
    elif pixel_size is not None:
        raise DataError("'pixel_size' goes with an array or a folder; this source has its own")
    if isinstance(source, Store):
        if cells is not None:
            raise DataError(
                f"{source.path}: a store holds the crops of its own cells; to predict at other "
                "positions, give the folder of images"
            )
        return _from_store(source, image, np.arange(len(source)) if rows is None else rows)
    return _from_source(source, image, given)


def _is_folder(source: Any) -> bool:
    """Tell whether a source is a place that a reader opens."""
    return isinstance(source, str | Path) and not is_store(source)


def _from_source(
    source: Source, image: ImageConfig, given: tuple[pd.DataFrame, str] | None
) -> Inputs:
    unread: list[str] = []
    if given is not None:
        source, unread = place_cells(source, *given)
    away = outside(source)
    skipped = tuple(source.obs.index[away])
    source = replace(source, obs=source.obs[~away], counts=None, var=None)
    placed = match_channels(source.channels, image.channels, source.name)
    gain = np.ones(len(image.channels), dtype=np.float32)
    if source.dtype.name != image.dtype:
        some = replace(source, obs=source.obs.iloc[_some(source.obs.index)])
        lost: list[str] = []
        each = iter_crops(
            some, image.pixel_size, image.crop_px, failed=lambda rows, why: lost.append(str(why))
        )
        pixels = [batch.images for batch in each]
        if not pixels:
            raise DataError(lost[0])
        gain = _gain(_p999(np.concatenate(pixels)), placed, image)

    def crops(rows: Rows, batch_size: int) -> Iterator[CropBatch | tuple[Rows, str]]:
        failed: list[tuple[Rows, str]] = []
        for batch in iter_crops(
            source,
            image.pixel_size,
            image.crop_px,
            batch_size=batch_size,
            rows=rows,
            failed=lambda some, why: failed.append((some, str(why))),
        ):
            yield batch
            yield from failed
            failed.clear()
        yield from failed

    return Inputs(
        source.name,
        source.identity,
        source.obs if given is not None else source.obs[known_columns(source.obs)],
        tuple(placed),
        source.dtype,
        gain,
        skipped,
        tuple(unread),
        tuple(f"{p} ({p.cells} cells)" if p.cells else str(p) for p in source.problems),
        crop_order(source, image.pixel_size, image.crop_px),
        crops,
    )


def known_columns(obs: pd.DataFrame, *more: str | None) -> list[str]:
    """Return the columns of a source's cells that a result keeps: positions, metadata, and more."""
    named = ("field", "x_centroid", "y_centroid", *more)
    return [c for c in obs if c in named or str(c).startswith("Metadata_")]


def _given(cells: str | Path | pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return a user's table of cells, with all its columns as they can be written, and its name."""
    frame = isinstance(cells, pd.DataFrame)
    obs = check_cells(cells, "the table 'cells'") if frame else read_cells(cells)
    where = "the table 'cells'" if frame else str(cells)
    bad = [name for name in obs if not isinstance(name, str) or "/" in name]
    if bad:
        raise DataError(f"{where}: columns {bad}: names of columns are text without '/'")
    for name in obs.columns.drop("field", errors="ignore"):
        if not pd.api.types.is_numeric_dtype(obs[name]):  # text with holes can be written so
            text = obs[name].astype(object).map(str, na_action="ignore")
            obs[name] = text.astype("category")
    return obs, where


def _from_store(store: Store, image: ImageConfig, rows: NDArray[np.int64]) -> Inputs:
    manifest = store.manifest
    side = _side(manifest.crop_px, manifest.pixel_size, image, str(store.path))
    placed = match_channels(manifest.channels, image.channels, str(store.path))
    gain = np.ones(len(image.channels), dtype=np.float32)
    if manifest.dtype != image.dtype:
        tops = [manifest.channel_stats[name]["p999"] for name in manifest.channels]
        gain = _gain(np.array(tops), placed, image)

    def crops(places: Rows, batch_size: int) -> Iterator[CropBatch]:
        at_once = max(_READ // batch_size, 1) * batch_size
        for start in range(0, len(places), at_once):
            some = places[start : start + at_once]
            read = store.take(rows[some])
            for at in range(0, len(some), batch_size):
                fitted = _fit(read[at : at + batch_size], side, image.crop_px)
                none = np.zeros(len(fitted), dtype=bool)
                yield CropBatch(some[at : at + batch_size], fitted, none)

    obs = store.obs().iloc[rows]
    return Inputs(
        str(store.path),
        manifest.identity,
        obs[known_columns(obs)],
        tuple(placed),
        np.dtype(manifest.dtype),
        gain,
        (),
        (),
        tuple(f"{p['where']}: {p['reason']}" for p in manifest.problems),
        np.argsort(rows, kind="stable"),
        crops,
    )


def _from_array(
    array: NDArray[Any],
    image: ImageConfig,
    channels: Sequence[str] | None,
    pixel_size: float | None,
) -> Inputs:
    name = f"array of shape {array.shape}"
    if array.ndim != 4 or array.shape[2] != array.shape[3]:
        raise DataError(f"{name}: crops are (n, C, H, W) with H equal to W")
    if not len(array):
        raise DataError(f"{name}: zero cells; there is nothing to predict")
    if channels is None or pixel_size is None:
        raise DataError(
            f"{name}: say what it holds: channels=[...], one stain a channel, e.g. "
            f"{list(image.channels)}, and pixel_size= in micrometres"
        )
    if len(channels) != array.shape[1]:
        raise DataError(f"{name}: has {array.shape[1]} channels, but {len(channels)} are named")
    names = canonical_channels(channels, name)
    if np.issubdtype(array.dtype, np.floating):
        broken = np.flatnonzero(~np.isfinite(array).all(axis=(1, 2, 3)))
        if len(broken):
            raise DataError(
                f"{name}: NaN or infinite pixels in {len(broken)} cells, the first at index "
                f"{broken[0]}; remove these cells or mend them"
            )
    elif not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{name}: pixels of type {array.dtype}; give integers or floats")
    side = _side(array.shape[-1], pixel_size, image, name)
    placed = match_channels(names, image.channels, name)
    obs = pd.DataFrame(index=pd.Index([str(i) for i in range(len(array))], name="cell_id"))
    gain = np.ones(len(image.channels), dtype=np.float32)
    if array.dtype.name != image.dtype:
        gain = _gain(_p999(array[_some(obs.index)]), placed, image)

    def crops(rows: Rows, batch_size: int) -> Iterator[CropBatch]:
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            fitted = _fit(array[some], side, image.crop_px)
            yield CropBatch(some, fitted, np.zeros(len(some), dtype=bool))

    order = np.arange(len(array))
    digest = hashlib.sha256(f"{name} {array.dtype} {channels} {pixel_size}".encode())
    digest.update(np.ascontiguousarray(array[_some(obs.index)]).tobytes())
    return Inputs(
        name, digest.hexdigest(), obs, tuple(placed), array.dtype, gain, (), (), (), order, crops
    )


def _side(crop_px: int, pixel_size: float, image: ImageConfig, where: str) -> int:
    """Return how many of the crop's pixels make the model's width."""
    if not 0 < pixel_size < 1000:
        raise DataError(f"{where}: a pixel size of {pixel_size} micrometres cannot be right")
    wanted = image.crop_px * image.pixel_size
    side = round(wanted / pixel_size)
    if not 1 <= side <= crop_px:
        raise DataError(
            f"{where}: crops are {crop_px * pixel_size:.1f} um wide, the model looks at "
            f"{wanted:.1f} um; cut wider crops ({side} pixels of {pixel_size} um)"
        )
    return side


def _fit(crops: NDArray[Any], side: int, crop_px: int) -> NDArray[Any]:
    """Cut the middle ``side`` pixels and resample them to ``crop_px``."""
    start = (crops.shape[-1] - side) // 2
    return resample(crops[..., start : start + side, start : start + side], crop_px)


def _some(cells: pd.Index) -> NDArray[np.int64]:
    """Return the positions of up to 512 cells, chosen by their ids whatever their order."""
    digests = [hashlib.sha256(str(cell).encode()).digest() for cell in cells]
    chosen = sorted(range(len(cells)), key=digests.__getitem__)[:_SCALE_CELLS]
    return np.sort(np.array(chosen, dtype=np.int64))


def _p999(crops: NDArray[Any]) -> NDArray[np.float64]:
    return np.quantile(crops.astype(np.float32), 0.999, axis=(0, 2, 3)).astype(np.float64)


def _gain(
    top: NDArray[np.float64], placed: Sequence[int | None], image: ImageConfig
) -> NDArray[np.float32]:
    """Return the gains that bring each stain's 99.9th percentile to that of the training images."""
    gain = [
        1.0 if place is None or top[place] <= 0 else wanted / top[place]
        for place, wanted in zip(placed, image.p999, strict=True)
    ]
    return np.array(gain, dtype=np.float32)
