"""Square crops around cells, at a stated pixel size, from images of any size in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from phenoseq.data.source import FieldImage, Source
from phenoseq.errors import DataError

#: Side of the regions that are read at a time, in pixels of the level read.
REGION = 4096
#: Largest share of cells that may lie outside the image.
MAX_OUTSIDE = 0.5


@dataclass(frozen=True)
class CropBatch:
    """Crops of some cells.

    Attributes
    ----------
    rows
        Positions of the cells in ``source.obs``, int64 ``(n,)``.
    images
        ``(n, C, crop_px, crop_px)`` in the pixel type of the source.
    cut
        True where the crop leaves the image (and is reflected there), bool ``(n,)``.
    """

    rows: NDArray[np.int64]
    images: NDArray[Any]
    cut: NDArray[np.bool_]

    def __getitem__(self, some: slice) -> CropBatch:
        """Return some of the cells."""
        return CropBatch(self.rows[some], self.images[some], self.cut[some])


def outside(source: Source) -> NDArray[np.bool_]:
    """Tell which cells have their centroid outside their image, bool ``(n_obs,)``.

    Raises
    ------
    DataError
        Where most are: then the coordinates are not micrometres in this image's frame.
    """
    out = np.ones(len(source.obs), dtype=bool)
    x, y = source.obs["x_centroid"].to_numpy(), source.obs["y_centroid"].to_numpy()
    for name, rows in by_field(source.obs):
        if name not in source.fields:
            raise DataError(f"{source.name}: cells name the field {name!r}, which has no image")
        level = source.fields[name].levels[0]
        height, width = (side * level.pixel_size for side in level.shape)
        out[rows] = (x[rows] < 0) | (y[rows] < 0) | (x[rows] >= width) | (y[rows] >= height)
    if len(out) and out.mean() > MAX_OUTSIDE:
        level = next(iter(source.fields.values())).levels[0]
        raise DataError(
            f"{source.name}: {out.sum()} of {len(out)} cells lie outside the image, which is "
            f"{level.shape[1] * level.pixel_size:.0f} x {level.shape[0] * level.pixel_size:.0f} um "
            f"(cells reach {x.max():.0f}, {y.max():.0f}); are the coordinates in pixels, or is "
            f"the pixel size of {level.pixel_size} um wrong?"
        )
    return out


def crop_order(source: Source, pixel_size: float, crop_px: int) -> NDArray[np.int64]:
    """Return the cells that lie inside their image, in the order in which they are best read.

    That is field by field, and region by region: so that pixels are read once.
    """
    inside = ~outside(source)
    centres = source.obs[["y_centroid", "x_centroid"]].to_numpy()
    parts = [np.empty(0, dtype=np.int64)]
    for name, rows in by_field(source.obs):
        chosen = rows[inside[rows]]
        place = _Places(source.fields[name], centres[chosen], pixel_size, crop_px)
        parts.append(chosen[place.order])
    return np.concatenate(parts)


def iter_crops(
    source: Source,
    pixel_size: float,
    crop_px: int,
    *,
    batch_size: int = 512,
    rows: NDArray[np.int64] | None = None,
    failed: Callable[[NDArray[np.int64], str], None] | None = None,
) -> Iterator[CropBatch]:
    """Cut a crop around cells, region by region.

    The coarsest pyramid level that is fine enough is read, in regions of bounded size, and each
    crop is resampled (bilinear, antialiased) to ``pixel_size``. A crop depends on its cell and
    image alone.

    Parameters
    ----------
    source
        Images and cells.
    pixel_size
        Micrometres a pixel of the crops. Their width is exact to half a pixel of the level read.
    crop_px
        Side of the crops in pixels.
    batch_size
        Crops in a batch; only the last has fewer.
    rows
        Which cells, in which order; all of :func:`crop_order` by default, of which others should
        be parts, or regions are read again and again.
    failed
        ``failed(rows, why)`` is told of cells whose image cannot be decoded, which are left out
        then; otherwise that is an error.

    Raises
    ------
    DataError
        Where an image cannot be decoded.
    """
    if rows is None:
        rows = crop_order(source, pixel_size, crop_px)
    waiting: list[CropBatch] = []
    for piece in _pieces(source, rows, pixel_size, crop_px, batch_size, failed):
        waiting.append(piece)
        if sum(len(w.rows) for w in waiting) >= batch_size:
            whole = _joined(waiting)
            yield whole[:batch_size]
            waiting = [whole[batch_size:]]
    if any(len(piece.rows) for piece in waiting):
        yield _joined(waiting)


def _joined(pieces: list[CropBatch]) -> CropBatch:
    if len(pieces) == 1:
        return pieces[0]
    return CropBatch(
        np.concatenate([p.rows for p in pieces]),
        np.concatenate([p.images for p in pieces]),
        np.concatenate([p.cut for p in pieces]),
    )


def by_field(obs: pd.DataFrame) -> list[tuple[str, NDArray[np.int64]]]:
    """Return the fields that cells are in, each with the positions of its cells in ``obs``."""
    groups = obs.reset_index(drop=True).groupby("field", sort=False, observed=True).indices
    return [(str(name), np.asarray(rows, dtype=np.int64)) for name, rows in groups.items()]


class _Places:
    """Where the crops of some cells of a field lie, in pixels of the level that is read."""

    def __init__(
        self, image: FieldImage, centres: NDArray[np.float64], pixel_size: float, crop_px: int
    ) -> None:
        self.level = image.level_for(pixel_size)
        self.side = max(round(crop_px * pixel_size / self.level.pixel_size), 1)
        corner = np.round(centres / self.level.pixel_size - self.side / 2)
        self.corner: NDArray[np.int64] = corner.astype(np.int64)

    @property
    def region(self) -> NDArray[np.int64]:
        """Region of each crop, ``(n, 2)``."""
        return np.clip(self.corner, 0, None) // REGION

    @property
    def order(self) -> NDArray[np.int64]:
        """The crops region by region."""
        corner, region = self.corner, self.region
        return np.lexsort((corner[:, 1], corner[:, 0], region[:, 1], region[:, 0]))


def _pieces(
    source: Source,
    rows: NDArray[np.int64],
    pixel_size: float,
    crop_px: int,
    at_once: int,
    failed: Callable[[NDArray[np.int64], str], None] | None,
) -> Iterator[CropBatch]:
    """Yield the crops of ``rows`` in order, reading each region once where it comes up once."""
    if not len(rows):
        return
    field = source.obs["field"].astype(str).to_numpy()
    centres = source.obs[["y_centroid", "x_centroid"]].to_numpy()
    for some in np.split(rows, np.flatnonzero(field[rows][1:] != field[rows][:-1]) + 1):
        image = source.fields[field[some[0]]]
        place = _Places(image, centres[some], pixel_size, crop_px)
        level, side, corner = place.level, place.side, place.corner
        height, width = level.shape
        cut = np.any((corner < 0) | (corner + side > [height, width]), axis=1)
        edges = np.flatnonzero(np.any(np.diff(place.region, axis=0), axis=1)) + 1
        for group in np.split(np.arange(len(some)), edges):
            (y0, x0), (y1, x1) = corner[group].min(axis=0), corner[group].max(axis=0) + side
            try:
                pixels = level.read(max(y0, 0), min(y1, height), max(x0, 0), min(x1, width))
            except DataError as error:
                if failed is None:
                    raise
                failed(some[group], f"{field[some[0]]}: {error}")
                continue
            pad = [(0, 0), (max(-y0, 0), max(y1 - height, 0)), (max(-x0, 0), max(x1 - width, 0))]
            if any(before or after for before, after in pad):
                pixels = np.pad(pixels, pad, mode="symmetric")
            for start in range(0, len(group), at_once):
                part = group[start : start + at_once]
                crops = np.empty((len(part), len(pixels), side, side), dtype=pixels.dtype)
                for out, (y, x) in zip(crops, corner[part] - [y0, x0], strict=True):
                    out[:] = pixels[:, y : y + side, x : x + side]
                yield CropBatch(some[part], resample(crops, crop_px), cut[part])


def resample(crops: NDArray[Any], crop_px: int) -> NDArray[Any]:
    """Resample crops ``(n, C, H, W)`` to ``crop_px`` a side, keeping their pixel type."""
    if crops.shape[-1] == crop_px:
        return crops
    size = (crop_px, crop_px)
    tensor = torch.from_numpy(crops.astype(np.float32))
    scaled = torch.nn.functional.interpolate(tensor, size, mode="bilinear", antialias=True)
    out = scaled.numpy()
    if np.issubdtype(crops.dtype, np.integer):
        info = np.iinfo(crops.dtype)
        out = np.clip(np.rint(out), info.min, info.max)
    return out.astype(crops.dtype)
