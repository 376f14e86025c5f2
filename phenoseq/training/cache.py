"""Context tokens on disk: a frozen encoder reads each crop once, and the denoiser trains on tokens.

Layout, in a folder named by the digest of all that the tokens depend on::

    KEY/tokens.npy                       float16 (n, N, dim), of the crops as they are
    KEY/indptr.npy indices.npy data.npy  their counts, as CSR (n, g)
    KEY/rows.npy                         int64 (n,): their positions in the store, rising
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.dataset import EpochStream
from phenoseq.data.handover import Batch
from phenoseq.data.store import Store
from phenoseq.data.storewriter import whole_or_nothing
from phenoseq.models.phenoseq import PhenoSeq

Progress = Callable[[int, int], None]
Rows = NDArray[np.int64]
_READ, _BATCH = 2048, 128


class TokenCache:
    """Tokens and counts of some cells, mapped from disk and read as they are used.

    Attributes
    ----------
    path
        Its folder.
    tokens, counts, rows
        See the module.
    """

    def __init__(self, path: Path, n_genes: int) -> None:
        self.path = path
        self.tokens = np.load(path / "tokens.npy", mmap_mode="r")
        self.rows: Rows = np.load(path / "rows.npy")
        data, indices = (
            np.load(path / f"{name}.npy", mmap_mode="r") for name in ("data", "indices")
        )
        self.counts = sparse.csr_matrix((len(self.rows), n_genes), dtype=np.float32)
        self.counts.data, self.counts.indices = data, indices  # not copied, nor looked through
        self.counts.indptr = np.load(path / "indptr.npy")

    def batch(self, rows: Rows) -> Batch:
        """Return ``{"tokens": (B, N, dim), "counts": (B, g), "rows": (B,)}`` of cells, float32."""
        at = np.searchsorted(self.rows, rows)
        return {
            "tokens": torch.from_numpy(self.tokens[at]).float(),
            "counts": torch.from_numpy(self.counts[at].toarray()),
            "rows": torch.from_numpy(rows),
        }


def cache_tokens(
    model: PhenoSeq,
    store: Store,
    rows: Rows,
    folder: Path,
    *,
    progress: Progress | None = None,
) -> TokenCache:
    """Encode cells once, or find what was encoded before.

    What is there is used only where encoder, store and cells are those it was made from; and
    it is there whole or not at all.

    Parameters
    ----------
    model
        Encodes, on its device.
    store, rows
        The cells, positions in the store.
    folder
        In which the folder of the cache is made.
    progress
        Called with (cells done, cells in all).

    Raises
    ------
    DataError
        Where the disk is full, or the store cannot be read.
    """
    rows = np.sort(rows)
    path = folder / _key(model, store, rows)
    if not path.exists():
        with whole_or_nothing(path, overwrite=False) as partial:
            partial.mkdir(parents=True)
            _write_counts(store, rows, partial)
            _write_tokens(model, store, rows, partial, progress)
            np.save(partial / "rows.npy", rows)
    return TokenCache(path, len(store.manifest.genes))


@torch.no_grad()
def _write_tokens(
    model: PhenoSeq,
    store: Store,
    rows: Rows,
    folder: Path,
    progress: Progress | None,
) -> None:
    device, was_training = model.image_mean.device, model.training
    model.eval()
    n = len(rows)
    size = model.encode(torch.from_numpy(store.take(rows[:1])).to(device))[0].shape[1:]
    tokens = np.lib.format.open_memmap(
        folder / "tokens.npy", "w+", np.dtype(np.float16), (n, *size)
    )
    for start in range(0, n, _READ):
        images = torch.from_numpy(store.take(rows[start : start + _READ]))
        for at in range(0, len(images), _BATCH):
            crops = images[at : at + _BATCH].to(device).float()
            place = slice(start + at, start + at + len(crops))
            tokens[place] = model.encode(crops)[0].half().cpu().numpy()
            if progress is not None:
                progress(place.stop, n)
    tokens.flush()
    model.train(was_training)


def _write_counts(store: Store, rows: Rows, folder: Path) -> None:
    blocks = [rows[start : start + _READ] for start in range(0, len(rows), _READ)]
    sizes = [np.diff(store.counts(some).indptr) for some in blocks]
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(sizes), dtype=np.int64)])
    n = int(indptr[-1])
    index = np.dtype(np.int64 if n >= 1 << 31 else np.int32)  # of both, or scipy copies one
    create = np.lib.format.open_memmap
    indices = create(folder / "indices.npy", "w+", index, (n,))
    data = create(folder / "data.npy", "w+", np.dtype(np.float32), (n,))
    done = 0
    for some in blocks:
        counts = store.counts(some)
        place = slice(done, done + counts.nnz)
        indices[place], data[place] = counts.indices, counts.data
        done += counts.nnz
    indices.flush()
    data.flush()
    np.save(folder / "indptr.npy", indptr.astype(index))


def _key(model: PhenoSeq, store: Store, rows: Rows) -> str:
    """Return the digest of all that the tokens and counts depend on."""
    facts = {
        "layout": 1,
        "cells": len(store),
        "store": asdict(store.manifest),
        "image": asdict(model.config.image),
        "encoder": asdict(model.config.encoder),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(rows).tobytes())
    for name, tensor in sorted(model.encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


class TokenStream(EpochStream):
    """Batches of a :class:`TokenCache`, every cell once an epoch.

    Parameters
    ----------
    cache
        What is streamed.
    rows
        Cells to stream, all in the cache.
    batch_size, shuffle, seed, workers
        See :class:`~phenoseq.data.dataset.EpochStream`.
    """

    def __init__(
        self,
        cache: TokenCache,
        rows: Rows,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        workers: int = 1,
    ) -> None:
        super().__init__(
            cache.path,
            (len(rows), "cells"),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            window=1,
            workers=workers,
        )
        self.rows = np.sort(rows)
        self._genes = cache.counts.shape[1]

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches of this rank and worker."""
        number, skip = self._turn()
        cache = TokenCache(self.store, self._genes)
        rows = self.rows
        if self.shuffle:
            rows = np.random.default_rng([self.seed, self.epoch]).permutation(rows)
        reader = number * self.world + self.rank
        own = np.array_split(rows, self.world * self.workers)[reader]
        for some in np.array_split(own, self._each)[skip:]:
            yield cache.batch(some)


class CachedDataModule(StoreDataModule):
    """Streams cached tokens in place of a store's crops.

    Parameters
    ----------
    data
        The data that the tokens are of, set up.
    cache
        Of its training cells and the validation cells that it gives.
    """

    def __init__(self, data: StoreDataModule, cache: TokenCache) -> None:
        super().__init__(
            data.store, data.split, data.batch_size, data.num_workers, data.seed, data.max_val
        )
        self.opened, self.parts = data.opened, data.parts
        self.cache = cache

    def stream(self, part: str, *, shuffle: bool, most: int | None = None) -> TokenStream:  # type: ignore[override]
        """Return the stream of a part, of ``most`` of its cells, drawn by the seed."""
        return TokenStream(
            self.cache,
            self.parts.rows(part) if most is None else self.some(part, most),
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            workers=max(self.num_workers, 1),
        )
