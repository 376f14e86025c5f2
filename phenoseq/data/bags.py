"""Bags: the cells of a sample, divided into groups of equal size whatever their order."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from phenoseq.errors import DataError


@dataclass(frozen=True)
class Bags:
    """Cells in bags.

    Attributes
    ----------
    names
        Of each bag, ``SAMPLE:0``, ``SAMPLE:1`` and so on.
    samples
        The sample that each is of.
    rows
        Positions of the cells in their table, int64 ``(n_bags, size)``: the bag's own first, then
        what fills it.
    n_cells
        Cells of its own in each bag, int64 ``(n_bags,)``. Every cell is some bag's own, once.
    """

    names: list[str]
    samples: list[str]
    rows: NDArray[np.int64]
    n_cells: NDArray[np.int64]

    def owners(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return for each cell of the table the bag whose own it is, and its place in that."""
        own = np.arange(self.rows.shape[1]) < self.n_cells[:, None]
        bag = np.empty(int(own.sum()), dtype=np.int64)
        place = np.empty_like(bag)
        bag[self.rows[own]], place[self.rows[own]] = np.nonzero(own)
        return bag, place


def make_bags(obs: pd.DataFrame, sample: str, *, size: int, seed: int, where: str) -> Bags:
    """Divide the cells of each sample into bags.

    The order of a sample's cells, and so their bags, follows from a digest of (seed, sample, cell
    id). The last bag of a sample is filled, where it is short, with cells of the sample drawn with
    replacement by the seed.

    Parameters
    ----------
    obs
        One row a cell, indexed by cell id.
    sample
        Column of ``obs`` that says which sample a cell is of.
    size
        Cells a bag.
    seed
        Another one makes other bags.
    where
        What the table is called in an error.

    Raises
    ------
    DataError
        Where there are no cells, two have the same id, the column is missing, or a cell has no
        sample.
    """
    cells = [str(cell) for cell in obs.index]
    groups = _groups(obs, cells, sample, where)
    names, samples, rows, n_cells = [], [], [], []
    for name, members in groups.items():
        ordered = sorted(members, key=lambda row: (_digest(seed, name, cells[row]), cells[row]))
        for number, start in enumerate(range(0, len(ordered), size)):
            own = ordered[start : start + size]
            names.append(f"{name}:{number}")
            samples.append(name)
            n_cells.append(len(own))
            if len(own) < size:
                stream = np.random.default_rng(int.from_bytes(_digest(seed, name, "", "fill")))
                own = own + [
                    ordered[i] for i in stream.integers(len(ordered), size=size - len(own))
                ]
            rows.append(own)
    return Bags(names, samples, np.array(rows, dtype=np.int64), np.array(n_cells, dtype=np.int64))


def _groups(obs: pd.DataFrame, cells: list[str], sample: str, where: str) -> dict[str, list[int]]:
    """Return the rows of each sample, samples in the order of their names."""
    if not cells:
        raise DataError(f"{where}: zero cells; there is nothing to predict")
    index = pd.Index(cells)
    if not index.is_unique:
        twice = sorted(set(index[index.duplicated()]))
        raise DataError(
            f"{where}: cell ids that occur more than once: {twice[:3]}; make them unique, e.g. "
            "with adata.obs_names_make_unique()"
        )
    if sample not in obs:
        columns = [str(column) for column in obs.columns]
        near = difflib.get_close_matches(sample, columns, n=3, cutoff=0.4) or columns[:10]
        raise DataError(
            f"{where}: no column {sample!r} in obs to say which sample a cell is of; near it are "
            f"{near}. Name it with sample= (--sample)"
        )
    values = obs[sample]
    missing = values.isna().to_numpy()
    if missing.any():
        raise DataError(
            f"{where}: {int(missing.sum())} cells have no {sample}, e.g. "
            f"{cells[int(np.flatnonzero(missing)[0])]}; fill it in or remove them"
        )
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(values.astype(str)):
        groups.setdefault(name, []).append(row)
    return dict(sorted(groups.items()))


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest()


def constant_metadata(obs: pd.DataFrame, bags: Bags) -> pd.DataFrame:
    """Return the ``Metadata_*`` columns that say one thing for all cells of each sample.

    Returns
    -------
    One row a bag, indexed by its name; text where the column is not of numbers or booleans.
    """
    first = bags.rows[:, 0]
    codes, _ = pd.factorize(np.array(bags.samples, dtype=object))
    sample_of = np.empty(len(obs), dtype=np.int64)
    sample_of[bags.rows.ravel()] = np.repeat(codes, bags.rows.shape[1])
    lead = first[np.unique(codes, return_index=True)[1]]  # a cell of each sample
    out: dict[str, NDArray[np.generic]] = {}
    for column in [str(c) for c in obs.columns if str(c).startswith("Metadata_")]:
        values = obs[column]
        if not pd.api.types.is_numeric_dtype(values):
            values = values.astype(object).where(values.notna(), "").astype(str)
        kinds, _ = pd.factorize(values, use_na_sentinel=False)
        if (kinds == kinds[lead[sample_of]]).all():
            out[column] = values.to_numpy()[first]
    return pd.DataFrame(out, index=pd.Index(bags.names, name="bag"))
