"""MERSCOPE output folders (Vizgen), one region, as the instrument writes them."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.data.readers.cells import check_cells
from phenoseq.data.readers.counts import align_counts
from phenoseq.data.readers.ometiff import open_stains
from phenoseq.data.source import Source, digest_of
from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.genes import gene_table, tell_symbols

_MOSAIC = re.compile(r"mosaic_(?P<stain>.+)_z(?P<z>\d+)\.tiff?")
_IDS = ("EntityID", "cell_id", "cell")
#: Rows of the count table that are read at once.
_ROWS = 20_000
#: Pixel sizes that differ by more than this share contradict each other.
TOLERANCE = 0.01


def detect(folder: Path) -> str | None:
    """Return what makes ``folder`` look like a MERSCOPE output folder, or None."""
    planes = _mosaics(folder)
    if not planes or not (folder / "cell_metadata.csv").exists():
        return None
    return "it has 'cell_metadata.csv' and 'images/mosaic_STAIN_zN.tif'"


def read_merscope(folder: Path, *, pixel_size: float | None = None) -> Source:
    """Read a MERSCOPE output folder (one region); images are opened, not loaded.

    Of the z planes that one is used which has most stains, of several such the middle one; its
    number is in the name of the field, ``"z3"``. Positions become micrometres from the upper left
    corner of the image; cells outside of it are kept. ``Blank-*`` barcodes are dropped. The tables
    name genes by symbol only. The count table may be absent (``counts`` is then None).

    Parameters
    ----------
    folder
        The output folder, which holds ``images`` and ``cell_metadata.csv``.
    pixel_size
        Micrometres a pixel. By default the size of the image in micrometres over that in pixels.

    Raises
    ------
    DataError
        Where images or cells are missing or unreadable, no file places the image among the cells,
        or the count table belongs to other cells.
    """
    folder = Path(folder)
    planes = _mosaics(folder)
    if not planes:
        raise DataError(f"{folder}/images: no image; expected 'mosaic_STAIN_zN.tif'")
    z = _choose_plane(planes, folder)
    image = open_stains(planes[z])
    place = _read_place(folder / "images")
    height, width = image.series[0][1].shape[-2:]
    size = _pixel_size(place, (height, width), pixel_size, folder)
    obs = _read_metadata(folder / "cell_metadata.csv", place.corner)
    obs.insert(0, "field", f"z{z}")
    table = folder / "cell_by_gene.csv"
    counts, var = _read_counts(table, obs.index) if table.exists() else (None, None)
    return Source(
        kind="merscope",
        name=str(folder),
        channels=image.channels,
        fields={f"z{z}": image.field(size)},
        obs=obs,
        counts=counts,
        var=var,
        identity=digest_of(size, obs, counts, var),
    )


def _mosaics(folder: Path) -> dict[int, dict[str, Path]]:
    """Return the file of each stain by z plane, both in order."""
    planes: dict[int, dict[str, Path]] = {}
    for path in sorted((folder / "images").glob("mosaic_*_z*.tif*")):
        match = _MOSAIC.fullmatch(path.name)
        if match:
            planes.setdefault(int(match["z"]), {})[match["stain"]] = path
    return dict(sorted(planes.items()))


def _choose_plane(planes: dict[int, dict[str, Path]], folder: Path) -> int:
    """Return the middle one of the planes with most stains; tell where planes differ."""
    most = max(map(len, planes.values()))
    fullest = [z for z, files in planes.items() if len(files) == most]
    z = fullest[len(fullest) // 2]
    every = sorted({stain for files in planes.values() for stain in files})
    lacking = [stain for stain in every if stain not in planes[z]]
    if lacking or any(len(files) < most for files in planes.values()):
        have = "; ".join(f"z{k}: {', '.join(files)}" for k, files in planes.items())
        warnings.warn(
            f"{folder}/images: z planes have different stains ({have}); z{z} is used"
            + (f", without {lacking}" if lacking else ""),
            PhenoseqWarning,
            stacklevel=3,
        )
    return z


@dataclass(frozen=True)
class _Place:
    """Where the mosaic lies: its corner, and its size or that of a pixel, in micrometres."""

    corner: tuple[float, float]
    extent: tuple[float, float] | None  # width and height of the box of the manifest
    stated: dict[str, float]  # micrometres a pixel, by who says so
    pixels: tuple[int, int] | None  # width and height of the mosaic that the manifest states


def _read_place(images: Path) -> _Place:
    path, transform = images / "manifest.json", images / "micron_to_mosaic_pixel_transform.csv"
    stated: dict[str, float] = {}
    corner = extent = pixels = None
    if path.exists():
        try:
            manifest = json.loads(path.read_text())
            if "microns_per_pixel" in manifest:
                stated[f"{path.name} 'microns_per_pixel'"] = float(manifest["microns_per_pixel"])
            if "bbox_microns" in manifest:
                x0, y0, x1, y1 = map(float, manifest["bbox_microns"])
                corner, extent = (x0, y0), (x1 - x0, y1 - y0)
            if "mosaic_width_pixels" in manifest and "mosaic_height_pixels" in manifest:
                pixels = manifest["mosaic_width_pixels"], manifest["mosaic_height_pixels"]
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); copy it again") from error
        if extent is not None and not (0 < extent[0] < np.inf and 0 < extent[1] < np.inf):
            raise DataError(f"{path}: 'bbox_microns' spans {extent} um; copy it again")
    if transform.exists():
        matrix = _read_transform(transform)
        stated[transform.name] = 1 / matrix[0, 0]
        corner = corner or (-matrix[0, 2] / matrix[0, 0], -matrix[1, 2] / matrix[1, 1])
    if corner is None:
        raise DataError(
            f"{images}: neither 'manifest.json' with 'bbox_microns' nor {transform.name!r} says "
            "where the image lies among the cells; copy one of them from the instrument's output"
        )
    return _Place(corner, extent, stated, pixels)


def _read_transform(path: Path) -> NDArray[np.float64]:
    try:
        matrix = np.loadtxt(path.read_text().replace(",", " ").splitlines(), ndmin=2)
    except ValueError as error:
        raise DataError(f"{path}: cannot be read ({error}); copy it again") from error
    if matrix.shape != (3, 3) or matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
        raise DataError(f"{path}: no 3 x 3 matrix of positive scales; copy it again")
    if np.abs(matrix[[0, 1], [1, 0]]).max() > TOLERANCE * matrix[0, 0]:
        raise DataError(f"{path}: the image is rotated against the cells; export it unrotated")
    return matrix


def _pixel_size(place: _Place, shape: tuple[int, int], given: float | None, folder: Path) -> float:
    """Return micrometres a pixel: as given, of the box, or as stated; tell of contradictions."""
    height, width = shape
    found = dict(place.stated)
    if place.extent is not None:
        across, down = place.extent[0] / width, place.extent[1] / height
        if given is None and abs(across / down - 1) > TOLERANCE:
            raise DataError(
                f"{folder}/images/manifest.json: 'bbox_microns' over {width} x {height} pixels "
                f"gives {across:.4g} um a pixel across and {down:.4g} down; the image or the "
                "manifest is of another region: copy both again, or give --pixel-size"
            )
        found = {f"'bbox_microns' over {width} x {height} pixels": across, **found}
    if given is not None:
        found = {"--pixel-size": given, **found}
    if not found:
        raise DataError(
            f"{folder}/images/manifest.json: states no pixel size; give it in micrometres: "
            "--pixel-size 0.108 is the instrument's"
        )
    who, size = next(iter(found.items()))
    if not 0.01 < float(size) < 100:
        raise DataError(f"{folder}: {who}: a pixel size of {size} micrometres cannot be right")
    other = [f"{w}: {s:.4g}" for w, s in found.items() if not abs(s / size - 1) <= TOLERANCE]
    if place.pixels is not None and place.pixels != (width, height):
        other.append(f"'manifest.json' says {place.pixels[0]} x {place.pixels[1]} pixels")
    if other:
        warnings.warn(
            f"{folder}/images: contradictory sizes: {who}: {size:.4g} um a pixel, but "
            f"{'; '.join(other)}. {size:.4g} is used",
            PhenoseqWarning,
            stacklevel=3,
        )
    return float(size)


def _read_metadata(path: Path, corner: tuple[float, float]) -> pd.DataFrame:
    """Read the cells, with positions from the corner of the image."""
    if not path.exists():
        raise DataError(f"{path}: missing; it holds the positions of the cells")
    try:
        ids, _ = _id_column(path)
        table = pd.read_csv(path, dtype={ids: str})  # 64 bits, which a float would not keep apart
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy it again") from error
    nameless = int(table[ids].isna().sum())
    if nameless:
        raise DataError(f"{path}: {nameless} cells have no id; copy it again")
    table = table.set_index(ids)
    lacking = [name for name in ("center_x", "center_y") if name not in table]
    if lacking:
        raise DataError(f"{path}: no column {lacking}; it has {list(table.columns)[:12]}")
    for axis, name in enumerate(("x", "y")):
        position = pd.to_numeric(table.pop(f"center_{name}"), errors="coerce")
        table.insert(axis, f"{name}_centroid", position - corner[axis])
    return check_cells(table, str(path))


def _id_column(path: Path) -> tuple[str, list[str]]:
    """Return the column of cell ids, without a name in older files, and all other columns."""
    columns = list(pd.read_csv(path, nrows=0).columns)
    ids = next((name for name in _IDS if name in columns), columns[0])
    return ids, [name for name in columns if name != ids]


def _read_counts(path: Path, cells: pd.Index) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    """Read the table of counts, its genes only, in the order of ``cells``."""
    try:
        ids, columns = _id_column(path)
        genes = [name for name in columns if not name.lower().startswith("blank")]
        types = {ids: str, **dict.fromkeys(genes, np.float32)}
        parts, barcodes = [], []
        with pd.read_csv(path, usecols=[ids, *genes], dtype=types, chunksize=_ROWS) as chunks:
            for chunk in chunks:
                barcodes += list(chunk.pop(ids))
                parts.append(sparse.csr_matrix(chunk[genes].to_numpy(np.float32)))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a readable table of counts ({error}); copy it again, or remove it to "
            "predict without counts"
        ) from error
    if not genes:
        raise DataError(f"{path}: no gene in it, only {columns[:5]}")
    if not parts:
        raise DataError(f"{path}: no cells in it")
    matrix = sparse.vstack(parts, format="csr")
    if not np.isfinite(matrix.data).all():
        raise DataError(f"{path}: counts are missing; the file may be cut off: copy it again")
    var = gene_table([""] * len(genes), genes, str(path))
    tell_symbols(var, str(path))
    return align_counts(matrix, pd.Index(barcodes), cells, str(path)), var
