"""One reader a layout; each yields a :class:`~phenoseq.data.source.Source`."""

from __future__ import annotations

from pathlib import Path

from phenoseq.data.readers.cellprofiler import is_cellprofiler, read_cellprofiler
from phenoseq.data.readers.cells import read_cells
from phenoseq.data.readers.xenium import is_xenium, read_xenium
from phenoseq.data.source import Source
from phenoseq.errors import DataError

__all__ = ["open_source", "read_cellprofiler", "read_cells", "read_xenium"]


def open_source(path: str | Path, *, pixel_size: float | None = None) -> Source:
    """Open a folder of images and cells with the reader that knows its layout.

    Parameters
    ----------
    path
        A Xenium output folder, or a folder with CellProfiler's single-cell table and its images.
    pixel_size
        Micrometres a pixel at full resolution, where the folder does not say.

    Raises
    ------
    DataError
        Where the folder is missing or no reader knows its layout.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if is_xenium(folder):
        return read_xenium(folder, pixel_size=pixel_size)
    if is_cellprofiler(folder):
        return read_cellprofiler(folder, pixel_size=pixel_size)
    raise DataError(
        f"{folder}: not a layout that phenoseq reads. A Xenium output folder has "
        "'cells.parquet' (or 'cells.csv.gz') and 'morphology_focus'; a CellProfiler folder has a "
        "single-cell table (.parquet or .csv) with columns 'Image_FileName_Orig<Stain>', and the "
        "images somewhere below it"
    )
