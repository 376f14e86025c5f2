"""scGeneScope (Altos Labs): crops of single cells in zip files, and its protocol.

Its features and RNA are ``.h5ad`` files, which :class:`phenoseq.data.backed.Cells` reads: give
``round_1.h5ad`` and ``round_2.h5ad`` of a folder, or the folder. They also say more of the cells
than the manifest does (``Sample_ID``): see :func:`phenoseq.data.metadata.add_metadata`.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from numpy.typing import NDArray

from phenoseq.data.readers.pandashdf import has_key, read_pandas_hdf
from phenoseq.data.source import FieldImage, Level, Source
from phenoseq.data.splits import SplitConfig
from phenoseq.errors import DataError

#: Stains in the order of the published features.
CHANNELS = ("DNA", "RNA", "AGP", "Mito", "ER")
#: The benchmark's split: train on replicate 3, select on 5, test within the experiment on 4 and
#: on the held-out experiment, replicates 1 and 2.
PROTOCOL = SplitConfig(
    by="Replicate",
    block=None,
    declared={"train": ("3",), "val": ("5",), "test_we": ("4",), "test_he": ("1", "2")},
)
_MANIFESTS = (".h5", ".hdf", ".hdf5")
#: Zip files that are open at a time; the list of what one holds can take a second to read.
_OPEN = 4
#: Crops that are tried before it is said that none can be read.
_TRIES = 20
_OUTSIDE = re.compile(r"^$|^[/\\]|(^|[/\\])\.\.([/\\]|$)|^[^/\\]*:")


def detect(path: Path) -> str | None:
    """Return what makes ``path`` look like scGeneScope's crops, or None."""
    found = [file for file in _manifests(path) if has_key(file, "manifest")]
    if found and any(found[0].parent.rglob("*.zip")):
        return f"{found[0].name!r} holds a manifest, and it has zip files"
    return None


def read_scgenescope(path: Path, *, pixel_size: float | None = None) -> Source:
    """Read crops of single cells; they stay in their zip files and are read one by one.

    Parameters
    ----------
    path
        A manifest (an HDF5 file with a data frame ``manifest``), or the folder of one or several;
        the zip files lie somewhere below that folder. The manifest has a row a cell: ``cell_id``,
        ``path-DNA`` and so on for each stain, and what else is known, which becomes ``obs``. A path
        may start with the folder or name of its zip file (``plate1/...`` in ``plate1.zip``);
        otherwise it is looked for in all of them.
    pixel_size
        Micrometres a pixel; the files do not say.

    Raises
    ------
    DataError
        Where the manifest is missing or broken, a path leaves its zip file, the pixel size is
        missing, or none of the first crops can be read.
    """
    path = Path(path)
    if pixel_size is None:
        raise DataError(f"{path}: these files do not say how large a pixel is: --pixel-size UM")
    found = _manifests(path)
    if not found:
        raise DataError(f"{path}: no manifest, an HDF5 file (.h5, .hdf, .hdf5)")
    table = pd.concat([read_pandas_hdf(file, "manifest") for file in found])
    paths = [f"path-{name}" for name in CHANNELS]
    missing = [name for name in ["cell_id", *paths] if name not in table]
    if missing:
        raise DataError(f"{found[0]}: the manifest has no columns {missing}, only {list(table)}")
    table = table.set_index(table["cell_id"].astype(str)).drop(columns="cell_id")
    if not table.index.is_unique:
        twice = list(table.index[table.index.duplicated()][:3])
        raise DataError(f"{found[0]}: cells stand there twice, e.g. {twice}")
    if not len(table):
        raise DataError(f"{found[0]}: the manifest has no cells")
    members = table[paths].astype(str)
    for column in paths:
        bad = next((name for name in members[column] if _OUTSIDE.search(name)), None)
        if bad is not None:
            raise DataError(
                f"{found[0]}: the path {bad!r} leaves its zip file; the manifest is not safe"
            )
    fields = _Crops(_Archive(found[0].parent), members, float(pixel_size))
    obs = table.drop(columns=paths)
    obs.insert(0, "field", obs.index)
    obs["x_centroid"], obs["y_centroid"] = (side * pixel_size / 2 for side in fields.shape[::-1])
    digest = hashlib.sha256(f"{pixel_size:.6f}".encode())
    digest.update(pd.util.hash_pandas_object(members).to_numpy().tobytes())
    return Source(
        kind="scgenescope",
        name=str(path),
        channels=CHANNELS,
        fields=fields,
        obs=obs,
        counts=None,
        var=None,
        identity=digest.hexdigest(),
    )


def _manifests(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    return [file for file in files if file.suffix in _MANIFESTS]


class _Archive:
    """Zip files below a folder, of which a few are open at a time."""

    def __init__(self, folder: Path) -> None:
        self._zips = sorted(folder.rglob("*.zip"))
        self._names = [path.relative_to(folder).with_suffix("").parts for path in self._zips]
        self._open: dict[Path, zipfile.ZipFile] = {}
        self._known: dict[str, tuple[Path, int]] = {}
        self._broken: dict[Path, DataError] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read(self, member: str) -> bytes:
        """Return the content of a file that the manifest names; :class:`DataError` if broken."""
        folder = member.rpartition("/")[0]
        path, cut = self._known.get(folder) or self._find(member)
        if member[cut:] not in self._file(path).NameToInfo:
            path, cut = self._find(member)
        self._known[folder] = path, cut
        try:
            return self._file(path).read(member[cut:])
        except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as e:
            raise DataError(f"{path}: {member[cut:]}: cannot be read ({e}); copy it again") from e

    def _find(self, member: str) -> tuple[Path, int]:
        """Return the zip file that a path is in, and how much of the path's start it lacks."""
        parts = member.split("/")
        for n in range(len(parts) - 1, -1, -1):  # parts of the path that the zip's name stands for
            start = tuple(parts[:n])
            cut = len("/".join(start)) + 1 if n else 0
            likely = [
                path
                for path, name in zip(self._zips, self._names, strict=True)
                if not n or start in (name[-n:], name[:-1][-n:])
            ]
            found = [path for path in likely if self._has(path, member[cut:])]
            if len(found) > 1:
                raise DataError(
                    f"{member}: stands in {found[0]} and in {found[1]}; keep each zip file under "
                    "the folder or name that the manifest's paths start with"
                )
            if found:
                return found[0], cut
        for error in self._broken.values():
            raise error
        names = [path.name for path in self._zips[:5]]
        raise DataError(f"{member}: in none of the zip files ({names}); is one missing?")

    def _has(self, path: Path, name: str) -> bool:
        if path in self._broken:
            return False
        try:
            return name in self._file(path).NameToInfo
        except DataError as error:
            self._broken[path] = error
            return False

    def _file(self, path: Path) -> zipfile.ZipFile:
        if path not in self._open:
            while len(self._open) >= _OPEN:
                self._open.pop(next(iter(self._open))).close()
            try:
                self._open[path] = zipfile.ZipFile(path)
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(f"{path}: no readable zip file ({error}); copy it again") from error
        return self._open[path]


class _Crops(Mapping[str, FieldImage]):
    """A field a cell: its crop, all of one ``shape``, made when it is asked for."""

    def __init__(self, archive: _Archive, members: pd.DataFrame, pixel_size: float) -> None:
        self._archive, self._pixel_size = archive, pixel_size
        self._index, self._members = members.index, members.to_numpy(object)
        self.shape = self._first_shape()

    def _first_shape(self) -> tuple[int, int]:
        first: DataError | None = None
        for paths in self._members[:_TRIES]:
            try:
                height, width = _plane(self._archive, paths[0]).shape
                return height, width
            except DataError as error:
                first = first or error
        assert first is not None
        raise DataError(f"none of the first {_TRIES} crops can be read; the first: {first}")

    def __getitem__(self, cell: str) -> FieldImage:
        paths = self._members[self._index.get_loc(cell)]
        level = Level(self._pixel_size, self.shape, _Crop(self._archive, paths, self.shape))
        return FieldImage((level,), np.dtype(np.uint8))

    def __contains__(self, cell: object) -> bool:
        return cell in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


@dataclass(frozen=True)
class _Crop:
    """Reads a region of a cell's crop."""

    archive: _Archive
    paths: NDArray[np.object_]
    shape: tuple[int, int]

    def __call__(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        planes = [_plane(self.archive, path) for path in self.paths]
        for path, plane in zip(self.paths, planes, strict=True):
            if plane.shape != self.shape:
                raise DataError(f"{path}: {plane.shape} pixels, where others have {self.shape}")
        return np.stack([plane[y0:y1, x0:x1] for plane in planes])


def _plane(archive: _Archive, path: str) -> NDArray[np.uint8]:
    raw = archive.read(path)
    try:
        plane = tifffile.imread(io.BytesIO(raw))
    except Exception as error:  # tifffile has errors of its own
        raise DataError(f"{path}: not a readable TIFF ({error})") from error
    if plane.ndim != 2 or plane.dtype != np.uint8:
        raise DataError(
            f"{path}: {plane.dtype} of shape {plane.shape}, not an 8-bit image of one channel"
        )
    return np.asarray(plane)
