"""What `decode` gives: averages of the nearest real cells, how near they are, and which."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.neighbors import KNeighborsRegressor

import phenoseq
from phenoseq.cli import main
from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.inference import decode as module
from phenoseq.inference import neighbours
from phenoseq.inference.reference import Reference

D, GENES = 6, 9
weightings = pytest.mark.parametrize("weighting", ["distance", "uniform"])


@pytest.fixture
def reference():
    """200 cells with expression and an embedding, none like another."""
    rng = np.random.default_rng(0)
    adata = ad.AnnData(
        np.log1p(rng.poisson(0.7, (200, GENES))).astype(np.float32),
        obs=pd.DataFrame(index=[f"cell{i}" for i in range(200)]),
        var=pd.DataFrame(
            {"symbol": [f"G{j}" for j in range(GENES)]}, index=[f"ENSG{j}" for j in range(GENES)]
        ),
    )
    adata.obsm["scGPT"] = rng.standard_normal((200, D)).astype(np.float32)
    return adata


@pytest.fixture
def predicted():
    """Five bags, eleven draws: as many that names do not sort by number."""
    rng = np.random.default_rng(1)
    draws = rng.standard_normal((11, 5, D)).astype(np.float32)
    adata = ad.AnnData(
        draws[0].copy(),
        obs=pd.DataFrame({"Metadata_Well": list("ABCDE")}, index=[f"bag{i}" for i in range(5)]),
        layers={f"draw_{i}": draw for i, draw in enumerate(draws)},
        obsm={"spatial": rng.random((5, 2))},
        uns={"phenoseq": {"seed": 7, "n_samples": 11}, "other": 1},
    )
    return adata


def one(embeddings) -> ad.AnnData:
    return ad.AnnData(np.asarray(embeddings, dtype=np.float32))


def line(positions, expression) -> ad.AnnData:
    """Reference cells on a line."""
    adata = ad.AnnData(np.asarray(expression, dtype=np.float32))
    adata.obsm["scGPT"] = np.asarray(positions, dtype=np.float32)[:, None]
    return adata


def same(a: ad.AnnData, b: ad.AnnData) -> None:
    """No bit differs."""
    np.testing.assert_array_equal(a.X, b.X)
    assert set(a.layers) == set(b.layers)
    for name in a.layers:
        np.testing.assert_array_equal(a.layers[name], b.layers[name])
    pd.testing.assert_frame_equal(a.obs, b.obs)
    pd.testing.assert_frame_equal(a.var, b.var)


# ---------------------------------------------------------------------------------------- by hand


def test_uniform_by_hand():
    got = phenoseq.decode(
        one([[0.0], [10.0]]),
        line([1, -2, 4, 11], [[3, 0], [0, 6], [9, 9], [1, 2]]),
        k=2,
        weighting="uniform",
    )
    np.testing.assert_allclose(got.X, [[1.5, 3], [5, 5.5]], rtol=1e-6)
    np.testing.assert_allclose(got.obs["reference_distance"], [1.5, 3.5])
    assert list(got.obs["reference_nearest"]) == ["0", "3"]
    # to their two nearest others: 1 -> 3, 3; -2 -> 3, 6; 4 -> 3, 6; 11 -> 7, 10
    assert got.uns["phenoseq"]["decode"]["reference_sample_distance"] == 4.5
    np.testing.assert_allclose(got.obs["reference_distance_ratio"], [1.5 / 4.5, 3.5 / 4.5])


def test_distance_by_hand():
    """Weights 1/1 and 1/2 of the first, and 1/1 and 1/6 of the second."""
    got = phenoseq.decode(
        one([[0.0], [10.0]]), line([1, -2, 4, 11], [[3, 0], [0, 6], [9, 9], [1, 2]]), k=2
    )
    np.testing.assert_allclose(got.X, [[2, 2], [(6 + 9) / 7, (12 + 9) / 7]], rtol=1e-6)


def test_a_cell_that_is_hit_counts_alone_and_copies_of_it_alike():
    cells = line([1, 1, 1.5, 7, 2], [[2], [4], [100], [5], [50]])
    assert phenoseq.decode(one([[1.0], [7.0]]), cells, k=3).X.tolist() == [[3], [5]]
    uniform = phenoseq.decode(one([[1.0]]), cells, k=3, weighting="uniform")
    np.testing.assert_allclose(uniform.X, [[106 / 3]], rtol=1e-6)


def test_equally_near_cells_go_by_their_order():
    cells = line([2, 1, -1, 1, 3], [[0], [10], [20], [40], [0]])
    got = phenoseq.decode(one([[0.0]]), cells, k=2)
    assert got.X.tolist() == [[15]]
    assert list(got.obs["reference_nearest"]) == ["1"]


@weightings
@pytest.mark.parametrize("k", [1, 4, 10])
def test_x_is_that_of_scikit_learn(reference, weighting, k):
    points = np.random.default_rng(2).standard_normal((40, D)).astype(np.float32)
    points[3] = reference.obsm["scGPT"][17]
    got = phenoseq.decode(one(points), reference, k=k, weighting=weighting)
    oracle = KNeighborsRegressor(k, weights=weighting, algorithm="kd_tree")
    oracle.fit(reference.obsm["scGPT"], reference.X)
    np.testing.assert_allclose(got.X, oracle.predict(points), atol=2e-6)
    distance, rows = oracle.kneighbors(points)
    np.testing.assert_allclose(got.obs["reference_distance"], distance.mean(axis=1), atol=1e-6)
    assert list(got.obs["reference_nearest"]) == [f"cell{i}" for i in rows[:, 0]]


@weightings
def test_real_cells_decode_to_themselves_by_distance_only(reference, weighting):
    got = phenoseq.decode(one(reference.obsm["scGPT"]), reference, weighting=weighting)
    if weighting == "distance":
        np.testing.assert_array_equal(got.X, reference.X)
    else:
        assert np.abs(got.X - reference.X).max() > 0.1
    assert list(got.obs["reference_nearest"]) == list(reference.obs_names)


# ------------------------------------------------------------------------------------------ draws


@weightings
def test_each_draw_is_decoded_and_x_is_their_mean(predicted, reference, weighting):
    got = phenoseq.decode(predicted, reference, k=4, weighting=weighting)
    assert list(got.layers) == [f"draw_{i}" for i in range(11)]
    alone = {
        name: phenoseq.decode(one(predicted.layers[name]), reference, k=4, weighting=weighting)
        for name in got.layers
    }
    for name, single in alone.items():
        np.testing.assert_array_equal(got.layers[name], single.X)
    np.testing.assert_allclose(got.X, np.mean([a.X for a in alone.values()], axis=0), atol=1e-6)
    distances = np.array([a.obs["reference_distance"] for a in alone.values()])
    np.testing.assert_allclose(got.obs["reference_distance"], distances.mean(axis=0))
    by_one = [
        phenoseq.decode(one(layer), reference, k=1).obs for layer in predicted.layers.values()
    ]
    least = np.argmin([o["reference_distance"] for o in by_one], axis=0)
    assert len(set(least)) > 1
    want = [by_one[draw]["reference_nearest"].iloc[i] for i, draw in enumerate(least)]
    assert list(got.obs["reference_nearest"]) == want


def test_x_alone_is_one_draw(predicted, reference):
    got = phenoseq.decode(one(predicted.X), reference)
    assert not got.layers
    np.testing.assert_array_equal(got.X, phenoseq.decode(predicted, reference).layers["draw_0"])


def test_draws_take_the_place_of_x_and_other_layers_are_no_draws(predicted, reference):
    want = phenoseq.decode(predicted, reference)
    predicted.X[:] = np.nan
    predicted.layers["std"] = predicted.layers["draw_0"] * np.nan
    predicted.layers["draw_mean"] = predicted.layers["draw_0"] * np.nan
    same(phenoseq.decode(predicted, reference), want)
    del predicted.X
    same(phenoseq.decode(predicted, reference), want)


def test_a_sparse_prediction_is_one(predicted, reference):
    want = phenoseq.decode(predicted, reference)
    for name in predicted.layers:
        predicted.layers[name] = sparse.csr_matrix(predicted.layers[name])
    same(phenoseq.decode(predicted, reference), want)


# ---------------------------------------------------------------------------------- what comes out


def test_rows_are_the_predictions_and_columns_the_references(predicted, reference):
    before = predicted.copy()
    got = phenoseq.decode(predicted, reference)
    assert got.shape == (5, GENES)
    assert got.X.dtype == got.layers["draw_10"].dtype == np.float32
    assert list(got.obs_names) == list(predicted.obs_names)
    assert list(got.obs["Metadata_Well"]) == list("ABCDE")
    pd.testing.assert_frame_equal(got.var, reference.var)
    np.testing.assert_array_equal(got.obsm["spatial"], predicted.obsm["spatial"])
    pd.testing.assert_frame_equal(predicted.obs, before.obs)
    assert predicted.uns == before.uns


def test_uns_tells_how_it_was_made(predicted, reference):
    record = phenoseq.decode(predicted, reference, k=3, weighting="uniform").uns["phenoseq"]
    assert json.loads(json.dumps(record)) == record
    assert (record["seed"], record["n_samples"]) == (7, 11)
    median = record["decode"].pop("reference_sample_distance")
    embedding = reference.obsm["scGPT"].astype("f8")
    every = np.sqrt(((embedding[:, None] - embedding) ** 2).sum(-1))
    assert median == pytest.approx(np.median(np.sort(every, axis=1)[:, 1:4].mean(axis=1)))
    assert record["decode"] == {
        "phenoseq_version": phenoseq.__version__,
        "reference": "AnnData in memory",
        "reference_n_obs": 200,
        "key": "scGPT",
        "k": 3,
        "weighting": "uniform",
        "metric": "euclidean",
        "backend": "exact",
        "reference_sample": 200,
        "reference_sample_seed": 0,
    }


def test_the_ratio_is_about_one_among_real_cells_and_grows_outside():
    """Held-out cells of one distribution, and the same moved away; a sample of 1000 of 3000."""
    rng = np.random.default_rng(0)
    cells = ad.AnnData(np.zeros((3000, 1), dtype=np.float32))
    cells.obsm["scGPT"] = rng.standard_normal((3000, D)).astype(np.float32)
    inside = rng.standard_normal((400, D))
    got = phenoseq.decode(one(inside), cells)
    assert got.uns["phenoseq"]["decode"]["reference_sample"] == 1000
    assert got.obs["reference_distance_ratio"].median() == pytest.approx(1, abs=0.05)
    ratios = [
        phenoseq.decode(one(inside + away), cells).obs["reference_distance_ratio"].median()
        for away in (1, 2, 4)
    ]
    assert 1.1 < ratios[0] < ratios[1] < ratios[2]
    assert ratios[2] > 4
    same(phenoseq.decode(one(inside), cells), got)  # the sample is the same each time


def test_a_reference_of_copies_has_no_ratio():
    cells = line([0] * 8 + [1], [[1]] * 9)
    with pytest.warns(PhenoseqWarning, match="exact copies"):
        got = phenoseq.decode(one([[3.0]]), cells, k=2)
    assert got.obs["reference_distance_ratio"].isna().all()
    assert got.obs["reference_distance"].item() == 2.5


def test_values_stay_on_the_references_scale(predicted, reference):
    counts = reference.copy()
    counts.X = np.rint(np.expm1(reference.X) * 1000).astype(np.int64)
    got = phenoseq.decode(predicted, counts, k=1)
    nearest = phenoseq.decode(one(predicted.X), counts, k=1).obs["reference_nearest"]
    np.testing.assert_array_equal(got.layers["draw_0"], counts[list(nearest)].X)


# --------------------------------------------------------------------------- in memory and on disk


def forms(reference, tmp_path):
    """The reference in memory, backed and on disk; dense, and sparse either way in memory."""
    yield "dense", reference
    for kind in (sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array):
        other = reference.copy()
        other.X = kind(reference.X)
        yield kind.__name__, other
    for x in ("dense", "csr"):
        stored = reference.copy()
        stored.layers["counts"] = stored.X.copy()
        if x == "csr":
            stored.X = sparse.csr_matrix(stored.X)
        stored.write_h5ad(tmp_path / f"{x}.h5ad", compression="gzip")
        stored.write_zarr(tmp_path / f"{x}.zarr")
        yield f"{x} h5ad", tmp_path / f"{x}.h5ad"
        yield f"{x} zarr", str(tmp_path / f"{x}.zarr")
        yield f"{x} backed", ad.read_h5ad(tmp_path / f"{x}.h5ad", backed="r")
    yield "view", ad.concat([reference, reference], index_unique="-", merge="same")[:200]


def test_every_form_of_a_reference_gives_the_same_bits(predicted, reference, tmp_path):
    reference.obsm["X_pca"] = reference.obsm["scGPT"] * 0
    want = phenoseq.decode(predicted, reference)
    seen = {}
    for name, form in forms(reference, tmp_path):
        got = phenoseq.decode(predicted, form)
        if name == "view":
            got.obs["reference_nearest"] = got.obs["reference_nearest"].str.removesuffix("-0")
        same(got, want)
        seen[name] = got.uns["phenoseq"]["decode"]["reference"]
    assert seen["csr h5ad"] == seen["csr backed"] == "csr.h5ad"
    assert seen["dense zarr"] == "dense.zarr"
    assert seen["csr_matrix"] == "AnnData in memory"


def test_small_blocks_give_the_same_bits(predicted, reference, tmp_path, monkeypatch):
    want = phenoseq.decode(predicted, reference)
    reference.write_h5ad(tmp_path / "r.h5ad")
    monkeypatch.setattr(neighbours, "BLOCK", 17 * D)
    monkeypatch.setattr(neighbours, "CHUNK", 5 * D * 26)
    same(phenoseq.decode(predicted, tmp_path / "r.h5ad"), want)
    monkeypatch.setattr(module, "BLOCK", 3 * GENES)
    got = phenoseq.decode(predicted, tmp_path / "r.h5ad")
    for name in want.layers:
        np.testing.assert_allclose(got.layers[name], want.layers[name], atol=1e-6)


def test_other_rows_change_no_bit(predicted, reference):
    want = phenoseq.decode(predicted, reference)
    got = phenoseq.decode(predicted[["bag3", "bag1"]].copy(), reference)
    np.testing.assert_array_equal(got.X, want[["bag3", "bag1"]].X)
    np.testing.assert_array_equal(
        got.obs["reference_distance"], want.obs["reference_distance"].iloc[[3, 1]]
    )


def test_faiss_gives_the_same(predicted, reference):
    pytest.importorskip("faiss", reason="faiss is an optional extra: pip install 'phenoseq[faiss]'")
    want = phenoseq.decode(predicted, reference)
    got = phenoseq.decode(predicted, reference, backend="faiss")
    assert got.uns["phenoseq"]["decode"]["backend"] == "faiss"
    same(got, want)


def big(path: Path, n: int, genes: int, per_cell: int | None) -> None:
    """Write a reference of n cells; dense and empty where ``per_cell`` is None, else sparse."""
    rng = np.random.default_rng(0)
    small = ad.AnnData(obs=pd.DataFrame(index=np.arange(n).astype(str)), shape=(n, genes))
    small.obsm["scGPT"] = rng.standard_normal((n, 4)).astype(np.float32)
    small.write_h5ad(path)
    with h5py.File(path, "a") as file:
        file.pop("X", None)
        if per_cell is None:  # takes no space on disk: no chunk is written but one
            x = file.create_dataset("X", (n, genes), "f4", chunks=(1, genes), fillvalue=2)
            x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            return
        columns = np.sort(rng.permuted(np.tile(np.arange(genes), (50, 1)), axis=1)[:, :per_cell])
        x = file.create_group("X")
        x.attrs.update(
            {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n, genes)}
        )
        x["indptr"] = np.arange(n + 1) * per_cell
        x["indices"] = np.tile(columns.astype(np.int32), (n // 50, 1)).ravel()
        x.create_dataset("data", (n * per_cell,), "f4", fillvalue=2, chunks=True)


@pytest.mark.parametrize(
    ("n", "genes", "per_cell"), [(30_000, 10_000, None), (20_000, 4_000, 1_000)]
)
def test_expression_is_never_loaded_whole(tmp_path, n, genes, per_cell):
    """1.2 GB of dense and 160 MB of sparse expression, in less than 100 MB."""
    big(tmp_path / "big.h5ad", n, genes, per_cell)
    points = one(np.random.default_rng(1).standard_normal((20, 4)))
    phenoseq.decode(one([[0.0], [1.0]]), line([1, 2, 3], [[1]] * 3), k=1)  # imports what it needs
    tracemalloc.start()
    try:
        got = phenoseq.decode(points, tmp_path / "big.h5ad")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got.shape == (20, genes)
    if per_cell is None:
        np.testing.assert_allclose(got.X, 2, rtol=1e-6)
    else:
        np.testing.assert_allclose(got.X.sum(axis=1), 2 * per_cell, rtol=1e-5)
    assert peak < 100e6


def test_only_the_neighbours_are_read_and_each_once(predicted, reference, monkeypatch):
    rows, read = [], Reference.expression_rows
    monkeypatch.setattr(
        Reference, "expression_rows", lambda self, r: rows.extend(r.tolist()) or read(self, r)
    )
    monkeypatch.setattr(module, "BLOCK", 30 * GENES)
    phenoseq.decode(predicted, reference, k=2)
    points = np.concatenate(list(predicted.layers.values()))
    oracle = KNeighborsRegressor(2).fit(reference.obsm["scGPT"], reference.X)
    near = np.unique(oracle.kneighbors(points, return_distance=False))
    assert rows == near.tolist()
    assert len(near) < 100


# ------------------------------------------------------------------------------------ written, CLI


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_round_trip(predicted, reference, tmp_path, suffix):
    path = tmp_path / f"decoded{suffix}"
    made = phenoseq.decode(predicted, reference, out=path)
    read = ad.read_h5ad(path) if suffix == ".h5ad" else ad.read_zarr(path)
    np.testing.assert_array_equal(read.X, made.X)
    np.testing.assert_array_equal(read.layers["draw_10"], made.layers["draw_10"])
    assert list(read.obs["reference_nearest"]) == list(made.obs["reference_nearest"])
    assert read.uns["phenoseq"]["decode"]["k"] == 10
    assert read.uns["phenoseq"]["seed"] == 7


@pytest.fixture
def files(predicted, reference, tmp_path):
    predicted.write_h5ad(tmp_path / "pred.h5ad")
    reference.write_h5ad(tmp_path / "rna.h5ad")
    return tmp_path


def test_the_command_does_what_the_call_does(predicted, reference, files, capsys):
    out = files / "out.h5ad"
    args = ["decode", str(files / "pred.h5ad"), "--reference", str(files / "rna.h5ad")]
    assert main([*args, "--key", "scGPT", "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert "out.h5ad: 5 rows, 9 genes" in text
    want = phenoseq.decode(predicted, reference)
    ratio = want.obs["reference_distance_ratio"].median()
    assert f"median: {ratio:.2f}" in text
    np.testing.assert_array_equal(ad.read_h5ad(out).X, want.X)
    assert main([*args, "-k", "3", "--weighting", "uniform", "-o", str(out)]) == 0
    want = phenoseq.decode(predicted, reference, k=3, weighting="uniform")
    np.testing.assert_array_equal(ad.read_h5ad(out).X, want.X)


def test_the_command_explains_an_error(files, capsys):
    args = ["decode", str(files / "pred.h5ad"), "--reference", str(files / "rna.h5ad")]
    assert main([*args, "--key", "scVI", "-o", str(files / "out.h5ad")]) == 1
    assert "rna.h5ad: no 'obsm/scVI'; it has {'obsm': ['scGPT']" in capsys.readouterr().err
    assert not (files / "out.h5ad").exists()


# --------------------------------------------------------------------------- what cannot be decoded


CASES = {
    "no such key": (lambda p, r: r.obsm.update(X_pca=r.obsm.pop("scGPT")),
                    r"no 'obsm/scGPT'; it has \{'obsm': \['X_pca'\]"),
    "no embedding": (lambda p, r: r.obsm.pop("scGPT") is None,
                     r"no 'obsm/scGPT'; it has \{'obsm': \[\]"),
    "a table": (lambda p, r: r.obsm.update(scGPT=pd.DataFrame({"0": 1.0}, r.obs_names)),
                r"obsm/scGPT: stored as (DataFrame|dataframe), of which rows cannot be read"),
    "another width": (lambda p, r: r.obsm.update(scGPT=r.obsm["scGPT"][:, :4]),
                      "has 4 numbers a cell, the predicted embeddings 6"),
    "too few cells": (lambda p, r: (p, r[:10].copy()), "has 10 cells; k = 10 needs more than 10"),
    "reference without X": (lambda p, r: delattr(r, "X"), "no 'X'; it has"),
    "reference without genes": (lambda p, r: (p, r[:, :0].copy()), "X has no genes"),
    "empty prediction": (lambda p, r: (p[:0].copy(), r), "the prediction has no rows"),
    "prediction of nothing": (lambda p, r: (ad.AnnData(obs=p.obs), r), "neither X nor layers"),
    "NaN predicted": (lambda p, r: p.layers["draw_9"].__setitem__((2, 1), np.nan),
                      r"not finite in 1 rows, e\.g\. \['bag2'\]"),
    "NaN embedded": (lambda p, r: r.obsm["scGPT"].__setitem__((7, 1), np.nan),
                     r"embedding has values that are not finite in 1 cells, e\.g\. rows \[7\]"),
    "NaN expressed": (lambda p, r: r.X.__setitem__((slice(None), 1), np.nan),
                      r"expression \(X\) of cells \['cell.*not finite"),
}  # fmt: skip


@pytest.mark.parametrize("place", ["memory", "h5ad", "zarr"])
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_decoded_is_named(predicted, reference, tmp_path, case, place):
    change, message = CASES[case]
    changed = change(predicted, reference)
    predicted, reference = changed if isinstance(changed, tuple) else (predicted, reference)
    if place != "memory":
        both = {"pred": predicted, "rna": reference}
        for name, adata in both.items():
            getattr(adata, f"write_{place}")(tmp_path / f"{name}.{place}")
        predicted, reference = (tmp_path / f"{name}.{place}" for name in both)
    with pytest.raises(DataError, match=message):
        phenoseq.decode(predicted, reference, out=tmp_path / "out.h5ad")
    assert not (tmp_path / "out.h5ad").exists()


@pytest.mark.parametrize("place", ["h5ad", "zarr"])
def test_expression_stored_by_gene_is_refused_on_disk(predicted, reference, tmp_path, place):
    reference.X = sparse.csc_matrix(reference.X)
    getattr(reference, f"write_{place}")(tmp_path / f"rna.{place}")
    with pytest.raises(DataError, match=r"stored as csc_matrix, of which rows.*csr_matrix"):
        phenoseq.decode(predicted, tmp_path / f"rna.{place}")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"weighting": "softmax"}, "unknown weighting 'softmax'; choose from 'distance'"),
        ({"backend": "annoy"}, "unknown backend 'annoy'; choose from 'exact', 'faiss'"),
    ],
)
def test_bad_options_are_named(predicted, reference, option, message):
    with pytest.raises(DataError, match=message):
        phenoseq.decode(predicted, reference, **option)


@pytest.mark.parametrize("which", ["prediction", "reference"])
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_files_that_are_no_anndata(predicted, reference, tmp_path, which, suffix):
    def go(path):
        pair = (path, reference) if which == "prediction" else (predicted, path)
        return phenoseq.decode(*pair)

    path = tmp_path / f"some{suffix}"
    with pytest.raises(DataError, match=rf"some{suffix}: (there is )?no such ({which}|file)"):
        go(path)
    path.write_text("nothing") if suffix == ".h5ad" else path.mkdir()
    with pytest.raises(DataError, match=f"some{suffix}"):
        go(path)
    if suffix == ".h5ad":
        with h5py.File(path, "w") as file:
            file["matrix"] = [1]
        with pytest.raises(DataError, match=r"some\.h5ad: (holds no|not a readable) AnnData"):
            go(path)
    with pytest.raises(DataError, match=rf"name a {which} that ends in \.h5ad or \.zarr"):
        go(tmp_path / "some.loom")


def test_the_output_is_checked_before_any_work(files, monkeypatch):
    monkeypatch.setattr(module, "nearest", lambda *a, **k: pytest.fail("worked first"))
    pair = (files / "pred.h5ad", files / "rna.h5ad")
    with pytest.raises(DataError, match=r"OUT\.h5ad or OUT\.zarr"):
        phenoseq.decode(*pair, out=files / "out.csv")
    for same_file in pair:
        with pytest.raises(DataError, match="is read here, and would be replaced"):
            phenoseq.decode(*pair, out=files / "." / same_file.name)
    backed = ad.read_h5ad(pair[1], backed="r")
    with pytest.raises(DataError, match="is read here, and would be replaced"):
        phenoseq.decode(pair[0], backed, out=pair[1])
