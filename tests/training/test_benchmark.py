"""The scGeneScope benchmark on a simulated miniature."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import yaml

from phenoseq.benchmark import scgenescope as bench
from phenoseq.benchmark.files import ScGeneScope
from phenoseq.benchmark.made import Made
from phenoseq.benchmark.scgenescope import benchmark_scgenescope
from phenoseq.cli import main
from phenoseq.errors import DataError, ModelError
from phenoseq.models.load import load_folder
from phenoseq.training.arms import ARMS
from phenoseq.training.perceptron import PerceptronConfig

SMALL = PerceptronConfig(
    width=8, layers=2, epochs=4, patience=3, batch_size=16, bag_batch=32, bags_per_epoch=64
)
HOW = {"classifier": SMALL, "draws": 60, "device": "cpu"}
EXAMPLE = Path(__file__).parents[2] / "examples" / "scgenescope_phenoseq.yaml"
VIT = "features/imaging/imagenet/vit-l"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def ran(scgenescope, tmp_path_factory):
    """Run the command, with a model that it trains as the example says, but small."""
    folder = tmp_path_factory.mktemp("benchmark")
    config = yaml.safe_load(EXAMPLE.read_text())
    config["data"]["init_args"] |= {"n_images": 4, "n_rna": 2, "batch_size": 8}
    config["model"]["init_args"]["denoiser"] |= {"dim": 16, "depth": 1, "heads": 2}
    config["trainer"] |= {"max_epochs": 1, "precision": "32-true", "enable_model_summary": False}
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    whole = bench.benchmark_scgenescope

    def small(*args, classifier, **how):
        return whole(*args, classifier=replace(SMALL, epochs=classifier.epochs), **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "benchmark_scgenescope", small)
        options = ["--config", str(folder / "small.yaml"), "--draws", "60", "--epochs", "4"]
        where = [str(scgenescope), "-o", str(folder / "out"), "--device", "cpu"]
        assert main(["benchmark", "scgenescope", *where, *options]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def model(ran):
    return load_folder(ran / "work" / "training" / "model")


def scores(folder, **wanted):
    rows = json.loads((folder / "metrics.json").read_text())["scores"]
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def test_every_arm_is_scored_within_and_out_of_the_experiment(ran, scgenescope):
    rows = scores(ran)
    assert {(r["bag_size"], r["test"], r["arm"]) for r in rows} == {
        (size, test, arm) for size in (1, 32) for test in ("test_he", "test_we") for arm in ARMS
    }
    assert {r["n"] for r in rows if r["bag_size"] == 32} == {60}
    facts = json.loads((ran / "metrics.json").read_text())
    obs = ad.concat([ad.read_h5ad(file) for file in sorted((scgenescope / VIT).glob("*"))]).obs
    treated = obs[obs["Treatment"] != "DMSO"]
    numbers = treated["Replicate"].astype(str).value_counts()
    assert facts["cells"]["train"] == numbers["3"]
    assert facts["cells"]["val"] == numbers["5"]
    assert facts["cells"]["test_we"] == numbers["4"]
    assert facts["cells"]["test_he"] == numbers["1"] + numbers["2"]
    assert facts["model_split"]["declared"]["train"] == ["3"]
    assert facts["model_bag"] == 4
    assert rows[0]["n_classes"] == treated["Treatment"].nunique()
    gaps = {r["arm"] for r in rows if r["gap_interval"] is not None}
    assert gaps == {arm for arm in ARMS if arm.startswith("imaging + ")} - {"imaging + real"}


def test_what_the_arms_read_is_of_the_right_cells(ran, model, scgenescope):
    """Synthetic RNA of a cell is a draw of a bag that it is one of; real RNA is of its sample."""
    data = ScGeneScope(scgenescope)
    made = Made(data, model, ran / "work", 0, "cpu")
    obs = data.images.obs.iloc[data.cells]
    images, bag = made.images(), made.bag_of_cell
    x = data.images.matrix("X").take(data.cells)
    np.testing.assert_array_equal(images, x)
    context = made.context(images)
    for cell in range(0, len(obs), 7):
        own = np.flatnonzero(bag == bag[cell])
        assert obs["Treatment"].iloc[own].nunique() == 1
        assert obs["Replicate"].iloc[own].nunique() == 1
        if len(own) == 4:  # a bag that is short is filled with others of the sample
            np.testing.assert_allclose(context[bag[cell]], images[own].mean(axis=0), rtol=1e-5)
    drawn = ad.read_zarr(ran / "work" / "synthetic.zarr")
    layers = np.stack([drawn.layers[f"draw_{k}"] for k in range(4)])
    synthetic = made.synthetic()
    ids = obs.index.to_numpy()
    places = set()
    for cell in range(len(ids)):
        k, row = np.argwhere((layers == synthetic[cell]).all(axis=2))[0]
        assert json.loads(drawn.obs["cells"].iloc[row])[k] == ids[cell]
        places.add((k, row))
    assert len(places) == len(ids)
    real = made.real(np.random.default_rng(0))
    rna = data.sequenced
    embeddings = rna.matrix("obsm/scGPT")[0 : len(rna)]
    for cell in range(0, len(ids), 5):
        found = np.flatnonzero((embeddings == real.values[real.rows[cell]]).all(axis=1))
        for column in ("Treatment", "Replicate"):
            assert rna.obs[column].iloc[found[0]] == obs[column].iloc[cell]


def test_nothing_is_fitted_to_test_cells(ran, model, scgenescope, tmp_path):
    """Other features in round 2 change no score of replicate 4."""
    shutil.copytree(scgenescope / "features", tmp_path / "features")
    for file in (VIT, "features/rnaseq/scgpt"):
        path = tmp_path / file / "round_2.h5ad"
        table = ad.read_h5ad(path)
        table.X = table.X * 3
        for name in table.obsm:
            table.obsm[name] = 50 - table.obsm[name]
        table.write_h5ad(path)
    how = {**HOW, "bag_sizes": (1,), "model": model}
    benchmark_scgenescope(ScGeneScope(scgenescope), tmp_path / "one", **how)
    benchmark_scgenescope(ScGeneScope(tmp_path), tmp_path / "two", **how)
    keys = ("arm", "balanced_accuracy", "macro_f1", "val_balanced_accuracy", "epochs")
    one, two = (
        [[r[k] for k in keys] for r in scores(tmp_path / name, test="test_we")]
        for name in ("one", "two")
    )
    assert one == two
    assert scores(tmp_path / "one", test="test_he") != scores(tmp_path / "two", test="test_he")


def test_a_sample_without_rna_is_left_out_of_all_arms(model, scgenescope, tmp_path):
    shutil.copytree(scgenescope / "features", tmp_path / "features")
    path = tmp_path / "features/rnaseq/scgpt/round_2.h5ad"
    table = ad.read_h5ad(path)
    gone = (table.obs["Treatment"] == "drug1") & (table.obs["Replicate"].astype(str) == "2")
    table[~gone].write_h5ad(path)
    data = ScGeneScope(tmp_path)
    left = data.left_out()
    assert list(left) == ["drug1|2"]
    whole = ScGeneScope(scgenescope)
    assert len(whole.cells) == len(data.cells) + left["drug1|2"]
    assert whole.left_out() == {}


def test_a_run_goes_on_under_the_same_settings_only(ran, model, scgenescope, tmp_path):
    config = {"config": ran.parent / "small.yaml", **HOW}
    before = (ran / "metrics.json").read_text()
    benchmark_scgenescope(ScGeneScope(scgenescope), ran, **config)  # nothing is trained again
    assert (ran / "metrics.json").read_text() == before
    with pytest.raises(ModelError, match="seed"):
        benchmark_scgenescope(ScGeneScope(scgenescope), ran, **config, seed=1)
    with pytest.raises(ModelError, match="--config"):
        benchmark_scgenescope(ScGeneScope(scgenescope), tmp_path)


def test_models_that_saw_other_replicates_are_refused(model, scgenescope, tmp_path):
    training = model.config.training
    split = {**training.split, "declared": {"train": ["3", "4"], "val": ["5"]}}
    leaky = load_folder(model.save(tmp_path / "model"))
    leaky.config = replace(leaky.config, training=replace(training, split=split))
    with pytest.raises(ModelError, match="replicate 3"):
        benchmark_scgenescope(ScGeneScope(scgenescope), tmp_path / "out", model=leaky, **HOW)


def test_files_that_are_missing(model, scgenescope, tmp_path, capsys):
    with pytest.raises(DataError, match="resnet50"):
        benchmark_scgenescope(
            ScGeneScope(scgenescope, imaging="resnet50"), tmp_path / "a", model=model, **HOW
        )
    with pytest.raises((DataError, ModelError), match="scvi"):
        benchmark_scgenescope(
            ScGeneScope(scgenescope, embedding="scvi"), tmp_path / "b", model=model, **HOW
        )
    only = tmp_path / "data" / VIT
    only.mkdir(parents=True)
    shutil.copy(scgenescope / VIT / "round_1.h5ad", only)
    rna = "features/rnaseq/scgpt"
    shutil.copytree(scgenescope / rna, tmp_path / "data" / rna)
    with pytest.raises(DataError, match="test_he"):
        benchmark_scgenescope(ScGeneScope(tmp_path / "data"), tmp_path / "c", model=model, **HOW)
