"""One reader a layout; each yields a :class:`~phenoseq.data.source.Source`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phenoseq.data.readers import (
    cellprofiler,
    folder,
    jump,
    merscope,
    omefield,
    omezarr,
    scgenescope,
    spatialdata,
    xenium,
)
from phenoseq.data.readers.cellprofiler import read_cellprofiler
from phenoseq.data.readers.cells import read_cells
from phenoseq.data.readers.folder import read_folder
from phenoseq.data.readers.jump import read_jump
from phenoseq.data.readers.merscope import read_merscope
from phenoseq.data.readers.omefield import read_omefield
from phenoseq.data.readers.omezarr import read_omezarr
from phenoseq.data.readers.scgenescope import read_scgenescope
from phenoseq.data.readers.spatialdata import read_spatialdata
from phenoseq.data.readers.storage import is_url, place_of
from phenoseq.data.readers.xenium import read_xenium
from phenoseq.data.source import Source
from phenoseq.errors import DataError

__all__ = [
    "READERS",
    "Reader",
    "find_reader",
    "open_source",
    "read_cellprofiler",
    "read_cells",
    "read_folder",
    "read_jump",
    "read_merscope",
    "read_omefield",
    "read_omezarr",
    "read_scgenescope",
    "read_spatialdata",
    "read_xenium",
]


@dataclass(frozen=True)
class Reader:
    """A layout that phenoseq reads.

    Attributes
    ----------
    name
        What ``--format`` calls it.
    layout
        What such a source holds, for people.
    detect
        Returns what in a source speaks for this layout, or None.
    read
        ``read(path, pixel_size=...)`` returns the source; images are opened, not loaded.
    remote
        Whether both take a URL, as text, as well as a path.
    bare
        Whether ``read(..., cells=False)`` opens the images alone, and asks for no cells.
    """

    name: str
    layout: str
    detect: Callable[[Any], str | None]
    read: Callable[..., Source]
    remote: bool = False
    bare: bool = False


#: In the order in which they are tried: the most specific layouts first.
READERS: tuple[Reader, ...] = (
    Reader(
        "xenium",
        "Xenium output folder: 'cells.parquet' (or 'cells.csv.gz') and 'morphology_focus'",
        xenium.detect,
        read_xenium,
    ),
    Reader(
        "merscope",
        "MERSCOPE output folder: 'cell_metadata.csv' and 'images/mosaic_STAIN_zN.tif'",
        merscope.detect,
        read_merscope,
    ),
    Reader(
        "spatialdata",
        "SpatialData folder: an image, a table, and the labels, shapes or points it is of",
        spatialdata.detect,
        read_spatialdata,
    ),
    Reader(
        "ome-zarr",
        "OME-Zarr plate or image (NGFF 0.4, 0.5) with label images; also s3:// and https://",
        omezarr.detect,
        read_omezarr,
        remote=True,
        bare=True,
    ),
    Reader(
        "jump",
        "Cell Painting Gallery: 'load_data.csv', and the table of nuclei beside it",
        jump.detect,
        read_jump,
        bare=True,
    ),
    Reader(
        "cellprofiler",
        "folder with CellProfiler's single-cell table (.parquet or .csv, with columns "
        "'Image_FileName_Orig<Stain>') and the images somewhere below it",
        cellprofiler.detect,
        read_cellprofiler,
    ),
    Reader(
        "scgenescope",
        "scGeneScope's crops: an HDF5 file with a data frame 'manifest', and zip files of TIFF",
        scgenescope.detect,
        read_scgenescope,
    ),
    Reader(
        "ome-tiff",
        "one OME-TIFF image 'NAME.ome.tif' with 'NAME_labels.tif' or 'cells.csv' beside it",
        omefield.detect,
        read_omefield,
        bare=True,
    ),
    Reader(
        "folder",
        "folder of TIFF images 'FIELD_STAIN.tif', with 'cells.csv', 'masks', or neither",
        folder.detect,
        read_folder,
        bare=True,
    ),
)


def find_reader(path: str | Path, format: str | None = None) -> tuple[Reader, str]:
    """Return the reader for a source, and the reason for it.

    Parameters
    ----------
    path
        A source that exists, or a URL.
    format
        Name of a reader, in place of the first that knows the layout.

    Raises
    ------
    DataError
        Where the source is missing, no reader knows its layout, or there is no such reader.
    """
    source = place_of(path)
    if isinstance(source, Path) and not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if format is not None:
        for reader in READERS:
            if reader.name == format:
                _check_reach(reader, source)
                return reader, "as asked for"
        names = [reader.name for reader in READERS]
        near = difflib.get_close_matches(format, names, n=1, cutoff=0.3)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"no format {format!r}; phenoseq reads {names}{guess}")
    for reader in READERS:
        if is_url(source) and not reader.remote:
            continue
        reason = reader.detect(source)
        if reason is not None:
            return reader, reason
    known = "".join(f"\n  {reader.name}: {reader.layout}" for reader in READERS)
    raise DataError(f"{source}: not a layout that phenoseq reads, which are{known}")


def open_source(
    path: str | Path,
    *,
    format: str | None = None,
    pixel_size: float | None = None,
    cells: bool = True,
) -> Source:
    r"""Open images and cells with the reader that knows their layout.

    Parameters
    ----------
    path
        Folder, file or URL; :data:`READERS` says of what kind.
    format
        Name of a reader, where the layout should not be guessed.
    pixel_size
        Micrometres a pixel at full resolution, where the source does not say.
    cells
        False where cells come from elsewhere: then those of the source are not read, and need not
        be there, unless its layout has images and cells as one.

    Raises
    ------
    DataError
        Where the source is missing or broken, no reader knows its layout, or there is no such
        reader.

    Examples
    --------
    >>> import numpy as np
    >>> import tifffile
    >>> Path("images").mkdir()
    >>> tifffile.imwrite("images/field1_DAPI.tif", np.zeros((64, 64), np.uint16))
    >>> _ = Path("images/cells.csv").write_text("cell_id,field,x,y\nc1,field1,20,30\n")
    >>> source = open_source("images", pixel_size=0.5)
    >>> source.kind, source.channels, source.obs["x_centroid"].item()
    ('folder', ('DNA',), 10.25)
    """
    reader, _ = find_reader(path, format)
    options = {} if cells or not reader.bare else {"cells": False}
    return reader.read(place_of(path), pixel_size=pixel_size, **options)


def _check_reach(reader: Reader, source: Path | str) -> None:
    if is_url(source) and not reader.remote:
        raise DataError(f"{source}: {reader.name} is read from a folder; copy it to one first")
