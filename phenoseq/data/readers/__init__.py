"""One reader a layout; each yields a :class:`~phenoseq.data.source.Source`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from phenoseq.data.readers import scgenescope, xenium
from phenoseq.data.readers.cells import read_cells
from phenoseq.data.readers.scgenescope import read_scgenescope
from phenoseq.data.readers.xenium import read_xenium
from phenoseq.data.source import Source
from phenoseq.errors import DataError

__all__ = [
    "READERS",
    "Reader",
    "find_reader",
    "open_source",
    "read_cells",
    "read_scgenescope",
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
    """

    name: str
    layout: str
    detect: Callable[[Path], str | None]
    read: Callable[..., Source]


#: In the order in which they are tried: the most specific layouts first.
READERS: tuple[Reader, ...] = (
    Reader(
        "xenium",
        "Xenium output folder: 'cells.parquet' (or 'cells.csv.gz') and 'morphology_focus'",
        xenium.detect,
        read_xenium,
    ),
    Reader(
        "scgenescope",
        "scGeneScope's crops: an HDF5 file with a data frame 'manifest', and zip files of TIFF",
        scgenescope.detect,
        read_scgenescope,
    ),
)


def find_reader(path: str | Path, format: str | None = None) -> tuple[Reader, str]:
    """Return the reader for a source, and the reason for it.

    Parameters
    ----------
    path
        A source that exists.
    format
        Name of a reader, in place of the first that knows the layout.

    Raises
    ------
    DataError
        Where the source is missing, no reader knows its layout, or there is no such reader.
    """
    source = Path(path)
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if format is not None:
        for reader in READERS:
            if reader.name == format:
                return reader, "as asked for"
        names = [reader.name for reader in READERS]
        near = difflib.get_close_matches(format, names, n=1, cutoff=0.3)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"no format {format!r}; phenoseq reads {names}{guess}")
    for reader in READERS:
        reason = reader.detect(source)
        if reason is not None:
            return reader, reason
    known = "".join(f"\n  {reader.name}: {reader.layout}" for reader in READERS)
    raise DataError(f"{source}: not a layout that phenoseq reads, which are{known}")


def open_source(
    path: str | Path, *, format: str | None = None, pixel_size: float | None = None
) -> Source:
    """Open images and cells with the reader that knows their layout.

    Parameters
    ----------
    path
        Folder or file; :data:`READERS` says of what kind.
    format
        Name of a reader, where the layout should not be guessed.
    pixel_size
        Micrometres a pixel at full resolution, where the source does not say.

    Raises
    ------
    DataError
        Where the source is missing or broken, no reader knows its layout, or there is no such
        reader.
    """
    reader, _ = find_reader(path, format)
    return reader.read(Path(path), pixel_size=pixel_size)
