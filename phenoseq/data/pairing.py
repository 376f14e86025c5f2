"""Which RNA goes with which image: by cell (id or position), or by sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from phenoseq.data.backed import Cells
from phenoseq.data.source import Source
from phenoseq.errors import DataError
from phenoseq.genes import GeneMatch

Rows = NDArray[np.int64]
#: Bytes of a matrix that are in memory at a time while it is read through.
BUDGET = 1 << 29
#: Two distances (micrometres) that differ by less are a tie.
_TIE = 1e-6
_JOIN = "|"


@dataclass(frozen=True)
class CellPairing:
    """Image cells and the RNA cells that are the same cells.

    Attributes
    ----------
    by
        ``"id"`` or ``"centroid"``.
    images, rna
        Positions of the matched cells in each, int64, of equal length; ``images`` rises.
    distance
        Micrometres between the two, float64; empty where they are matched by id.
    n_images, n_rna
        Cells in each.
    ties
        Image cells left out because two RNA cells were as near, or their RNA cell had two.
    """

    by: str
    images: Rows
    rna: Rows
    distance: NDArray[np.float64]
    n_images: int
    n_rna: int
    ties: int = 0

    def table(self) -> pd.DataFrame:
        """Return the numbers of cells as a table, with a column ``cells``."""
        n = len(self.images)
        numbers = {"matched": n, "only in images": self.n_images - n, "only in RNA": self.n_rna - n}
        if self.by == "centroid":
            numbers["left out as ties (of those only in images)"] = self.ties
        return pd.DataFrame({"cells": numbers})

    def __str__(self) -> str:
        """Tell how many cells match, and how near they are."""
        numbers = ", ".join(f"{name} {n:,}" for name, n in self.table()["cells"].items())
        text = f"cells paired by {self.by}: {numbers}"
        if len(self.distance):
            middle, high, most = np.quantile(self.distance, (0.5, 0.95, 1))
            text += f"; distance {middle:.2f} um (median), {high:.2f} (95%), {most:.2f} (most)"
        return text


def pair_cells(
    source: Source,
    rna: Cells,
    *,
    by: Literal["id", "centroid"] = "id",
    max_distance: float | None = None,
) -> CellPairing:
    """Match image cells with RNA cells, one to one.

    Parameters
    ----------
    source
        Images and cells.
    rna
        Cells with counts; by ``"centroid"`` with ``x_centroid`` and ``y_centroid`` in ``obs`` or
        ``obsm["spatial"]``, in micrometres from the image's corner, and with a column ``field``
        where the source has several.
    by
        ``"id"`` for cells of one id; ``"centroid"`` for cells that are each other's nearest.
    max_distance
        Micrometres at most between two matched cells; needed by ``"centroid"``.

    Raises
    ------
    DataError
        Where no cell is matched, or positions are missing.
    """
    if (by == "centroid") != (max_distance is not None):
        raise DataError(
            "pairing by centroid needs the distance at most, and pairing by id has none; half a "
            "cell's width is a start: --max-distance 5"
        )
    if by == "id":
        place = rna.obs.index.get_indexer(source.obs.index)
        images = np.flatnonzero(place >= 0)
        pairing = CellPairing(
            by, images, place[images].astype(np.int64), np.empty(0), len(place), len(rna)
        )
        hint = f"images such as {list(source.obs.index[:3])}, RNA such as {list(rna.obs.index[:3])}"
    else:
        assert max_distance is not None
        pairing = _by_centroid(source, rna, max_distance)
        hint = f"none lies within {max_distance} um; are both in micrometres from one corner?"
    if not len(pairing.images):
        raise DataError(f"{source.name} and {rna.name}: no cell is in both ({hint})")
    return pairing


def _by_centroid(source: Source, rna: Cells, max_distance: float) -> CellPairing:
    here, there = source.obs[["x_centroid", "y_centroid"]].to_numpy(np.float64), _positions(rna)
    fields = source.obs["field"].astype(str).to_numpy()
    several = len(np.unique(fields)) > 1
    if several and "field" not in rna.obs:
        raise DataError(
            f"{rna.name}: needs a column 'field' in obs, since {source.name} has several fields, "
            f"such as {np.unique(fields)[:3].tolist()}"
        )
    its = rna.obs["field"].astype(str).to_numpy() if several else np.full(len(rna), fields[0])
    pairs, ties = [], 0
    for name in np.unique(fields):
        ours, theirs = np.flatnonzero(fields == name), np.flatnonzero(its == name)
        if not len(theirs):
            continue
        near, distance, tied = _nearest(here[ours], there[theirs])
        back, _, tied_back = _nearest(there[theirs], here[ours])
        close = distance <= max_distance
        ambiguous = close & (tied | tied_back[near])
        ties += int(ambiguous.sum())
        good = np.flatnonzero(close & ~ambiguous & (back[near] == np.arange(len(ours))))
        pairs.append((ours[good], theirs[near[good]], distance[good]))
    images, rows, distance = (
        np.concatenate([pair[k] for pair in pairs] or [np.empty(0, np.int64)]) for k in range(3)
    )
    order = np.argsort(images)
    return CellPairing(
        "centroid", images[order], rows[order], distance[order], len(here), len(there), ties
    )


def _positions(rna: Cells) -> NDArray[np.float64]:
    columns = ["x_centroid", "y_centroid"]
    if set(columns) <= set(rna.obs):
        where = rna.obs[columns].to_numpy(np.float64)
    else:
        try:
            spatial = rna.matrix("obsm/spatial").take(np.arange(len(rna)))
        except DataError as error:
            raise DataError(
                f"{rna.name}: no positions; give {columns} in obs, or obsm['spatial'], in "
                f"micrometres ({error})"
            ) from error
        where = np.asarray(spatial, dtype=np.float64)[:, :2]
    if not np.isfinite(where).all():
        raise DataError(f"{rna.name}: cells without a position; remove them")
    return np.asarray(where)


def _nearest(
    these: NDArray[np.float64], those: NDArray[np.float64]
) -> tuple[Rows, NDArray[np.float64], NDArray[np.bool_]]:
    """Return the nearest of ``those`` to each of ``these``, how far it is, and if two are."""
    distance, place = cKDTree(those).query(these, k=[1, 2])
    return place[:, 0], distance[:, 0], distance[:, 1] - distance[:, 0] < _TIE


def join_counts(
    source: Source,
    rna: Cells,
    *,
    by: Literal["id", "centroid"] = "id",
    max_distance: float | None = None,
    key: str = "X",
    genes: pd.DataFrame | None = None,
    min_genes: float = 0.5,
) -> tuple[Source, CellPairing, list[GeneMatch]]:
    """Give a source the counts of RNA cells that are the same cells.

    Only the rows matched and the genes wanted are held in memory. A cell without RNA has no counts.

    Parameters
    ----------
    source
        Images and cells; counts it has already are replaced.
    rna, by, max_distance
        See :func:`pair_cells`.
    key
        Where the raw counts are: ``"X"`` or ``"layers/NAME"``.
    genes, min_genes
        Genes to keep and the least share of them that must be there; see
        :meth:`phenoseq.data.backed.Cells.genes`.

    Raises
    ------
    DataError
        Where no cell is matched, too few genes are there, or values are no raw counts.
    """
    pairing = pair_cells(source, rna, by=by, max_distance=max_distance)
    matrix, var, matches = rna.genes(genes, key=key, min_share=min_genes)
    digest = hashlib.sha256(source.identity.encode())
    digest.update("\n".join([*source.obs.index[pairing.images], *var.index]).encode())
    order = np.argsort(pairing.rna)  # files are read forwards
    found = []
    for some in blocks(pairing.rna[order], matrix.row_bytes):
        block = sparse.csr_matrix(matrix.take(some))
        check_counts(block.data, f"{rna.name}: {key}")
        block.eliminate_zeros()
        found.append(block)
    empty = sparse.csr_matrix((1, matrix.shape[1]), dtype=np.float32)
    place = np.full(len(source.obs), len(order))
    place[pairing.images[order]] = np.arange(len(order))
    counts = sparse.vstack([*found, empty], format="csr")[place]
    counts.sort_indices()
    for array, dtype in ((counts.indptr, "<i8"), (counts.indices, "<i8"), (counts.data, "<f4")):
        digest.update(array.astype(dtype).tobytes())
    joined = replace(source, counts=counts, var=var, identity=digest.hexdigest())
    return joined, pairing, matches


def blocks(rows: Rows, row_bytes: float) -> list[Rows]:
    """Divide rows into runs of which each has about :data:`BUDGET` bytes."""
    size = max(int(BUDGET / row_bytes), 1)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def check_counts(values: NDArray[Any], where: str) -> None:
    """Check that values are raw counts: whole numbers of at least 0; :class:`DataError` if not."""
    bad = ~np.isfinite(values) | (values < 0) | (values != np.round(values))
    if bad.any():
        raise DataError(
            f"{where}: not raw counts, there are values such as {values[bad][:3].tolist()}; raw "
            "counts may be in a layer: --layer counts"
        )


# ------------------------------------------------------------------------------------- by sample


@dataclass(frozen=True)
class SamplePairing:
    """Image cells and RNA cells of the same samples.

    Attributes
    ----------
    columns
        Columns of ``obs`` whose values together name a sample, joined by ``|``.
    samples
        Names of the samples in both, sorted.
    images, rna
        For every cell the position of its sample in ``samples``, -1 where that is not in both.
    table
        One row a sample of either, with columns ``image_cells`` and ``rna_cells``.
    """

    columns: tuple[str, ...]
    samples: tuple[str, ...]
    images: Rows
    rna: Rows
    table: pd.DataFrame

    def __str__(self) -> str:
        """Tell how many samples and cells are in both, and which are in one only."""
        of = self.table
        here, there = of["image_cells"] > 0, of["rna_cells"] > 0
        both = of[here & there].sum()
        text = (
            f"{len(of):,} samples by {', '.join(self.columns)}: {len(self.samples):,} in both "
            f"({both['image_cells']:,} image cells, {both['rna_cells']:,} RNA cells)"
        )
        for name, column, only in (
            ("images", "image_cells", here & ~there),
            ("RNA", "rna_cells", there & ~here),
        ):
            if only.any():
                some = ", ".join(of.index[only][:5]) + (", ..." if only.sum() > 5 else "")
                text += (
                    f"; in {name} only {only.sum():,} ({of[column][only].sum():,} cells: {some})"
                )
        return text


def pair_samples(
    images: pd.DataFrame, rna: pd.DataFrame, columns: Sequence[str], where: str
) -> SamplePairing:
    """Find the samples of which there are images and RNA.

    Parameters
    ----------
    images, rna
        ``obs`` of the image cells and of the RNA cells.
    columns
        Columns of both that together name a sample, e.g. ``["Treatment", "Replicate"]``.
    where
        What they are called in an error.

    Raises
    ------
    DataError
        Where a column is missing, a cell has nothing there, or no sample is in both.
    """
    ours = sample_names(images, columns, f"{where}, images")
    theirs = sample_names(rna, columns, f"{where}, RNA")
    table = pd.DataFrame({"image_cells": ours.value_counts(), "rna_cells": theirs.value_counts()})
    table = table.fillna(0).astype(np.int64).sort_index().rename_axis("sample")
    both = table.index[(table > 0).all(axis=1)]
    if not len(both):
        raise DataError(
            f"{where}: no sample is in both; by {list(columns)} images have "
            f"{sorted(ours.unique())[:3]}, RNA has {sorted(theirs.unique())[:3]}"
        )
    return SamplePairing(
        tuple(columns),
        tuple(both),
        both.get_indexer(ours).astype(np.int64),
        both.get_indexer(theirs).astype(np.int64),
        table,
    )


def sample_names(obs: pd.DataFrame, columns: Sequence[str], where: str) -> pd.Series:
    """Return the name of every cell's sample; raises :class:`DataError` where it has none."""
    if not columns:
        raise DataError("pairing by sample needs the columns that name one: --sample-columns A,B")
    names = []
    for column in columns:
        if column not in obs:
            raise DataError(f"{where}: no column {column!r} in obs, only {list(obs.columns)}")
        holes = int(obs[column].isna().sum())
        if holes:
            raise DataError(f"{where}: {holes} cells have no {column!r}; fill it in or remove them")
        text = obs[column].astype(str)
        if len(columns) > 1 and text.str.contains(_JOIN, regex=False).any():
            raise DataError(f"{where}: {column!r} holds {_JOIN!r}, which joins the columns' values")
        names.append(text)
    joined = names[0]
    for text in names[1:]:
        joined = joined + _JOIN + text
    return joined


def facts_of_samples(
    pairing: SamplePairing, images: pd.DataFrame, rna: pd.DataFrame
) -> pd.DataFrame:
    """Return what ``obs`` says alike of all cells of each sample, one row a sample in both.

    A column is there if it is one thing, written alike, for all image cells and RNA cells of each
    sample; one that only images or only RNA have counts too. So a split by it divides samples.
    """
    facts: dict[str, NDArray[np.object_]] = {}
    for column in dict.fromkeys([*images, *rna]):
        found = []
        for obs, codes in ((images, pairing.images), (rna, pairing.rna)):
            if column in obs:
                text = obs[column].astype(object).map(str, na_action="ignore").to_numpy()
                found.append(pd.DataFrame({"sample": codes, "value": text})[codes >= 0])
        different = pd.concat(found).drop_duplicates().sort_values("sample")
        if len(different) == len(pairing.samples):
            facts[column] = different["value"].to_numpy(object)
    return pd.DataFrame(facts, index=pd.Index(pairing.samples, name="sample"))
