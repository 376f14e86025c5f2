"""The LightningDataModule over a sample store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from numpy.typing import NDArray

from phenoseq.data.bagstream import BagStream
from phenoseq.data.dataset import BatchLoader, StreamLoader
from phenoseq.data.samplestore import SampleStore
from phenoseq.data.splits import Split, SplitConfig


class SampleDataModule(L.LightningDataModule):
    """Streams bags of a sample store to Lightning, samples split by declared groups.

    Parameters
    ----------
    store
        Path of a store made by ``phenoseq prepare --pair-by sample``.
    split
        How samples are divided; by a column, not by block.
    n_images, n_rna
        Image cells and RNA cells in a bag.
    batch_size
        Bags a batch, on each device.
    num_workers
        Processes that read; 0 reads in the training process.
    seed
        Of the order of the cells.
    max_val
        Most RNA cells of validation, alike of every sample.

    Attributes
    ----------
    opened, parts
        The store and the split of its samples, after :meth:`setup`.
    """

    opened: SampleStore
    parts: Split

    def __init__(
        self,
        store: str | Path,
        split: SplitConfig,
        n_images: int = 16,
        n_rna: int = 1,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        max_val: int = 4096,
    ) -> None:
        super().__init__()
        self.store = Path(store)
        self.split = split
        self.n_images, self.n_rna = n_images, n_rna
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.max_val = max_val

    def setup(self, stage: str | None = None) -> None:
        """Open the store and divide its samples; raises :class:`~phenoseq.errors.DataError`."""
        if hasattr(self, "opened"):
            return
        self.opened = SampleStore(self.store)
        self.parts = self.opened.split(self.split)

    def image_sample(self, part: str, n: int) -> NDArray[Any]:
        """Return the images or features of up to ``n`` cells of a part, drawn by the seed."""
        rows = np.concatenate([np.arange(*place) for place in self._places(part, "image")])
        if len(rows) > n:
            rows = np.random.default_rng(self.seed).choice(rows, n, replace=False)
        return self.opened.images.take(np.sort(rows))

    def rna_sample(self, part: str, n: int) -> NDArray[np.float32]:
        """Return about ``n`` RNA cells of a part, of each sample the same share, dense."""
        places = self._places(part, "rna")
        share = min(n / max(int((places[:, 1] - places[:, 0]).sum()), 1), 1.0)
        found = []
        for start, stop in places.tolist():  # a sample's cells stand in an order that was drawn
            rows = self.opened.rna.read(start, start + math.ceil((stop - start) * share))
            found.append(rows if isinstance(rows, np.ndarray) else rows.toarray())
        return np.concatenate(found)

    def _places(self, part: str, of: str) -> NDArray[np.int64]:
        samples = self.opened.samples.iloc[self.parts.rows(part)]
        return np.asarray(samples[[f"{of}_start", f"{of}_stop"]], dtype=np.int64)

    def train_dataloader(self) -> StreamLoader:
        """Return shuffled training batches; each pass is the next epoch."""
        return StreamLoader(self._stream("train", shuffle=True, most=None), self.num_workers)

    def val_dataloader(self) -> BatchLoader:
        """Return validation batches, always the same bags in the same order."""
        most = max(self.max_val // len(self.parts.rows("val")), self.n_rna)
        return BatchLoader(self._stream("val", shuffle=False, most=most), self.num_workers)

    def _stream(self, part: str, *, shuffle: bool, most: int | None) -> BagStream:
        return BagStream(
            self.store,
            self.parts.rows(part),
            n_images=self.n_images,
            n_rna=self.n_rna,
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            workers=max(self.num_workers, 1),
            most=most,
        )
