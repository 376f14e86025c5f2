"""The LightningDataModule over a store."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
from numpy.typing import NDArray

from phenoseq.data.dataset import BatchLoader, CellStream, StreamLoader
from phenoseq.data.splits import Split, SplitConfig, make_split
from phenoseq.data.store import Store


class StoreDataModule(L.LightningDataModule):
    """Streams a store's cells to Lightning, split by declared groups.

    Parameters
    ----------
    store
        Path of a store made by ``phenoseq prepare``.
    split
        How cells are divided.
    batch_size
        Cells a batch, on each device.
    num_workers
        Processes that read; 0 reads in the training process.
    seed
        Of the order of the cells.
    max_val
        Most validation cells, drawn by the seed.

    Attributes
    ----------
    opened, parts
        The store and its split, after :meth:`setup`.
    """

    opened: Store
    parts: Split

    def __init__(
        self,
        store: str | Path,
        split: SplitConfig = SplitConfig(),  # noqa: B008 - frozen, and shown by --help
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

    def train_dataloader(self) -> StreamLoader:
        """Return shuffled training batches; each pass is the next epoch."""
        stream = self._stream(self.parts.rows("train"), shuffle=True)
        self._training = StreamLoader(stream, self.num_workers)
        if self._restored:
            self._training.load_state_dict(self._restored)
        return self._training

    def state_dict(self) -> dict[str, int]:
        """Return where training is in which epoch, for a checkpoint."""
        return {} if self._training is None else self._training.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let training go on where a checkpoint was made.

        Lightning would give the state to the loader itself, but not where the number of steps was
        asked for before.
        """
        self._restored = state_dict

    def val_dataloader(self) -> BatchLoader:
        """Return validation batches, always the same cells in the same order."""
        stream = self._stream(self.some("val", self.max_val), shuffle=False)
        return BatchLoader(stream, self.num_workers)

    def _stream(self, rows: NDArray[np.int64], *, shuffle: bool) -> CellStream:
        return CellStream(
            self.store,
            rows,
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            workers=max(self.num_workers, 1),
        )


def split_of(store: Store, config: SplitConfig) -> Split:
    """Divide the cells of a store."""
    return make_split(
        config,
        store.obs(),
        crop_width=store.manifest.crop_width,
        occupied=store.all_cells(),
    )
