"""A folder of TIFF images, put together to fields of view that are opened when they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phenoseq.channels import canonical
from phenoseq.data.readers.filenames import example_map, parse_name, read_channel_map
from phenoseq.data.readers.planes import Planes, Probe, probe_fields
from phenoseq.data.source import FieldImage, Problem, tell_problems
from phenoseq.errors import DataError

#: Folders beside the images that hold something else.
MASKS, OVERLAYS = "masks", "overlays"


@dataclass(frozen=True)
class Images:
    """Fields of view of a folder.

    Attributes
    ----------
    channels
        Canonical stain names, in the order of the channels.
    pixel_size
        Micrometres a pixel.
    fields, files, metadata
        Image, files and ``Metadata_*`` of each field, by its name.
    problems
        Fields that are left out; whoever asked for the images tells of them.
    """

    channels: tuple[str, ...]
    pixel_size: float
    fields: dict[str, FieldImage]
    files: dict[str, Planes]
    metadata: dict[str, dict[str, str]]
    problems: tuple[Problem, ...]

    def plane(self, field: str, stain: str) -> NDArray[Any]:
        """Return all of one stain of a field, ``(H, W)``, reading no other file."""
        image = self.files[field].open(stain)
        try:
            level = image.field(self.pixel_size).levels[0]
            pixels = level.read(0, level.shape[0], 0, level.shape[1])
        finally:
            image.close()
        return np.asarray(pixels[image.channels.index(stain)])


def open_images(folder: Path, pixel_size: float | None = None) -> Images:
    """Find the images of a folder, check each of them once, and put them together to fields.

    A field with a file that cannot be read, or without a stain that most fields have, is left out
    as a problem. Folders within are searched, a link to a folder only once.

    Parameters
    ----------
    folder
        Folder of TIFF files; see :func:`~phenoseq.data.readers.filenames.parse_name` for names.
    pixel_size
        Micrometres a pixel, where the files do not say.

    Raises
    ------
    DataError
        Where there is no image, a channel number has no stain, two files claim one stain of one
        field, there is no pixel size, or no field can be used.
    """
    files, metadata = _group(folder)
    found, channels, problems = probe_fields(files)
    if not found:
        tell_problems(problems, 0, str(folder))
    size = _pixel_size(found, pixel_size, folder)
    fields = {field: one.field(files[field], channels, size) for field, one in found.items()}
    used = {field: files[field] for field in fields}
    return Images(channels, size, fields, used, metadata, problems)


def list_images(folder: Path) -> Iterator[Path]:
    """Yield the TIFF files in a folder and those within, in order, each folder once.

    Hidden files, thumbnails, and the folders ``masks`` and ``overlays`` are passed over.
    """
    seen = set()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(
            name for name in folders if name not in (MASKS, OVERLAYS) and name[0] != "."
        )
        for name in sorted(names):
            if name.lower().endswith((".tif", ".tiff")) and name[0] != "." and "_thumb" not in name:
                yield Path(place) / name


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be searched ({error.strerror})") from error


def _group(folder: Path) -> tuple[dict[str, Planes], dict[str, dict[str, str]]]:
    """Put files together to fields by their names."""
    stain_of = read_channel_map(folder)
    fields: dict[str, dict[str, Path]] = {}
    metadata: dict[str, dict[str, str]] = {}
    unknown: dict[str, Path] = {}
    for path in list_images(folder):
        name = parse_name(path.relative_to(folder), stain_of)
        token = name.token
        if token is not None and token.isdigit() and token not in stain_of:
            unknown.setdefault(token, path)
            continue
        stain = "" if token is None else stain_of.get(token, token)
        if token is not None and not stain:
            continue  # the map leaves it out
        stain = canonical(stain)
        there = fields.setdefault(name.field, {})
        if stain in there or (there and "" in (stain, *there)):
            raise DataError(
                f"{path}: a second image of {stain or 'all stains'!r} for the field "
                f"{name.field!r}, beside {next(iter(there.values())).name}; keep one plane and one "
                "time of each"
            )
        there[stain] = path
        metadata[name.field] = metadata.get(name.field, {}) | name.metadata
    if unknown:
        numbers = sorted(unknown, key=int)
        raise DataError(
            f"{folder}: channels have numbers only: {', '.join(numbers)} (such as "
            f"{unknown[numbers[0]].name}), and no channels.csv there says which stains they are. "
            f"Write one, an empty stain leaves a channel out; for example, if it were so:"
            f"{example_map(numbers)}"
        )
    if not fields:
        raise DataError(f"{folder}: no TIFF image in it")
    return {field: Planes(dict(sorted(fields[field].items()))) for field in fields}, metadata


def _pixel_size(found: Mapping[str, Probe], given: float | None, folder: Path) -> float:
    stated = {f: one.pixel_size for f, one in found.items() if one.pixel_size is not None}
    sizes = [given] if given is not None else list(stated.values())
    if not sizes:
        raise DataError(f"{folder}: no image states its pixel size; give it with --pixel-size (um)")
    for field, size in stated.items() if given is None else [("as given", given)]:
        if not 0.01 < size < 100:
            raise DataError(f"{folder}: {field}: a pixel size of {size} um cannot be right")
        if abs(size / sizes[0] - 1) > 0.01:
            raise DataError(
                f"{folder}: {field} says {size} um a pixel, {next(iter(stated))} says {sizes[0]}; "
                "tell which is right with --pixel-size, or keep them in folders of their own"
            )
    return float(sizes[0])
