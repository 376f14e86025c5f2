"""Streams cells of a store in batches, whole chunks at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from phenoseq.data.store import Store
from phenoseq.errors import DataError

Batch = dict[str, Tensor]


class CellStream(IterableDataset[Batch]):
    """Batches of cells, ``{"images": (B, C, H, W), "counts": (B, g) float32, "rows": (B,)}``.

    Chunks are read whole, in an order that depends on (seed, epoch) alone and is divided over ranks
    and workers; cells are shuffled within a window of chunks. The store is opened where it is read,
    so that the stream can be sent to a worker; which rank this is, it asks when it is made, since a
    worker does not know.

    Parameters
    ----------
    store
        Path of the store.
    rows
        Cells to stream, positions in the store.
    counts
        Raw counts of all cells of the store, CSR ``(n_obs, g)``.
    batch_size
        Cells a batch.
    shuffle
        False keeps the store's order and every cell. True shuffles, and gives every rank and worker
        the same number of full batches in every epoch, so that no rank waits for another.
    seed
        Of the order.
    window
        Chunks in memory at once, among whose cells is shuffled.
    workers
        Processes that will read, of which the number of batches depends.
    """

    def __init__(
        self,
        store: str | Path,
        rows: NDArray[np.int64],
        counts: sparse.csr_matrix,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        window: int = 64,
        workers: int = 1,
    ) -> None:
        super().__init__()
        self.store = Path(store)
        self.rows = np.sort(rows)
        self.counts = counts
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.window = window
        self.workers = workers
        self.world, self.rank = _world(), _rank()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of one rank."""
        shares = self._shares(self.workers)[self.rank :: self.world]
        return sum(-(-sum(map(len, share)) // self.batch_size) for share in shares)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches of this rank and worker."""
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        share = self._shares(workers)[worker_id * self.world + self.rank]
        rng = np.random.default_rng([self.seed, self.epoch, self.rank, worker_id])
        store = Store(self.store)
        waiting: tuple[NDArray[np.int64], NDArray[Any]] | None = None
        for start in range(0, len(share), self.window):
            rows = np.concatenate(share[start : start + self.window])
            images = store.take(rows)
            if waiting is not None:
                rows = np.concatenate([waiting[0], rows])
                images = np.concatenate([waiting[1], images])
            order = rng.permutation(len(rows)) if self.shuffle else np.arange(len(rows))
            last = start + self.window >= len(share)
            stop = len(rows) if last else len(rows) - len(rows) % self.batch_size
            for at in range(0, stop, self.batch_size):
                some = order[at : at + self.batch_size]
                yield self._batch(rows[some], images[some])
            waiting = (rows[order[stop:]], images[order[stop:]])

    def _batch(self, rows: NDArray[np.int64], images: NDArray[Any]) -> Batch:
        if images.dtype == np.uint16:
            images = images.astype(np.int32)
        return {
            "images": torch.from_numpy(images),
            "counts": torch.from_numpy(self.counts[rows].toarray().astype(np.float32)),
            "rows": torch.from_numpy(rows),
        }

    def _shares(self, workers: int) -> list[list[NDArray[np.int64]]]:
        """Divide the cells, chunk by chunk, over ranks and workers.

        Shuffled, every share has the same number of full batches, whatever the epoch.
        """
        chunk = int(Store(self.store).crops.chunks[0])
        n = self.world * workers
        chunks = _by_chunk(self.rows, chunk)
        if not self.shuffle:
            return [chunks[i::n] for i in range(n)]
        size = len(self.rows) // (n * self.batch_size) * self.batch_size
        if not size:
            raise DataError(
                f"{self.store}: {len(self.rows)} cells give no full batch of {self.batch_size} to "
                f"each of {n} readers (devices x workers); use smaller batches or fewer readers"
            )
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(chunks))
        rows = np.concatenate([chunks[i] for i in order])
        return [_by_chunk(rows[i * size : (i + 1) * size], chunk) for i in range(n)]


def _by_chunk(rows: NDArray[np.int64], chunk: int) -> list[NDArray[np.int64]]:
    return np.split(rows, np.flatnonzero(np.diff(rows // chunk)) + 1)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world() > 1 else 0
