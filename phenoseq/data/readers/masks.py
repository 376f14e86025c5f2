"""Cells from images of labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pandas as pd
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

from phenoseq.errors import DataError


def read_mask(path: Path, shape: tuple[int, int]) -> NDArray[Any]:
    """Read an image of labels, TIFF or PNG: integers ``(H, W)``, 0 for background.

    Raises
    ------
    DataError
        Where it cannot be read, is not of one plane of integers, or not of this shape.
    """
    try:
        if path.suffix.lower() == ".png":
            labels = np.asarray(imagecodecs.png_decode(path.read_bytes()))
        else:
            labels = np.asarray(tifffile.imread(path))
    except Exception as error:  # each codec has errors of its own
        raise DataError(f"{path}: not a readable image ({error}); write it again") from error
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{path}: {labels.shape} of {labels.dtype} is no mask: it has one plane of integers, "
            "a number for each cell and 0 for background"
        )
    if labels.shape != shape:
        raise DataError(f"{path}: {labels.shape}, but the images of its field are {shape}")
    return labels


def cells_of(labels: NDArray[Any], field: str, pixel_size: float) -> pd.DataFrame:
    """Return the cells of a field: ``<field>-<label>``, with centroids in micrometres.

    Parameters
    ----------
    labels
        Integers ``(H, W)``, 0 for background.
    field
        Name of the field.
    pixel_size
        Micrometres a pixel.

    Returns
    -------
    One row a label, indexed by ``cell_id``, with ``field``, ``x_centroid``, ``y_centroid``.
    """
    numbers, dense = np.unique(labels, return_inverse=True)
    wanted = np.flatnonzero(numbers > 0)
    ones = np.broadcast_to(np.uint8(1), labels.shape)
    centres = ndimage.center_of_mass(ones, dense.reshape(labels.shape), wanted)
    centres = (np.array(centres, dtype=np.float64).reshape(-1, 2) + 0.5) * pixel_size
    ids = pd.Index([f"{field}-{n}" for n in numbers[wanted]], dtype=object, name="cell_id")
    return pd.DataFrame(
        {"field": field, "x_centroid": centres[:, 1], "y_centroid": centres[:, 0]}, index=ids
    )
