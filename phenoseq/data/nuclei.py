"""Nuclei of all fields of a source, written as masks, a table of cells, and pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import imagecodecs
import numpy as np
import pandas as pd
import tifffile
from numpy.typing import NDArray

from phenoseq.data.readers import find_reader, open_source
from phenoseq.data.readers.images import MASKS, OVERLAYS, open_images
from phenoseq.data.readers.masks import cells_of
from phenoseq.data.segment import Method, find_nuclei, overlay
from phenoseq.data.source import tell_problems
from phenoseq.errors import DataError


def segment_folder(
    folder: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    pixel_size: float | None = None,
    method: Method = "watershed",
    progress: Callable[[int, int], None] | None = None,
) -> pd.Series:
    """Find the nuclei of every field of a source, and write them.

    Written are ``masks/FIELD.tif`` (int32 labels), ``overlays/FIELD.png`` and ``cells.csv``, all in
    the form in which a folder of images is read; nothing of them is there before all are done.

    Parameters
    ----------
    folder
        Folder of TIFF images, or another source that :func:`~phenoseq.data.readers.open_source`
        reads, with the stain DNA among the images. Cells that it has are not asked.
    out
        Folder to write to; that of the images is fine.
    format
        Name of a reader, where the layout should not be guessed.
    pixel_size
        Micrometres a pixel, where the files do not say.
    method
        See :func:`~phenoseq.data.segment.find_nuclei`.
    progress
        Called with (fields done, fields in all).

    Returns
    -------
    Number of nuclei of each field, indexed by its name.

    Raises
    ------
    DataError
        Where the images cannot be used, none is of DNA, or one of these is there already.
    """
    out = Path(out)
    fields, size, dna_of = _planes(folder, format, pixel_size)
    names = (MASKS, OVERLAYS, "cells.csv")
    there = [name for name in names if (out / name).exists()]
    if there:
        raise DataError(f"{out}: has {there} already; remove them or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    counts, tables = {}, []
    with TemporaryDirectory(prefix=".nuclei-", dir=out) as scratch:
        partial = Path(scratch)
        for done, field in enumerate(fields, start=1):
            dna = dna_of(field)
            labels = find_nuclei(dna, size, method=method)
            mask, picture = (partial / MASKS / f"{field}.tif", partial / OVERLAYS / f"{field}.png")
            for path in (mask, picture):
                path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(mask, labels, compression="zlib", metadata=None)
            picture.write_bytes(imagecodecs.png_encode(overlay(dna, labels)))
            tables.append(cells_of(labels, field, size))
            counts[field] = len(tables[-1])
            if progress is not None:
                progress(done, len(fields))
        pd.concat(tables).to_csv(partial / "cells.csv")
        for name in names:
            shutil.move(partial / name, out / name)
    return pd.Series(counts, name="nuclei")


def _planes(
    folder: str | Path, format: str | None, pixel_size: float | None
) -> tuple[list[str], float, Callable[[str], NDArray[Any]]]:
    """Return the fields of a source, its pixel size, and what reads the stain DNA of a field."""
    if find_reader(folder, format)[0].name == "folder":  # which would find nuclei to be its cells
        images = open_images(Path(folder), pixel_size)
        tell_problems(images.problems, len(images.fields), str(folder))
        _check_dna(images.channels, folder)
        return list(images.fields), images.pixel_size, lambda field: images.plane(field, "DNA")
    source = open_source(folder, format=format, pixel_size=pixel_size)
    _check_dna(source.channels, folder)

    def read(field: str) -> NDArray[Any]:
        level = source.fields[field].levels[0]
        pixels = level.read(0, level.shape[0], 0, level.shape[1])
        return np.asarray(pixels[source.channels.index("DNA")])

    return list(source.fields), source.pixel_size, read


def _check_dna(channels: Sequence[str], folder: str | Path) -> None:
    if "DNA" not in channels:
        raise DataError(f"{folder}: no stain DNA to find nuclei in; it has {list(channels)}")
