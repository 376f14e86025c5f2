"""Prediction of samples by a model of crops or features: bags, masks, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import phenoseq
from phenoseq.cli import main
from phenoseq.data.backed import Cells
from phenoseq.errors import DataError
from phenoseq.inference.inputs import open_inputs
from phenoseq.inference.randomness import bag_normals
from phenoseq.inference.samples import sample_job
from phenoseq.inference.table import predict_table
from phenoseq.models.config import SampleConfig
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.embedding import EmbeddingConfig
from phenoseq.models.givenfeatures import GivenFeatures
from phenoseq.models.sample import SamplePhenoSeq

F, D = 12, 5


def awake(config, space=None):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = SamplePhenoSeq(config, space).eval()
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape))
        return network


@pytest.fixture(scope="module")
def of_features(model):
    network = awake(
        SampleConfig(
            GivenFeatures("statistics", ("DNA", "ER"), 1, F),
            EmbeddingConfig("scGPT", D),
            model.config.training,
            None,
            denoiser=DenoiserConfig(16, 2, 2, 2),
            bag_size=4,
        )
    )
    network.context_whiten.mul_(1.0)
    return network


@pytest.fixture(scope="module")
def of_crops(model):
    of = model.config
    training = replace(of.training, reliability=(), reliability_interval=())
    return awake(
        SampleConfig(of.image, of.expression, training, of.encoder, bag_size=4), model.expression
    )


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    samples = np.repeat(["s1", "s2"], [9, 6])[rng.permutation(15)]
    obs = pd.DataFrame({"Sample_ID": samples}, index=[f"cell{i}" for i in range(15)])
    return ad.AnnData(rng.normal(size=(15, F)).astype(np.float32), obs=obs)


def test_a_bag_is_generated_from_its_own_cells_by_its_own_noise(of_features, table):
    made = phenoseq.predict(table, model=of_features, sample="Sample_ID", n_samples=3, device="cpu")
    assert list(made.obs_names) == ["s1:0", "s1:1", "s1:2", "s2:0", "s2:1"]
    assert made.obs["n_cells"].tolist() == [4, 4, 1, 4, 2]
    assert list(made.var_names) == [f"scGPT_{i}" for i in range(D)]
    np.testing.assert_array_equal(made.X, made.layers["draw_0"])
    for bag in ("s1:1", "s1:2", "s2:1"):  # what fills the last two is not read
        cells = json.loads(made.obs["cells"][bag])
        with torch.inference_mode():
            read = torch.from_numpy(table[cells].X)[None]
            context = of_features.encode(read)
            noise = torch.from_numpy(bag_normals(0, [bag], 3, D))
            want = of_features.expression.decode(of_features.generate(context, noise))[0]
            strange = of_features.strangeness(context, read)
        got = np.stack([made[bag].layers[f"draw_{k}"][0] for k in range(3)])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        assert made.obs["ood_score"][bag] == pytest.approx(float(strange), rel=1e-4)
    record = made.uns["phenoseq"]
    assert json.loads(json.dumps(record)) == record
    assert (record["pairing"], record["embedding"], record["bag_size"]) == ("sample", "scGPT", 4)


def test_batches_do_not_matter(of_features, table):
    one, two = (
        predict_table(
            sample_job(
                of_features, Cells(table), "Sample_ID", n_samples=2, device="cpu", batch_size=n
            )
        )
        for n in (1, 32)
    )
    np.testing.assert_allclose(one.layers["draw_1"], two.layers["draw_1"], rtol=1e-4, atol=1e-5)


def test_crops(of_crops, plate, tmp_path):
    how = {"model": of_crops, "sample": "Metadata_Well", "n_samples": 2, "device": "cpu"}
    made = phenoseq.predict(plate.source, **how)
    assert set(made.layers) == {"std", "q05", "q95", "draw"}
    assert list(made.var_names) == list(of_crops.config.expression.genes)
    assert set(made.obs["Metadata_Well"]) == set(plate.source.obs["Metadata_Well"])
    inputs = open_inputs(plate.source, of_crops.config.cells)
    crops = {}
    for batch in inputs.crops(inputs.order, 64):
        crops.update(zip(inputs.obs.index[batch.rows], batch.images, strict=True))
    bag = made.obs_names[2]
    cells = np.stack([crops[cell] for cell in json.loads(made.obs["cells"][bag])])
    with torch.inference_mode():
        context = of_crops.encode(torch.from_numpy(cells.astype(np.float32))[None])
        dim = of_crops.config.expression.latent_dim
        latent = of_crops.generate(context, torch.from_numpy(bag_normals(0, [bag], 2, dim)))
        mean = of_crops.expression.expected(of_crops.expected(context, latent))
    np.testing.assert_allclose(made[bag].X, mean, rtol=1e-3, atol=1e-3)
    kept = phenoseq.predict(plate.source, keep_draws=True, out=tmp_path / "o.h5ad", **how)
    assert {"draw_0", "draw_1"} <= set(kept.layers)
    np.testing.assert_array_equal(np.asarray(kept.X[:]), made.X)


def test_cells_that_cannot_be_read_are_masked_and_bags_of_none_left_out(of_crops, plate):
    inputs = open_inputs(plate.source, of_crops.config.cells)
    how = {"n_samples": 2, "device": "cpu"}
    whole = predict_table(sample_job(of_crops, inputs, "Metadata_Well", **how))
    cells = [json.loads(text) for text in whole.obs["cells"]]
    bad = inputs.obs.index.get_indexer([*cells[0], cells[-2][1]])  # all of one, one of another

    def crops(rows, batch_size):
        for batch in inputs.crops(rows, batch_size):
            lost = np.isin(batch.rows, bad)
            if lost.any():
                yield batch.rows[lost], "field x: truncated"
            if (~lost).any():
                yield replace(batch, **{
                    k: getattr(batch, k)[~lost] for k in ("rows", "images", "cut")
                })  # fmt: skip

    broken = replace(inputs, crops=crops)
    with pytest.warns(UserWarning, match="truncated"):
        made = predict_table(sample_job(of_crops, broken, "Metadata_Well", **how))
    assert list(made.obs_names) == list(whole.obs_names[1:])
    same = np.isclose(made.X, whole[made.obs_names].X, rtol=1e-4, atol=1e-4).all(axis=1)
    assert list(made.obs_names[~same]) == [whole.obs_names[-2]]


def test_what_is_refused(of_features, of_crops, table, plate):
    for model, source in ((of_features, table), (of_crops, plate.source)):
        with pytest.raises(DataError, match="say which sample each cell is of"):
            phenoseq.predict(source, model=model)
        with pytest.raises(DataError, match="'published_steps' has no meaning"):
            phenoseq.predict(source, model=model, sample="x", published_steps=True)
    with pytest.raises(DataError, match=r"11 features a cell, the model reads 12: statistics"):
        phenoseq.predict(table[:, :11], model=of_features, sample="Sample_ID")
    with pytest.raises(DataError, match="reads images"):
        phenoseq.predict(table, model=of_crops, sample="Sample_ID")
    with pytest.raises(DataError, match="n_samples is 0"):
        phenoseq.predict(table, model=of_features, sample="Sample_ID", n_samples=0)


def test_the_command(of_features, table, tmp_path, capsys):
    of_features.save(tmp_path / "m")
    table.write_h5ad(tmp_path / "f.h5ad")
    command = ["predict", str(tmp_path / "f.h5ad"), "--model", str(tmp_path / "m"), "--sample"]
    assert main([*command, "Sample_ID", "-o", str(tmp_path / "o.h5ad"), "--device", "cpu"]) == 0
    assert "5 bags, scGPT embeddings of 5 numbers" in capsys.readouterr().out
