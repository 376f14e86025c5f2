"""Stores in which image cells and RNA cells are of the same samples, but not the same cells.

Layout::

    STORE.zarr/            attributes["phenoseq"]: the manifest, pairing "sample"
        crops or features  (n, C, crop_px, crop_px), or (n, width) float32: the image cells
        table/             AnnData without X: obs of the image cells, var names of features
        rna/               AnnData of the RNA cells: X (CSR), or an embedding in obsm
        samples/           data frame: what is known of each sample, and which rows are its cells
        excluded/          data frame of the cells that are not in the store, and why

Cells of a sample stand side by side, so that a sample is read without reading the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.data.arrays import DAMAGED, RowReader, reading
from phenoseq.data.csr import CsrReader
from phenoseq.data.splits import Split, SplitConfig, make_split
from phenoseq.data.store import JsonManifest, is_store
from phenoseq.disk import on_disk
from phenoseq.errors import DataError

#: The column of ``obs`` that names a cell's sample, in both tables.
SAMPLE = "sample_key"


@dataclass(frozen=True)
class SampleManifest(JsonManifest):
    """What a sample store holds; JSON in the attributes of its root group.

    Attributes
    ----------
    schema_version
        Version of this layout.
    pairing
        ``"sample"``: images and RNA are of the same samples.
    kind, source, identity
        Layout, name and digest of the images or features.
    rna_source, rna_identity
        Name and digest of the RNA.
    sample_columns
        Columns of ``obs`` that name a sample.
    images
        ``"crops"`` or ``"features"``.
    channels, pixel_size, crop_px, source_pixel_size, dtype, channel_stats
        Of crops, as in :class:`~phenoseq.data.store.Manifest`; without crops ``channels`` and
        ``channel_stats`` are empty, sizes None and ``dtype`` is float32.
    rna
        ``"counts"`` (raw), ``"expression"`` (measured genes, values as they came) or
        ``"embedding"``.
    embedding
        Name of the embedding.
    genes, symbols
        The gene vocabulary, empty where there is an embedding.
    min_counts
        Least counts of an RNA cell in the store.
    excluded
        Cells left out, by reason, of ``"images"`` and ``"rna"``.
    version
        The phenoseq that wrote it.
    problems
        Fields of the images that could not be read, as in :class:`~phenoseq.data.store.Manifest`.
    """

    pairing: str
    kind: str
    source: str
    identity: str
    rna_source: str
    rna_identity: str
    sample_columns: tuple[str, ...]
    images: Literal["crops", "features"]
    channels: tuple[str, ...]
    pixel_size: float | None
    crop_px: int | None
    source_pixel_size: float | None
    dtype: str
    channel_stats: dict[str, dict[str, float]]
    rna: Literal["counts", "expression", "embedding"]
    embedding: str | None
    genes: tuple[str, ...]
    symbols: tuple[str, ...]
    min_counts: int
    excluded: dict[str, dict[str, int]]
    version: str
    problems: tuple[dict[str, Any], ...] = ()


class ImageRows(Protocol):
    """What is read of image cells: crops or features, by rows."""

    def __len__(self) -> int:
        """Return the number of cells."""

    @property
    def chunk(self) -> int:
        """Rows that are decoded together."""

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return ``rows`` in that order."""


class RnaRows(Protocol):
    """What is read of RNA cells, by rows."""

    shape: tuple[int, int]

    def read(self, start: int, stop: int) -> NDArray[np.float32] | sparse.csr_matrix:
        """Return rows ``start`` to ``stop``, an embedding dense and genes as CSR."""


def pairs_by_sample(path: str | Path) -> bool:
    """Tell whether there is a store that pairs by sample."""
    path = on_disk(path)
    if not is_store(path):
        return False
    raw: Any = zarr.open_group(path, mode="r").attrs["phenoseq"]
    return isinstance(raw, dict) and raw.get("pairing") == "sample"


class SampleStore:
    """A prepared store of samples, opened for reading.

    Attributes
    ----------
    path
        Where it is.
    manifest
        What it holds.
    images
        Crops or features of the image cells, read by rows.
    rna
        The RNA cells, read by rows.
    samples
        One row a sample: what ``obs`` says alike of all its cells, and ``image_start``,
        ``image_stop``, ``rna_start`` and ``rna_stop``, the rows that are its cells.
    """

    images: ImageRows
    rna: RnaRows

    def __init__(self, path: str | Path) -> None:
        """Open a store.

        Raises
        ------
        DataError
            Where there is none, it is not whole, or it pairs by cell.
        """
        self.path = on_disk(path)
        if not is_store(self.path):
            raise DataError(
                f"{self.path}: no phenoseq store; make one with 'phenoseq prepare SOURCE "
                f"{self.path.name} --rna RNA.h5ad --pair-by sample --sample-columns COLUMNS'"
            )
        self._group = zarr.open_group(self.path, mode="r")
        raw: Any = self._group.attrs["phenoseq"]
        if not isinstance(raw, dict) or raw.get("pairing") != "sample":
            raise DataError(f"{self.path}: pairs images and RNA by cell; open it with Store")
        self.manifest = SampleManifest.from_json(raw, str(self.path))
        for name in ("table", "rna", "samples", "excluded"):
            if name not in self._group:
                raise DataError(f"{self.path}/{name}: missing; {DAMAGED}")
        self.images = RowReader(self._group, self.manifest.images, self.path)
        self.rna = RnaReader(self._group, self.path, self.manifest.embedding)
        self.samples: pd.DataFrame = self._frame("samples")

    def image_obs(self) -> pd.DataFrame:
        """Return ``obs`` of the image cells; ``sample_key`` names each one's sample."""
        return self._frame("table/obs")

    def rna_obs(self) -> pd.DataFrame:
        """Return ``obs`` of the RNA cells; ``sample_key`` names each one's sample."""
        return self._frame("rna/obs")

    def _frame(self, name: str) -> pd.DataFrame:
        with reading(self.path / name):
            frame: pd.DataFrame = ad.io.read_elem(self._group[name])
        return frame

    def split(self, config: SplitConfig) -> Split:
        """Divide the samples into parts; a sample's image cells and RNA cells go with it.

        Raises
        ------
        DataError
            Where the split is by block, or by a column that does not say one thing of all cells
            of each sample.
        """
        if config.block is not None:
            raise DataError(
                f"{self.path}: RNA cells have no place, so samples cannot be split by block; set "
                "'by' to a column, and 'block' to null"
            )
        if config.by not in self.samples:
            raise DataError(
                f"{self.path}: samples cannot be split by {config.by!r}: there is no such column "
                "that says one thing of all image cells and RNA cells of each sample; there are "
                f"{[c for c in self.samples if c not in _RANGES]}"
            )
        return make_split(config, self.samples, crop_width=0.0, occupied=self.samples)


_RANGES = ("image_start", "image_stop", "rna_start", "rna_stop")


class RnaReader:
    """The RNA cells of a store, read by rows.

    Attributes
    ----------
    shape
        ``(n, width)``.
    """

    def __init__(self, group: zarr.Group, path: Path, embedding: str | None) -> None:
        """Open ``rna/`` of a store; :class:`DataError` where it is not whole."""
        self._cells: RowReader | CsrReader
        if embedding is None:
            self._cells = CsrReader(group, "rna/X", path)
            self.shape = self._cells.shape
            return
        obsm = group.get("rna/obsm")
        if not isinstance(obsm, zarr.Group):
            raise DataError(f"{path}/rna/obsm: missing; {DAMAGED}")
        self._cells = RowReader(obsm, embedding, path / "rna" / "obsm")
        rows, width = self._cells.array.shape
        self.shape = (rows, width)

    def read(self, start: int, stop: int) -> NDArray[np.float32] | sparse.csr_matrix:
        """Return rows ``start`` to ``stop``, an embedding dense and genes as CSR.

        Raises
        ------
        DataError
            Where a chunk is corrupt.
        """
        return self._cells.read(start, stop)
