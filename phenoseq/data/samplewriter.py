"""Writes sample stores: cells sorted by sample, in blocks, so that memory does not grow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy import sparse

from phenoseq._version import __version__
from phenoseq.data.arrays import RowWriter, create_rows
from phenoseq.data.backed import Cells, Matrix
from phenoseq.data.csr import CsrWriter
from phenoseq.data.pairing import (
    SamplePairing,
    blocks,
    check_counts,
    facts_of_samples,
    pair_samples,
)
from phenoseq.data.samplestore import SAMPLE, SampleManifest, SampleStore
from phenoseq.data.source import Problem, Source
from phenoseq.data.store import SCHEMA_VERSION
from phenoseq.data.storewriter import (
    UNREADABLE,
    Progress,
    check_ids,
    check_target,
    off_image,
    whole_or_nothing,
    write_crops,
    write_element,
)
from phenoseq.disk import on_disk
from phenoseq.errors import DataError

Rows = NDArray[np.int64]
_ELSEWHERE = "no sample of that name on the other side"
_BROKEN = "values that are not finite"


@dataclass(frozen=True)
class RnaConfig:
    """What is taken of RNA cells.

    Attributes
    ----------
    embedding
        A name in ``obsm``, in place of genes.
    layer
        A name in ``layers``, in place of ``X``.
    values
        ``"counts"`` for raw counts, which are checked; ``"expression"`` to take measured genes as
        they are, e.g. log1p-normalised.
    min_counts
        Least counts of an RNA cell, where they are counts.
    min_genes
        Least share of the genes wanted that each file must have.
    """

    embedding: str | None = None
    layer: str | None = None
    values: Literal["counts", "expression"] = "counts"
    min_counts: int = 20
    min_genes: float = 0.5

    def __post_init__(self) -> None:
        if self.embedding is not None and self.layer is not None:
            raise DataError("RNA is an embedding or a layer, not both")
        if self.embedding is not None and "/" in self.embedding:
            raise DataError(f"obsm[{self.embedding!r}]: a name with '/' cannot be stored")

    @property
    def are_counts(self) -> bool:
        """Whether raw counts are taken."""
        return self.embedding is None and self.values == "counts"

    @property
    def key(self) -> str:
        """Where it is in an AnnData: ``"X"``, ``"layers/NAME"`` or ``"obsm/NAME"``."""
        if self.embedding is not None:
            return f"obsm/{self.embedding}"
        return "X" if self.layer is None else f"layers/{self.layer}"


def write_sample_store(
    images: Source | Cells,
    rna: Cells,
    path: str | Path,
    *,
    columns: Sequence[str],
    config: RnaConfig = RnaConfig(),
    genes: pd.DataFrame | None = None,
    pixel_size: float = 0.425,
    crop_px: int = 64,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[SampleStore, SamplePairing]:
    """Write image cells and RNA cells of the same samples as a store, whole or not at all.

    Cells of samples that are on one side only are left out, with the reason, as are image cells
    cut by the border, RNA cells of too few counts, and cells with a value that is not finite.
    Matrices are read in blocks of bounded size, forwards. The order of a sample's cells is drawn,
    always alike, so that some that stand side by side are a fair part of it; crops stand in the
    order in which the image is read.

    Parameters
    ----------
    images
        Images and cells, or cells whose ``X`` are features of their images.
    rna
        RNA cells.
    path
        Where to write. Nothing is there until all is written.
    columns
        Columns of both ``obs`` that together name a sample.
    config, genes
        What is taken of RNA cells, and the genes to keep (those of the first file).
    pixel_size, crop_px
        Micrometres a pixel of the crops and their side in pixels, where there are images.
    overwrite
        Replace the store that is there, once the new one is whole.
    progress
        Called with (cells done, cells in all), image cells first.

    Raises
    ------
    DataError
        Where no sample is on both sides, too few genes are there, values are no raw counts,
        something is at ``path``, a file cannot be read, or the disk is full.
    """
    path = on_disk(path)
    if isinstance(images, Source):
        check_ids(images)
    check_target(path, overwrite=overwrite)
    pairing = pair_samples(images.obs, rna.obs, columns, f"{images.name} and {rna.name}")
    why = np.where(pairing.images < 0, _ELSEWHERE, "")
    if isinstance(images, Source):
        off = off_image(images, pixel_size, crop_px)
        why = np.where(why == "", off, why)
    their_why = np.where(pairing.rna < 0, _ELSEWHERE, "").astype(object)
    why = why.astype(object)
    ours, theirs = _by_sample(pairing.images, why), _by_sample(pairing.rna, their_why)
    if not len(ours):
        raise DataError(f"{images.name}: no image cell is left: {_count(why)}")
    total = len(ours) + len(theirs)
    with whole_or_nothing(path, overwrite=overwrite) as partial:
        group = zarr.create_group(partial, zarr_format=3)
        if isinstance(images, Source):
            members = [m for m in _split_by(ours, pairing.images) if len(m)]
            rows, stats, lost = write_crops(
                images, members, group, pixel_size, crop_px, _shifted(progress, 0, total)
            )
            why[np.setdiff1d(ours, rows)] = UNREADABLE
            about = _of_crops(images, pixel_size, crop_px, stats, lost)
            identity = images.identity
            table = ad.AnnData(obs=_obs(images.obs, rows, pairing.images, pairing))
            table.obsm["spatial"] = images.obs[["x_centroid", "y_centroid"]].to_numpy("f8")[rows]
        else:
            matrix = images.matrix("X")
            shape, axes = (0, matrix.shape[1]), ("cell", "feature")
            array = create_rows(group, "features", shape, np.dtype("f4"), axes)
            rows, identity = _copy(
                images, matrix, ours, why, _Dense(array), _finite, _shifted(progress, 0, total)
            )
            about = _of_features()
            table = ad.AnnData(
                obs=_obs(images.obs, rows, pairing.images, pairing),
                var=pd.DataFrame(index=pd.Index(images.var_names)),
            )
        write_element(group, "table", table)
        rna_rows, rna_identity, var = _write_rna(
            group, rna, theirs, their_why, pairing, config, genes,
            _shifted(progress, len(ours), total),
        )  # fmt: skip
        samples = facts_of_samples(pairing, images.obs, rna.obs)
        for name, codes, kept in (
            ("image", pairing.images, rows),
            ("rna", pairing.rna, rna_rows),
        ):
            edges = np.searchsorted(codes[kept], np.arange(len(samples) + 1))
            samples[f"{name}_start"], samples[f"{name}_stop"] = edges[:-1], edges[1:]
        write_element(group, "samples", _writable(samples))
        write_element(group, "excluded", _excluded(images.obs, why, rna.obs, their_why))
        manifest = SampleManifest(
            schema_version=SCHEMA_VERSION,
            pairing="sample",
            source=Path(images.name).name,
            identity=identity,
            rna_source=Path(rna.name).name,
            rna_identity=rna_identity,
            sample_columns=pairing.columns,
            rna=config.values if config.embedding is None else "embedding",
            embedding=config.embedding,
            genes=tuple(var.index),
            symbols=tuple(var["symbol"]),
            min_counts=config.min_counts if config.are_counts else 0,
            excluded={"images": _count(why), "rna": _count(their_why)},
            version=__version__,
            **about,
        )
        group.attrs["phenoseq"] = asdict(manifest)
    return SampleStore(path), pairing


def _by_sample(codes: Rows, why: NDArray[np.object_]) -> Rows:
    """Return the cells kept, sample by sample, those of a sample in an order that is drawn."""
    drawn = np.random.default_rng(0).permutation(len(codes))
    drawn = drawn[why[drawn] == ""]
    order: Rows = drawn[np.argsort(codes[drawn], kind="stable")]
    return order


def _split_by(rows: Rows, codes: Rows) -> list[Rows]:
    return np.split(rows, np.flatnonzero(np.diff(codes[rows])) + 1)


def _shifted(progress: Progress | None, done: int, total: int) -> Progress | None:
    return None if progress is None else lambda n, _: progress(done + n, total)


def _of_crops(
    source: Source,
    pixel_size: float,
    crop_px: int,
    stats: list[dict[str, float]],
    lost: tuple[Problem, ...],
) -> dict[str, Any]:
    return {
        "kind": source.kind,
        "images": "crops",
        "channels": source.channels,
        "pixel_size": pixel_size,
        "crop_px": crop_px,
        "source_pixel_size": source.pixel_size,
        "dtype": source.dtype.name,
        "channel_stats": dict(zip(source.channels, stats, strict=True)),
        "problems": tuple(asdict(problem) for problem in (*source.problems, *lost)),
    }


def _of_features() -> dict[str, Any]:
    none = dict.fromkeys(("pixel_size", "crop_px", "source_pixel_size"))
    about = {"kind": "anndata", "images": "features", "channels": (), "channel_stats": {}}
    return {**about, **none, "dtype": "float32"}


class _Dense:
    """Writes dense rows."""

    def __init__(self, array: zarr.Array[Any]) -> None:
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        self._writer = RowWriter(array)

    def add(self, rows: Any) -> None:
        self._writer.add(rows.toarray() if sparse.issparse(rows) else rows)

    def finish(self) -> None:
        self._writer.flush()


def _write_rna(
    group: zarr.Group,
    rna: Cells,
    order: Rows,
    why: NDArray[np.object_],
    pairing: SamplePairing,
    config: RnaConfig,
    genes: pd.DataFrame | None,
    progress: Progress | None,
) -> tuple[Rows, str, pd.DataFrame]:
    """Write the RNA cells; return those kept in their order, a digest, and their genes."""
    none = pd.DataFrame({"symbol": []}, index=pd.Index([], dtype=object), dtype=object)
    if config.embedding is not None:
        matrix, var = rna.matrix(config.key), none
    else:
        matrix, var, _ = rna.genes(genes, key=config.key, min_share=config.min_genes)
    write_element(group, "rna", ad.AnnData(obs=rna.obs.iloc[:0], var=var))  # obs comes last
    writer: _Dense | CsrWriter
    if config.embedding is not None:
        inside, shape, axes = group["rna/obsm"], (0, matrix.shape[1]), ("cell", "dim")
        assert isinstance(inside, zarr.Group)
        writer = _Dense(create_rows(inside, config.embedding, shape, np.dtype("f4"), axes))
    else:
        writer = CsrWriter(group.create_group("rna/X"), matrix.shape[1])
    where = f"{rna.name}: {config.key}"

    def counted(block: Any) -> NDArray[np.str_]:
        rows = sparse.csr_matrix(block)
        check_counts(rows.data, where)
        few = np.asarray(rows.sum(axis=1)).ravel() < config.min_counts
        return np.where(few, f"fewer than {config.min_counts} counts", "")

    check = counted if config.are_counts else _finite
    rows, identity = _copy(rna, matrix, order, why, writer, check, progress)
    write_element(group, "rna/obs", _obs(rna.obs, rows, pairing.rna, pairing))
    return rows, identity, var


def _finite(block: Any) -> NDArray[np.str_]:
    rows = sparse.csr_matrix(block) if sparse.issparse(block) else block
    good = np.isfinite(rows.sum(axis=1)) if sparse.issparse(rows) else np.isfinite(rows).all(axis=1)
    return np.where(np.asarray(good).ravel(), "", _BROKEN)


def _copy(
    cells: Cells,
    matrix: Matrix,
    order: Rows,
    why: NDArray[np.object_],
    writer: _Dense | CsrWriter,
    check: Callable[[Any], NDArray[np.str_]],
    progress: Progress | None,
) -> tuple[Rows, str]:
    """Copy rows in ``order``, but those that ``check`` speaks against; return them and a digest."""
    digest = hashlib.sha256(cells.identity().encode())
    kept, done = [np.empty(0, dtype=np.int64)], 0
    for some in blocks(order, matrix.row_bytes):
        block = matrix.take(some)
        reason = check(block)
        why[some] = reason
        good = reason == ""
        block = block if good.all() else block[good]
        writer.add(block)
        kept.append(some[good])
        parts = (block,) if isinstance(block, np.ndarray) else (block.indices, block.data)
        for array in parts:
            digest.update(np.ascontiguousarray(array).data)
        done += len(some)
        if progress is not None:
            progress(done, len(order))
    writer.finish()
    rows = np.concatenate(kept)
    if not len(rows):
        raise DataError(f"{cells.name}: no cell is left to store; all are left out: {_count(why)}")
    return rows, digest.hexdigest()


def _obs(obs: pd.DataFrame, rows: Rows, codes: Rows, pairing: SamplePairing) -> pd.DataFrame:
    table = _writable(obs.iloc[rows])
    names = np.array(pairing.samples, dtype=object)
    table[SAMPLE] = pd.Categorical.from_codes(codes[rows], names)
    return table


def _writable(obs: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose text is categories, which may have holes."""
    table = obs.copy()
    for name in table:
        if table[name].dtype == object:
            table[name] = table[name].map(str, na_action="ignore").astype("category")
    return table


def _excluded(
    images: pd.DataFrame,
    why: NDArray[np.object_],
    rna: pd.DataFrame,
    their_why: NDArray[np.object_],
) -> pd.DataFrame:
    """Return the cells that are not in the store, with columns ``of`` and ``reason``."""
    tables = []
    for of, obs, reasons in (("images", images, why), ("rna", rna, their_why)):
        out = reasons != ""
        table = pd.DataFrame({"reason": reasons[out].astype(str)}, index=obs.index[out])
        tables.append(table.assign(of=of))
    return pd.concat(tables)


def _count(reasons: NDArray[np.object_]) -> dict[str, int]:
    names, n = np.unique(reasons[reasons != ""].astype(str), return_counts=True)
    return dict(zip(names.tolist(), n.tolist(), strict=True))
