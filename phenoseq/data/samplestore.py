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
from typing import Any, Literal, Self

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.data.arrays import DAMAGED, RowReader, reading
from phenoseq.data.splits import Split, SplitConfig, make_split
from phenoseq.data.store import SCHEMA_VERSION, is_store
from phenoseq.errors import DataError

#: The column of ``obs`` that names a cell's sample, in both tables.
SAMPLE = "sample_key"


@dataclass(frozen=True)
class SampleManifest:
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

    schema_version: int
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

    @classmethod
    def from_json(cls, raw: Any, where: str) -> Self:
        """Rebuild a manifest from JSON; :class:`DataError` where it is not one."""
        if not isinstance(raw, dict) or raw.get("pairing") != "sample":
            raise DataError(f"{where}: pairs images and RNA by cell; open it with Store")
        if raw.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"{where}: manifest of schema version {raw.get('schema_version')}, this phenoseq "
                f"reads {SCHEMA_VERSION}; run 'phenoseq prepare' again with this version"
            )
        try:
            lists = {k: tuple(raw[k]) for k in ("sample_columns", "channels", "genes", "symbols")}
            return cls(**{**raw, **lists, "problems": tuple(raw.get("problems", ()))})
        except (TypeError, KeyError) as error:
            raise DataError(f"{where}: broken manifest ({error}); prepare it again") from error


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

    def __init__(self, path: str | Path) -> None:
        """Open a store.

        Raises
        ------
        DataError
            Where there is none, it is not whole, or it pairs by cell.
        """
        self.path = Path(path)
        if not is_store(self.path):
            raise DataError(
                f"{self.path}: no phenoseq store; make one with 'phenoseq prepare SOURCE "
                f"{self.path.name} --rna RNA.h5ad --pair-by sample --sample-columns COLUMNS'"
            )
        self._group = zarr.open_group(self.path, mode="r")
        self.manifest = SampleManifest.from_json(self._group.attrs["phenoseq"], str(self.path))
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
        self._dense: RowReader | None = None
        if embedding is not None:
            obsm = _subgroup(group, "rna/obsm", path)
            self._dense = RowReader(obsm, embedding, path / "rna" / "obsm")
            rows, width = self._dense.array.shape
            self.shape = (rows, width)
            return
        matrix = _subgroup(group, "rna/X", path)
        at = path / "rna" / "X"
        indptr = RowReader(matrix, "indptr", at)
        self._indptr: NDArray[np.int64] = indptr.read(0, len(indptr))
        self._data, self._indices = (RowReader(matrix, k, at) for k in ("data", "indices"))
        shape: Any = matrix.attrs["shape"]
        self.shape = (int(shape[0]), int(shape[1]))

    def read(self, start: int, stop: int) -> NDArray[np.float32] | sparse.csr_matrix:
        """Return rows ``start`` to ``stop``, an embedding dense and genes as CSR.

        Raises
        ------
        DataError
            Where a chunk is corrupt.
        """
        if self._dense is not None:
            return self._dense.read(start, stop)
        ends = self._indptr[start : stop + 1]
        data, at = (
            array.read(int(ends[0]), int(ends[-1])) for array in (self._data, self._indices)
        )
        shape = (stop - start, self.shape[1])
        return sparse.csr_matrix((data, at, ends - ends[0]), shape=shape)


def _subgroup(group: zarr.Group, name: str, path: Path) -> zarr.Group:
    found = group.get(name)
    if not isinstance(found, zarr.Group):
        raise DataError(f"{path}/{name}: missing; {DAMAGED}")
    return found
