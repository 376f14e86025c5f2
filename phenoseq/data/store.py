"""The store: one sharded Zarr v3 group of crops, expression and a manifest.

Layout::

    STORE.zarr/            attributes["phenoseq"]: the manifest
        crops              (n_obs, C, crop_px, crop_px), chunks of cells inside shards
        table/             AnnData: X raw counts, obs, var, obsm["spatial"] in micrometres
        excluded/          data frame of the cells that are not in the store, and why
"""

from __future__ import annotations

import glob
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy import sparse
from zarr.codecs import BloscCodec, Crc32cCodec

from phenoseq._version import __version__
from phenoseq.data.arrays import DAMAGED, RowReader, RowWriter, reading
from phenoseq.data.crops import crop_order, extents, iter_crops, outside
from phenoseq.data.source import Lost, Problem, Source
from phenoseq.disk import room_for
from phenoseq.errors import DataError

SCHEMA_VERSION = 1
#: Most cells in a chunk (the least that is decoded) and in a shard (one file), and most bytes of a
#: chunk's crops, by which there are fewer cells where crops are large.
CHUNK, SHARD, CHUNK_BYTES = 64, 1024, 1 << 20
Progress = Callable[[int, int], None]
#: Why a cell is left out whose pixels cannot be read; the file stands among the problems.
UNREADABLE = "image that cannot be read"


@dataclass(frozen=True)
class Manifest:
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

    schema_version: int
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

    @classmethod
    def from_json(cls, raw: Any, where: str) -> Self:
        """Rebuild a manifest from JSON; :class:`DataError` where it is not one."""
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{where}: manifest of schema version {version}, this phenoseq reads "
                f"{SCHEMA_VERSION}; run 'phenoseq prepare' again with this version"
            )
        try:
            lists = {k: tuple(raw[k]) for k in ("channels", "genes", "symbols")}
            return cls(**{**raw, **lists, "problems": tuple(raw.get("problems", ()))})
        except (TypeError, KeyError) as error:
            raise DataError(f"{where}: broken manifest ({error}); prepare it again") from error


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
    """

    def __init__(self, path: str | Path) -> None:
        """Open a store.

        Raises
        ------
        DataError
            Where there is none, or it is not whole.
        """
        self.path = Path(path)
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
        self._cells = RowReader(group, "crops", self.path)
        self.crops = self._cells.array

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self._cells)

    @property
    def shard(self) -> int:
        """Cells in a shard, whose crops are one file."""
        return self._cells.shard

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
        with reading(self.path / "table/X"):
            matrix = ad.io.sparse_dataset(self._group["table/X"])
            parts, order = [], []
            for run, start, stop in self._cells.runs(rows):
                parts.append(sparse.csr_matrix(matrix[start:stop])[rows[run] - start])
                order.append(run)
            if not parts:
                return sparse.csr_matrix((0, len(self.manifest.genes)), dtype=np.float32)
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
        return self._cells.read(start, stop)

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the crops of ``rows`` in that order; chunks side by side are read at once."""
        return self._cells.take(rows)


def is_store(path: str | Path) -> bool:
    """Tell whether a whole phenoseq store is at ``path``."""
    try:
        node = json.loads((Path(path) / "zarr.json").read_text())
        return "phenoseq" in node["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_store(
    source: Source,
    path: str | Path,
    *,
    pixel_size: float = 0.425,
    crop_px: int = 64,
    min_counts: int = 20,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Store:
    """Write a source with expression as a store, whole or not at all.

    Cells outside the image, cut by its border, without counts, with fewer than ``min_counts``, or
    whose pixels cannot be read are left out; they stand in ``excluded`` with the reason, and their
    number in the manifest.

    Parameters
    ----------
    source
        Images, cells and counts.
    path
        Where to write. Nothing is there until all is written.
    pixel_size, crop_px
        Micrometres a pixel of the crops, and their side in pixels.
    min_counts
        Least counts of a cell.
    overwrite
        Replace the store that is there, once the new one is whole.
    progress
        Called with (cells done, cells in all).

    Raises
    ------
    DataError
        Where the source has no counts, no cell is left, something is at ``path``, too many
        images cannot be read, or the disk is full.
    """
    path = Path(path)
    if source.counts is None or source.var is None:
        raise DataError(
            f"{source.name}: no count matrix, so there is nothing to train on; to predict, give "
            "this source to 'phenoseq predict' as it is"
        )
    check_target(path, overwrite=overwrite)
    reason = _exclusions(source, pixel_size, crop_px, min_counts)
    keep = reason == ""
    if not keep.any():
        why = pd.Series(reason).value_counts().to_dict()
        raise DataError(f"{source.name}: no cell is left to store; all are left out: {why}")
    with whole_or_nothing(path) as partial:
        group = zarr.create_group(partial, zarr_format=3)
        kept = np.flatnonzero(keep)
        rows, stats, lost = write_crops(source, [kept], group, pixel_size, crop_px, progress)
        reason[np.setdiff1d(kept, rows)] = UNREADABLE
        keep = reason == ""
        obs = source.obs.iloc[rows].copy()
        obs["total_counts"] = np.asarray(source.counts[rows].sum(axis=1)).ravel()
        table = ad.AnnData(
            source.counts[rows],
            obs=obs,
            var=source.var,
            obsm={"spatial": obs[["x_centroid", "y_centroid"]].to_numpy(np.float64)},
        )
        excluded = source.obs[~keep].copy()
        excluded["reason"] = reason[~keep]
        write_element(group, "table", table)
        write_element(group, "excluded", excluded)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            kind=source.kind,
            source=Path(source.name).name,
            identity=source.identity,
            pairing="cell",
            channels=source.channels,
            pixel_size=pixel_size,
            crop_px=crop_px,
            source_pixel_size=source.pixel_size,
            dtype=source.dtype.name,
            genes=tuple(source.var.index),
            symbols=tuple(source.var["symbol"]),
            channel_stats=dict(zip(source.channels, stats, strict=True)),
            min_counts=min_counts,
            excluded={str(k): int(v) for k, v in excluded["reason"].value_counts().items()},
            version=__version__,
            problems=tuple(asdict(problem) for problem in (*source.problems, *lost)),
        )
        group.attrs["phenoseq"] = asdict(manifest)
    return Store(path)


def _exclusions(
    source: Source, pixel_size: float, crop_px: int, min_counts: int
) -> NDArray[np.object_]:
    """Return why each cell is left out, empty where it is kept."""
    assert source.counts is not None
    total = np.asarray(source.counts.sum(axis=1)).ravel()
    reason = off_image(source, pixel_size, crop_px)
    conditions = {
        "no counts": total == 0,
        f"fewer than {min_counts} counts": total < min_counts,
    }
    few = np.select(list(conditions.values()), list(conditions), default="")
    return np.where(reason == "", few, reason).astype(object)


def off_image(source: Source, pixel_size: float, crop_px: int) -> NDArray[np.str_]:
    """Return why a cell's crop cannot be had whole, empty where it can, ``(n_obs,)``."""
    off = outside(source)
    half = pixel_size * crop_px / 2
    x, y = source.obs["x_centroid"].to_numpy(), source.obs["y_centroid"].to_numpy()
    width, height = extents(source)
    border = (x < half) | (y < half) | (x > width - half) | (y > height - half)
    conditions = {"outside the image": off, "cut by the border": border}
    return np.select(list(conditions.values()), list(conditions), default="")


def check_target(path: Path, *, overwrite: bool) -> None:
    """Check that a store may be written to ``path``; raises :class:`DataError` where not."""
    if path.exists() and not is_store(path):
        raise DataError(f"{path}: exists already and is no store; choose another name")
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists already; remove it, or use --overwrite")


def write_element(group: zarr.Group, name: str, element: Any) -> None:
    """Write an AnnData or data frame into a store."""
    with ad.settings.override(zarr_write_format=3), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*autosharding")
        ad.io.write_elem(group, name, element)


def create_rows(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    axes: Sequence[str],
    *,
    shuffle: Literal["bitshuffle", "shuffle"] = "bitshuffle",
) -> zarr.Array[Any]:
    """Create an array with a row a cell, ``shape``, in chunks of about a megabyte inside shards."""
    chunk = min(CHUNK, max(CHUNK_BYTES // (math.prod(shape[1:]) * dtype.itemsize), 1))
    return group.create_array(
        name,
        shape=shape,
        chunks=(chunk, *shape[1:]),
        shards=(SHARD // CHUNK * chunk, *shape[1:]),
        dtype=dtype,
        compressors=(BloscCodec(cname="zstd", clevel=3, shuffle=shuffle), Crc32cCodec()),
        dimension_names=axes,
        config={"write_empty_chunks": True},
    )


def write_crops(
    source: Source,
    groups: Sequence[NDArray[np.int64]],
    group: zarr.Group,
    pixel_size: float,
    crop_px: int,
    progress: Progress | None,
) -> tuple[NDArray[np.int64], list[dict[str, float]], tuple[Problem, ...]]:
    """Write the crops of some cells, one group of cells after the other.

    Returns
    -------
    The cells in the order of the crops (within a group that in which the image is read), the
    statistics of each channel, and what could not be read, which is told in a warning.

    Raises
    ------
    DataError
        Where more than a fifth of the cells cannot be read, or the disk is full.
    """
    rows = np.concatenate(
        [
            members[crop_order(_images_of(source, members), pixel_size, crop_px)]
            for members in groups
        ]
    )
    shape = (0, len(source.channels), crop_px, crop_px)
    axes = ("cell", "channel", "y", "x")
    writer = RowWriter(create_rows(group, "crops", shape, source.dtype, axes))
    histogram = _Histogram(len(source.channels), source.dtype)
    lost = Lost(source.name, len(rows))
    written, done = [], 0
    for batch in iter_crops(
        source, pixel_size, crop_px, batch_size=CHUNK, rows=rows, lost=lost.add
    ):
        histogram.add(batch.images)
        writer.add(batch.images)
        written.append(batch.rows)
        done += len(batch.rows)
        if progress is not None:
            progress(done + lost.cells, len(rows))
    writer.flush()
    lost.tell()
    return np.concatenate(written), histogram.stats(), tuple(lost.problems)


def _images_of(source: Source, rows: NDArray[np.int64]) -> Source:
    return replace(source, obs=source.obs.iloc[rows], counts=None, var=None)


class _Histogram:
    """Counts pixel values of each channel, so that percentiles need no second pass."""

    BINS = 65536

    def __init__(self, n_channels: int, dtype: np.dtype[Any]) -> None:
        top = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1.0
        self._step = max((float(top) + 1) / self.BINS, 1.0) if top > 1 else 1.0 / self.BINS
        self._counts = np.zeros((n_channels, self.BINS), dtype=np.int64)
        self._sum = np.zeros(n_channels)
        self._square = np.zeros(n_channels)

    def add(self, images: NDArray[Any]) -> None:
        for c in range(images.shape[1]):
            values = images[:, c].ravel()
            bins = np.clip((values / self._step).astype(np.int64), 0, self.BINS - 1)
            self._counts[c] += np.bincount(bins, minlength=self.BINS)
            self._sum[c] += values.sum(dtype=np.float64)
            self._square[c] += np.square(values, dtype=np.float64).sum()

    def stats(self) -> list[dict[str, float]]:
        n = self._counts.sum(axis=1)
        mean = self._sum / n
        std = np.sqrt(np.maximum(self._square / n - mean**2, 0))
        reached = np.cumsum(self._counts, axis=1) >= 0.999 * n[:, None]
        p999 = np.argmax(reached, axis=1) * self._step
        return [
            {"mean": float(m), "std": float(s), "p999": float(p)}
            for m, s, p in zip(mean, std, p999, strict=True)
        ]


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """Give a folder beside ``path`` to write to, which becomes ``path`` when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        pid = stale.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(stale, ignore_errors=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with room_for(path, "nothing was written"):
            yield partial / "new"
            if path.exists():  # moved as a whole, since half a store would look like one
                path.rename(partial / "old")
            (partial / "new").rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
