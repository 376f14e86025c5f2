"""Makes the table of a job: in memory, or in a file, block by block."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.inference.blocks import Blocks
from phenoseq.inference.job import Job, Left, Rows, Values, assemble
from phenoseq.inference.writer import open_table
from phenoseq.progress import bar

Progress = Callable[[int, int], None]


def make_table(job: Job, out: Path | None, doing: str) -> ad.AnnData:
    """Do a job with a progress bar, in memory, or in a file on which the table is open then."""
    with bar(doing) as progress:
        if out is None:
            return predict_table(job, progress)
        predict_file(job, out, progress)
    return open_table(out)


def predict_table(job: Job, progress: Progress | None = None) -> ad.AnnData:
    """Do a job in memory.

    Raises
    ------
    DataError
        Where more than a fifth of the rows cannot be predicted.
    """
    sink = _InMemory(job)
    done = 0
    for rows, values in job.compute(job.order):
        sink.add(rows, values)
        done += len(rows)
        if progress is not None:
            progress(done, len(job.order))
    return sink.table()


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
        Where the disk is full, or more than a fifth of the rows cannot be predicted; finished
        blocks are kept.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    blocks = np.split(job.order, np.arange(job.block, len(job.order), job.block))
    block_of = np.empty(len(job.order), dtype=np.int32)
    block_of[job.order] = np.repeat(np.arange(len(blocks)), [len(rows) for rows in blocks])
    sink = Blocks(out, job, len(blocks), rank, world)
    todo = [k for k in range(rank, len(blocks), world) if not sink.done(k)]
    total = sum(len(rows) for rows in blocks[rank::world])
    before = done = total - sum(len(blocks[k]) for k in todo)
    for rows, values in job.compute(np.concatenate([job.order[:0], *(blocks[k] for k in todo)])):
        for k in np.unique(block_of[rows]).tolist():
            here = block_of[rows] == k
            if sink.add(k, rows[here], _cut(values, here)) == len(blocks[k]):
                sink.flush(k)
        done += len(rows)
        if progress is not None:
            progress(done, total)
    sink.finish()
    return before


def _cut(values: Values | str, some: NDArray[np.bool_]) -> Values | str:
    if isinstance(values, str) or some.all():
        return values
    return {name: array[some] for name, array in values.items()}


class _InMemory:
    """Keeps all rows."""

    def __init__(self, job: Job) -> None:
        self.job, n = job, len(job.order)
        self._dense = {f.name: f.empty(n) for f in job.fields if not f.sparse}
        self._sparse: dict[str, list[Any]] = {f.name: [] for f in job.fields if f.sparse}
        self._rows: list[Rows] = []
        self._left = Left(job)

    def add(self, rows: Rows, values: Values | str) -> None:
        if isinstance(values, str):
            self._left.add(rows.tolist(), values)
            return
        self._rows.append(rows)
        for name, array in self._dense.items():
            array[rows] = values[name]
        for name, parts in self._sparse.items():
            parts.append(sparse.csr_matrix(values[name]))

    def table(self) -> ad.AnnData:
        rows = np.concatenate(self._rows)
        back = np.argsort(rows)
        whole = {n: sparse.vstack(p, format="csr")[back] for n, p in self._sparse.items()}
        dense = self._dense
        if len(rows) < len(self.job.order):
            dense = {name: array[rows[back]] for name, array in dense.items()}
        return assemble(self.job, {**dense, **whole}, self._left)
