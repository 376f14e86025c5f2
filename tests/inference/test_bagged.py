"""Prediction from features: what comes out, that it is a bag's own, and what is refused."""

from __future__ import annotations

import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import phenoseq
from phenoseq.cli import main
from phenoseq.data import backed
from phenoseq.data.backed import Cells
from phenoseq.errors import DataError, ModelError, PhenoseqWarning
from phenoseq.inference import bagged
from phenoseq.inference.bagged import bag_job
from phenoseq.inference.randomness import bag_normals
from phenoseq.inference.table import predict_table
from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.models.published_config import (
    Origin,
    PublishedConfig,
    PublishedNoise,
    PublishedSizes,
)

F, D = 20, 6


@pytest.fixture(scope="module")
def network():
    sizes = PublishedSizes(F, D, 16, 4, 2, 1, 8, 2, 0.1)
    origin = Origin("a" * 64, "b" * 64, "ema", "some/repo", "c" * 40)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = PublishedPhenoSeq(PublishedConfig(origin, sizes, PublishedNoise(steps=5))).eval()
        model.features_mean.copy_(torch.arange(20.0))
        model.features_std.fill_(2.0)
        model.rna_mean.fill_(3.0)
    return model


@pytest.fixture(scope="module")
def table():
    """Features of 90 cells of three samples, rows mixed."""
    rng = np.random.default_rng(0)
    samples = np.repeat(["s1", "s2", "s3"], [50, 32, 8])[rng.permutation(90)]
    obs = pd.DataFrame(
        {
            "Sample_ID": samples,
            "Metadata_Compound": pd.Categorical([f"drug{s[1]}" for s in samples]),
            "Metadata_Site": np.arange(90),
            "note": "x",
        },
        index=[f"cell{i}" for i in range(90)],
    )
    values = np.arange(20.0) + 2 * rng.normal(size=(90, F))
    return ad.AnnData(values.astype(np.float32), obs=obs)


def go(model, table, progress=None, **options):
    how = {"n_samples": 3, "device": "cpu", **options}
    cells = table if isinstance(table, Cells) else Cells(table)
    return predict_table(bag_job(model, cells, "Sample_ID", **how), progress)


@pytest.fixture(scope="module")
def predicted(network, table):
    return phenoseq.predict(table, model=network, sample="Sample_ID", n_samples=3, device="cpu")


# --------------------------------------------------------------------------------- what comes out


def test_a_row_is_a_bag_and_its_draws_are_kept(predicted, table):
    assert predicted.shape == (4 + 2 + 1, D)
    assert list(predicted.var_names) == [f"scGPT_{i}" for i in range(D)]
    assert set(predicted.layers) == {"draw_0", "draw_1", "draw_2"}
    np.testing.assert_array_equal(predicted.X, predicted.layers["draw_0"])
    assert predicted.X.dtype == np.float32
    assert (predicted.layers["draw_0"] != predicted.layers["draw_1"]).all()
    assert list(predicted.obs_names[:4]) == ["s1:0", "s1:1", "s1:2", "s1:3"]
    obs = predicted.obs
    assert obs["Sample_ID"].tolist() == ["s1"] * 4 + ["s2"] * 2 + ["s3"]
    assert obs["Metadata_Compound"].tolist() == ["drug1"] * 4 + ["drug2"] * 2 + ["drug3"]
    assert "Metadata_Site" not in obs
    assert "note" not in obs
    assert obs["n_cells"].tolist() == [16, 16, 16, 2, 16, 16, 8]
    assert obs["filled"].tolist() == [False, False, False, True, False, False, True]
    own = [cell for cells in obs["cells"] for cell in json.loads(cells)]
    assert sorted(own) == sorted(table.obs_names)
    assert [len(json.loads(cells)) for cells in obs["filled_with"]] == [0, 0, 0, 14, 0, 0, 8]
    np.testing.assert_allclose(obs["ood_score"], 1, atol=0.15)


def test_uns_tells_how_it_was_made_as_plain_json(predicted, network):
    record = predicted.uns["phenoseq"]
    assert json.loads(json.dumps(record)) == record
    assert (record["seed"], record["n_samples"], record["steps"]) == (0, 3, 5)
    assert (record["sampler"], record["published_steps"]) == ("dpmpp_2m", False)
    assert (record["pairing"], record["sample_column"]) == ("sample", "Sample_ID")
    assert record["origin"]["commit"] == "c" * 40
    assert record["phenoseq_version"] == phenoseq.__version__


def test_a_bag_is_generated_from_its_own_cells_by_its_own_noise(predicted, network, table):
    for bag in ("s1:3", "s2:0"):
        row = predicted.obs.loc[bag]
        cells = json.loads(row["cells"]) + json.loads(row["filled_with"])
        noise = torch.from_numpy(bag_normals(0, [bag], 3, D))
        with torch.inference_mode():
            context = network.encode(torch.from_numpy(table[cells].X)[None])
            want = network.generate(context, noise)[0].numpy()
        got = np.stack([predicted[bag].layers[f"draw_{k}"][0] for k in range(3)])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_noise_of_draws_is_independent():
    noise = bag_normals(0, [f"b{i}" for i in range(200)], 4, 50)
    flat = noise.transpose(1, 0, 2).reshape(4, -1)
    np.testing.assert_allclose(np.corrcoef(flat), np.eye(4), atol=0.05)
    assert abs(flat.mean()) < 0.02
    np.testing.assert_array_equal(bag_normals(0, ["b7"], 2, 50)[0], noise[7, :2])
    assert not np.array_equal(bag_normals(1, ["b7"], 2, 50)[0], noise[7, :2])


# ---------------------------------------------------------- the same bag gets the same numbers


def same(a, b):
    assert list(a.obs["cells"]) == list(b.obs["cells"])
    for name in a.layers:
        np.testing.assert_allclose(a.layers[name], b.layers[name], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_matter(network, table, predicted, batch_size):
    same(predicted, go(network, table, batch_size=batch_size))


def test_order_of_rows_and_other_samples_do_not_matter(network, table, predicted):
    order = np.random.default_rng(1).permutation(90)
    same(predicted, go(network, table[order]))
    some = table[table.obs["Sample_ID"] == "s2"]
    same(predicted[predicted.obs["Sample_ID"] == "s2"], go(network, some))


def test_seed_and_steps(network, table, predicted):
    np.testing.assert_array_equal(go(network, table).X, predicted.X)
    other = go(network, table, seed=1)
    assert (other.X != predicted.X).all()
    assert list(other.obs["cells"]) != list(predicted.obs["cells"])
    finer = go(network, table, steps=9)
    assert finer.uns["phenoseq"]["steps"] == 9
    assert not np.allclose(finer.X, predicted.X, atol=1e-3)


def test_published_steps_are_an_option(network, table, predicted):
    got = go(network, table, published_steps=True, steps=30)
    record = got.uns["phenoseq"]
    assert (record["sampler"], record["steps"], record["published_steps"]) == ("ddim", 31, True)
    assert not np.allclose(got.X, predicted.X, atol=1e-3)


@pytest.mark.parametrize("kind", ["dense", "compressed", "csr", "zarr"])
def test_a_file_gives_what_its_table_gives(tmp_path, network, table, predicted, kind, monkeypatch):
    monkeypatch.setattr(bagged, "_CHECKED", 4 * F * 7)  # so that blocks of 7 cells are read
    monkeypatch.setattr(bagged, "_HELD", 4 * F * 16 * 2)  # and two bags are held
    copy, path = table.copy(), tmp_path / ("f.zarr" if kind == "zarr" else "f.h5ad")
    if kind == "csr":
        copy.X = sparse.csr_matrix(copy.X)
    if kind == "zarr":
        copy.write_zarr(path)
    else:
        copy.write_h5ad(path, compression="gzip" if kind == "compressed" else None)
    got = phenoseq.predict(path, model=network, sample="Sample_ID", n_samples=3, device="cpu")
    same(predicted, got)
    if kind == "dense":
        opened = ad.read_h5ad(path, backed="r")
        same(predicted, go(network, opened))


def test_features_by_columns_are_refused(tmp_path, network, table):
    copy = table.copy()
    copy.X = sparse.csc_matrix(copy.X)
    copy.write_h5ad(tmp_path / "f.h5ad")
    with pytest.raises(DataError, match="stored as csc_matrix, of which rows cannot be read alone"):
        phenoseq.predict(tmp_path / "f.h5ad", model=network, sample="Sample_ID")


def test_a_file_is_never_read_whole(tmp_path, network, table, monkeypatch):
    table.write_h5ad(tmp_path / "f.h5ad")
    monkeypatch.setattr(bagged, "_CHECKED", 4 * F * 7)
    monkeypatch.setattr(bagged, "_HELD", 4 * F * 16)
    read, take = [], backed.Matrix.take
    monkeypatch.setattr(
        backed.Matrix, "take", lambda self, rows: read.append(len(rows)) or take(self, rows)
    )
    go(network, Cells(tmp_path / "f.h5ad"), batch_size=1)
    assert max(read) <= 16


def test_written_and_opened(tmp_path, network, table, predicted):
    out = tmp_path / "o.h5ad"
    phenoseq.predict(table, model=network, sample="Sample_ID", n_samples=3, device="cpu", out=out)
    got = ad.read_h5ad(out)
    np.testing.assert_array_equal(got.X, predicted.X)
    assert got.uns["phenoseq"]["origin"]["repo"] == "some/repo"
    assert json.loads(got.obs["cells"].iloc[0]) == json.loads(predicted.obs["cells"].iloc[0])


def test_the_command(tmp_path, network, table, predicted, capsys):
    network.save(tmp_path / "m")
    table.write_h5ad(tmp_path / "f.h5ad")
    arguments = ["predict", str(tmp_path / "f.h5ad"), "--model", str(tmp_path / "m")]
    arguments += ["-o", str(tmp_path / "o.h5ad"), "--n-samples", "3", "--device", "cpu"]
    assert main([*arguments, "--sample", "Sample_ID"]) == 0
    assert "7 bags, scGPT embeddings of 6 numbers" in capsys.readouterr().out
    np.testing.assert_allclose(ad.read_h5ad(tmp_path / "o.h5ad").X, predicted.X, rtol=1e-4)
    assert main(arguments) == 1
    assert "--sample" in capsys.readouterr().err


def test_progress_counts_to_the_end(network, table):
    seen = []
    go(network, table, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_a_sample_column_that_is_metadata(network, table):
    copy = table.copy()
    copy.obs["Metadata_Well"] = copy.obs["Sample_ID"]
    got = predict_table(bag_job(network, Cells(copy), "Metadata_Well", n_samples=1, device="cpu"))
    assert list(got.obs.columns).count("Metadata_Well") == 1


# -------------------------------------------------------------------------------- what is refused


def changed(table, **options):
    copy = table.copy()
    for name, value in options.items():
        setattr(copy, name, value)
    return copy


def test_bad_features(network, table):
    values = table.X.copy()
    values[[4, 60], 3] = np.nan, np.inf
    with pytest.raises(DataError, match="NaN or infinite features in 2 cells, the first 'cell4'"):
        go(network, changed(table, X=values))
    with pytest.raises(DataError, match=r"19 features a cell, the model reads 20: vit_l_16"):
        go(network, table[:, :19])
    with pytest.raises(DataError, match="zero cells"):
        go(network, table[:0])
    with pytest.raises(DataError, match="no 'X'"):
        go(network, ad.AnnData(obs=table.obs))
    with pytest.raises(DataError, match=r"no column 'Sampel' in obs.*'Sample_ID'"):
        predict_table(bag_job(network, Cells(table), "Sampel", device="cpu"))
    with pytest.raises(DataError, match="more than once"):
        go(network, changed(table, obs_names=["same"] * 2 + list(table.obs_names[2:])))
    with pytest.raises(DataError, match="n_samples is 0"):
        go(network, table, n_samples=0)
    with pytest.raises(ModelError, match="steps = 0"):
        go(network, table, steps=0)


def test_features_of_another_scale_are_warned_of(network, table):
    with pytest.warns(PhenoseqWarning, match="off the training ones by .* deviations"):
        got = go(network, changed(table, X=table.X * 100))
    assert got.obs["ood_score"].min() > 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(network, table)


def test_a_model_of_features_says_what_it_reads(network, xenium_folder, plate):
    for source, message in (
        (np.zeros((2, 3, 8, 8)), r"reads imaging features.*20 features a cell: vit_l_16"),
        (xenium_folder().path, r"lacks the stain\(s\) \['RNA'"),
        (plate.source, "its cells have no 'Sample_ID'"),
    ):
        with pytest.raises(DataError, match=message):
            phenoseq.predict(source, model=network, sample="Sample_ID")
    with pytest.raises(DataError, match=r"say which sample.*Metadata_Well"):
        phenoseq.predict(plate.source, model=network)


def test_options_that_mean_nothing_are_refused(network, model, table, plate):
    with pytest.raises(DataError, match="'channels' has no meaning for a model of imaging feat"):
        phenoseq.predict(table, model=network, sample="Sample_ID", channels=["DNA"])
    with pytest.raises(DataError, match="'eight_bit' has no meaning for a table of features"):
        phenoseq.predict(table, model=network, sample="Sample_ID", eight_bit="full")
    with pytest.raises(DataError, match="'sample' has no meaning for a model of images"):
        phenoseq.predict(plate.source, model=model, sample="Sample_ID")


def test_a_model_of_images_says_what_to_do_with_features(tmp_path, model, table):
    table.write_h5ad(tmp_path / "f.h5ad")
    table.write_zarr(tmp_path / "f.zarr")
    for source in (table, tmp_path / "f.h5ad", tmp_path / "f.zarr"):
        with pytest.raises(DataError, match=r"reads images.*choose a model of imaging features"):
            phenoseq.predict(source, model=model)


def test_files_that_are_none(tmp_path, network):
    with pytest.raises(DataError, match=r"none\.h5ad: no such file"):
        phenoseq.predict(tmp_path / "none.h5ad", model=network, sample="Sample_ID")
    (tmp_path / "bad.h5ad").write_bytes(b"no file of HDF5")
    with pytest.raises(DataError, match=r"bad\.h5ad: not a readable"):
        phenoseq.predict(tmp_path / "bad.h5ad", model=network, sample="Sample_ID")


def test_a_model_of_features_cannot_be_scored_on_a_store(network, store):
    with pytest.raises(ModelError, match="embeddings of samples"):
        phenoseq.evaluate(network, store.path)
