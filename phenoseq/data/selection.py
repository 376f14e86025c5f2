"""Some stains and genes of a store, seen as if it held no others."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.channels import canonical
from phenoseq.data.datamodule import StoreDataModule, split_of
from phenoseq.data.dataset import CellStream
from phenoseq.data.handover import Arrays, Batch, Spec, fresh
from phenoseq.data.splits import UNASSIGNED, Split, SplitConfig
from phenoseq.data.store import Store
from phenoseq.errors import DataError

Rows = NDArray[np.int64]


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
        self.full = full = self.manifest
        self.channel_rows, self.gene_rows = (
            np.arange(len(full.channels)),
            np.arange(len(full.genes)),
        )
        if channels is not None:
            names = [canonical(name) for name in channels]
            self.channel_rows = _places(names, [full.channels], f"{path}: its stains")
        if genes is not None:
            self.gene_rows = _places(genes, [full.genes, full.symbols], f"{path}: its genes")
        chosen = tuple(full.channels[i] for i in self.channel_rows)
        self.manifest = replace(
            full,
            channels=chosen,
            channel_stats={name: full.channel_stats[name] for name in chosen},
            genes=tuple(full.genes[i] for i in self.gene_rows),
            symbols=tuple(full.symbols[i] for i in self.gene_rows),
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
