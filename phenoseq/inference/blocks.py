"""Blocks of a prediction in files, from which a run can go on.

A block holds some rows of every field. Blocks stand beside the output, each whole or not there;
when all are, they are put together in the order of the rows, with few rows in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import zarr
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.data.storewriter import write_element, zarr_v3
from phenoseq.disk import room_for
from phenoseq.inference.job import Field, Job, Left, Part, Rows, Values, assemble
from phenoseq.inference.writer import put_in_place

#: Rows put together at once, which is also the height of the chunks of the file.
_AT_ONCE = 2048
#: Numbers of a sparse array in a chunk.
_CHUNK = (1 << 16,)
_PLAN, _LEFT, _POLL = "plan.json", "left.json", 0.2


class Blocks:
    """Keeps blocks in the folder ``.OUT.blocks`` beside the output.

    Blocks of another plan are of no use, and removed, by the first process of several. It names
    itself in the file of the plan, and each of the others says in a file of its own for which
    first process it works: so that the folder stays until all of them have looked into it.
    """

    def __init__(self, out: Path, job: Job, blocks: int, rank: int, world: int) -> None:
        self.out, self.job, self.blocks, self.rank, self.world = out, job, blocks, rank, world
        self.folder = out.with_name(f".{out.name}.blocks")
        self._waiting: dict[int, list[Part]] = {}
        self._left, self._told = Left(job), ""
        fields = [(f.name, f.width, f.dtype) for f in job.fields]
        layout = {"rows": len(job.order), "block": job.block, "fields": fields}
        whole = json.dumps({"plan": job.plan, "layout": layout}, sort_keys=True)
        self._plan = hashlib.sha256(whole.encode()).hexdigest()
        if rank:
            while not self._check_in():
                time.sleep(_POLL)
        else:
            with self._room():
                self._start()
        for stale in self.folder.glob(f".partial-{rank}-*"):  # of a run that was killed
            shutil.rmtree(stale)

    def _start(self) -> None:
        if self._found()[0] != self._plan:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._name = uuid.uuid4().hex
        self._put(_PLAN, [self._plan, self._name])

    def _found(self) -> list[str]:
        """Return the plan of the blocks that are there, and the name of the first process."""
        try:
            plan, name = json.loads((self.folder / _PLAN).read_text())
        except (FileNotFoundError, ValueError):
            return ["", ""]
        return [plan, name]

    def _check_in(self) -> bool:
        """Tell the first process that this one is there, once the blocks are of this plan."""
        plan, name = self._found()
        if plan == self._plan and name != self._told:
            self._put(f"rank-{self.rank}.json", name)
            self._told = name
        return plan == self._plan

    def _put(self, name: str, value: Any) -> None:
        with self._partial() as partial:
            (partial / name).write_text(json.dumps(value))
            os.replace(partial / name, self.folder / name)

    def done(self, block: int) -> bool:
        """Tell whether a block is there."""
        return self._block(block).exists()

    def add(self, block: int, rows: Rows, values: Values | str) -> int:
        """Take rows of a block; return how many of it there are by now."""
        if isinstance(values, str):
            self._left.add(rows.tolist(), values)
        parts = self._waiting.setdefault(block, [])
        parts.append((rows, values))
        return sum(len(rows) for rows, _ in parts)

    def flush(self, block: int) -> None:
        """Write a block that was taken, whole or not at all."""
        parts = self._waiting.pop(block)
        good = [(rows, values) for rows, values in parts if not isinstance(values, str)]
        left: dict[str, list[int]] = {}
        for rows, why in parts:
            if isinstance(why, str):
                left.setdefault(why, []).extend(rows.tolist())
        with self._room(), self._partial() as some:
            new = some / "block"
            new.mkdir()
            np.save(new / "rows.npy", np.concatenate([_none(), *(rows for rows, _ in good)]))
            for field in self.job.fields:
                whole = [field.empty(0), *(values[field.name] for _, values in good)]
                np.save(new / _file(field), np.concatenate(whole).astype(field.dtype, copy=False))
            (new / _LEFT).write_text(json.dumps(left))
            new.rename(self._block(block))

    def finish(self) -> None:
        """Put the blocks together, or wait until the first process has done so."""
        if self.rank:
            while self.folder.exists():
                self._check_in()
                time.sleep(_POLL)
            return
        while not all(self.done(k) for k in range(self.blocks)):
            time.sleep(_POLL)
        self._write()
        while not all(self._is_here(rank) for rank in range(1, self.world)):
            time.sleep(_POLL)
        shutil.rmtree(self.folder)

    def _is_here(self, rank: int) -> bool:
        file = self.folder / f"rank-{rank}.json"
        return file.exists() and json.loads(file.read_text()) == self._name

    def _write(self) -> None:
        """Put all blocks together as the output, which appears whole."""
        job, n, left_out = self.job, len(self.job.order), Left(self.job)
        with self._room(), self._partial() as some:
            columns = {f.name: f.empty(n) for f in job.fields if not f.width}
            where = np.full((n, 2), -1, dtype=np.int64)
            for block in range(self.blocks):
                rows = np.load(self._block(block) / "rows.npy")
                where[rows] = np.stack([np.full(len(rows), block), np.arange(len(rows))], axis=1)
                for name, column in columns.items():
                    column[rows] = np.load(self._block(block) / _file(Field(name, 0)))
                for why, left in json.loads((self._block(block) / _LEFT).read_text()).items():
                    left_out.add(left, why)
            there = where[:, 0] >= 0
            where = where[there]
            columns = {name: column[there] for name, column in columns.items()}
            partial, arrays = some / self.out.name, [f for f in job.fields if f.width]
            with _opened(partial, assemble(job, columns, left_out)) as group:
                for field in arrays:
                    _make(group, field, len(where))
                for start in range(0, len(where), _AT_ONCE):
                    place = where[start : start + _AT_ONCE]
                    for field in arrays:
                        _append(group, field, start, self._gather(field, place))
            put_in_place(partial, self.out, some)

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
        prefix = f".partial-{self.rank}-"
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=prefix) as some:
            yield Path(some)

    @contextmanager
    def _room(self) -> Iterator[None]:
        with room_for(self.out, "what is done is kept"):
            yield


def _none() -> Rows:
    return np.empty(0, dtype=np.int64)


def _file(field: Field) -> str:
    return field.name.replace("/", "-") + ".npy"


@contextmanager
def _opened(path: Path, frame: ad.AnnData) -> Iterator[Any]:
    """Write the small parts of a table to a new file, and give its root to add the large ones."""
    if path.suffix == ".h5ad":
        with h5py.File(path, "w") as file:
            ad.io.write_elem(file, "/", frame)
            yield file
        return
    group = zarr.create_group(path, zarr_format=3)
    with zarr_v3():
        ad.io.write_elem(group, "/", frame)
    yield group
    with zarr_v3():
        zarr.consolidate_metadata(path)


def _make(group: Any, field: Field, n: int) -> None:
    """Make an array for ``n`` rows, to be filled from the first on."""
    if field.name in group:
        del group[field.name]
    hdf5 = {"compression": "lzf"} if isinstance(group, h5py.File) else {}
    if field.sparse:
        none = sparse.csr_matrix((0, field.width), dtype=field.dtype)
        write_element(group, field.name, none, dataset_kwargs={"chunks": _CHUNK, **hdf5})
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
