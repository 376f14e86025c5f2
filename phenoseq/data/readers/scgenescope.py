"""scGeneScope (Altos Labs): crops of single cells in zip files, and its protocol.

Its features and RNA are ``.h5ad`` files, which :class:`phenoseq.data.backed.Cells` reads: give
``round_1.h5ad`` and ``round_2.h5ad`` of a folder, or the folder.
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from numpy.typing import NDArray

from phenoseq.data.readers.pandashdf import has_key, read_pandas_hdf
from phenoseq.data.source import FieldImage, Level, Source
from phenoseq.data.splits import SplitConfig
from phenoseq.errors import DataError, PhenoseqWarning

#: Stains in the order of the published features.
CHANNELS = ("DNA", "RNA", "AGP", "Mito", "ER")
#: The benchmark's split: train on replicate 3, select on 5, test within the experiment on 4 and
#: on the held-out experiment, replicates 1 and 2.
PROTOCOL = SplitConfig(
    by="Replicate",
    block=None,
    declared={"train": ("3",), "val": ("5",), "test_we": ("4",), "test_he": ("1", "2")},
)
_OPEN = 4


def detect(folder: Path) -> str | None:
    """Return what makes ``folder`` look like scGeneScope's crops, or None."""
    found = [path for path in _manifests(folder) if has_key(path, "manifest")]
    if found and any(folder.rglob("*.zip")):
        return f"{found[0].name!r} holds a manifest, and it has zip files"
    return None


def read_scgenescope(
    folder: Path, *, pixel_size: float | None = None, cells: pd.Index | None = None
) -> Source:
    """Read crops of single cells; they stay in their zip files and are read one by one.

    Parameters
    ----------
    folder
        With a manifest (an HDF5 file with a data frame ``manifest``) and zip files somewhere
        below it. The manifest has a row a cell: ``cell_id``, ``path-DNA`` and so on for each
        stain, and what else is known, which becomes ``obs``. A path is looked for in the zip file
        that it starts with (``plate1/...`` in ``plate1.zip``, with or without that start), then in
        all others.
    pixel_size
        Micrometres a pixel; the files do not say.
    cells
        Ids of the cells wanted; those without a manifest row are left out with a warning.

    Raises
    ------
    DataError
        Where the manifest is missing or broken, a path leaves its zip file, or the pixel size is
        missing.
    """
    folder = Path(folder)
    if pixel_size is None:
        raise DataError(f"{folder}: these files do not say how large a pixel is: --pixel-size UM")
    found = _manifests(folder)
    if not found:
        raise DataError(f"{folder}: no manifest, an HDF5 file (.h5, .hdf, .hdf5)")
    table = pd.concat([read_pandas_hdf(path, "manifest") for path in found])
    paths = [f"path-{name}" for name in CHANNELS]
    missing = [name for name in ["cell_id", *paths] if name not in table]
    if missing:
        raise DataError(f"{found[0]}: the manifest has no columns {missing}, only {list(table)}")
    table = table.set_index(table["cell_id"].astype(str)).drop(columns="cell_id")
    if not table.index.is_unique:
        twice = list(table.index[table.index.duplicated()][:3])
        raise DataError(f"{found[0]}: cells stand there twice, e.g. {twice}")
    if cells is not None:
        known = cells.isin(table.index)
        if not known.all():
            warnings.warn(
                f"{found[0]}: {int((~known).sum())} of {len(cells)} cells have no row and are left "
                f"out, e.g. {list(cells[~known][:3])}",
                PhenoseqWarning,
                stacklevel=2,
            )
        table = table.loc[cells[known]]
    if not len(table):
        raise DataError(f"{found[0]}: none of the cells wanted are in the manifest")
    members = table[paths].astype(str)
    for column in paths:
        for path in members[column]:
            _check_inside(path, found[0])
    archive = _Archive(sorted(folder.rglob("*.zip")))
    fields = _Crops(archive, members, float(pixel_size))
    side = fields[members.index[0]].levels[0].shape
    obs = table.drop(columns=paths)
    obs.insert(0, "field", obs.index)
    obs["x_centroid"], obs["y_centroid"] = side[1] * pixel_size / 2, side[0] * pixel_size / 2
    digest = hashlib.sha256(f"{pixel_size:.6f}".encode())
    digest.update(pd.util.hash_pandas_object(members).to_numpy().tobytes())
    return Source(
        kind="scgenescope",
        name=str(folder),
        channels=CHANNELS,
        fields=fields,
        obs=obs,
        counts=None,
        var=None,
        identity=digest.hexdigest(),
    )


def _manifests(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for ending in ("h5", "hdf", "hdf5") for p in folder.glob(f"*.{ending}"))


def _check_inside(path: str, where: Path) -> None:
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0].startswith("/") or ":" in parts[0]:
        raise DataError(f"{where}: the path {path!r} leaves its zip file; the manifest is not safe")


class _Archive:
    """Zip files, of which a few are open at a time."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._open: dict[Path, zipfile.ZipFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_paths": self._paths, "_open": {}}

    def read(self, member: str) -> bytes:
        first, _, rest = member.partition("/")
        ordered = sorted(self._paths, key=lambda path: path.stem != first)
        for path in ordered:
            file = self._file(path)
            for name in (member, rest) if path.stem == first and rest else (member,):
                try:
                    return file.read(name)
                except KeyError:
                    continue
                except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
                    raise DataError(f"{path}: {name}: cannot be read ({error})") from error
        names = [path.name for path in self._paths[:5]]
        raise DataError(f"{member}: in none of the zip files ({names}); is one missing?")

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
    """A field a cell: its crop, made when it is asked for."""

    def __init__(self, archive: _Archive, members: pd.DataFrame, pixel_size: float) -> None:
        self._archive, self._pixel_size = archive, pixel_size
        self._members = members
        self._shape: tuple[int, int] | None = None

    def __getitem__(self, cell: str) -> FieldImage:
        paths = self._members.loc[cell].tolist()
        if self._shape is None:
            self._shape = self._plane(paths[0]).shape[:2]

        def read(y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
            return np.stack([self._plane(path)[y0:y1, x0:x1] for path in paths])

        level = Level(self._pixel_size, self._shape, read)
        return FieldImage((level,), np.dtype(np.uint8))

    def __iter__(self) -> Iterator[str]:
        return iter(self._members.index)

    def __len__(self) -> int:
        return len(self._members)

    def _plane(self, path: str) -> NDArray[np.uint8]:
        raw = self._archive.read(path)
        try:
            plane = tifffile.imread(io.BytesIO(raw))
        except Exception as error:  # tifffile has errors of its own
            raise DataError(f"{path}: not a readable TIFF ({error})") from error
        if plane.ndim != 2 or plane.dtype != np.uint8:
            raise DataError(
                f"{path}: {plane.dtype} of shape {plane.shape}, not an 8-bit image of one channel"
            )
        if self._shape is not None and plane.shape != self._shape:
            raise DataError(f"{path}: {plane.shape} pixels, where the first has {self._shape}")
        return np.asarray(plane)
