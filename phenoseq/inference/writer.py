"""Where a table is written, whole or not at all, and opened again."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import zarr

from phenoseq.data.storewriter import zarr_v3
from phenoseq.disk import on_disk, room_for
from phenoseq.errors import DataError


def check_out(out: str | Path) -> Path:
    """Check, before any work, that a table can be written to ``out``.

    Raises
    ------
    DataError
        Where it is a URL, its name does not end in ``.h5ad`` or ``.zarr``, its folder cannot be
        written to, or something other than an AnnData is there.
    """
    path = on_disk(out)
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


def put_in_place(partial: Path, out: Path, aside: Path) -> None:
    """Give a finished table its name; what was there is replaced, a folder by way of ``aside``."""
    if partial.is_file():
        os.replace(partial, out)
        return
    if out.exists():  # moved as a whole, since half a table would look like one
        out.rename(aside / "old")
    partial.rename(out)


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
        else:
            with zarr_v3():
                adata.write_zarr(partial)
        put_in_place(partial, path, Path(some))


def open_table(path: Path) -> ad.AnnData:
    """Open a table whose matrices stay in the file, and are read where they are sliced.

    ``obs``, ``var``, ``uns`` and vectors are in memory. ``.to_memory()`` reads the rest.
    """
    group: Any = h5py.File(path) if path.suffix == ".h5ad" else zarr.open_group(path, mode="r")
    matrices: dict[str, dict[str, Any]] = {
        part: {name: _matrix(group[part][name]) for name in group[part]}
        for part in ("layers", "obsm")
    }
    frames = {part: ad.io.read_elem(group[part]) for part in ("obs", "var", "uns")}
    return ad.AnnData(_matrix(group["X"]), **frames, **matrices)


def _matrix(node: Any) -> Any:
    return node if isinstance(node, h5py.Dataset | zarr.Array) else ad.io.sparse_dataset(node)
