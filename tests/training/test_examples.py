"""Every config of ``examples/`` trains for a few steps, and leaves a model that predicts."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import phenoseq
from phenoseq.cli import main
from phenoseq.training import base
from phenoseq.training.train import train

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "scgenescope_published": {"dim": 16, "heads": 4, "layers": 2, "encoder_layers": 1},
    "scgenescope_phenoseq": {"denoiser.dim": 16, "denoiser.heads": 2},
    "simulated_plate": {"components": 6, "hidden": 16},
    "xenium_pancreas": {
        "components": 6,
        "hidden": 16,
        "encoder.backbone": "test_resnet",
        "encoder_weights": "null",
    },
}
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quick")]


@pytest.fixture
def no_pictures():
    """Draw them, here."""


def arguments(config, store, root, **more):
    settings = {
        "data.store": store.path,
        "data.batch_size": 8,
        "data.max_val": 40,
        "model.sample_every": 1,
        "model.draws": 2,
        **{f"model.{name}": value for name, value in SMALL[config].items()},
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_model_summary": "false",
        "trainer.default_root_dir": root,
        **more,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return ["--config", str(EXAMPLES / f"{config}.yaml"), *flags]


def test_there_is_a_test_of_every_config():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(SMALL)


@pytest.mark.parametrize("config", SMALL)
def test_config(config, store, embedded, scgenescope, tmp_path, capsys):
    of_samples = config.startswith("scgenescope")
    root = tmp_path / "run"
    out = train(arguments(config, embedded if of_samples else store, root))
    hint = "predict CELLS" if of_samples else "evaluate"
    assert f"model in {out}; try: phenoseq {hint} --model {out}" in capsys.readouterr().out
    metrics = pd.read_csv(root / "metrics.csv")
    for name in ("val_loss", "val_pcc_gene", "val_e_distance", "val_variance_ratio"):
        assert np.isfinite(metrics[name].dropna()).all()
        assert len(metrics[name].dropna()) == 1
    assert len(list((root / "val_samples").iterdir())) == 1

    model = phenoseq.load_model(out)
    how = {"model": model, "n_samples": 2, "device": "cpu"}
    if not of_samples:
        known = {k: getattr(store.manifest, k) for k in ("channels", "pixel_size")}
        assert phenoseq.predict(store.take(np.arange(20)), **known, **how).shape == (20, 60)
        return
    record = model.config.origin if "published" in config else model.config.training
    assert record.split["declared"]["test_he"] == ["1", "2"]
    file = scgenescope / "features/imaging/imagenet/vit-l/round_2.h5ad"
    made = phenoseq.predict(file, sample="Sample_ID", **how)
    assert made.n_vars == 6
    assert set(made.obs["Sample_ID"]) == set(ad.read_h5ad(file, backed="r").obs["Sample_ID"])
    assert np.isfinite(made.X).all()
    again = phenoseq.predict(file, sample="Sample_ID", **how)
    np.testing.assert_array_equal(made.layers["draw_1"], again.layers["draw_1"])


def test_crops_of_samples(counted, plate, tmp_path, capsys):
    """Genes of samples, from images: trained, saved, and predicted by the command."""
    options = {
        "data": "SampleDataModule",
        "data.split": "{by: Metadata_Replicate, block: null, test: 0.2, val: 0.2, cal: 0}",
        "data.n_images": 3,
        "data.n_rna": 2,
        "model.encoder.backbone": "test_resnet",
    }
    given = arguments("simulated_plate", counted, tmp_path / "run", **options)[2:]
    settings = dict(zip(given[::2], given[1::2], strict=True))
    ordered = ["--data", settings.pop("--data"), *(x for pair in settings.items() for x in pair)]
    assert main(["train", *ordered]) == 0
    model = phenoseq.load_model(tmp_path / "run" / "model")
    assert model.config.bag_size == 3
    how = {"n_samples": 3, "device": "cpu", "sample": "Metadata_Well"}
    made = phenoseq.predict(plate.source, model=model, keep_draws=True, **how)
    assert made.n_vars == 60
    assert set(made.obs["Metadata_Well"]) == set(plate.source.obs["Metadata_Well"])
    assert set(made.layers) == {"std", "q05", "q95", "draw", "draw_0", "draw_1", "draw_2"}
    median = model.config.expression.median_library
    drawn = np.expm1(made.to_df("draw").to_numpy())
    np.testing.assert_allclose(drawn.sum(axis=1), median, rtol=1e-3)
    few = made[:2].obs
    again = phenoseq.predict(plate.source, model=model, **how)
    np.testing.assert_array_equal(made.X, again.X)
    assert few["n_cells"].tolist() == [3, 3]


def test_a_run_on_samples_that_was_stopped_goes_on(embedded, tmp_path, monkeypatch):
    """In the middle of an epoch, of a network with dropout."""
    name, more = "scgenescope_published", {"trainer.max_epochs": 2, "data.batch_size": 6}
    more["trainer.limit_train_batches"] = 1.0
    more |= {"trainer.precision": "32-true", "model.sample_every": 9, "data.n_images": 4}
    whole = train(arguments(name, embedded, tmp_path / "whole", **more))
    step = base.TrainingModule.training_step

    def fail(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 3:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(base.TrainingModule, "training_step", fail)
    with pytest.raises(KeyboardInterrupt):
        train(arguments(name, embedded, tmp_path / "stopped", **more))
    monkeypatch.undo()
    again = train(arguments(name, embedded, tmp_path / "stopped", **more))
    one, two = (phenoseq.load_model(folder).state_dict() for folder in (whole, again))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-5)
