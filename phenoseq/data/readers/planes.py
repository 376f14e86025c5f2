"""Fields of view as TIFF files, one a stain or one with all: checked once, opened when read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phenoseq.channels import STAINS
from phenoseq.data.readers.ometiff import OmeTiff, open_ometiff, open_stains
from phenoseq.data.readers.storage import Place
from phenoseq.data.source import FieldImage, Level, Problem
from phenoseq.errors import DataError
from phenoseq.progress import bar


@dataclass(frozen=True)
class Planes:
    """The files of one field: one a stain, or one with all of them (under the name "")."""

    stains: Mapping[str, Place]

    def open(self, only: str | None = None) -> OmeTiff:
        """Open them, or the file of one stain; :class:`DataError` where one is broken."""
        whole = self.stains.get("")
        if isinstance(whole, Path):
            try:
                return open_ometiff([whole])
            except DataError as error:
                raise DataError(
                    f"{error} (the end of the name {whole.name!r} is no stain that phenoseq "
                    "knows, so the file itself must name its channels; or tell it in channels.csv)"
                ) from error
        return open_stains(self.stains if only is None else {only: self.stains[only]})

    def probe(self, *, decode: bool = True) -> Probe:
        """Return what the files say; with ``decode``, every compressed pixel is decoded once.

        Raises
        ------
        DataError
            Where a file is missing, broken or unlike the others.
        """
        image = self.open()
        try:
            if decode:
                image.check()
            field = image.field(1.0)
        finally:
            image.close()
        levels = tuple((level.pixel_size, level.shape) for level in field.levels)
        return Probe(image.channels, field.dtype, image.pixel_size, levels)


@dataclass(frozen=True)
class Probe:
    """What the files of a field say.

    Attributes
    ----------
    channels
        Canonical stain names.
    dtype
        Pixel type.
    pixel_size
        Micrometres a pixel as OME-XML states it, or None. The resolution tags of plain TIFF are
        not asked: microscopes write the camera's pixel there, or a number made up.
    levels
        Reduction and ``(height, width)`` of each level, finest first.
    """

    channels: tuple[str, ...]
    dtype: np.dtype[Any]
    pixel_size: float | None
    levels: tuple[tuple[float, tuple[int, int]], ...]

    def field(self, files: Planes, channels: tuple[str, ...], pixel_size: float) -> FieldImage:
        """Return the field of these files, with some of its stains in that order."""
        levels = tuple(
            Level(pixel_size * reduction, shape, _Region(files, channels, k, shape, self.dtype))
            for k, (reduction, shape) in enumerate(self.levels)
        )
        return FieldImage(levels, self.dtype)


@dataclass(frozen=True)
class _Region:
    """Reads a region of some channels of a field, whose files are open no longer than that."""

    files: Planes
    channels: tuple[str, ...]
    level: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]

    def __call__(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        image = self.files.open()
        try:
            field = image.field(1.0)
            level = field.levels[self.level]
            if (level.shape, field.dtype) != (self.shape, self.dtype):
                raise DataError(
                    f"{next(iter(self.files.stains.values()))}: {level.shape} {field.dtype} "
                    f"differs from {self.shape} {self.dtype} of the first image; images of one "
                    "source must match: keep those that differ apart"
                )
            pixels = level.read(y0, y1, x0, x1)
        finally:
            image.close()
        return pixels[[image.channels.index(name) for name in self.channels]]


def probe_fields(
    files: Mapping[str, Planes],
) -> tuple[dict[str, Probe], tuple[str, ...], tuple[Problem, ...]]:
    """Check the files of every field once.

    Returns
    -------
    What those fields say that can be used together; the stains that they have, which are those
    that most fields have; and the other fields, with the reason: a file that cannot be read, a
    stain that it lacks, or pixels of another type than most have.
    """
    found: dict[str, Probe] = {}
    problems = []
    with bar("checking images") as progress:
        for done, (field, these) in enumerate(files.items(), start=1):
            try:
                found[field] = these.probe()
            except DataError as error:
                problems.append(Problem(field, str(error)))
            progress(done, len(files))
    channels, dtype = _most_common(found)
    for field, one in list(found.items()):
        lacking = [name for name in channels if name not in one.channels]
        if lacking:
            reason = f"has no image of {lacking}, as other fields do (it has {list(one.channels)})"
        elif one.dtype != dtype:
            reason = f"pixels are {one.dtype}, those of other fields {dtype}"
        else:
            continue
        problems.append(Problem(field, reason))
        del found[field]
    return found, channels, tuple(problems)


def _most_common(found: Mapping[str, Probe]) -> tuple[tuple[str, ...], np.dtype[Any]]:
    """Return the stains that most fields have together (of equals, more stains), and the dtype."""
    if not found:
        return (), np.dtype(np.uint16)
    order = list(STAINS)
    sets = Counter(
        tuple(sorted(one.channels, key=lambda s: (order.index(s) if s in order else 99, s)))
        for one in found.values()
    )
    channels = max(sets, key=lambda names: (sets[names], len(names)))
    return channels, Counter(one.dtype for one in found.values()).most_common(1)[0][0]
