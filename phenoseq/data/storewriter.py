"""Writes a store of cells, whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import itertools
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray

from phenoseq._version import __version__
from phenoseq.data.arrays import RowWriter, create_rows
from phenoseq.data.crops import crop_order, extents, iter_crops, outside
from phenoseq.data.csr import CsrWriter
from phenoseq.data.source import Lost, Problem, Source
from phenoseq.data.store import SCHEMA_VERSION, Manifest, Store, is_store
from phenoseq.disk import on_disk, room_for
from phenoseq.errors import DataError

Progress = Callable[[int, int], None]
#: Why a cell is left out whose pixels cannot be read; the file stands among the problems.
UNREADABLE = "image that cannot be read"
# In a folder that is being written, locked by the process that writes it.
_LOCK = "lock"


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
        Where the source has no counts, two cells have one id, no cell is left, something is at
        ``path`` or is being written there, too many images cannot be read, or the disk is full.

    Examples
    --------
    >>> from phenoseq.data.simulate import simulate_plate
    >>> plate = simulate_plate(seed=1, wells_per_treatment=1, sites_per_well=1, cells_per_site=8)
    >>> store = write_store(plate.source, "plate.zarr", pixel_size=0.65)
    >>> store.crops.shape == (len(store), 5, 64, 64), store.table().n_vars
    (True, 60)
    """
    path = on_disk(path)
    if source.counts is None or source.var is None:
        raise DataError(
            f"{source.name}: no count matrix, so there is nothing to train on; RNA may come from "
            "another file (--rna RNA.h5ad); to predict, give this source to 'phenoseq predict'"
        )
    check_ids(source)
    check_target(path, overwrite=overwrite)
    reason = _exclusions(source, pixel_size, crop_px, min_counts)
    keep = reason == ""
    if not keep.any():
        why = pd.Series(reason).value_counts().to_dict()
        raise DataError(f"{source.name}: no cell is left to store; all are left out: {why}")
    with whole_or_nothing(path, overwrite=overwrite) as partial:
        group = zarr.create_group(partial, zarr_format=3)
        kept = np.flatnonzero(keep)
        rows, stats, lost = write_crops(source, [kept], group, pixel_size, crop_px, progress)
        reason[np.setdiff1d(kept, rows)] = UNREADABLE
        keep = reason == ""
        obs = source.obs.iloc[rows].copy()
        obs["total_counts"] = np.asarray(source.counts[rows].sum(axis=1)).ravel()
        table = ad.AnnData(
            obs=obs,
            var=source.var,
            obsm={"spatial": obs[["x_centroid", "y_centroid"]].to_numpy(np.float64)},
        )
        excluded = source.obs[~keep].copy()
        excluded["reason"] = reason[~keep]
        write_element(group, "table", table)
        matrix = CsrWriter(group.create_group("table/X"), len(source.var))
        matrix.add(source.counts[rows])
        matrix.finish()
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


def check_ids(source: Source) -> None:
    """Check that a source's cells can be told apart; raises :class:`DataError` where not."""
    twice = source.obs.index[source.obs.index.duplicated()]
    if len(twice):
        raise DataError(
            f"{source.name}: {len(twice)} cell ids stand there more than once, e.g. "
            f"{[str(name) for name in twice.unique()[:3]]}; give each cell an id of its own"
        )


def check_target(path: Path, *, overwrite: bool) -> None:
    """Check that a store may be written to ``path``; raises :class:`DataError` where not."""
    if path.exists() and not is_store(path):
        raise DataError(f"{path}: exists already and is no store; choose another name")
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists already; remove it, or use --overwrite")


@contextmanager
def zarr_v3() -> Iterator[None]:
    """Write Zarr v3, and keep back what anndata and zarr say of it to those who write it."""
    with ad.settings.override(zarr_write_format=3), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*autosharding")
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        yield


def write_element(group: Any, name: str, element: Any, **how: Any) -> None:
    """Write an AnnData or a part of one into a group of Zarr or HDF5; ``how`` as for anndata."""
    parent, _, key = name.rpartition("/")  # no path is a key to anndata 0.13
    with zarr_v3():
        ad.io.write_elem(group[parent] if parent else group, key, element, **how)


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
    array = create_rows(group, "crops", shape, source.dtype, axes)
    writer = RowWriter(array)
    histogram = _Histogram(len(source.channels), source.dtype)
    lost = Lost(source.name, len(rows))
    written, done = [], 0
    for batch in iter_crops(
        source, pixel_size, crop_px, batch_size=array.chunks[0], rows=rows, failed=lost.add
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
def whole_or_nothing(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a folder beside ``path`` to write to, which becomes ``path`` when all went well.

    Of two processes that write the same, the second is refused: at once, or where both began at
    the same moment, when it is done and the other's is there.

    Raises
    ------
    DataError
        Where another process writes to ``path``, or wrote it meanwhile, or the disk is full.
    """
    prefix = f".{path.name}.partial-"
    with room_for(path, "nothing was written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f"{glob.escape(prefix)}*"):
            _remove_stale(other, path)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
        try:
            with (partial / _LOCK).open("w") as lock:  # held until this process ends, however
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield partial / "new"
                _put(partial, path, overwrite=overwrite)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _remove_stale(partial: Path, path: Path) -> None:
    """Remove what a process left that was killed; refuse where it is still at work."""
    try:
        lock = (partial / _LOCK).open("r+")
    except OSError:  # not of ours
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{path}: another process is writing it; wait until that has ended, or choose "
                "another name"
            ) from None
        shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, path: Path, *, overwrite: bool) -> None:
    """Move what is whole to its place, and what is there out of it, both at one stroke."""
    for n in itertools.count():
        if overwrite:  # moved as a whole, since half a store would look like one
            with suppress(FileNotFoundError):
                path.rename(partial / f"old-{n}")
        try:
            (partial / "new").rename(path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            if not overwrite:
                raise DataError(
                    f"{path}: another process has written it meanwhile, and that is kept; use "
                    "--overwrite to replace it"
                ) from error
        else:
            return
