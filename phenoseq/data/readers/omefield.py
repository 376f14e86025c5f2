"""One field as OME-TIFF, with a label image or a table of cells beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from phenoseq.data.readers.cells import check_cells, no_cells, read_cells
from phenoseq.data.readers.labels import BLOCK, centroids
from phenoseq.data.readers.ometiff import OmeTiff, open_ometiff
from phenoseq.data.readers.scale import pixel_size_of
from phenoseq.data.source import Source, digest_of
from phenoseq.errors import DataError

_ENDINGS = (".ome.tif", ".ome.tiff")


def detect(path: Path) -> str | None:
    """Return what makes ``path`` look like one OME-TIFF image, or None."""
    name = next((e for e in _ENDINGS if path.name.lower().endswith(e) and path.is_file()), None)
    return name and f"it is a file {name!r}"


def read_omefield(path: Path, *, pixel_size: float | None = None, cells: bool = True) -> Source:
    """Read one OME-TIFF, ``NAME.ome.tif``; the image is opened, not loaded.

    Cells are those of the table beside it, ``NAME_cells.csv`` or ``cells.csv`` (or ``.parquet``),
    else the labels of the label image ``NAME_labels.tif`` or ``labels.tif`` (or ``.ome.tif``),
    which is read once, block by block.

    Parameters
    ----------
    path
        The file.
    pixel_size
        Micrometres a pixel, in place of what the OME-XML states.
    cells
        False to open the images alone, for cells from elsewhere.

    Raises
    ------
    DataError
        Where the image or the cells are missing or broken, no pixel size is stated, or the label
        image is not of the image's size.
    """
    path = Path(path)
    image = open_ometiff([path])
    size = pixel_size_of(pixel_size, image.pixel_size, str(path))
    name = next(
        (path.name[: -len(e)] for e in _ENDINGS if path.name.lower().endswith(e)), path.stem
    )
    tables = [f"{stem}.{e}" for stem in (f"{name}_cells", "cells") for e in ("csv", "parquet")]
    masks = [f"{stem}.{e}" for stem in (f"{name}_labels", "labels") for e in ("tif", "ome.tif")]
    table, mask = (
        next((path.parent / n for n in names if (path.parent / n).exists()), None)
        for names in (tables, masks)
    )
    if not cells:
        obs = no_cells()
    elif table is not None:
        obs = read_cells(table).drop(columns="field", errors="ignore")
        obs.insert(0, "field", name)
    elif mask is not None:
        obs = _labelled(mask, image, name, size)
    else:
        raise DataError(
            f"{path}: nothing says where its cells are; put one of {tables + masks} beside it"
        )
    return Source(
        kind="ome-tiff",
        name=str(path),
        channels=image.channels,
        fields={name: image.field(size)},
        obs=obs,
        counts=None,
        var=None,
        identity=digest_of(size, obs),
    )


def _labelled(path: Path, image: OmeTiff, name: str, size: float) -> pd.DataFrame:
    """Return the labels of a label image as cells ``NAME-LABEL``."""
    labels = open_ometiff([path], default_names=("labels",))
    level = labels.field(size)
    shape = tuple(image.series[0][1].shape[-2:])
    plane = level.levels[0]
    if level.dtype.kind not in "iu" or plane.shape != shape or len(labels.series) != 1:
        raise DataError(
            f"{path}: {len(labels.series)} x {plane.shape} pixels of {level.dtype}; a label image "
            f"of {name} has {shape} whole numbers"
        )

    def read(y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        return np.asarray(plane.read(y0, y1, x0, x1)[0])

    found = centroids(read, plane.shape, (BLOCK, BLOCK))
    obs = pd.DataFrame(
        {"field": name, "x_centroid": found["x"] * size, "y_centroid": found["y"] * size}
    )
    obs.index = pd.Index([f"{name}-{label}" for label in found.index], dtype=object)
    return check_cells(obs, str(path))
