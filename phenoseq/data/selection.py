"""Some stains and genes of a store, seen as if it held no others."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import anndata as ad
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.channels import canonical
from phenoseq.data.bagstream import BagStream
from phenoseq.data.datamodule import StoreDataModule, split_of
from phenoseq.data.dataset import CellStream
from phenoseq.data.handover import Arrays, Batch, Spec, fresh
from phenoseq.data.samplemodule import SampleDataModule
from phenoseq.data.samplestore import ImageRows, RnaRows, SampleManifest, SampleStore
from phenoseq.data.splits import UNASSIGNED, Split, SplitConfig
from phenoseq.data.store import Manifest, Store
from phenoseq.errors import DataError

Rows = NDArray[np.int64]
M = TypeVar("M", Manifest, SampleManifest)
#: RNA cells that are read at once, to see which have counts.
_READ = 1 << 14


class SelectedStore(Store):
    """A store of which some stains and genes are read.

    Parameters
    ----------
    path
        The store.
    channels
        Stains to read, by any of their names; all by default.
    genes
        Genes to read, by id or symbol; all by default.

    Attributes
    ----------
    channel_rows, gene_rows
        Their positions in the store, int64.
    full
        The manifest of the store, all stains and genes in it.

    Raises
    ------
    DataError
        Where there is no store, or it lacks one of them.
    """

    def __init__(
        self,
        path: str | Path,
        channels: Sequence[str] | None = None,
        genes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(path)
        self.full = self.manifest
        self.channel_rows, self.gene_rows, self.manifest = _selected(
            path, self.full, channels, genes
        )

    def table(self) -> ad.AnnData:
        """Return the expression table of these genes."""
        return super().table()[:, self.gene_rows].copy()

    def counts(self, rows: Rows) -> sparse.csr_matrix:
        """Return the raw counts of these genes."""
        return super().counts(rows)[:, self.gene_rows]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return these stains of the crops of cells ``start`` to ``stop``."""
        return super().read(start, stop)[:, self.channel_rows]

    def take(self, rows: Rows) -> NDArray[Any]:
        """Return these stains of the crops of ``rows``."""
        return super().take(rows)[:, self.channel_rows]


class SelectedStream(CellStream):
    """Batches of cells with the stains and genes of a selection; see its base for the rest."""

    def __init__(self, store: SelectedStore, rows: Rows, **how: Any) -> None:
        super().__init__(store.path, rows, **how)
        self._channels = store.channel_rows
        self._genes = store.gene_rows

    def _new(self, number: int) -> Callable[[Spec], tuple[Batch, Arrays]]:
        return fresh  # what is handed over is the selection

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches of this rank and worker."""
        for batch in super().__iter__():
            assert isinstance(batch, dict)
            images, counts = batch["images"][:, self._channels], batch["counts"][:, self._genes]
            yield batch | {"images": images, "counts": counts}


class SelectedDataModule(StoreDataModule):
    """Streams a selection of a store to Lightning: its cells that have counts of these genes.

    Parameters
    ----------
    store, split, batch_size, seed
        See :class:`~phenoseq.data.datamodule.StoreDataModule`.
    channels, genes
        See :class:`SelectedStore`.
    """

    opened: SelectedStore

    def __init__(
        self,
        store: str | Path,
        split: SplitConfig,
        batch_size: int = 128,
        *,
        seed: int = 0,
        channels: Sequence[str] | None,
        genes: Sequence[str] | None,
    ) -> None:
        super().__init__(store, split, batch_size, seed=seed)
        self._channels, self._genes = channels, genes

    def setup(self, stage: str | None = None) -> None:
        """Open the store and divide its cells; raises :class:`~phenoseq.errors.DataError`."""
        if hasattr(self, "opened"):
            return
        self.opened = SelectedStore(self.store, self._channels, self._genes)
        self.parts = split_of_selected(self.opened, self.split)

    def stream(self, part: str, *, shuffle: bool, most: int | None = None) -> CellStream:
        """Return the stream of a part, of ``most`` of its cells, drawn by the seed."""
        return SelectedStream(
            self.opened,
            self.parts.rows(part) if most is None else self.some(part, most),
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            workers=max(self.num_workers, 1),
        )


def split_of_selected(store: SelectedStore, config: SplitConfig) -> Split:
    """Divide the cells of a store; those without counts of the selected genes are left out."""
    split = split_of(store, config)
    if len(store.gene_rows) == len(store.full.genes):
        return split
    empty = np.asarray(store.table().X.sum(axis=1)).ravel() == 0
    return replace(split, part=np.where(empty, UNASSIGNED, split.part))


class SelectedSampleStore(SampleStore):
    """A sample store of which some stains and genes are read.

    RNA cells without counts of the genes are left out, and rows of RNA number the others.

    Parameters
    ----------
    path, channels, genes
        See :class:`SelectedStore`.

    Attributes
    ----------
    channel_rows, gene_rows
        See :class:`SelectedStore`.
    full
        The manifest of the store, all stains and genes in it.

    Raises
    ------
    DataError
        Where there is no store, it lacks one of them, or it has no stains or genes to choose from.
    """

    def __init__(
        self,
        path: str | Path,
        channels: Sequence[str] | None = None,
        genes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(path)
        self.full = full = self.manifest
        if channels is not None and full.images == "features":
            raise DataError(
                f"{path}: holds features, whose stains it does not name; leave 'channels' out"
            )
        if genes is not None and full.rna == "embedding":
            raise DataError(f"{path}: holds an embedding, and no genes; leave 'genes' out")
        self.channel_rows, self.gene_rows, self.manifest = _selected(path, full, channels, genes)
        if channels is not None:
            self.images = _SomeStains(self.images, self.channel_rows)
        if genes is not None:
            ends = ["rna_start", "rna_stop"]
            places = self.samples[ends].to_numpy(int)
            self.rna = some = _SomeGenes(self.rna, self.gene_rows)
            self.samples = self.samples.copy()
            self.samples[ends] = np.searchsorted(some.rows, places)


class _SomeStains:
    """Some stains of crops."""

    def __init__(self, crops: ImageRows, stains: Rows) -> None:
        self._crops, self._stains = crops, stains

    def __len__(self) -> int:
        return len(self._crops)

    @property
    def chunk(self) -> int:
        return self._crops.chunk

    def take(self, rows: Rows) -> NDArray[Any]:
        return self._crops.take(rows)[:, self._stains]


class _SomeGenes:
    """Some genes of RNA cells, of which those with counts of them are ``rows``."""

    def __init__(self, cells: RnaRows, genes: Rows) -> None:
        self._cells, self._genes = cells, genes
        n = cells.shape[0]
        total = [
            np.asarray(cells.read(at, min(at + _READ, n))[:, genes].sum(axis=1)).ravel()
            for at in range(0, n, _READ)
        ]
        self.rows: Rows = np.flatnonzero(np.concatenate(total))
        self.shape = len(self.rows), len(genes)

    def read(self, start: int, stop: int) -> NDArray[np.float32] | sparse.csr_matrix:
        rows = self.rows[start:stop]
        if not len(rows):
            return self._cells.read(0, 0)[:, self._genes]
        return self._cells.read(int(rows[0]), int(rows[-1]) + 1)[rows - rows[0]][:, self._genes]


class SelectedBagStream(BagStream):
    """Batches of bags with the stains and genes of a selection; see its base for the rest."""

    def __init__(self, store: SelectedSampleStore, samples: Rows, **how: Any) -> None:
        self._opened = store
        super().__init__(store.path, samples, **how)

    def _open(self) -> SampleStore:
        return self._opened


class SelectedSampleModule(SampleDataModule):
    """Streams a selection of a sample store to Lightning.

    Parameters
    ----------
    store, split, n_images, n_rna, seed
        See :class:`~phenoseq.data.samplemodule.SampleDataModule`.
    channels, genes
        See :class:`SelectedSampleStore`.
    """

    opened: SelectedSampleStore

    def __init__(
        self,
        store: str | Path,
        split: SplitConfig,
        n_images: int,
        n_rna: int,
        *,
        seed: int = 0,
        channels: Sequence[str] | None,
        genes: Sequence[str] | None,
    ) -> None:
        super().__init__(store, split, n_images, n_rna, seed=seed)
        self._channels, self._genes = channels, genes

    def setup(self, stage: str | None = None) -> None:
        """Open the store and divide its samples; raises :class:`~phenoseq.errors.DataError`."""
        if hasattr(self, "opened"):
            return
        self.opened = SelectedSampleStore(self.store, self._channels, self._genes)
        self.parts = self.opened.split(self.split)

    def _bags(self, samples: Rows, **how: Any) -> BagStream:
        return SelectedBagStream(self.opened, samples, **how)


def _selected(
    path: str | Path,
    full: M,
    channels: Sequence[str] | None,
    genes: Sequence[str] | None,
) -> tuple[Rows, Rows, M]:
    """Return the places of stains and genes in a manifest, and the manifest of these alone."""
    at, of = np.arange(len(full.channels)), np.arange(len(full.genes))
    if channels is not None:
        names = [canonical(name) for name in channels]
        at = _places(names, [full.channels], f"{path}: its stains")
    if genes is not None:
        of = _places(genes, [full.genes, full.symbols], f"{path}: its genes")
    chosen = tuple(full.channels[i] for i in at)
    manifest = replace(
        full,
        channels=chosen,
        channel_stats={name: full.channel_stats[name] for name in chosen},
        genes=tuple(full.genes[i] for i in of),
        symbols=tuple(full.symbols[i] for i in of),
    )
    return at, of, manifest


def _places(wanted: Sequence[str], known: Sequence[Sequence[str]], where: str) -> Rows:
    """Return the position of each name in the first of some lists that has it."""
    at: dict[str, int] = {}
    for names in known:
        for place, name in enumerate(names):
            at.setdefault(name, place)
    missing = [name for name in wanted if name not in at]
    if missing:
        near = difflib.get_close_matches(missing[0], at, n=3) or list(known[0][:8])
        raise DataError(
            f"{where} lack {len(missing)} of the {len(wanted)} wanted, {missing[:5]}; "
            f"there are, for example, {near}"
        )
    places = [at[name] for name in wanted]
    if not places or len(set(places)) < len(places):
        raise DataError(f"{where}: choose at least one, and each once, not {list(wanted)}")
    return np.array(places, dtype=np.int64)
