"""The store: one sharded Zarr v3 group of crops, expression and a manifest.

Layout::

    STORE.zarr/            attributes["phenoseq"]: the manifest
        crops              (n_obs, C, crop_px, crop_px), chunks of cells inside shards
        table/             AnnData: X raw counts, obs, var, obsm["spatial"] in micrometres
        excluded/          data frame of the cells that are not in the store, and why
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.data.arrays import DAMAGED, RowReader, reading
from phenoseq.data.csr import CsrReader
from phenoseq.disk import on_disk
from phenoseq.errors import DataError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class JsonManifest:
    """A manifest that is rebuilt from the JSON that its fields became."""

    schema_version: int

    @classmethod
    def from_json(cls, raw: Any, where: str) -> Self:
        """Rebuild a manifest from JSON; :class:`DataError` where it is not one."""
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{where}: manifest of schema version {version}, this phenoseq reads "
                f"{SCHEMA_VERSION}; run 'phenoseq prepare' again with this version"
            )
        listed = [f.name for f in fields(cls) if str(f.type).startswith("tuple")]
        try:
            return cls(**{**raw, **{name: tuple(raw[name]) for name in listed if name in raw}})
        except TypeError as error:
            raise DataError(f"{where}: broken manifest ({error}); prepare it again") from error


@dataclass(frozen=True)
class Manifest(JsonManifest):
    """What a store holds; JSON in the attributes of its root group.

    Attributes
    ----------
    schema_version
        Version of this layout.
    kind, source, identity
        Layout, name and digest of the source (see :class:`~phenoseq.data.source.Source`).
    pairing
        ``"cell"``: image and counts are of the same cell.
    channels
        Canonical stain names, in the order of the crops' channels.
    pixel_size, crop_px
        Micrometres a pixel of the crops, and their side in pixels.
    source_pixel_size, dtype
        Micrometres a full-resolution pixel of the source, and its pixel type.
    genes, symbols
        The gene vocabulary, ids and symbols, in the order of the table's columns.
    channel_stats
        For each channel ``mean``, ``std``, ``p999`` (99.9th percentile) over the crops' pixels.
    min_counts
        Least counts of a cell in the store.
    excluded
        Cells of the source that are not in the store, by reason.
    version
        The phenoseq that wrote it.
    problems
        Fields of the source that could not be read: ``where``, ``reason``, and number of ``cells``
        (:class:`~phenoseq.data.source.Problem`).
    """

    kind: str
    source: str
    identity: str
    pairing: str
    channels: tuple[str, ...]
    pixel_size: float
    crop_px: int
    source_pixel_size: float
    dtype: str
    genes: tuple[str, ...]
    symbols: tuple[str, ...]
    channel_stats: dict[str, dict[str, float]]
    min_counts: int
    excluded: dict[str, int]
    version: str
    problems: tuple[dict[str, Any], ...] = ()

    @property
    def crop_width(self) -> float:
        """Width of a crop in micrometres."""
        return self.pixel_size * self.crop_px


class Store:
    """A prepared store, opened for reading.

    Attributes
    ----------
    path
        Where it is.
    manifest
        What it holds.
    crops
        Zarr array ``(n_obs, C, H, W)``.
    images
        The same, read by rows.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a store.

        Raises
        ------
        DataError
            Where there is none, or it is not whole.
        """
        self.path = on_disk(path)
        if not is_store(self.path):
            raise DataError(
                f"{self.path}: no phenoseq store; make one with "
                f"'phenoseq prepare SOURCE {self.path.name}'"
            )
        self._group = group = zarr.open_group(self.path, mode="r")
        raw: Any = group.attrs["phenoseq"]
        if isinstance(raw, dict) and raw.get("pairing") == "sample":
            raise DataError(
                f"{self.path}: pairs images and RNA by sample, not by cell; open it with "
                "phenoseq.data.samplestore.SampleStore. Models of single cells need a store "
                "that pairs by cell"
            )
        self.manifest = Manifest.from_json(raw, str(self.path))
        for name in ("table", "excluded"):
            if name not in group:
                raise DataError(f"{self.path}/{name}: missing; {DAMAGED}")
        self.images = RowReader(group, "crops", self.path)
        self.crops = self.images.array

    @cached_property
    def rna(self) -> CsrReader:
        """The raw counts, read by rows."""
        return CsrReader(self._group, "table/X", self.path)

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.images)

    @property
    def shard(self) -> int:
        """Cells in a shard, whose crops are one file."""
        return self.images.shard

    def table(self) -> ad.AnnData:
        """Return the expression table: raw counts (CSR), ``obs``, ``var``, ``obsm["spatial"]``.

        Raises
        ------
        DataError
            Where it cannot be read.
        """
        with reading(self.path / "table"):
            table: ad.AnnData = ad.read_zarr(self.path / "table")
        return table

    def obs(self) -> pd.DataFrame:
        """Return the ``obs`` of the expression table alone; as for :meth:`table`."""
        with reading(self.path / "table/obs"):
            obs: pd.DataFrame = ad.io.read_elem(self._group["table/obs"])
        return obs

    def counts(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        """Return the raw counts of ``rows`` in that order, CSR ``(n, g)``, reading no others.

        Raises
        ------
        DataError
            Where they cannot be read.
        """
        parts, order = [], []
        for run, start, stop in self.images.runs(rows):
            parts.append(self.rna.read(start, stop)[rows[run] - start])
            order.append(run)
        if not parts:
            return sparse.csr_matrix((0, self.rna.shape[1]), dtype=np.float32)
        back = np.argsort(np.concatenate(order))
        return sparse.vstack(parts, format="csr")[back]

    def all_cells(self) -> pd.DataFrame:
        """Return field and position of every cell of the source, also those not in the store."""
        obs = self.obs()
        with reading(self.path / "excluded"):
            excluded = ad.io.read_elem(self._group["excluded"])
        shared = [name for name in obs.columns if name in excluded]
        return pd.concat([obs[shared].astype(excluded[shared].dtypes), excluded[shared]])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the crops of cells ``start`` to ``stop``, ``(n, C, H, W)``.

        Raises
        ------
        DataError
            Where a chunk is corrupt.
        """
        return self.images.read(start, stop)

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the crops of ``rows`` in that order; chunks side by side are read at once."""
        return self.images.take(rows)


def is_store(path: str | Path) -> bool:
    """Tell whether a whole phenoseq store is at ``path``."""
    try:
        node = json.loads((Path(path) / "zarr.json").read_text())
        return "phenoseq" in node["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
