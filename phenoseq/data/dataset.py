"""Streams cells of a store in batches, whole shards at a time, and can go on where it stopped."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from phenoseq.data.handover import Arrays, Batch, Inbox, Item, Outbox, Parcel, Spec, fresh
from phenoseq.data.store import Store
from phenoseq.data.window import Window
from phenoseq.errors import DataError

Rows = NDArray[np.int64]
# Batches that a worker may be ahead: it makes many at once, when a window is read.
_AHEAD = 8


class EpochStream(IterableDataset[Item]):
    """Batches of a store, every item once an epoch, divided over ranks and workers.

    Every rank and worker gives the same number of batches, of nearly the same size, so that no
    rank waits for another. The store is opened where it is read, so that the stream can be sent to
    a worker; which rank this is, it asks when it is made, since a worker does not know.

    Parameters
    ----------
    store
        Path of the store.
    items
        Items of an epoch, and what they are called in an error.
    batch_size
        Most items in a batch.
    shuffle
        False keeps the store's order.
    seed
        Of the order.
    window
        Shards or samples in memory at once, among whose items is shuffled.
    workers
        Processes that will read, of which the number of batches depends.

    Attributes
    ----------
    epoch, start
        The pass that the next iteration makes, and how many of this rank's batches it leaves out
        since they were given already.
    posted
        Whether batches go to another process, as parcels; see ``BatchLoader``.
    """

    def __init__(
        self,
        store: str | Path,
        items: tuple[int, str],
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        window: int,
        workers: int,
    ) -> None:
        super().__init__()
        self.store = Path(store)
        self._items, self._called = items
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.window = window
        self.workers = workers
        self.world, self.rank = _world(), _rank()
        self.epoch = self.start = 0
        self.posted = False

    def __len__(self) -> int:
        """Return the number of batches of one rank in an epoch.

        Raises
        ------
        DataError
            Where the items are too few to give every reader one for each of its batches.
        """
        readers = self.world * self.workers
        most = -(-self._items // readers)
        batches = -(-most // self.batch_size)
        if self._items // readers < batches:
            raise DataError(
                f"{self.store}: {self._items} {self._called} cannot be shared by {readers} readers "
                f"(devices x workers) in batches of {self.batch_size}; use fewer readers"
                + (" or larger batches" if self.batch_size < most else "")
            )
        return batches * self.workers

    def _turn(self) -> tuple[int, int]:
        """Return which of this rank's readers this is, and how many batches it has given."""
        worker = get_worker_info()
        # The loader takes batches from its workers in turn, starting with the first: after a
        # restart that one must be whose turn it was.
        number = ((worker.id if worker else 0) + self.start) % self.workers
        return number, len(range(number, self.start, self.workers))

    def _new(self, number: int) -> Callable[[Spec], tuple[Item, Arrays]]:
        """Return what makes the batches of a reader: what it gives, and the arrays to be filled."""
        return Outbox(number).new if self.posted else fresh

    @property
    def _each(self) -> int:
        """Batches of one reader."""
        return len(self) // self.workers


class CellStream(EpochStream):
    """Batches of cells, ``{"images": (B, C, H, W), "counts": (B, g) float32, "rows": (B,)}``.

    Shards are read in an order that depends on (seed, epoch) alone, and divided over ranks and
    workers; cells are shuffled within a window of shards.

    Parameters
    ----------
    store, batch_size, shuffle, seed, window, workers
        See :class:`EpochStream`; items are cells.
    rows
        Cells to stream, positions in the store.
    """

    def __init__(
        self,
        store: str | Path,
        rows: Rows,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        window: int = 8,
        workers: int = 1,
    ) -> None:
        super().__init__(
            store,
            (len(rows), "cells"),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            window=window,
            workers=workers,
        )
        self.rows = np.sort(rows)

    def __iter__(self) -> Iterator[Item]:
        """Iterate over the batches of this rank and worker."""
        number, skip = self._turn()
        new, store = self._new(number), Store(self.store)
        crops, width = store.crops, store.rna.shape[1]
        room = self.window * store.shard + 2 * self.batch_size
        window = Window(store, min(room, len(store)))
        unread = np.empty(0, dtype=np.int64)
        for more, batches in self._plan(store, number):
            unread = np.concatenate([unread, more])
            if skip:
                given, batches = batches[:skip], batches[skip:]
                skip -= len(given)
                unread = np.setdiff1d(unread, np.concatenate([unread[:0], *given]))
            if not batches:
                continue
            window.load(unread)
            unread = unread[:0]
            for rows in batches:
                batch, arrays = new(
                    {
                        "images": ((len(rows), *crops.shape[1:]), crops.dtype),
                        "counts": ((len(rows), width), np.dtype(np.float32)),
                        "rows": ((len(rows),), np.dtype(np.int64)),
                    }
                )
                window.gather(rows, arrays["images"], arrays["counts"])
                arrays["rows"][:] = rows
                yield batch
            window.forget(np.concatenate(batches))

    def _plan(self, store: Store, number: int) -> Iterator[tuple[Rows, list[Rows]]]:
        """Yield, for each window, the cells to read and the batches that can then be given."""
        shards = _by_shard(self._share(store, number), store.shard)
        sizes = [len(part) for part in np.array_split(np.concatenate(shards), self._each)]
        rng = np.random.default_rng([self.seed, self.epoch, self.rank, number])
        waiting = np.empty(0, dtype=np.int64)
        for start in range(0, len(shards), self.window):
            fresh = np.concatenate(shards[start : start + self.window])
            pool = np.concatenate([waiting, fresh])
            if self.shuffle:
                pool = rng.permutation(pool)
            ends = np.cumsum(sizes)
            ready = int(np.searchsorted(ends, len(pool), side="right"))
            *batches, waiting = np.split(pool, ends[:ready])
            sizes = sizes[ready:]
            yield fresh, batches

    def _share(self, store: Store, number: int) -> Rows:
        """Return the cells of one reader, shard by shard in the order of this epoch."""
        shards = _by_shard(self.rows, store.shard)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(shards))
            shards = [shards[i] for i in order]
        readers = self.world * self.workers
        return np.array_split(np.concatenate(shards), readers)[number * self.world + self.rank]


def _server() -> BaseContext:
    """Return what starts readers: a process that has imported this module once for all of them."""
    if "forkserver" not in multiprocessing.get_all_start_methods():  # as on Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class BatchLoader(DataLoader[Item]):
    """Loads the batches of a stream, over processes in memory that is used again.

    A batch may be kept: its memory is used again when the last of its tensors is dropped.

    Parameters
    ----------
    stream
        What to load.
    num_workers
        Processes that read; 0 reads in this one.
    """

    dataset: EpochStream

    def __init__(self, stream: EpochStream, num_workers: int = 0) -> None:
        stream.posted = num_workers > 0
        super().__init__(
            stream,
            batch_size=None,
            num_workers=num_workers,
            multiprocessing_context=_server() if num_workers else None,
            prefetch_factor=_AHEAD if num_workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Iterate over the batches of a pass."""
        inbox = Inbox()
        for item in super().__iter__():
            yield inbox.open(item) if isinstance(item, Parcel) else item


class StreamLoader(BatchLoader):
    """Loads a shuffled :class:`EpochStream`, one epoch after the other.

    Its state is where it is in which epoch, so that a run that was stopped goes on with the next
    batch: Lightning keeps it in checkpoints.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Iterate over what is left of this epoch, or over the next one."""
        stream = self.dataset
        self.load_state_dict(self.state_dict())
        for batch in super().__iter__():
            stream.start += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were given."""
        stream = self.dataset
        if stream.start >= len(stream):
            return {"epoch": stream.epoch + 1, "start": 0}
        return {"epoch": stream.epoch, "start": stream.start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where a state was taken."""
        self.dataset.epoch, self.dataset.start = state["epoch"], state["start"]


def _by_shard(rows: Rows, shard: int) -> list[Rows]:
    return np.split(rows, np.flatnonzero(np.diff(rows // shard)) + 1)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world() > 1 else 0
