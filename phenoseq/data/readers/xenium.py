"""Xenium output folders (10x Genomics), as the instrument writes them."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from phenoseq.data.readers.cells import read_cells
from phenoseq.data.readers.counts import align_counts
from phenoseq.data.readers.ometiff import open_ometiff
from phenoseq.data.source import Source, digest_of
from phenoseq.errors import DataError
from phenoseq.genes import gene_table, tell_symbols

_CELLS = ("cells.parquet", "cells.csv.gz", "cells.csv")
_FIELD = "section"


def detect(folder: Path) -> str | None:
    """Return what makes ``folder`` look like a Xenium output folder, or None."""
    if (folder / "experiment.xenium").exists():
        return "it has 'experiment.xenium'"
    cells = next((name for name in _CELLS if (folder / name).exists()), None)
    return f"it has {cells!r} and 'morphology_focus'" if cells and _images(folder) else None


def read_xenium(folder: Path, *, pixel_size: float | None = None) -> Source:
    """Read a Xenium output folder; images are opened, not loaded.

    Both layouts are read: one ``morphology_focus.ome.tif`` (DAPI), and a ``morphology_focus``
    folder with one file a stain. Control probes and other features that are not genes are
    dropped. The count matrix may be absent (``counts`` is then None).

    Parameters
    ----------
    folder
        The output folder.
    pixel_size
        Micrometres a pixel, where ``experiment.xenium`` does not say.

    Raises
    ------
    DataError
        Where images or cells are missing or unreadable, no file states the pixel size, two state
        different ones, or the count matrix belongs to other cells.
    """
    folder = Path(folder)
    images = _images(folder)
    if not images:
        raise DataError(
            f"{folder}: no image; expected 'morphology_focus.ome.tif' or "
            "'morphology_focus/*.ome.tif'"
        )
    image = open_ometiff(images, default_names=("DAPI",))
    size = _pixel_size(folder, image.pixel_size, pixel_size)
    cells = [folder / name for name in _CELLS if (folder / name).exists()]
    if not cells:
        raise DataError(f"{folder}: no table of cells; expected one of {list(_CELLS)}")
    obs = read_cells(cells[0])
    obs.insert(0, "field", _FIELD)
    matrix = folder / "cell_feature_matrix.h5"
    counts, var = _read_counts(matrix, obs.index) if matrix.exists() else (None, None)
    return Source(
        kind="xenium",
        name=str(folder),
        channels=image.channels,
        fields={_FIELD: image.field(size)},
        obs=obs,
        counts=counts,
        var=var,
        identity=digest_of(size, obs, counts, var),
    )


def _images(folder: Path) -> list[Path]:
    several = sorted((folder / "morphology_focus").glob("*.ome.tif"))
    one = folder / "morphology_focus.ome.tif"
    return several or ([one] if one.exists() else [])


def _pixel_size(folder: Path, in_image: float | None, given: float | None) -> float:
    path = folder / "experiment.xenium"
    stated = None
    if path.exists():
        try:
            stated = json.loads(path.read_text()).get("pixel_size")
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); copy it again") from error
    size = next((s for s in (given, stated, in_image) if s is not None), None)
    if size is None:
        raise DataError(
            f"{path}: states no 'pixel_size', and neither does the image; give it in micrometres: "
            "--pixel-size 0.2125 is the instrument's"
        )
    if not 0.01 < float(size) < 100:
        raise DataError(f"{path}: a pixel size of {size} micrometres cannot be right")
    if given is None and stated and in_image and abs(stated / in_image - 1) > 0.01:
        raise DataError(
            f"{path}: says {stated} um a pixel, the image says {in_image}; "
            "tell which is right with --pixel-size"
        )
    return float(size)


def _read_counts(path: Path, cells: pd.Index) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    """Read a 10x count matrix, its genes only, in the order of ``cells``."""
    try:
        with h5py.File(path) as file:
            group = file["matrix"]
            matrix = sparse.csc_matrix(
                (group["data"][:], group["indices"][:], group["indptr"][:]),
                shape=tuple(group["shape"][:]),
            )
            barcodes = pd.Index(group["barcodes"].asstr()[:])
            features = group["features"]
            kinds = features["feature_type"].asstr()[:]
            ids, symbols = features["id"].asstr()[:], features["name"].asstr()[:]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: not a readable 10x count matrix ({error}); copy it again, or remove it to "
            "predict without counts"
        ) from error
    genes = np.flatnonzero(kinds == "Gene Expression")
    if not len(genes):
        raise DataError(f"{path}: no feature of the type 'Gene Expression', only {set(kinds)}")
    var = gene_table(ids[genes], symbols[genes], str(path))
    tell_symbols(var, str(path))
    by_cell = matrix.T.tocsr()[:, genes].astype(np.float32)
    return align_counts(by_cell, barcodes, cells, str(path)), var
