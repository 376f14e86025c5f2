"""Rows of a prediction, block by block: in memory, or in files from which a run can go on.

A block holds some rows of every field. Blocks on disk stand beside the output, each whole or not
there; when all are, they are put together in the order of the rows, with few rows in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.disk import room_for

Rows = NDArray[np.int64]
Values = Mapping[str, NDArray[Any]]
Progress = Callable[[int, int], None]
#: Rows put together at once, which is also the height of the chunks of the file.
_AT_ONCE = 2048
#: Numbers of a sparse array in a chunk.
_CHUNK = (1 << 16,)
_PLAN, _POLL = "plan.sha256", 0.2


@dataclass(frozen=True)
class Field:
    """One array of a prediction.

    Attributes
    ----------
    name
        Where it goes: ``"X"``, ``"layers/std"``, ``"obsm/X_phenoseq"``, ``"obs/ood_score"``.
    width
        Numbers a row; 0 for a column of ``obs``.
    dtype
        Of the numbers.
    sparse
        Whether it becomes CSR.
    """

    name: str
    width: int
    dtype: str = "float32"
    sparse: bool = False

    def empty(self, n: int) -> NDArray[Any]:
        """Return an array for ``n`` rows."""
        return np.empty((n, self.width) if self.width else n, dtype=self.dtype)


@dataclass(frozen=True)
class Job:
    """A prediction to be made.

    Attributes
    ----------
    fields
        What is predicted of a row.
    order
        All rows, in the order in which they are best predicted.
    block
        Rows in a block; a multiple of the rows that ``compute`` yields at once.
    compute
        Yields, for rows in a part of ``order``, some of them with their values, in this order.
    obs, var, uns
        The rest of the table.
    plan
        All that the values follow from, plain JSON.
    """

    fields: tuple[Field, ...]
    order: Rows
    block: int
    compute: Callable[[Rows], Iterator[tuple[Rows, Values]]]
    obs: pd.DataFrame
    var: pd.DataFrame
    uns: dict[str, Any]
    plan: Mapping[str, Any]


def predict_table(job: Job, progress: Progress | None = None) -> ad.AnnData:
    """Do a job in memory."""
    sink = _InMemory(job.fields, len(job.order))
    done = 0
    for rows, values in job.compute(job.order):
        sink.add(rows, values)
        done += len(rows)
        if progress is not None:
            progress(done, len(job.order))
    return sink.table(job)


def predict_file(job: Job, out: Path, progress: Progress | None = None) -> int:
    """Do a job block by block, and write the table to ``out``; go on where a run had stopped.

    Memory does not grow with the number of rows, but for ``obs``. Where several processes are
    started by ``torchrun`` or SLURM with ``RANK`` and ``WORLD_SIZE`` set, each makes its share of
    the blocks, and the first puts them together.

    Returns
    -------
    How many rows had been done before.

    Raises
    ------
    DataError
        Where the disk is full; finished blocks are kept.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    blocks = np.split(job.order, np.arange(job.block, len(job.order), job.block))
    sink = _InBlocks(out, job, len(blocks), first=rank == 0)
    todo = [k for k in range(rank, len(blocks), world) if not sink.done(k)]
    total = sum(len(rows) for rows in blocks[rank::world])
    before = done = total - sum(len(blocks[k]) for k in todo)
    waiting: list[tuple[Rows, Values]] = []
    for some in job.compute(np.concatenate([job.order[:0], *(blocks[k] for k in todo)])):
        waiting.append(some)
        done += len(some[0])
        if sum(len(rows) for rows, _ in waiting) == len(blocks[todo[0]]):
            sink.add(todo.pop(0), waiting)
            waiting = []
        if progress is not None:
            progress(done, total)
    if rank == 0:
        sink.wait()
        sink.write()
    else:
        while sink.folder.exists():
            time.sleep(_POLL)
    return before


class _InMemory:
    """Keeps all rows."""

    def __init__(self, fields: Sequence[Field], n: int) -> None:
        self.fields = fields
        self._dense = {f.name: f.empty(n) for f in fields if not f.sparse}
        self._sparse: dict[str, list[sparse.csr_matrix]] = {f.name: [] for f in fields if f.sparse}
        self._rows: list[Rows] = []

    def add(self, rows: Rows, values: Values) -> None:
        self._rows.append(rows)
        for name, array in self._dense.items():
            array[rows] = values[name]
        for name, parts in self._sparse.items():
            parts.append(sparse.csr_matrix(values[name]))

    def table(self, job: Job) -> ad.AnnData:
        back = np.argsort(np.concatenate(self._rows))
        whole = {n: sparse.vstack(p, format="csr")[back] for n, p in self._sparse.items()}
        return _anndata(job, {**self._dense, **whole})


class _InBlocks:
    """Keeps blocks in the folder ``.OUT.blocks`` beside the output.

    Blocks of another plan are of no use, and removed, by the first process of several.
    """

    def __init__(self, out: Path, job: Job, blocks: int, *, first: bool) -> None:
        self.out, self.job, self.blocks = out, job, blocks
        self.folder = out.with_name(f".{out.name}.blocks")
        fields = [(f.name, f.width, f.dtype) for f in job.fields]
        layout = {"rows": len(job.order), "block": job.block, "fields": fields}
        whole = json.dumps({"plan": job.plan, "layout": layout}, sort_keys=True)
        text = hashlib.sha256(whole.encode()).hexdigest()
        file = self.folder / _PLAN
        while not (file.exists() and file.read_text() == text):
            if not first:
                time.sleep(_POLL)
                continue
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with self._partial() as partial:
                (partial / _PLAN).write_text(text)
                os.replace(partial / _PLAN, file)

    def done(self, block: int) -> bool:
        return self._block(block).exists()

    def add(self, block: int, parts: Sequence[tuple[Rows, Values]]) -> None:
        """Write a block, whole or not at all."""
        with room_for(self.out, "what is done is kept"), self._partial() as some:
            new = some / "block"
            new.mkdir()
            np.save(new / "rows.npy", np.concatenate([rows for rows, _ in parts]))
            for field in self.job.fields:
                whole = np.concatenate([values[field.name] for _, values in parts])
                np.save(new / _file(field), whole.astype(field.dtype, copy=False))
            new.rename(self._block(block))

    def wait(self) -> None:
        """Wait for the blocks of other processes."""
        while not all(self.done(k) for k in range(self.blocks)):
            time.sleep(_POLL)

    def write(self) -> None:
        """Put all blocks together as the output, which appears whole, and remove them."""
        job, n = self.job, len(self.job.order)
        with room_for(self.out, "what is done is kept"), self._partial() as some:
            columns = {f.name: f.empty(n) for f in job.fields if not f.width}
            where = np.empty((n, 2), dtype=np.int64)
            for block in range(self.blocks):
                rows = np.load(self._block(block) / "rows.npy")
                where[rows] = np.stack([np.full(len(rows), block), np.arange(len(rows))], axis=1)
                for name, column in columns.items():
                    column[rows] = np.load(self._block(block) / _file(Field(name, 0)))
            partial, arrays = some / self.out.name, [f for f in job.fields if f.width]
            with _opened(partial, _anndata(job, columns)) as group:
                for field in arrays:
                    _make(group, field, n)
                for start in range(0, n, _AT_ONCE):
                    place = where[start : start + _AT_ONCE]
                    for field in arrays:
                        _append(group, field, start, self._gather(field, place))
            if self.out.exists():  # moved as a whole, since half a table would look like one
                self.out.rename(some / "old")
            partial.rename(self.out)
        shutil.rmtree(self.folder)

    def _gather(self, field: Field, place: NDArray[np.int64]) -> NDArray[Any]:
        """Read the rows at (block, position in it), in this order."""
        out = field.empty(len(place))
        for block in np.unique(place[:, 0]):
            some = np.flatnonzero(place[:, 0] == block)
            stored = np.load(self._block(int(block)) / _file(field), mmap_mode="r")
            out[some] = stored[place[some, 1]]
        return out

    def _block(self, block: int) -> Path:
        return self.folder / f"{block:06d}"

    @contextmanager
    def _partial(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".partial-") as some:
            yield Path(some)


def _file(field: Field) -> str:
    return field.name.replace("/", "-") + ".npy"


def _anndata(job: Job, values: Mapping[str, Any]) -> ad.AnnData:
    """Put together the table of those fields that there are values of."""
    obs = job.obs.copy()
    parts: dict[str, dict[str, Any]] = {"layers": {}, "obsm": {}}
    for name, value in values.items():
        kind, _, last = name.rpartition("/")
        if kind == "obs":
            obs[last] = value
        elif kind:
            parts[kind][last] = value
    if {"x_centroid", "y_centroid"} <= set(obs):
        parts["obsm"]["spatial"] = obs[["x_centroid", "y_centroid"]].to_numpy(np.float64)
    return ad.AnnData(values.get("X"), obs=obs, var=job.var, uns=job.uns, **parts)


@contextmanager
def _opened(path: Path, frame: ad.AnnData) -> Iterator[Any]:
    """Write the small parts of a table to a new file, and give its root to add the large ones."""
    if path.suffix == ".h5ad":
        with h5py.File(path, "w") as file:
            ad.io.write_elem(file, "/", frame)
            yield file
        return
    group = zarr.create_group(path, zarr_format=3)
    ad.io.write_elem(group, "/", frame)
    yield group
    zarr.consolidate_metadata(path)


def _make(group: Any, field: Field, n: int) -> None:
    """Make an array for ``n`` rows, to be filled from the first on."""
    if field.name in group:
        del group[field.name]
    hdf5 = {"compression": "lzf"} if isinstance(group, h5py.File) else {}
    if field.sparse:
        none = sparse.csr_matrix((0, field.width), dtype=field.dtype)
        ad.io.write_elem(group, field.name, none, dataset_kwargs={"chunks": _CHUNK, **hdf5})
        return
    make = group.create_dataset if hdf5 else group.create_array
    chunks = (min(_AT_ONCE, n), field.width)
    array = make(field.name, shape=(n, field.width), dtype=field.dtype, chunks=chunks, **hdf5)
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def _append(group: Any, field: Field, start: int, values: NDArray[Any]) -> None:
    if field.sparse:
        ad.io.sparse_dataset(group[field.name]).append(sparse.csr_matrix(values))
    else:
        group[field.name][start : start + len(values)] = values
