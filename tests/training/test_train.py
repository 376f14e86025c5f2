"""`phenoseq train`: learns, leaves a model that loads, and goes on where it was stopped."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import phenoseq
from phenoseq.cli import main
from phenoseq.errors import DataError, ModelError
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.training.baselines import BASELINES
from phenoseq.training.module import PhenoSeqModule
from phenoseq.training.train import train

quiet = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def weights():
    """Give a function that returns all tensors of a model's folder."""
    return lambda folder: PhenoSeq.load(folder).state_dict()


def losses(root, name="val_loss"):
    return pd.read_csv(root / "metrics.csv")[name].dropna().to_numpy()


@pytest.mark.long
@quiet
def test_trains_and_leaves_a_model(arguments, store, tmp_path, capsys, monkeypatch):
    assert main(["train", *arguments(epochs=8, **{"model.lr": 4e-3, "ema": 0.9})]) == 0
    assert "phenoseq evaluate --model" in capsys.readouterr().out
    root = tmp_path / "run"
    assert sorted(p.name for p in (root / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    seen = losses(root)
    assert len(seen) == 8
    assert seen[-1] < 0.95 * seen[0]

    model = phenoseq.load_model(root / "model")
    record = model.config.training
    assert record.identity == store.manifest.identity
    assert record.split["by"] == "Metadata_Well"
    assert len(record.reliability) == 60
    assert np.mean(record.reliability) > 0.05
    low, high = np.array(record.reliability_interval).T  # over validation wells
    assert len(low) == 60
    assert (low <= high).all()
    assert np.mean((low <= record.reliability) & (record.reliability <= high)) > 0.9
    prediction = phenoseq.predict(store.path, model=model, n_samples=4, device="cpu")
    assert 0.5 < np.median(prediction.obs["ood_score"]) < 2

    monkeypatch.setitem(sys.modules, "umap", None)  # which takes long to import
    how = {"out": tmp_path / "scores", "device": "cpu", "n_samples": 2, "epochs": 1}
    how["regressor"] = tmp_path / "regressor"
    scores = phenoseq.evaluate(root / "model", store.path, **how)
    assert [s.name for s in scores] == ["model", *BASELINES.values()]
    assert sorted(p.name for p in (tmp_path / "scores").iterdir() if p.suffix != ".parquet") == [
        "baselines.zarr",
        "metrics.json",
        "metrics.md",
        "prediction.zarr",
        "report.html",
        "truth.zarr",
    ]
    # fitted once: what is there of the same model, cells and settings is taken
    monkeypatch.setattr("phenoseq.scoring.fit_baselines", None)
    assert phenoseq.evaluate(root / "model", store.path, **how) == scores
    with pytest.raises(TypeError):
        phenoseq.evaluate(root / "model", store.path, **how | {"seed": 1})


@quiet
@pytest.mark.usefixtures("quick")
def test_a_run_that_was_stopped_goes_on(arguments, tmp_path, weights, monkeypatch, capsys):
    train(arguments("whole"))
    step = PhenoSeqModule.training_step

    def fail(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 3:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(PhenoSeqModule, "training_step", fail)
    assert main(["train", *arguments("stopped")]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(PhenoSeqModule, "training_step", step)
    assert not (tmp_path / "stopped" / "model").exists()
    train(arguments("stopped"))
    whole, stopped = (weights(tmp_path / root / "model") for root in ("whole", "stopped"))
    for name, tensor in whole.items():
        torch.testing.assert_close(stopped[name], tensor, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        losses(tmp_path / "stopped")[-1], losses(tmp_path / "whole")[-1], rtol=1e-5
    )


FEW = {"trainer.limit_train_batches": 3, "data.max_val": 40}


@quiet
@pytest.mark.usefixtures("quick")
def test_equal_seeds_give_equal_models(arguments, tmp_path, weights):
    train(arguments("a", epochs=1, **FEW))
    train(arguments("b", epochs=1, **FEW))
    train(arguments("c", epochs=1, seed_everything=1, **FEW))
    a, b, c = (weights(tmp_path / root / "model") for root in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["denoiser.inward.weight"], c["denoiser.inward.weight"])


@quiet
@pytest.mark.usefixtures("quick")
def test_another_run_in_the_same_folder_is_refused(arguments, store, tmp_path):
    """Other settings, or another store in the place of the old one."""
    path = tmp_path / "plate.zarr"
    shutil.copytree(store.path, path)
    how = {"data.store": path, **FEW}
    train(arguments(epochs=1, **how))
    with pytest.raises(ModelError, match="holds a run with other settings"):
        train(arguments(epochs=1, **how, **{"model.lr": 0.01}))
    facts = path / "zarr.json"
    facts.write_text(facts.read_text().replace(store.manifest.identity, "0" * 64))
    with pytest.raises(DataError, match="than when this run began"):
        train(arguments(epochs=1, **how))


@quiet
@pytest.mark.usefixtures("quick")
def test_training_sees_the_training_part_alone(arguments, store, tmp_path, monkeypatch):
    seen = set()
    step = PhenoSeqModule.training_step

    def watch(self, batch, batch_idx):
        seen.update(batch["rows"].tolist())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(PhenoSeqModule, "training_step", watch)
    out = train(arguments(epochs=1))
    config = PhenoSeq.load(out).config
    from phenoseq.data.datamodule import split_of
    from phenoseq.data.splits import SplitConfig

    split = split_of(store, SplitConfig(**config.training.split))
    assert seen == set(split.rows("train").tolist())
    assert split.digest == config.training.split_digest


@quiet
@pytest.mark.usefixtures("quick")
def test_bfloat16_on_the_cpu(arguments, tmp_path, weights):
    train(arguments(epochs=1, **FEW, **{"trainer.precision": "bf16-mixed"}))
    state = weights(tmp_path / "run" / "model")
    assert all(t.dtype == torch.float32 for t in state.values())
    assert all(bool(torch.isfinite(t).all()) for t in state.values())
    assert np.isfinite(losses(tmp_path / "run")).all()
