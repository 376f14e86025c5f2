"""Square crops around cells, at a stated pixel size, from images of any size in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from phenoseq.data.source import FieldImage, Level, Problem, Source
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
    x, y = source.obs["x_centroid"].to_numpy(), source.obs["y_centroid"].to_numpy()
    width, height = extents(source)
    out = np.array((x < 0) | (y < 0) | (x >= width) | (y >= height), dtype=bool)
    if len(out) and out.mean() > MAX_OUTSIDE:
        level = next(iter(source.fields.values())).levels[0]
        raise DataError(
            f"{source.name}: {out.sum()} of {len(out)} cells lie outside the image, which is "
            f"{level.shape[1] * level.pixel_size:.0f} x {level.shape[0] * level.pixel_size:.0f} um "
            f"(cells reach {x.max():.0f}, {y.max():.0f}); are the coordinates in pixels, or is "
            f"the pixel size of {level.pixel_size} um wrong?"
        )
    return out


def extents(source: Source) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return width and height in micrometres of the image that each cell is in, ``(n_obs,)`` each.

    Raises
    ------
    DataError
        Where a cell names a field that has no image.
    """
    codes, levels = _by_cell(source, lambda image: image.levels[0])
    size = np.array([level.pixel_size for level in levels], dtype=np.float64)
    shape = np.array([level.shape for level in levels]).reshape(-1, 2)
    extent = shape * size[:, None]
    height, width = np.asarray(extent[codes].T, dtype=np.float64)
    return width, height


def crop_order(source: Source, pixel_size: float, crop_px: int) -> NDArray[np.int64]:
    """Return the cells that lie inside their image, in the order in which they are best read.

    That is field by field, and region by region: so that pixels are read once.
    """
    inside = np.flatnonzero(~outside(source))
    codes, levels = _by_cell(source, lambda image: image.level_for(pixel_size))
    level_size = np.array([level.pixel_size for level in levels], dtype=np.float64)
    _, corner = _places(_centres(source), level_size[codes], pixel_size, crop_px)
    region = _region(corner)
    keys = (corner[:, 1], corner[:, 0], region[:, 1], region[:, 0], codes)
    order: NDArray[np.int64] = inside[np.lexsort([key[inside] for key in keys])]
    return order


def _by_cell(
    source: Source, level_of: Callable[[FieldImage], Level]
) -> tuple[NDArray[np.int64], list[Level]]:
    """Return for each cell which of the fields, and of each field a level."""
    codes, names = pd.factorize(source.obs["field"].astype(str))
    lost = next((name for name in names if name not in source.fields), None)
    if lost is not None:
        raise DataError(f"{source.name}: cells name the field {lost!r}, which has no image")
    return codes.astype(np.int64), [level_of(source.fields[name]) for name in names]


def _centres(source: Source) -> NDArray[np.float64]:
    return np.asarray(source.obs[["y_centroid", "x_centroid"]], dtype=np.float64)


def _places(
    centres: NDArray[np.float64],
    level_size: NDArray[np.float64],
    pixel_size: float,
    crop_px: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return side and corner of each crop in pixels of the level read, ``(n,)`` and ``(n, 2)``."""
    side = np.maximum(np.rint(crop_px * pixel_size / level_size), 1).astype(np.int64)
    corner = np.round(centres / level_size[:, None] - side[:, None] / 2)
    return side, corner.astype(np.int64)


def _region(corner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the region of each crop, ``(n, 2)``."""
    return np.clip(corner, 0, None) // REGION


def iter_crops(
    source: Source,
    pixel_size: float,
    crop_px: int,
    *,
    batch_size: int = 512,
    rows: NDArray[np.int64] | None = None,
    failed: Callable[[NDArray[np.int64], Problem], None] | None = None,
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
        ``failed(rows, problem)`` is told of cells whose image cannot be decoded, which are left out
        then; otherwise that is an error.

    Raises
    ------
    DataError
        Where an image cannot be decoded, and nothing is called for it.
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


def _pieces(
    source: Source,
    rows: NDArray[np.int64],
    pixel_size: float,
    crop_px: int,
    at_once: int,
    failed: Callable[[NDArray[np.int64], Problem], None] | None,
) -> Iterator[CropBatch]:
    """Yield the crops of ``rows`` in order, reading each region once where it comes up once."""
    if not len(rows):
        return
    field, centres = source.obs["field"].astype(str).to_numpy(), _centres(source)
    for some in np.split(rows, np.flatnonzero(field[rows][1:] != field[rows][:-1]) + 1):
        name = field[some[0]]
        level = source.fields[name].level_for(pixel_size)
        sizes = np.full(len(some), level.pixel_size)
        sides, corner = _places(centres[some], sizes, pixel_size, crop_px)
        side, (height, width) = int(sides[0]), level.shape
        cut = np.any((corner < 0) | (corner + side > [height, width]), axis=1)
        edges = np.flatnonzero(np.any(np.diff(_region(corner), axis=0), axis=1)) + 1
        for group in np.split(np.arange(len(some)), edges):
            (y0, x0), (y1, x1) = corner[group].min(axis=0), corner[group].max(axis=0) + side
            try:
                pixels = level.read(max(y0, 0), min(y1, height), max(x0, 0), min(x1, width))
            except DataError as error:
                if failed is None:
                    raise
                failed(some[group], Problem(name, str(error), len(group)))
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
