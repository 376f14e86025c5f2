"""How pixels of any type become the 8 bits that a frozen image model was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from phenoseq.data.crops import REGION
from phenoseq.data.source import FieldImage, Source
from phenoseq.errors import DataError, PhenoseqWarning

EightBit = Literal["full", "percentile"]
_BINS = 65536


@dataclass(frozen=True)
class Scale:
    """What becomes 255, a stain; 0 stays 0, in between is linear, and outside is clipped.

    Attributes
    ----------
    mode
        ``"none"`` for pixels that are 8-bit already, ``"full"`` or ``"percentile"``.
    top
        The values that become 255, float64 ``(C,)``; a stain whose ``top`` is 0 is blank.
    """

    mode: str
    top: NDArray[np.float64]

    def __call__(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        """Return pixels ``(n, C, H, W)`` in 8 bits, rounded to the nearest."""
        if self.mode == "none":
            return pixels
        top = np.where(self.top > 0, self.top, np.inf)[:, None, None]
        out: NDArray[np.uint8] = np.clip(np.rint(pixels * 255.0 / top), 0, 255).astype(np.uint8)
        return out


def check_eight_bit(source: Source, mode: EightBit | None) -> None:
    """Check that the choice goes with the pixels of a source.

    Raises
    ------
    DataError
        Where a choice is needed and none, or none of those there are, was made.
    """
    dtype = source.dtype
    choices = (
        f"eight_bit='full' (--eight-bit full) makes 0..{_largest(dtype)} to 0..255; "
        "eight_bit='percentile' makes 0 .. the 99.9th percentile of each stain over the source to "
        "0..255, and clips what is brighter"
    )
    if mode not in (None, "full", "percentile"):
        raise DataError(f"eight_bit={mode!r}: no such choice; {choices}")
    if mode is None and dtype != np.uint8:
        raise DataError(
            f"{source.name}: pixels are {dtype}, and the image model takes 8 bits; say how they "
            f"become that: {choices}"
        )
    if mode == "full" and not np.issubdtype(dtype, np.integer):
        raise DataError(
            f"{source.name}: pixels are {dtype}, which have no full range; take "
            "eight_bit='percentile' (--eight-bit percentile)"
        )


def fit_scale(
    source: Source, places: Sequence[int], mode: EightBit | None, failed: Callable[[str, str], None]
) -> Scale:
    """Find what becomes 255.

    For ``"percentile"`` every pixel of every field is read: the top of a stain is the smallest
    value that at least 99.9% of its pixels reach at most. For pixels of 8 and 16 bits it is exact,
    for others within a 65536th of the brightest pixel. A stain with so few bright pixels that it
    is 0 takes the brightest.

    Parameters
    ----------
    source
        Images.
    places
        Their channels that are looked at.
    mode
        As in :func:`check_eight_bit`; None takes 8-bit pixels as they are.
    failed
        ``failed(field, why)`` is told of a field that cannot be read, which then does not count.
    """
    check_eight_bit(source, mode)
    if mode is None:
        return Scale("none", np.full(len(places), 255.0))
    if mode == "full":
        return Scale("full", np.full(len(places), float(_largest(source.dtype))))
    width = np.ones(len(places))
    exact = source.dtype in (np.uint8, np.uint16)
    if not exact:
        brightest = np.zeros(len(places))
        for pixels in _good_fields(source, places, failed):
            brightest = np.maximum(brightest, [plane.max() for plane in pixels])
        width = np.where(brightest > 0, brightest / (_BINS - 1), 1.0)
    counts = np.zeros((len(places), _BINS), dtype=np.int64)
    for pixels in _good_fields(source, places, failed):
        for c, plane in enumerate(pixels):
            bins = plane if exact else np.ceil(plane / width[c]).clip(0, _BINS - 1)
            counts[c] += np.bincount(bins.ravel().astype(np.int64), minlength=_BINS)
    return Scale("percentile", np.array([_top(n) for n in counts]) * width)


def warn_eight_bit(source: Source, scale: Scale, *, published: bool) -> None:
    """Warn where pixels are not the 8 bits that the weights saw, ``published`` ones or others."""
    if source.dtype == np.uint8 and scale.mode != "percentile":
        return
    tops = ", ".join(f"{top:.6g}" for top in scale.top)
    theirs = (
        ". The published weights saw 8-bit crops, and how these were made is not documented, so "
        "features may differ from theirs"
    )
    warnings.warn(
        f"{source.name}: pixels are {source.dtype}; those of {tops} (a stain each) became 255 "
        f"(recorded in uns){theirs if published else ''}",
        PhenoseqWarning,
        stacklevel=3,
    )


def _largest(dtype: np.dtype[Any]) -> int:
    return int(np.iinfo(dtype).max) if np.issubdtype(dtype, np.integer) else 1


def _top(counts: NDArray[np.int64]) -> int:
    """Return the bin at or below which a share of 99.9% lies, or the last one that is not empty."""
    reached = np.cumsum(counts)
    if not reached[-1]:
        return 0
    top = int(np.searchsorted(reached, reached[-1] - reached[-1] // 1000))
    return top or int(np.flatnonzero(counts)[-1])


def _good_fields(
    source: Source, places: Sequence[int], failed: Callable[[str, str], None]
) -> Iterator[NDArray[Any]]:
    """Yield the pixels ``(C, H, W)`` of the fields, region by region."""
    for name, image in source.fields.items():
        try:
            for pixels in _regions(image, places):
                if not np.isfinite(pixels).all():
                    broken = int((~np.isfinite(pixels)).sum())
                    raise DataError(f"{source.name}: field {name}: {broken} pixels are not numbers")
                yield pixels
        except DataError as error:
            failed(name, str(error))


def _regions(image: FieldImage, places: Sequence[int]) -> Iterator[NDArray[Any]]:
    level = image.levels[0]
    height, width = level.shape
    for y in range(0, height, REGION):
        for x in range(0, width, REGION):
            region = level.read(y, min(y + REGION, height), x, min(x + REGION, width))
            yield region[list(places)]
