"""Matrices are read by rows, the same from every kind of file, and never whole."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from phenoseq.data import backed
from phenoseq.data.backed import Cells, is_anndata
from phenoseq.errors import DataError
from phenoseq.genes import gene_table


def dense(rows):
    return rows.toarray() if sparse.issparse(rows) else rows


KINDS = ["contiguous", "chunked", "zarr", "memory"]


def stored(kind, table, tmp_path, write):
    if kind == "memory":
        return table
    if kind == "zarr":
        table.write_zarr(tmp_path / "t.zarr")
        return tmp_path / "t.zarr"
    return write(table, "t", **({"compression": "gzip"} if kind == "chunked" else {}))


@pytest.mark.parametrize("key", ["X", "obsm/scGPT", "layers/raw"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_the_order_asked_for(kind, key, tmp_path, write, rna, monkeypatch):
    monkeypatch.setattr(backed, "_READ", 300)  # a few rows at a time
    table = rna()
    table.layers["raw"] = table.X.toarray().astype(np.float64)
    whole = {"X": table.X, "obsm/scGPT": table.obsm["scGPT"], "layers/raw": table.layers["raw"]}
    matrix = Cells(stored(kind, table, tmp_path, write)).matrix(key)
    assert matrix.shape == whole[key].shape
    for rows in (np.array([5]), np.arange(200), np.random.default_rng(0).permutation(200)[:77]):
        found = matrix.take(rows)
        assert found.dtype == np.float32
        assert sparse.issparse(found) == matrix.sparse == (key == "X")
        np.testing.assert_array_equal(dense(found), dense(whole[key])[rows].astype(np.float32))


@pytest.mark.parametrize("sparse_x", [False, True])
def test_the_rest_of_a_file_is_not_read(write, rna, sparse_x, monkeypatch):
    table = rna()
    table.X = table.X if sparse_x else table.X.toarray()
    monkeypatch.setattr(backed, "_READ", 1)
    path = write(table, "t")
    if sparse_x:  # anndata writes it in chunks, which are read whole
        with h5py.File(path, "a") as file:
            for name in ("X/data", "X/indices"):
                values = file[name][:]
                del file[name]
                file[name] = values
    cells = Cells(path)
    read = []
    getitem = h5py.Dataset.__getitem__

    def spy(self, at, *rest):
        found = getitem(self, at, *rest)
        read.append(found.size)
        return found

    monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
    cells.matrix("X").take(np.array([3, 150]))
    # two rows of values (and where they stand), and where each row begins
    assert sum(read) <= 2 * 9 * (2 if sparse_x else 1) + (201 if sparse_x else 0)


def test_several_files_are_one_below_the_other(tmp_path, write, rna):
    first, second = rna(60), rna(40, replicates="12", seed=9)
    second.obs_names = [f"other{i}" for i in range(40)]
    second.obs["only_here"] = 1
    write(first, "rounds/round_1")
    write(second, "rounds/round_2")
    cells = Cells(tmp_path / "rounds")
    assert is_anndata(tmp_path / "rounds")
    assert list(cells.obs.index) == [*first.obs_names, *second.obs_names]
    assert list(cells.obs.columns) == ["Treatment", "Replicate", "batch", "quality"]
    assert set(cells.obs["batch"]) == {f"plate{i}" for i in range(1, 6)}
    rows = np.array([70, 3, 99, 59])
    both = np.concatenate([first.X.toarray(), second.X.toarray()])
    np.testing.assert_array_equal(cells.matrix("X").take(rows).toarray(), both[rows])


def test_ids_of_two_files_that_clash(write, rna):
    a, b = write(rna(20), "a"), write(rna(20), "b")
    assert list(Cells([a, b]).obs.index)[::39] == ["a:rna0", "b:rna19"]
    with pytest.raises(DataError, match="a file is given twice"):
        Cells([a, a])


def test_genes_of_files_in_another_order(write, rna):
    """Aligned by id; by symbol where a file has no ids; and those that one lacks are left out."""
    first, second = rna(20), rna(20, seed=9)
    second = second[:, ::-1].copy()
    del second.var["gene_ids"]
    second = second[:, [0, 1, 2, 3, 5, 6, 7, 8]].copy()  # without S4
    matrix, var, matches = Cells([write(first, "a"), write(second, "b")]).genes()
    kept = [0, 1, 2, 3, 5, 6, 7, 8]
    assert list(var.index) == [f"ENSG{i:011d}" for i in kept]
    assert list(var["symbol"]) == [f"S{i}" for i in kept]
    assert [match.by_symbol for match in matches] == [0, 8]
    assert str(matches[1]) == "8 of 9 genes matched, 8 of them by symbol; missing are S4"
    found = matrix.take(np.arange(40)).toarray()
    np.testing.assert_array_equal(found[:20], first.X.toarray()[:, kept])
    np.testing.assert_array_equal(found[20:], second.X.toarray()[:, ::-1])


def test_genes_wanted(write, rna):
    table = rna(20)
    cells = Cells(write(table, "a"))
    want = gene_table(["S7", "ENSG00000000002", "nowhere"], ["S7", "", ""], "here")
    matrix, var, (match,) = cells.genes(want)
    assert list(var.index) == ["ENSG00000000007", "ENSG00000000002"]
    np.testing.assert_array_equal(
        matrix.take(np.arange(20)).toarray(), table.X.toarray()[:, [7, 2]]
    )
    assert match.missing == [""]
    with pytest.raises(DataError, match=r"only 2 of 3 genes matched.*at least 90% must be there"):
        cells.genes(want, min_share=0.9)


def test_what_cannot_be_read(tmp_path, write, rna):
    with pytest.raises(DataError, match="no such file"):
        Cells(tmp_path / "nowhere.h5ad")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.h5ad file there"):
        Cells(tmp_path / "empty")
    (tmp_path / "text.h5ad").write_text("text")
    with pytest.raises(DataError, match=r"text\.h5ad: not a readable AnnData"):
        Cells(tmp_path / "text.h5ad")
    table = rna(20)
    table.X = sparse.csc_matrix(table.X)
    cells = Cells(write(table, "csc"))
    with pytest.raises(DataError, match="stored as csc_matrix, of which rows cannot be read"):
        cells.matrix("X")
    with pytest.raises(DataError, match=r"no 'obsm/UCE'; it has \{'obsm': \['scGPT'\]"):
        cells.matrix("obsm/UCE")
    twice = rna(20)
    twice.obs_names = ["a", "a", *twice.obs_names[2:]]
    with pytest.raises(DataError, match=r"more than once: \['a'\]"):
        Cells(twice)


def test_files_of_different_width(features):
    other = ad.AnnData(np.zeros((3, 4)), obs=pd.DataFrame(index=["a", "b", "c"]))
    with pytest.raises(DataError, match=r"\[4, 12\] columns"):
        Cells([features(5), other]).matrix("X")
