"""Cells are paired one to one or not at all; samples by all of their columns."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from phenoseq.data import pairing as pairing_module
from phenoseq.data.backed import Cells
from phenoseq.data.pairing import facts_of_samples, join_counts, pair_cells, pair_samples
from phenoseq.data.storewriter import write_store
from phenoseq.errors import DataError


@pytest.fixture(scope="module")
def source(ramp_source):
    return ramp_source(60)


def counts_for(ids, seed=0, n_genes=7):
    values = np.random.default_rng(seed).poisson(6, (len(ids), n_genes)).astype(np.float32)
    values[:, 0] = np.arange(len(ids)) + 50
    return ad.AnnData(
        sparse.csr_matrix(values),
        obs=pd.DataFrame(index=list(ids)),
        var=pd.DataFrame(index=[f"ENSG{i:011d}.3" for i in range(n_genes)]),
    )


# --------------------------------------------------------------------------------------- by id


def test_counts_join_the_cell_of_their_id(tmp_path, source, write, monkeypatch):
    monkeypatch.setattr(pairing_module, "BUDGET", 400)  # some rows at a time
    ids = ["other", *np.random.default_rng(0).permutation(source.obs.index)[:50]]
    table = counts_for(ids)
    bare = replace(source, counts=None, var=None)
    joined, pairing, (match,) = join_counts(bare, Cells(write(table, "rna")))
    assert list(joined.var.index) == [f"ENSG{i:011d}" for i in range(7)]
    place = pd.Index(ids).get_indexer(source.obs.index)
    expected = np.where(place[:, None] >= 0, table.X.toarray()[place], 0)
    np.testing.assert_array_equal(joined.counts.toarray(), expected)
    assert str(pairing) == "cells paired by id: matched 50, only in images 10, only in RNA 1"
    assert pairing.table()["cells"].to_dict() == {
        "matched": 50, "only in images": 10, "only in RNA": 1,
    }  # fmt: skip
    assert str(match) == "7 of 7 genes matched, 0 of them by symbol"

    store = write_store(joined, tmp_path / "s.zarr", pixel_size=0.5, crop_px=8)
    stored = store.table()
    assert set(stored.obs_names) <= set(ids)
    np.testing.assert_array_equal(stored.X.toarray(), table[stored.obs_names].X.toarray())
    assert store.manifest.pairing == "cell"


def test_identity_follows_the_counts(source):
    table = counts_for(source.obs.index)
    first = join_counts(source, Cells(table))[0].identity
    assert join_counts(source, Cells(table))[0].identity == first
    other = counts_for(source.obs.index, seed=1)
    assert join_counts(source, Cells(other))[0].identity != first
    assert join_counts(replace(source, identity="1" * 64), Cells(table))[0].identity != first


def test_no_id_in_both(source):
    with pytest.raises(DataError, match=r"no cell is in both \(images such as \['cell0'"):
        pair_cells(source, Cells(counts_for(["a", "b"])))


@pytest.mark.parametrize("value", [0.5, -1.0, np.nan])
def test_values_that_are_no_counts(source, value):
    table = counts_for(source.obs.index)
    table.X[3, 2] = value
    with pytest.raises(DataError, match=r"not raw counts, there are values such as \[.*--layer"):
        join_counts(source, Cells(table))
    table.layers["counts"] = counts_for(source.obs.index).X
    join_counts(source, Cells(table), key="layers/counts")


# ---------------------------------------------------------------------------------- by centroid


def at(source, positions, **columns):
    table = counts_for([f"r{i}" for i in range(len(positions))])
    positions = np.asarray(positions, dtype=float)
    table.obs["x_centroid"], table.obs["y_centroid"] = positions.T
    for name, values in columns.items():
        table.obs[name] = values
    return Cells(table)


def test_nearest_cell_within_the_distance(ramp_source):
    grid = np.stack(np.meshgrid(np.arange(10) * 20.0, np.arange(6) * 20.0), -1).reshape(-1, 2) + 50
    source = ramp_source(grid)
    rng = np.random.default_rng(0)
    order = rng.permutation(60)[:40]
    shift = rng.uniform(-2, 2, (40, 2))
    shift[0] = (6.0, 0.0)  # farther than allowed
    found = pair_cells(source, at(source, grid[order] + shift), by="centroid", max_distance=5)
    expected = sorted(zip(order[1:], range(1, 40), strict=True))
    assert list(zip(found.images, found.rna, strict=True)) == expected
    distance = np.linalg.norm(shift, axis=1)[found.rna]
    np.testing.assert_allclose(found.distance, distance, atol=1e-9)
    assert found.table()["cells"].tolist() == [39, 21, 1, 0]
    assert f"{np.median(distance):.2f} um (median)" in str(found)


def test_one_to_one(ramp_source):
    """Two RNA cells near one image cell: the nearer one is its pair, the other nobody's."""
    source = ramp_source(np.array([[100.0, 100.0], [150.0, 100.0]]))
    found = pair_cells(
        source, at(source, [[103, 100], [101, 100], [151, 100]]), by="centroid", max_distance=10
    )
    assert found.images.tolist() == [0, 1]
    assert found.rna.tolist() == [1, 2]
    source = ramp_source(np.array([[104.0, 100.0], [100.0, 100.0]]))
    found = pair_cells(source, at(source, [[101, 100]]), by="centroid", max_distance=10)
    assert found.images.tolist() == [1]


def test_ties_are_left_out_and_told(ramp_source):
    source = ramp_source(np.array([[100.0, 100.0], [150.0, 100.0], [200, 100], [204, 100]]))
    places = [[98, 100], [102, 100], [151, 100], [202, 100]]
    found = pair_cells(source, at(source, places), by="centroid", max_distance=10)
    assert found.images.tolist() == [1]
    assert found.ties == 3  # one with two RNA cells as near, and two as near to one RNA cell
    assert "ties (of those only in images) 3" in str(found)


def test_fields_are_paired_apart(ramp_source):
    source = ramp_source(np.array([[100.0, 100.0], [101.0, 100.0]]), fields=2)
    rna = at(source, [[101, 100], [100, 100]], field=["f0", "f1"])
    found = pair_cells(source, rna, by="centroid", max_distance=3)
    assert found.rna.tolist() == [0, 1]
    with pytest.raises(DataError, match="needs a column 'field'"):
        pair_cells(source, at(source, [[1, 1]]), by="centroid", max_distance=3)


def test_positions_in_obsm(source):
    table = counts_for(source.obs.index)
    table.obsm["spatial"] = source.obs[["x_centroid", "y_centroid"]].to_numpy()
    found = pair_cells(source, Cells(table), by="centroid", max_distance=0.01)
    assert found.rna.tolist() == list(range(60))
    del table.obsm["spatial"]
    with pytest.raises(DataError, match="no positions; give"):
        pair_cells(source, Cells(table), by="centroid", max_distance=1)


def test_distance_goes_with_centroids(source):
    rna = Cells(counts_for(source.obs.index))
    with pytest.raises(DataError, match="--max-distance"):
        pair_cells(source, rna, by="centroid")
    with pytest.raises(DataError, match="--max-distance"):
        pair_cells(source, rna, max_distance=3)


# ------------------------------------------------------------------------------------- by sample


def frame(**columns):
    return pd.DataFrame(columns, index=[f"c{i}" for i in range(len(next(iter(columns.values()))))])


def test_samples_of_several_columns():
    images = frame(drug=["a", "a", "b", "c"], rep=[1, 2, 1, 1], site=["x", "x", "y", "y"])
    rna = frame(drug=["b", "a", "a", "d", "a"], rep=["1", "1", "1", "1", "3"])
    found = pair_samples(images, rna, ["drug", "rep"], "here")
    assert found.samples == ("a|1", "b|1")
    assert found.images.tolist() == [0, -1, 1, -1]
    assert found.rna.tolist() == [1, 0, 0, -1, -1]
    assert found.table.to_dict("list") == {
        "image_cells": [1, 1, 0, 1, 1, 0], "rna_cells": [2, 0, 1, 1, 0, 1],
    }  # fmt: skip
    assert list(found.table.index) == ["a|1", "a|2", "a|3", "b|1", "c|1", "d|1"]
    assert str(found) == (
        "6 samples by drug, rep: 2 in both (2 image cells, 3 RNA cells); in images only 2 "
        "(2 cells: a|2, c|1); in RNA only 2 (2 cells: a|3, d|1)"
    )


def test_facts_that_hold_for_all_cells_of_a_sample():
    images = frame(
        well=["A", "A", "B"], drug=["x", "x", "y"], site=["1", "2", "1"], lab=["u", "u", "u"]
    )
    rna = frame(well=["A", "B"], drug=["x", "z"], chip=[7, 7], lab=["u", None])
    found = facts_of_samples(pair_samples(images, rna, ["well"], "here"), images, rna)
    # 'drug' and 'lab' differ between images and RNA of B, 'site' within A
    assert found.to_dict("list") == {"well": ["A", "B"], "chip": ["7", "7"]}


def test_what_is_no_sample():
    images, rna = frame(well=["A", "B"]), frame(well=["C", "D"], other=["x", "y"])
    with pytest.raises(DataError, match=r"no sample is in both; by \['well'\].*\['A', 'B'\]"):
        pair_samples(images, rna, ["well"], "here")
    with pytest.raises(DataError, match=r"here, images: no column 'other' in obs, only \['well'\]"):
        pair_samples(images, rna, ["other"], "here")
    with pytest.raises(DataError, match="--sample-columns"):
        pair_samples(images, rna, [], "here")
    with pytest.raises(DataError, match="here, RNA: 1 cells have no 'well'"):
        pair_samples(images, frame(well=["A", None]), ["well"], "here")
    with pytest.raises(DataError, match=r"holds '\|'"):
        pair_samples(frame(a=["x|y"], b=["z"]), rna, ["a", "b"], "here")
