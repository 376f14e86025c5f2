"""`phenoseq train` that starts its encoder from pretrained weights; the study of such weights."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

import phenoseq
import phenoseq.training.regressor as regression
from phenoseq.cli import main
from phenoseq.data.samplemodule import SampleDataModule
from phenoseq.data.splits import SplitConfig
from phenoseq.errors import DataError, ModelError, PhenoseqWarning
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.pretrained import read_pretrained
from phenoseq.models.timm_features import load_timm
from phenoseq.training.build import pretrained_for
from phenoseq.training.regressor import RegressorConfig, train_regressor
from phenoseq.training.train import train
from phenoseq.zoo.cards import make_card

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quick")]


@pytest.fixture
def file(tmp_path):
    """A file of weights of test_resnet."""
    network = timm.create_model("test_resnet")
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return path


@pytest.fixture
def study(example):
    return example("embed_study")


def test_a_frozen_backbone_is_that_of_the_file(arguments, store, file, tmp_path):
    how = {"model.encoder_weights": file, "model.encoder.norm": "batch"}
    how |= {"model.frozen_stages": "all", "model.encoder.channel_mode": "separate"}
    assert main(["train", *arguments(epochs=1, **how)]) == 0
    model = PhenoSeq.load(tmp_path / "run/model")
    published = safetensors.torch.load_file(file)
    stem = published.pop("conv1.0.weight")
    own = model.encoder.backbone.state_dict()
    torch.testing.assert_close(own.pop("conv1.0.weight"), stem.sum(dim=1, keepdim=True))
    for name, value in own.items():
        torch.testing.assert_close(value, published[name], msg=name)

    origin = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    raw = json.loads((tmp_path / "run/model/config.json").read_text())
    assert raw["training"]["encoder_weights"] == origin
    assert "encoder_weights" not in raw["encoder"]
    card = make_card("mine", "me/mine", model.config, {})
    assert f"`weights.safetensors` (sha256 `{origin['sha256']}`)" in card
    # what comes of it remembers them too
    again = phenoseq.finetune(model, store.path, split=SplitConfig("Metadata_Well", None), epochs=1)
    assert again.config.training.encoder_weights == origin


def test_the_regressor_starts_as_the_model_did(arguments, store, file, tmp_path):
    encoder = EncoderConfig("test_resnet", norm="batch")
    found = read_pretrained(encoder, store.manifest.crop_px, file)
    config = RegressorConfig(encoder, epochs=1, lr=0)
    how = SplitConfig(by="Metadata_Well", block=None)
    made, _ = train_regressor(store, how, config, tmp_path / "made", median=250.0, start=found)
    own = made.encoder.backbone.state_dict()["layer1.0.conv1.weight"]
    torch.testing.assert_close(own, safetensors.torch.load_file(file)["layer1.0.conv1.weight"])

    assert main(["train", *arguments(epochs=1, **{"model.encoder.norm": "batch"})]) == 0
    with pytest.raises(ModelError, match="started from no pretrained weights"):
        phenoseq.evaluate(tmp_path / "run/model", store.path, encoder_weights=file)
    how = {"model.encoder.norm": "batch", "model.encoder_weights": file}
    how["trainer.default_root_dir"] = tmp_path / "other"
    assert main(["train", *arguments(epochs=1, **how)]) == 0
    with pytest.warns(
        PhenoseqWarning, match=f"started from {file.name}, and that of the regressor"
    ):
        phenoseq.evaluate(tmp_path / "other/model", store.path, part="val", n_samples=1, epochs=1)


def test_a_run_goes_on_with_the_same_file_alone(arguments, file, tmp_path):
    how = {"model.encoder_weights": file, "model.encoder.norm": "batch"}
    train(arguments(epochs=1, **how))
    train(arguments(epochs=1, **how))
    state = {k: v + 1 for k, v in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(state, file)
    with pytest.raises(ModelError, match=r"encoder_weights: .* and was .* when the run began"):
        train(arguments(epochs=1, **how))


def test_features_have_no_backbone(embedded):
    split = SplitConfig(by="Replicate", block=None, test=0.2)
    data = SampleDataModule(embedded.path, split, n_images=2, n_rna=2, batch_size=2)
    data.setup()
    with pytest.raises(DataError, match=r"holds features.*leave out 'encoder_weights'"):
        pretrained_for(data, EncoderConfig("test_resnet", norm="batch"), "hub")


def test_the_study_of_frozen_features(study, store, tmp_path, monkeypatch):
    for name, value in {
        "LITE0": "test_resnet",
        "DINOV2": "test_vit",
        "SIDES": {"test_resnet": 64, "test_vit": 64},
        "SplitConfig": lambda: SplitConfig("Metadata_Well", None, test=0.2),
    }.items():
        monkeypatch.setattr(study, name, value)
    file = tmp_path / "lite0.pth"
    torch.save({f"other.{k}": v for k, v in timm.create_model("test_resnet").state_dict().items()},
               file)  # fmt: skip
    args = [str(store.path), str(tmp_path / "out"), "--lite0", str(file)]
    study.main([*args, "--train", "120", "--val", "40"])
    rows = pd.read_csv(tmp_path / "out/results.csv").set_index("features")
    assert list(rows["numbers"]) == [25, 480, 96, 480, 96, 320]
    assert rows["pcc_gene"].between(-1, 1).all()
    assert load_timm("test_resnet", ("DNA",), weights=tmp_path / "out/test_resnet.safetensors")


def test_the_study_of_encoders(example, store, file, tmp_path, monkeypatch):
    study = example("encoder_study")
    encoder = EncoderConfig("test_resnet", norm="batch")
    monkeypatch.setattr(study, "ENCODERS", {"a": (encoder, False), "b": (encoder, True)})
    monkeypatch.setattr(study, "AUGMENTATIONS", {study.RELEASED: (8, 0.1), "none": (1, 0.0)})
    monkeypatch.setattr(study, "SplitConfig", lambda: SplitConfig("Metadata_Well", None, test=0.2))
    args = [str(tmp_path / "out"), str(store.path), "--weights", str(file), "--encoders", "a", "b"]
    args += ["--augmentations", "all"]
    study.main(args)
    rows = pd.read_csv(tmp_path / "out/results.csv")
    assert list(rows["encoder"]) == ["ridge on intensities", "a", "a", "b", "b"]
    assert list(rows["augmentation"][1:]) == [study.RELEASED, "none"] * 2
    assert rows["pcc_gene"].between(-1, 1).all()
    assert rows["pcc_gene"].nunique() == 5
    monkeypatch.setattr(regression, "_RegressorModule", None)  # nothing is trained again
    study.main(args)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out/results.csv"), rows)


def test_the_ridge_of_the_study(study):
    x, y = np.random.default_rng(0).normal(size=(2, 30, 9)).astype(np.float32)
    fit, at = np.arange(30) < 20, np.arange(30) >= 20
    for features in (x, np.concatenate([x, x**2, x**3], axis=1)):  # fewer, and more, than cells
        scaler = StandardScaler().fit(features[fit])
        for penalty, found in zip(
            [0.5, 50], study.ridge(features, y, fit, at, [0.5, 50]), strict=True
        ):
            fitted = Ridge(penalty).fit(scaler.transform(features[fit]), y[fit])
            wanted = fitted.predict(scaler.transform(features[at]))
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
