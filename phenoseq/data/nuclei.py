"""Nuclei of all fields of a folder, written as masks, a table of cells, and pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import imagecodecs
import pandas as pd
import tifffile

from phenoseq.data.readers.images import MASKS, OVERLAYS, open_images
from phenoseq.data.readers.masks import cells_of
from phenoseq.data.segment import Method, find_nuclei, overlay
from phenoseq.data.source import tell_problems
from phenoseq.errors import DataError


def segment_folder(
    folder: str | Path,
    out: str | Path,
    *,
    pixel_size: float | None = None,
    method: Method = "watershed",
    progress: Callable[[int, int], None] | None = None,
) -> pd.Series:
    """Find the nuclei of every field of a folder of images, and write them.

    Written are ``masks/FIELD.tif`` (int32 labels), ``overlays/FIELD.png`` and ``cells.csv``, all in
    the form in which a folder of images is read; nothing of them is there before all are done.

    Parameters
    ----------
    folder
        Folder of TIFF images, with the stain DNA among them.
    out
        Folder to write to; that of the images is fine.
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
    images = open_images(Path(folder), pixel_size)
    tell_problems(images.problems, len(images.fields), str(folder))
    if "DNA" not in images.channels:
        raise DataError(f"{folder}: no stain DNA to find nuclei in; it has {list(images.channels)}")
    names = (MASKS, OVERLAYS, "cells.csv")
    there = [name for name in names if (out / name).exists()]
    if there:
        raise DataError(f"{out}: has {there} already; remove them or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    counts, tables = {}, []
    with TemporaryDirectory(prefix=".nuclei-", dir=out) as scratch:
        partial = Path(scratch)
        for done, field in enumerate(images.fields, start=1):
            dna = images.plane(field, "DNA")
            labels = find_nuclei(dna, images.pixel_size, method=method)
            mask, picture = (partial / MASKS / f"{field}.tif", partial / OVERLAYS / f"{field}.png")
            for path in (mask, picture):
                path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(mask, labels, compression="zlib", metadata=None)
            picture.write_bytes(imagecodecs.png_encode(overlay(dna, labels)))
            tables.append(cells_of(labels, field, images.pixel_size))
            counts[field] = len(tables[-1])
            if progress is not None:
                progress(done, len(images.fields))
        pd.concat(tables).to_csv(partial / "cells.csv")
        for name in names:
            shutil.move(partial / name, out / name)
    return pd.Series(counts, name="nuclei")
