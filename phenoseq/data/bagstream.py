"""Streams bags of a sample store: some image cells and some RNA cells of one sample each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.data.dataset import EpochStream, Rows
from phenoseq.data.handover import Arrays, Item, Spec
from phenoseq.data.samplestore import SampleStore

#: Bags that are made of one piece: RNA cells that stand side by side, and one pool of image cells.
PIECE = 64

Bag = dict[str, NDArray[Any]]
# What a generator is for, so that no two draw alike.
_ORDER, _PIECE, _BAG, _WINDOW = range(4)


class BagStream(EpochStream):
    """Batches of bags, each of N image cells and K RNA cells of one sample.

    A batch is ``{"images" or "features": (B, N, ...), "keep": (B, N), "counts", "expression" or
    "embedding": (B, K, width), "keep_rna": (B, K), "sample": (B,), "image_rows": (B, N), "rows":
    (B, K)}``; the last three are positions in the store.

    Every RNA cell of the samples is seen once an epoch over all ranks and workers, where
    ``keep_rna`` is True; the last bag of a sample is filled with others of its RNA cells, where it
    is False. The image cells of a bag are drawn without replacement, from a pool of the sample; a
    sample of fewer than N is filled with replacement, where ``keep`` is False. What is in a bag
    depends on (seed, epoch) and its place in the store, not on the rank and worker that gives it.

    Memory holds ``window`` pieces, each of up to 64 bags' RNA cells and ``pool`` image cells.

    Parameters
    ----------
    store
        Path of the sample store.
    samples
        Samples to stream, positions in ``store.samples``.
    n_images, n_rna
        N and K.
    batch_size, shuffle, seed, window, workers
        See :class:`~phenoseq.data.dataset.EpochStream`; items are bags, the window is of pieces.
    pool
        Image cells of a sample that are in memory at once, among which is drawn (at least N).
    most
        RNA cells of a sample at most, the first in the store; None for all.
    """

    def __init__(
        self,
        store: str | Path,
        samples: Rows,
        *,
        n_images: int,
        n_rna: int = 1,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        window: int = 16,
        workers: int = 1,
        pool: int = 256,
        most: int | None = None,
    ) -> None:
        self.n_images, self.n_rna, self.pool = n_images, n_rna, max(pool, n_images)
        self.store = Path(store)
        self._pieces = _divide(self._open(), samples, n_rna, most)
        self._sizes = np.array([piece.n_bags for piece in self._pieces], dtype=np.int64)
        super().__init__(
            store,
            (int(self._sizes.sum()), "bags"),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            window=window,
            workers=workers,
        )

    def __iter__(self) -> Iterator[Item]:
        """Iterate over the batches of this rank and worker."""
        number, skip = self._turn()
        new, store = self._new(number), self._open()
        names = {"images": "images", "rna": store.manifest.rna}
        if store.manifest.images == "features":
            names["images"] = "features"
        kept: dict[int, Bag] = {}
        for batches, waiting in self._plan(number):
            loaded: dict[int, _Loaded] = {}
            given = min(skip, len(batches))
            skip -= given
            for batch in batches[given:]:
                bags = [kept.pop(n) if n in kept else self._bag(store, n, loaded) for n in batch]
                yield _stacked(bags, names, new)
            if not skip:  # else the next batch, which takes all of those waiting, was given
                kept.update((n, self._bag(store, n, loaded)) for n in waiting if n not in kept)

    def _open(self) -> SampleStore:
        return SampleStore(self.store)

    def _plan(self, number: int) -> Iterator[tuple[list[list[int]], list[int]]]:
        """Yield, for each window, the batches that can be given, and the bags left for later.

        Bags are numbered through the pieces in the store's order.
        """
        share = self._share(number)
        sizes = [len(part) for part in np.array_split(share, self._each)]
        rng = self._generator(_WINDOW, self.rank, number)
        edges = np.flatnonzero(np.diff(self._piece_of(share))) + 1
        pieces = np.split(share, edges)
        waiting = np.empty(0, dtype=np.int64)
        for start in range(0, len(pieces), self.window):
            fresh = np.concatenate(pieces[start : start + self.window])
            if self.shuffle:
                fresh = rng.permutation(fresh)
            pool = np.concatenate([waiting, fresh])
            ends = np.cumsum(sizes)
            ready = int(np.searchsorted(ends, len(pool), side="right"))
            *batches, waiting = np.split(pool, ends[:ready])
            sizes = sizes[ready:]
            yield [batch.tolist() for batch in batches], waiting.tolist()

    def _share(self, number: int) -> Rows:
        """Return the bags of one reader, piece by piece in the order of this epoch."""
        order = np.arange(len(self._pieces))
        if self.shuffle:
            order = self._generator(_ORDER).permutation(order)
        first = np.cumsum(self._sizes) - self._sizes
        bags = np.concatenate([first[i] + np.arange(self._sizes[i]) for i in order])
        readers = self.world * self.workers
        return np.array_split(bags, readers)[number * self.world + self.rank]

    def _piece_of(self, bags: Rows) -> Rows:
        return np.searchsorted(np.cumsum(self._sizes), bags, side="right")

    def _generator(self, purpose: int, *words: int) -> np.random.Generator:
        epoch = self.epoch if self.shuffle else 0
        return np.random.default_rng([self.seed, epoch, purpose, *words])

    def _bag(self, store: SampleStore, number: int, loaded: dict[int, _Loaded]) -> Bag:
        at = int(self._piece_of(np.array([number]))[0])
        if at not in loaded:
            loaded[at] = self._load(store, at)
        piece = self._pieces[at]
        within = number - int(self._sizes[:at].sum())
        return loaded[at].bag(
            piece.sample, within, self.n_images, self.n_rna, self._generator(_BAG, at, within)
        )

    def _load(self, store: SampleStore, at: int) -> _Loaded:
        piece = self._pieces[at]
        rng = self._generator(_PIECE, at)
        n = piece.stop - piece.start
        order = rng.permutation(n) if self.shuffle else np.arange(n)
        fill = rng.integers(n, size=piece.n_bags * self.n_rna - n)
        rows = _some(piece.image_start, piece.image_stop, self.pool, store.images.chunk, rng)
        return _Loaded(
            images=store.images.take(rows),
            image_rows=rows,
            rna=store.rna.read(piece.start, piece.stop),
            rna_start=piece.start,
            order=np.concatenate([order, fill]),
            own=np.arange(len(order) + len(fill)) < n,
        )


def _stacked(
    bags: list[Bag], names: dict[str, str], new: Callable[[Spec], tuple[Item, Arrays]]
) -> Item:
    spec = {
        names.get(key, key): ((len(bags), *value.shape), value.dtype)
        for key, value in bags[0].items()
    }
    batch, arrays = new(spec)
    for key, array in zip(bags[0], arrays.values(), strict=True):
        np.stack([bag[key] for bag in bags], out=array)
    return batch


@dataclass(frozen=True)
class _Piece:
    """Some RNA cells of a sample, rows ``start`` to ``stop``, and where its image cells are."""

    sample: int
    start: int
    stop: int
    image_start: int
    image_stop: int
    n_bags: int


def _divide(store: SampleStore, samples: Rows, n_rna: int, most: int | None) -> list[_Piece]:
    pieces = []
    places = store.samples[["rna_start", "rna_stop", "image_start", "image_stop"]].to_numpy(int)
    for sample in np.sort(samples):
        start, stop, *images = (int(n) for n in places[sample])
        if images[0] == images[1]:
            continue
        stop = stop if most is None else min(stop, start + most)
        for at in range(start, stop, PIECE * n_rna):
            end = min(at + PIECE * n_rna, stop)
            bags = -(-(end - at) // n_rna)
            pieces.append(_Piece(int(sample), at, end, images[0], images[1], bags))
    return pieces


def _some(start: int, stop: int, n: int, chunk: int, rng: np.random.Generator) -> Rows:
    """Return rows of ``start`` to ``stop``: all, or those of some chunks, ``n`` or a few more."""
    rows = np.arange(start, stop)
    if len(rows) <= n:
        return rows
    chunks = np.split(rows, np.flatnonzero(np.diff(rows // chunk)) + 1)
    order = rng.permutation(len(chunks))
    enough = int(np.searchsorted(np.cumsum([len(chunks[i]) for i in order]), n)) + 1
    return np.concatenate([chunks[i] for i in np.sort(order[:enough])])


@dataclass(frozen=True)
class _Loaded:
    """A piece in memory.

    Attributes
    ----------
    images, image_rows
        The pool of image cells, and where they are in the store.
    rna, rna_start
        The RNA cells, and where the first is in the store.
    order, own
        RNA cells in the order in which bags take them, and whether each is there for itself, not
        to fill a bag.
    """

    images: NDArray[Any]
    image_rows: Rows
    rna: NDArray[np.float32] | sparse.csr_matrix
    rna_start: int
    order: Rows
    own: NDArray[np.bool_]

    def bag(self, sample: int, number: int, n: int, k: int, rng: np.random.Generator) -> Bag:
        """Return one bag of the piece."""
        there = len(self.images)
        drawn = rng.permutation(there)[:n]
        drawn = np.concatenate([drawn, rng.integers(there, size=n - len(drawn))])
        mine = slice(number * k, (number + 1) * k)
        rna = self.rna[self.order[mine]]
        return {
            "images": self.images[drawn],
            "keep": np.arange(n) < there,
            "rna": rna if isinstance(rna, np.ndarray) else rna.toarray(),
            "keep_rna": self.own[mine],
            "sample": np.array(sample),
            "image_rows": self.image_rows[drawn],
            "rows": self.rna_start + self.order[mine],
        }
