"""AnnData of any size, in memory or in files: its tables are read, its matrices row by row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.errors import DataError
from phenoseq.genes import GeneMatch, genes_of, match_genes, merged_genes

Given: TypeAlias = ad.AnnData | str | Path
#: Bytes that are read at a time at least, where the file is not in chunks, and most rows of it.
_READ, _RUN = 1 << 16, 256


class Matrix:
    """A matrix of several files, one below the other, of which some rows are read at a time.

    Attributes
    ----------
    shape
        ``(n_obs, width)``.
    sparse
        Whether rows come as CSR.
    row_bytes
        Bytes of a row once read as float32, on average.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        widths = sorted({part.width for part in parts})
        if len(widths) > 1:
            raise DataError(
                f"{parts[0].where} and the files beside it have {widths} columns; give files of one"
                " kind"
            )
        self._parts = parts
        self._starts = np.cumsum([0, *(part.n for part in parts)])
        self.shape = (int(self._starts[-1]), widths[0])
        self.sparse = any(part.sparse for part in parts)
        bytes_ = sum(part.row_bytes * part.n for part in parts)
        self.row_bytes = max(bytes_ / max(self.shape[0], 1), 1.0)

    def __getitem__(self, rows: slice) -> NDArray[np.float32] | sparse.csr_matrix:
        """Return some rows side by side, as :meth:`take` does."""
        return self.take(np.arange(*rows.indices(self.shape[0])))

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32] | sparse.csr_matrix:
        """Return ``rows`` in that order, float32 ``(n, width)``, dense or CSR.

        Raises
        ------
        DataError
            Where a file cannot be read.
        """
        order = np.argsort(rows, kind="stable")
        part = np.searchsorted(self._starts, rows[order], side="right") - 1
        if not self.sparse:
            out = np.empty((len(rows), self.shape[1]), dtype=np.float32)
            for i, one in enumerate(self._parts):
                place = order[part == i]
                for found in one.runs(rows[place] - self._starts[i]):
                    out[place[: len(found)]] = found
                    place = place[len(found) :]
            return out
        blocks = [
            sparse.csr_matrix(found)
            for i, one in enumerate(self._parts)
            for found in one.runs(rows[order[part == i]] - self._starts[i])
        ]
        back = np.empty(len(rows), dtype=np.int64)
        back[order] = np.arange(len(rows))
        return sparse.vstack(blocks, format="csr")[back]


class Cells:
    """The cells of one or several AnnData, whose matrices stay where they are.

    Parameters
    ----------
    given
        An AnnData in memory, a ``.h5ad`` or ``.zarr`` file, a folder of ``.h5ad`` files, or
        several of these.

    Attributes
    ----------
    name
        What to call them in messages.
    obs
        One row a cell with the columns that all files have. Where cells of two files have one id,
        ids are preceded by the name of their file.

    Raises
    ------
    DataError
        Where a file is missing or no AnnData, or two cells of one file have one id.
    """

    def __init__(self, given: Given | Sequence[Given]) -> None:
        several = [given] if isinstance(given, ad.AnnData | str | Path) else list(given)
        files = [one for item in several for one in _files(item)]
        if not files:
            raise DataError(f"{several}: no .h5ad file there")
        self._files = [_File(one) for one in files]
        names = [file.name for file in self._files]
        self.name = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        tables = [file.obs for file in self._files]
        for file, table in zip(self._files, tables, strict=True):
            if table.index.has_duplicates:
                twice = list(table.index[table.index.duplicated()][:3])
                raise DataError(
                    f"{file.name}: cell ids that occur more than once: {twice}; make them unique, "
                    "e.g. with adata.obs_names_make_unique()"
                )
        if len(tables) > 1 and pd.Index(np.concatenate([t.index for t in tables])).has_duplicates:
            tables = [
                table.set_axis([f"{Path(file.name).stem}:{cell}" for cell in table.index])
                for file, table in zip(self._files, tables, strict=True)
            ]
        shared = [c for c in tables[0] if all(c in table for table in tables)]
        plain = [_plain(table[shared]) for table in tables]
        self.obs = plain[0] if len(plain) == 1 else pd.concat(plain)
        if len(tables) > 1 and self.obs.index.has_duplicates:
            raise DataError(f"{self.name}: a file is given twice, or has the name of another")

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.obs)

    @property
    def var_names(self) -> list[str]:
        """Names of the columns of the first file's ``X``."""
        return list(self._files[0].var.index.astype(str))

    @property
    def record(self) -> dict[str, Any]:
        """How the first file was made, its ``uns["phenoseq"]``; empty where it does not say."""
        return self._files[0].record

    @property
    def var(self) -> pd.DataFrame:
        """``var`` of the first file."""
        return self._files[0].var

    def matrix(self, key: str = "X") -> Matrix:
        """Open ``"X"``, ``"layers/NAME"`` or ``"obsm/NAME"``.

        Raises
        ------
        DataError
            Where a file does not have it, or not as a dense or CSR matrix.
        """
        return Matrix([file.part(key) for file in self._files])

    def genes(
        self,
        want: pd.DataFrame | None = None,
        *,
        key: str = "X",
        min_share: float = 0.5,
    ) -> tuple[Matrix, pd.DataFrame, list[GeneMatch]]:
        """Open the matrix of ``key`` over genes that all files have.

        Parameters
        ----------
        want
            Genes to keep, a table as :func:`phenoseq.genes.gene_table` returns it, in whose order
            they come; those of the first file where it is None.
        key
            ``"X"`` or ``"layers/NAME"``.
        min_share
            Least share of the genes wanted that each file must have.

        Returns
        -------
        The matrix, the table of its genes, and how those of each file match the genes wanted.

        Raises
        ------
        DataError
            Where a file has too few of them, or lists a gene twice.
        """
        tables = [genes_of(file.var, file.name) for file in self._files]
        want = tables[0] if want is None else want
        matches = [
            match_genes(table, want, file.name, min_share=min_share)
            for file, table in zip(self._files, tables, strict=True)
        ]
        shared = matches[0].want
        for match in matches[1:]:
            shared = np.intersect1d(shared, match.want)
        if len(shared) < max(min_share * len(want), 1):
            raise DataError(
                f"{self.name}: the files share {len(shared)} of {len(want)} genes, and at least "
                f"{min_share:.0%} must be in all of them"
            )
        parts = []
        for file, match in zip(self._files, matches, strict=True):
            columns = match.have[np.isin(match.want, shared)]
            parts.append(file.part(key, columns))
        kept = np.isin(matches[0].want, shared)
        first = GeneMatch(matches[0].have[kept], matches[0].want[kept], 0, [])
        return Matrix(parts), merged_genes(tables[0], want, first), matches

    def identity(self) -> str:
        """Return a digest of the names and obs of all cells; matrices are not read for it."""
        digest = hashlib.sha256("\n".join(self.obs.index).encode())
        digest.update(pd.util.hash_pandas_object(self.obs, index=False).to_numpy().tobytes())
        return digest.hexdigest()


def dense(rows: NDArray[np.float32] | sparse.csr_matrix) -> NDArray[np.float32]:
    """Return rows of a :class:`Matrix` as an array."""
    if isinstance(rows, np.ndarray):
        return rows
    whole: NDArray[np.float32] = rows.toarray()
    return whole


def is_anndata(path: str | Path) -> bool:
    """Tell whether a path is an AnnData file, or a folder of ``.h5ad`` files."""
    path = Path(path)
    if path.suffix != ".zarr":
        return path.suffix == ".h5ad" or any(path.glob("*.h5ad"))
    try:
        return zarr.open_group(path, mode="r").attrs.get("encoding-type") == "anndata"
    except (FileNotFoundError, ValueError):
        return False


def _files(given: Given) -> list[Given]:
    if isinstance(given, ad.AnnData):
        return [given]
    path = Path(given)
    if path.is_dir() and path.suffix != ".zarr":
        return [*sorted(path.glob("*.h5ad"))]
    return [path]


def _plain(obs: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose categories are text, so that several can be joined."""
    text = [name for name in obs if isinstance(obs[name].dtype, pd.CategoricalDtype)]
    return obs.astype(dict.fromkeys(text, object)).rename_axis(None)


class _File:
    """One AnnData, in memory or on disk."""

    def __init__(self, given: Given) -> None:
        self.node: Any = given
        if isinstance(given, ad.AnnData) and not given.isbacked:
            self.name = "the AnnData given"
            self.obs, self.var = given.obs, given.var
        else:
            given = given.filename if isinstance(given, ad.AnnData) else given
            self.name = str(given)
            self.node, self.obs, self.var = _open(Path(given))
        self.obs = self.obs.set_axis(self.obs.index.astype(str))

    def part(self, key: str, columns: NDArray[np.int64] | None = None) -> _Part:
        at = self.node
        for name in key.split("/", 1):
            if isinstance(at, ad.AnnData):
                at = getattr(at, name)
            else:
                at = at[name] if at is not None and name in at else None
        if at is None:
            choices = {
                name: sorted(getattr(self.node, name) if self._in_memory else self._keys(name))
                for name in ("obsm", "layers")
            }
            raise DataError(f"{self.name}: no {key!r}; it has {choices}")
        if isinstance(at, ad.abc.CSRDataset | ad.abc.CSCDataset):
            at = at.group
        return _Part(at, f"{self.name}: {key}", len(self.obs), columns)

    @property
    def record(self) -> dict[str, Any]:
        """``uns["phenoseq"]``, or nothing."""
        found = self.node.uns if self._in_memory else self.node.get("uns", {})
        record = found.get("phenoseq", {})
        if isinstance(record, h5py.Group | zarr.Group):
            record = ad.io.read_elem(record)
        return record if isinstance(record, dict) else {}

    @property
    def _in_memory(self) -> bool:
        return isinstance(self.node, ad.AnnData)

    def _keys(self, name: str) -> list[str]:
        return list(self.node[name]) if name in self.node else []


def _open(path: Path) -> tuple[Any, pd.DataFrame, pd.DataFrame]:
    if not path.exists():
        raise DataError(f"{path}: no such file")
    try:
        node = zarr.open_group(path, mode="r") if path.is_dir() else h5py.File(path)
        obs, var = (ad.io.read_elem(node[name]) for name in ("obs", "var"))
    except Exception as error:  # h5py, zarr and anndata have errors of their own
        raise DataError(
            f"{path}: not a readable AnnData ({error}); write it with adata.write_h5ad"
        ) from error
    return node, obs, var


class _Part:
    """A matrix of one file."""

    def __init__(self, node: Any, where: str, n: int, columns: NDArray[np.int64] | None) -> None:
        self.where, self.n = where, n
        node = node.tocsr() if sparse.issparse(node) else node
        self._node, self._columns = node, columns
        self._kind = self._kind_of(node)
        self.sparse = self._kind == "csr on disk" or sparse.issparse(node)
        shape = tuple(node.attrs["shape"] if self._kind == "csr on disk" else node.shape)
        if len(shape) != 2 or shape[0] != n:
            raise DataError(f"{where}: a matrix of shape {shape} for {n} cells; write it again")
        self.width = int(shape[1]) if columns is None else len(columns)
        self._full = int(shape[1])
        dtype = np.dtype(node["data"].dtype if self._kind == "csr on disk" else node.dtype)
        if dtype.kind not in "biuf":
            raise DataError(f"{where}: values of type {dtype}; give numbers")
        self._indptr = node["indptr"][:] if self._kind == "csr on disk" else None
        per_row = float(self._full)
        if self.sparse:
            per_row = (node.nnz if self._indptr is None else int(self._indptr[-1])) / max(n, 1)
        self.row_bytes = per_row * (8 if self.sparse else 4)
        values = node["data"] if self._kind == "csr on disk" else node
        chunk = (getattr(values, "chunks", None) or (0,))[0]  # of values where sparse, else rows
        packed = chunk / max(per_row, 1.0) if self.sparse else chunk
        self._step = max(int(packed or _READ / max(self.row_bytes, 1.0)), 1)

    def _kind_of(self, node: Any) -> Literal["in memory", "dense", "csr on disk"]:
        if isinstance(node, np.ndarray) or sparse.issparse(node):
            return "in memory"
        if isinstance(node, h5py.Dataset | zarr.Array):
            return "dense"
        encoding = getattr(node, "attrs", {}).get("encoding-type", type(node).__name__)
        if encoding == "csr_matrix":
            return "csr on disk"
        raise DataError(
            f"{self.where}: stored as {encoding}, of which rows cannot be read alone; write it "
            "as an array or as scipy.sparse.csr_matrix"
        )

    def runs(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.float32] | sparse.csr_matrix]:
        """Yield rows, which rise, some at a time."""
        new = np.diff(rows // self._step) > 0
        if self._step == 1:
            new &= (np.diff(rows) > 1) | (np.diff(rows // _RUN) > 0)
        try:
            for run in np.split(rows, np.flatnonzero(new) + 1):
                if not len(run):
                    continue
                block = self._block(int(run[0]), int(run[-1]) + 1)[run - run[0]]
                yield block if self._columns is None else block[:, self._columns]
        except OSError as error:
            raise DataError(f"{self.where}: cannot be read ({error}); copy it again") from error

    def _block(self, start: int, stop: int) -> NDArray[np.float32] | sparse.csr_matrix:
        if self._indptr is None:
            block = self._node[start:stop]
            return (block if self.sparse else np.asarray(block)).astype(np.float32)
        ends = self._indptr[start : stop + 1].astype(np.int64)
        data, indices = (self._node[name][ends[0] : ends[-1]] for name in ("data", "indices"))
        return sparse.csr_matrix(
            (np.asarray(data).astype(np.float32), np.asarray(indices), ends - ends[0]),
            shape=(stop - start, self._full),
        )
