"""Illumination functions, as CellProfiler saves them: one ``.npy`` a plate and stain."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phenoseq.data.readers.storage import Place, read_bytes
from phenoseq.errors import DataError


def open_illumination(place: Place, shape: tuple[int, int]) -> NDArray[Any]:
    """Open the illumination function of images of ``shape``; a local one stays on the disk.

    Raises
    ------
    DataError
        Where it is missing or no array, has another shape, or is not positive everywhere.
    """
    try:
        if isinstance(place, Path):
            function: NDArray[Any] = np.load(place, mmap_mode="r", allow_pickle=False)
        else:
            function = np.load(io.BytesIO(read_bytes(place) or b""), allow_pickle=False)
        whole = bool(np.isfinite(function).all() and (function > 0).all())
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise DataError(
            f"{place}: no readable illumination function ({error}); copy it again"
        ) from error
    if function.shape != shape:
        raise DataError(f"{place}: is of shape {function.shape}, the images are {shape}")
    if not whole:
        raise DataError(f"{place}: has pixels that are not positive; calculate it again")
    return function


def corrected(pixels: NDArray[Any], function: NDArray[Any]) -> NDArray[Any]:
    """Return ``pixels / function`` in the pixel type of ``pixels``, rounded and clipped to it."""
    quotient: NDArray[Any] = pixels / function
    if np.issubdtype(pixels.dtype, np.integer):
        info = np.iinfo(pixels.dtype)
        quotient = np.clip(np.rint(quotient), info.min, info.max)
    return quotient.astype(pixels.dtype)
