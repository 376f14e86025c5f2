"""Writes an AnnData whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import anndata as ad

from phenoseq.disk import room_for
from phenoseq.errors import DataError


def check_out(out: str | Path) -> Path:
    """Check, before any work, that a prediction can be written to ``out``.

    Raises
    ------
    DataError
        Where the name does not end in ``.h5ad`` or ``.zarr``, its folder cannot be written to, or
        something other than an AnnData is there.
    """
    path = Path(out)
    if path.suffix not in (".h5ad", ".zarr"):
        raise DataError(f"{path}: name the output OUT.h5ad or OUT.zarr")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be made ({error})") from error
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path.parent}: no permission to write there")
    if path.exists() and not _replaceable(path):
        raise DataError(f"{path}: exists already and is no prediction; choose another name")
    return path


def _replaceable(path: Path) -> bool:
    """Tell whether a file, or a folder that holds an AnnData, is there, and not a store, say."""
    if path.suffix == ".h5ad":
        return path.is_file()
    try:
        node = json.loads((path / "zarr.json").read_text())
        return bool(node["attributes"]["encoding-type"] == "anndata")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_whole(adata: ad.AnnData, path: Path) -> None:
    """Write to a temporary name beside ``path``, then rename; replaces what was there.

    Raises
    ------
    DataError
        Where the disk is full; nothing is left behind then.
    """
    with (
        room_for(path, "nothing was written"),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.partial-") as some,
    ):
        partial = Path(some) / path.name
        if path.suffix == ".h5ad":
            adata.write_h5ad(partial, compression="lzf")
            os.replace(partial, path)
            return
        with ad.settings.override(zarr_write_format=3):
            adata.write_zarr(partial)
        if path.exists():  # moved as a whole, since half a table would look like one
            path.rename(Path(some) / "old")
        partial.rename(path)
