"""The LightningDataModule over a store, and what it shares with that over a sample store."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.data.dataset import BatchLoader, CellStream, EpochStream, StreamLoader
from phenoseq.data.samplestore import SampleStore
from phenoseq.data.splits import Split, SplitConfig, make_split
from phenoseq.data.store import Store
from phenoseq.errors import DataError


class StreamDataModule(L.LightningDataModule):
    """Streams a store to Lightning, split by declared groups, and goes on where a run stopped.

    Parameters
    ----------
    store
        Path of the store.
    split
        How it is divided.
    batch_size
        Cells or bags a batch, on each device.
    num_workers
        Processes that read; 0 reads in the training process.
    seed
        Of the order of the cells.
    max_val
        Most validation cells.

    Attributes
    ----------
    opened, parts
        The store and its split, after :meth:`setup`.
    """

    opened: Store | SampleStore
    parts: Split

    def __init__(
        self,
        store: str | Path,
        split: SplitConfig,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        max_val: int = 4096,
    ) -> None:
        super().__init__()
        self.store = Path(store)
        self.split = split
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.max_val = max_val
        self._training: StreamLoader | None = None
        self._restored: dict[str, int] = {}

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Open the store and divide it; raises :class:`~phenoseq.errors.DataError`."""

    @abstractmethod
    def stream(self, part: str, *, shuffle: bool, most: int | None = None) -> EpochStream:
        """Return the stream of a part, of about ``most`` of its cells, those with RNA."""

    @abstractmethod
    def image_sample(self, part: str, n: int) -> NDArray[Any]:
        """Return the crops or features of up to ``n`` cells of a part, drawn by the seed."""

    @abstractmethod
    def rna_sample(self, part: str, n: int) -> NDArray[np.float32] | sparse.csr_matrix:
        """Return the RNA of about ``n`` cells of a part: an embedding dense, genes as CSR."""

    @abstractmethod
    def n_cells(self, part: str) -> int:
        """Return the number of cells of a part, those with RNA."""

    def train_dataloader(self) -> StreamLoader:
        """Return shuffled training batches; each pass is the next epoch."""
        self._training = StreamLoader(self.stream("train", shuffle=True), self.num_workers)
        if self._restored:
            self._training.load_state_dict(self._restored)
        return self._training

    def val_dataloader(self) -> BatchLoader:
        """Return validation batches, always the same in the same order."""
        return self.fixed("val", self.max_val)

    def fixed(self, part: str, most: int, *, alone: bool = False) -> BatchLoader:
        """Return batches of about ``most`` cells of a part, always the same in the same order.

        Parameters
        ----------
        part, most
            See :meth:`stream`.
        alone
            Give all of them on this rank, in place of its share.
        """
        stream = self.stream(part, shuffle=False, most=most)
        if alone:
            stream.world, stream.rank = 1, 0
        return BatchLoader(stream, self.num_workers)

    @property
    def digest(self) -> str:
        """Hex digest of what the store holds and how it is divided."""
        facts = json.dumps([asdict(self.opened.manifest), self.parts.digest], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return where training is in which epoch, and of what data, for a checkpoint."""
        return (
            {} if self._training is None else {"data": self.digest, **self._training.state_dict()}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let training go on where a checkpoint was made.

        Lightning would give the state to the loader itself, but not where the number of steps was
        asked for before.

        Raises
        ------
        DataError
            Where the store is no longer what the run began with.
        """
        position = dict(state_dict)
        if position.pop("data", self.digest) != self.digest:
            raise DataError(
                f"{self.store}: holds or divides other cells, stains or genes than when this run "
                "began; bring that store back, or begin anew in another folder"
            )
        self._restored = position


class StoreDataModule(StreamDataModule):
    """Streams a store's cells to Lightning, split by declared groups.

    Parameters
    ----------
    store
        Path of a store made by ``phenoseq prepare``.
    split
        How cells are divided.
    batch_size, num_workers, seed, max_val
        See :class:`StreamDataModule`; validation cells are drawn by the seed.

    Attributes
    ----------
    opened, parts
        The store and its split, after :meth:`setup`.
    """

    opened: Store

    def __init__(
        self,
        store: str | Path,
        split: SplitConfig = SplitConfig(),  # noqa: B008 - frozen, and shown by --help
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        max_val: int = 4096,
    ) -> None:
        super().__init__(store, split, batch_size, num_workers, seed, max_val)

    def setup(self, stage: str | None = None) -> None:
        """Open the store and divide its cells; raises :class:`~phenoseq.errors.DataError`."""
        if hasattr(self, "opened"):
            return
        self.opened = Store(self.store)
        self.parts = split_of(self.opened, self.split)

    def some(self, part: str, n: int) -> NDArray[np.int64]:
        """Return up to ``n`` cells of a part, drawn by the seed, in the store's order."""
        rows = self.parts.rows(part)
        if len(rows) <= n:
            return rows
        return np.sort(np.random.default_rng(self.seed).choice(rows, n, replace=False))

    def stream(self, part: str, *, shuffle: bool, most: int | None = None) -> CellStream:
        """Return the stream of a part, of ``most`` of its cells, drawn by the seed."""
        return CellStream(
            self.store,
            self.parts.rows(part) if most is None else self.some(part, most),
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            workers=max(self.num_workers, 1),
        )

    def image_sample(self, part: str, n: int) -> NDArray[Any]:
        """Return the crops of up to ``n`` cells of a part, drawn by the seed."""
        return self.opened.take(self.some(part, n))

    def rna_sample(self, part: str, n: int) -> sparse.csr_matrix:
        """Return the counts of up to ``n`` cells of a part, drawn by the seed."""
        return self.opened.counts(self.some(part, n))

    def n_cells(self, part: str) -> int:
        """Return the number of cells of a part."""
        return len(self.parts.rows(part))


def split_of(store: Store, config: SplitConfig) -> Split:
    """Divide the cells of a store."""
    return make_split(
        config,
        store.obs(),
        crop_width=store.manifest.crop_width,
        occupied=store.all_cells(),
    )
