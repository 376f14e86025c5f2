"""Plain TIFF planes of microscope fields: found by name below a folder, read by region."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray

from phenoseq.data.readers.ometiff import open_tiff, stated_in_ome
from phenoseq.data.source import FieldImage, Level
from phenoseq.errors import DataError


@dataclass(frozen=True)
class Planes:
    """Stains of one field, one TIFF a stain, of one size and pixel type.

    Attributes
    ----------
    paths
        One file a stain.
    shape
        ``(height, width)`` in pixels.
    dtype
        Pixel type.
    pixel_size
        Micrometres a pixel as OME-XML states it, or None. The resolution tags of plain TIFF are
        not asked: microscopes write the camera's pixel there, or a number made up.
    """

    paths: tuple[Path, ...]
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    pixel_size: float | None

    def read(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        """Read a region ``(C, y1 - y0, x1 - x0)``; files are open only meanwhile."""
        out = np.empty((len(self.paths), y1 - y0, x1 - x0), dtype=self.dtype)
        for plane, path in zip(out, self.paths, strict=True):
            try:
                with tifffile.TiffFile(path) as tif, tif.pages[0].aszarr() as store:
                    plane[:] = zarr.open_array(store, mode="r")[y0:y1, x0:x1]
            except Exception as error:  # each codec has errors of its own
                raise DataError(
                    f"{path}: pixels at rows {y0}-{y1}, columns {x0}-{x1} cannot be decoded "
                    f"({error}); copy it again from the source"
                ) from error
        return out

    def field(self, pixel_size: float) -> FieldImage:
        """Return the field at ``pixel_size`` micrometres a pixel."""
        return FieldImage((Level(pixel_size, self.shape, self.read),), self.dtype)


def open_planes(paths: Sequence[Path]) -> Planes:
    """Open the TIFF files of one field, one a stain; pixels are not read.

    Raises
    ------
    DataError
        Where a file is truncated or no TIFF, holds anything but one grey plane, or differs from
        the others in size or pixel type.
    """
    facts = [_describe(path) for path in paths]
    shape, dtype, _ = facts[0]
    for path, (other_shape, other_dtype, _) in zip(paths, facts, strict=True):
        if (other_shape, other_dtype) != (shape, dtype):
            raise DataError(
                f"{path}: {other_shape} {other_dtype} differs from {paths[0].name}: {shape} "
                f"{dtype}; stains of one field must match"
            )
    sizes = [size for *_, size in facts if size]
    return Planes(tuple(paths), shape, dtype, sizes[0] if sizes else None)


def _describe(path: Path) -> tuple[tuple[int, int], np.dtype[Any], float | None]:
    with open_tiff(path) as tif:
        pages: list[Any] = [page for page in tif.pages if not page.is_reduced]  # type: ignore[union-attr]
        first: Any = tif.pages[0]
        if len(pages) != 1 or len(first.shape) != 2 or first.dtype is None:
            raise DataError(
                f"{path}: {len(pages)} planes, the first {first.shape}; one grey plane a file is "
                "read: split stacks and colour images first"
            )
        _, _, size = stated_in_ome(path, tif.ome_metadata)
        height, width = first.shape
        return (height, width), np.dtype(first.dtype).newbyteorder("="), size


def find_files(folder: Path, names: Collection[str]) -> dict[str, list[Path]]:
    """Find files by name anywhere below a folder.

    Links to folders are not followed, and links to files only where these lie below the folder.

    Returns
    -------
    For each name that is there its files, without links, in order.
    """
    root = folder.resolve()
    wanted = set(names)
    found: dict[str, set[Path]] = {}
    for here, _, files in os.walk(root):
        for name in wanted.intersection(files):
            path = (Path(here) / name).resolve()
            if path.is_relative_to(root) and path.is_file():
                found.setdefault(name, set()).add(path)
    return {name: sorted(paths) for name, paths in found.items()}


def choose_file(found: Mapping[str, Sequence[Path]], name: str, stated_folder: str) -> Path | None:
    r"""Choose the file of that name, or None where there is none.

    Parameters
    ----------
    found
        What :func:`find_files` found.
    name
        The file's name.
    stated_folder
        Where the file once was, with ``/`` or ``\``; of several files the one is chosen whose
        folder ends most like it.

    Raises
    ------
    DataError
        Where several files are as near.
    """
    paths = found.get(name, ())
    if len(paths) < 2:
        return paths[0] if paths else None
    stated = re.split(r"[\\/]+", stated_folder.rstrip("\\/"))
    nearness = [_same_at_the_end(path.parent.parts, stated) for path in paths]
    nearest = [p for p, n in zip(paths, nearness, strict=True) if n == max(nearness)]
    if len(nearest) > 1:
        raise DataError(
            f"{nearest[0]} and {nearest[1]}: two files of one name, and the table's folder "
            f"{stated_folder!r} does not tell which is meant; keep the folders' names as they "
            "were at the microscope, or one plate a folder"
        )
    return nearest[0]


def _same_at_the_end(here: Sequence[str], there: Sequence[str]) -> int:
    n = 0
    for a, b in zip(reversed(here), reversed(there), strict=False):
        if a != b:
            break
        n += 1
    return n
