"""The LightningDataModule over a sample store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.data.bagstream import BagStream
from phenoseq.data.datamodule import StreamDataModule
from phenoseq.data.samplestore import SampleStore
from phenoseq.data.splits import SplitConfig


class SampleDataModule(StreamDataModule):
    """Streams bags of a sample store to Lightning, samples split by declared groups.

    Parameters
    ----------
    store
        Path of a store made by ``phenoseq prepare --pair-by sample``.
    split
        How samples are divided; by a column, not by block.
    n_images, n_rna
        Image cells and RNA cells in a bag.
    batch_size, num_workers, seed, max_val
        See :class:`~phenoseq.data.datamodule.StreamDataModule`; of validation RNA cells every
        sample has as many.

    Attributes
    ----------
    opened, parts
        The store and the split of its samples, after :meth:`setup`.
    """

    opened: SampleStore

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
        super().__init__(store, split, batch_size, num_workers, seed, max_val)
        self.n_images, self.n_rna = n_images, n_rna

    def setup(self, stage: str | None = None) -> None:
        """Open the store and divide its samples; raises :class:`~phenoseq.errors.DataError`."""
        if hasattr(self, "opened"):
            return
        self.opened = SampleStore(self.store)
        self.parts = self.opened.split(self.split)

    def stream(self, part: str, *, shuffle: bool, most: int | None = None) -> BagStream:
        """Return the stream of a part, of about ``most`` of its RNA cells, alike of samples."""
        samples = self.parts.rows(part)
        return self._bags(
            samples,
            n_images=self.n_images,
            n_rna=self.n_rna,
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            workers=max(self.num_workers, 1),
            most=None if most is None else max(most // len(samples), self.n_rna),
        )

    def _bags(self, samples: NDArray[np.int64], **how: Any) -> BagStream:
        return BagStream(self.store, samples, **how)

    def image_sample(self, part: str, n: int) -> NDArray[Any]:
        """Return the crops or features of up to ``n`` cells of a part, drawn by the seed."""
        rows = self.image_rows(part)
        if len(rows) > n:
            rows = np.random.default_rng(self.seed).choice(rows, n, replace=False)
        return self.opened.images.take(np.sort(rows))

    def image_rows(self, part: str) -> NDArray[np.int64]:
        """Return the image cells of a part, positions in the store."""
        return np.concatenate([np.arange(*place) for place in self._places(part, "image")])

    def rna_sample(self, part: str, n: int) -> NDArray[np.float32] | sparse.csr_matrix:
        """Return about ``n`` RNA cells of a part, of each sample the same share."""
        places = self._places(part, "rna")
        share = min(n / max(self.n_cells(part), 1), 1.0)
        found: list[Any] = [  # a sample's cells stand in an order that was drawn
            self.opened.rna.read(start, start + math.ceil((stop - start) * share))
            for start, stop in places.tolist()
        ]
        if isinstance(found[0], np.ndarray):
            return np.concatenate(found)
        return sparse.vstack(found, format="csr")

    def n_cells(self, part: str) -> int:
        """Return the number of RNA cells of a part."""
        places = self._places(part, "rna")
        return int((places[:, 1] - places[:, 0]).sum())

    def _places(self, part: str, of: str) -> NDArray[np.int64]:
        samples = self.opened.samples.iloc[self.parts.rows(part)]
        return np.asarray(samples[[f"{of}_start", f"{of}_stop"]], dtype=np.int64)
