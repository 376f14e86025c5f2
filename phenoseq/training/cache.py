"""Context tokens on disk: a frozen encoder reads each crop once, and the denoiser trains on tokens.

Layout, in a folder named by the digest of all that the tokens depend on::

    KEY/tokens.npy                       float16 (n, N, dim), of the crops as they are
    KEY/rows.npy                         int64 (n,): their positions in the store, rising
    KEY/indptr.npy indices.npy data.npy  of a store of cells their counts, as CSR (n, g)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from phenoseq.data.bagstream import BagStream
from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.dataset import EpochStream
from phenoseq.data.handover import Batch
from phenoseq.data.samplemodule import SampleDataModule
from phenoseq.data.samplestore import SampleStore
from phenoseq.data.selection import SelectedBagStream, SelectedSampleModule, SelectedSampleStore
from phenoseq.data.store import Store
from phenoseq.data.storewriter import whole_or_nothing
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.sample import SamplePhenoSeq

Progress = Callable[[int, int], None]
Rows = NDArray[np.int64]
_READ, _BATCH = 2048, 128
#: Parts of a model's configuration that its tokens depend on.
_ENCODES = ("image", "cells", "encoder")


class Tokens:
    """Tokens of some image cells, mapped from disk and read as they are used.

    Attributes
    ----------
    path
        Its folder.
    tokens, rows
        See the module.
    chunk
        Rows that a store of crops decodes together, as which these are drawn.
    """

    def __init__(self, path: Path, chunk: int = 1) -> None:
        self.path, self.chunk = path, chunk
        self.tokens = np.load(path / "tokens.npy", mmap_mode="r")
        self.rows: Rows = np.load(path / "rows.npy")

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.rows)

    def take(self, rows: Rows) -> NDArray[np.float16]:
        """Return the tokens of cells at ``rows`` of the store, float16 ``(B, N, dim)``."""
        found: NDArray[np.float16] = self.tokens[np.searchsorted(self.rows, rows)]
        return found


class TokenCache(Tokens):
    """Tokens and counts of some cells.

    Attributes
    ----------
    counts
        See the module.
    """

    def __init__(self, path: Path, n_genes: int) -> None:
        super().__init__(path)
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
            _write_tokens(model, store.take, rows, partial, progress)
    return TokenCache(path, len(store.manifest.genes))


def cache_image_tokens(
    model: SamplePhenoSeq,
    store: SampleStore,
    rows: Rows,
    folder: Path,
    *,
    progress: Progress | None = None,
) -> Tokens:
    """Encode image cells of samples once; see :func:`cache_tokens`.

    A cell is encoded by itself, so that its tokens are the same in every bag.
    """
    rows = np.sort(rows)
    path = folder / _key(model, store, rows)
    if not path.exists():
        with whole_or_nothing(path, overwrite=False) as partial:
            partial.mkdir(parents=True)
            _write_tokens(model, store.images.take, rows, partial, progress)
    return Tokens(path, store.images.chunk)


@torch.no_grad()
def _write_tokens(
    model: PhenoSeq | SamplePhenoSeq,
    take: Callable[[Rows], NDArray[Any]],
    rows: Rows,
    folder: Path,
    progress: Progress | None,
) -> None:
    device, was_training = model.image_mean.device, model.training
    model.eval()

    def encode(images: Tensor) -> Tensor:
        images = images.to(device).float()
        return model.encode(images if isinstance(model, PhenoSeq) else images[:, None])[0]

    n = len(rows)
    size = encode(torch.from_numpy(take(rows[:1]))).shape[1:]
    tokens = np.lib.format.open_memmap(
        folder / "tokens.npy", "w+", np.dtype(np.float16), (n, *size)
    )
    for start in range(0, n, _READ):
        images = torch.from_numpy(take(rows[start : start + _READ]))
        for at in range(0, len(images), _BATCH):
            crops = images[at : at + _BATCH]
            place = slice(start + at, start + at + len(crops))
            tokens[place] = encode(crops).half().cpu().numpy()
            if progress is not None:
                progress(place.stop, n)
    tokens.flush()
    np.save(folder / "rows.npy", rows)
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


def _key(model: PhenoSeq | SamplePhenoSeq, store: Store | SampleStore, rows: Rows) -> str:
    """Return the digest of all that the tokens and counts depend on."""
    facts: dict[str, Any] = {"layout": 1, "store": asdict(store.manifest)}
    if isinstance(store, Store):
        facts["cells"] = len(store)
    config = model.config.to_json()
    facts["model"] = {k: v for k, v in json.loads(config).items() if k in _ENCODES}
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


class TokenBagStream(SelectedBagStream):
    """Batches of bags that hold tokens in place of crops, of the same cells.

    ``"images"`` are replaced by ``"tokens"``, float16 ``(B, N, n, dim)``.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches of this rank and worker."""
        for batch in super().__iter__():
            assert isinstance(batch, dict)
            batch["tokens"] = batch.pop("images")
            yield batch


class CachedSampleModule(SampleDataModule):
    """Streams bags of cached tokens in place of a store's crops.

    Parameters
    ----------
    data
        The data that the tokens are of, set up.
    tokens
        Of the image cells of its training and validation samples.
    """

    opened: SelectedSampleStore

    def __init__(self, data: SelectedSampleModule, tokens: Tokens) -> None:
        super().__init__(
            data.store,
            data.split,
            data.n_images,
            data.n_rna,
            data.batch_size,
            data.num_workers,
            data.seed,
            data.max_val,
        )
        self.opened, self.parts = copy(data.opened), data.parts
        self.opened.images = tokens

    def _bags(self, samples: Rows, **how: Any) -> BagStream:
        return TokenBagStream(self.opened, samples, **how)
