"""Nuclei in an image of DNA, and a picture to judge them by."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import filters, measure, segmentation
from skimage.morphology import disk, h_maxima

from phenoseq.errors import DataError

Method = Literal["watershed", "cellpose"]

#: All in micrometres: blur against noise, radius in which a nucleus must be brighter than the mean,
#: blur of the distance to the edge, and depth of a waist at which touching nuclei are parted.
_SMOOTH, _AROUND, _ROUND, _WAIST = 0.5, 20.0, 1.0, 0.5
#: Where between background (0) and Otsu's threshold (1) the least brightness lies, and how many
#: standard deviations it is above the background at least, so that noise gives no nuclei.
_LEAST, _SIGMAS = 0.5, 5.0
#: Tiles along each side whose dark parts tell how uneven the light is.
_TILES = 6
#: Diameter, in micrometres, that Cellpose is told.
_CELLPOSE_DIAMETER = 12.0


def find_nuclei(
    image: NDArray[Any],
    pixel_size: float,
    *,
    min_diameter: float = 5.0,
    max_diameter: float = 40.0,
    method: Method = "watershed",
) -> NDArray[np.int32]:
    """Find the nuclei in an image of DNA.

    Uneven light is subtracted. Pixels are foreground where they are brighter than their
    surroundings, and than half way from background to Otsu's threshold (Otsu, IEEE Trans. Syst. Man
    Cybern. 9, 62, 1979), and stand out of the noise. Touching nuclei are parted by a
    watershed of the distance to the edge, at waists that are deep enough (Malpica et al., Cytometry
    28, 289, 1997). Nuclei at the border of the image are kept.

    Parameters
    ----------
    image
        ``(H, W)``, any number type; nuclei are bright.
    pixel_size
        Micrometres a pixel.
    min_diameter, max_diameter
        Micrometres; the area of a nucleus is that of a circle between these.
    method
        ``"watershed"``, or ``"cellpose"`` for its pretrained network (Stringer et al., Nat. Methods
        18, 100, 2021), which must be installed.

    Returns
    -------
    int32 ``(H, W)``: 0 for background, nuclei numbered from 1 in the order of rows.

    Raises
    ------
    DataError
        Where the image is not of two dimensions or not finite, a size cannot be, or Cellpose is
        asked for but not installed.
    """
    if image.ndim != 2 or not image.size:
        raise DataError(f"an image of shape {image.shape}; nuclei are found in one plane (H, W)")
    if not 0.01 < pixel_size < 100:
        raise DataError(f"a pixel size of {pixel_size} micrometres cannot be right")
    if not 0 < min_diameter < max_diameter:
        raise DataError(f"nuclei of {min_diameter} to {max_diameter} um cannot be")
    if not np.isfinite(image).all():
        raise DataError("the image has pixels that are NaN or infinite; mend them")
    if method == "cellpose":
        labels = _cellpose(image, pixel_size)
    elif method == "watershed":
        labels = _watershed(image, pixel_size)
    else:
        raise DataError(f"no method {method!r}; there are 'watershed' and 'cellpose'")
    area = np.bincount(labels.ravel()) * pixel_size**2
    least, most = (np.pi / 4 * diameter**2 for diameter in (min_diameter, max_diameter))
    labels[((area < least) | (area > most))[labels]] = 0
    return np.asarray(segmentation.relabel_sequential(labels)[0], dtype=np.int32)


def _watershed(image: NDArray[Any], pixel_size: float) -> NDArray[np.int32]:
    smooth = ndimage.gaussian_filter(image.astype(np.float32), _SMOOTH / pixel_size)
    if smooth.min() == smooth.max():
        return np.zeros(image.shape, dtype=np.int32)
    flat = smooth - _shading(smooth)
    otsu = filters.threshold_otsu(flat)
    background = np.median(flat[flat <= otsu])
    least = max(_LEAST * (otsu - background), _SIGMAS * _noise(flat, pixel_size))
    around = ndimage.gaussian_filter(flat, _AROUND / pixel_size)
    mask = (flat > around) & (flat > background + least)
    mask = ndimage.binary_opening(mask, disk(max(1, round(_SMOOTH / pixel_size))))
    mask = ndimage.binary_fill_holes(mask)
    distance = ndimage.distance_transform_edt(mask).astype(np.float32) * np.float32(pixel_size)
    distance = ndimage.gaussian_filter(distance, _ROUND / pixel_size)
    seeds = _seeds(distance, measure.label(mask))
    return np.asarray(segmentation.watershed(-distance, seeds, mask=mask), dtype=np.int32)


def _shading(smooth: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fit a quadratic surface to what is dark in each of some tiles: the light's own unevenness."""
    y, x = (np.linspace(-1, 1, side, dtype=np.float32) for side in smooth.shape)
    rows, columns = (np.array_split(np.arange(side), min(_TILES, side)) for side in smooth.shape)
    points = [
        (y[r].mean(), x[c].mean(), np.percentile(smooth[np.ix_(r, c)], 20))
        for r in rows
        for c in columns
    ]
    v, u, dark = np.array(points, dtype=np.float32).T
    terms = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], axis=1)
    weight = np.ones_like(dark)
    for _ in range(10):  # towards least absolute deviations: a tile inside an object has no say
        a, b, c, d, e, f = fit = np.linalg.lstsq(terms * weight[:, None], dark * weight)[0]
        off = np.abs(dark - terms @ fit)
        weight = 1 / np.sqrt(np.maximum(off, 1e-3 * off.max() + 1e-12))
    v, u = y[:, None], x[None]
    return np.asarray(a + b * u + c * v + d * u * u + e * u * v + f * v * v, dtype=np.float32)


def _noise(smooth: NDArray[np.float32], pixel_size: float) -> float:
    """Return the standard deviation of the noise, from what differs between close points."""
    step = max(1, round(4 * _SMOOTH / pixel_size))
    if smooth.shape[1] <= step:
        return 0.0
    return float(1.0484 * np.median(np.abs(smooth[:, step:] - smooth[:, :-step])))


def _seeds(distance: NDArray[np.float32], clumps: NDArray[Any]) -> NDArray[np.int32]:
    """Mark the summits of each clump, parted by a waist of some depth, by numbers of their own."""
    seeds = np.zeros(clumps.shape, dtype=np.int32)
    n = 0
    for clump, place in enumerate(ndimage.find_objects(clumps), start=1):
        height = np.where(clumps[place] == clump, distance[place], 0)
        summits = measure.label(h_maxima(np.pad(height, 1), _WAIST))[1:-1, 1:-1]
        if not summits.any():  # flatter than the waist as a whole
            summits = (height == height.max()).astype(summits.dtype)
        seeds[place] = np.where(summits > 0, summits + n, seeds[place])
        n += int(summits.max())
    return seeds


def _cellpose(image: NDArray[Any], pixel_size: float) -> NDArray[np.int32]:
    try:
        from cellpose.models import CellposeModel
    except ImportError as error:
        raise DataError(
            "Cellpose is not installed; pip install 'phenoseq[segment]', or leave it to the "
            "watershed"
        ) from error
    import torch

    model = CellposeModel(gpu=torch.cuda.is_available())
    masks = model.eval(image, diameter=_CELLPOSE_DIAMETER / pixel_size)[0]
    return np.asarray(masks, dtype=np.int32)


def overlay(image: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.uint8]:
    """Draw the outlines of labelled objects on an image.

    Parameters
    ----------
    image
        ``(H, W)``, any number type; shown between its 1st and 99.8th percentile.
    labels
        Integers ``(H, W)``, 0 for background.

    Returns
    -------
    ``(H, W, 3)`` uint8, the image in grey, outlines in orange.

    Raises
    ------
    DataError
        Where image and labels differ in shape.
    """
    if image.shape != labels.shape or image.ndim != 2:
        raise DataError(
            f"image {image.shape} and labels {labels.shape} are not of one plane (H, W)"
        )
    low, high = np.percentile(image, [1, 99.8])
    scaled = np.clip((image.astype(np.float32) - low) / max(high - low, 1e-9), 0, 1)
    grey = np.rint(255 * np.sqrt(scaled)).astype(np.uint8)  # sqrt lifts what is dim
    out = np.stack([grey] * 3, axis=-1)
    out[segmentation.find_boundaries(labels, mode="inner")] = (255, 140, 0)
    return out
