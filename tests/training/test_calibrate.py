"""Models are recalibrated on calibration cells alone: at the end of training, and later."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import phenoseq
from phenoseq import tuning as tuning_module
from phenoseq.cli import main
from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.samplemodule import SampleDataModule
from phenoseq.data.splits import SplitConfig
from phenoseq.errors import DataError, ModelError
from phenoseq.models.counts import nb_cdf
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.encoder import EncoderConfig
from phenoseq.training import finalise as finalise_module
from phenoseq.training.finalise import finalise
from phenoseq.training.module import PhenoSeqModule

SPLIT = SplitConfig(by="Metadata_Well", block=None, test=0.2, val=0.2, cal=0.3)


@pytest.fixture(scope="module")
def data(store):
    made = StoreDataModule(store.path, SPLIT)
    made.setup()
    return made


@pytest.fixture
def model(data, quick):
    """A small model that was not trained, but for its decoder."""
    module = PhenoSeqModule(
        encoder=EncoderConfig("test_resnet"),
        denoiser=DenoiserConfig(dim=32, depth=2, heads=2, tokens=2),
        components=6,
        hidden=16,
    )
    torch.manual_seed(0)
    return module.build(data)[0].eval()


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Be content with few cells, and give a function that says with how few."""

    def least(n):
        for module in (finalise_module, tuning_module):
            monkeypatch.setattr(module, "LEAST", n)

    least(50)
    monkeypatch.setattr(finalise_module, "_CALIBRATION_CELLS", 10**6)
    return least


def ranks(model, data, part):
    """Randomised PIT of the counts of a part under the model, before and after."""
    space, pits = model.expression, []
    with torch.inference_mode():
        for counts, _, latent, _ in finalise_module._drawn(model, data, part, 10**6, 8, 1):
            rates, _ = space.decode(latent)
            below, at_most = nb_cdf(counts, rates * counts.sum(1)[:, None, None], space.theta)
            level = space.level(rates)
            u = below + torch.rand(below.shape) * (at_most - below)
            pits.append(torch.stack([u, model.config.recalibration.at(level)(u)]))
    return torch.cat(pits, dim=1).numpy()


def test_the_end_of_training_fits_it_on_calibration_cells_alone(model, data, monkeypatch):
    parts = []
    drawn = finalise_module._drawn

    def seen(model, data, part, *how):
        parts.append(part)
        return drawn(model, data, part, *how)

    monkeypatch.setattr(finalise_module, "_drawn", seen)
    with torch.no_grad():
        model.expression.log_theta -= 2.5  # counts that spread far too much, and are mostly zero
    done = finalise(model, data)
    assert parts == ["train", "cal", "val"]
    before, after = ranks(done, data, "val")
    wrong, mended = (float((np.abs(u - 0.5) <= 0.25).mean()) for u in (before, after))
    assert abs(wrong - 0.5) > 0.2
    assert mended == pytest.approx(0.5, abs=0.05)


def test_draws_have_the_mean_of_each_gene_of_the_training_cells(model, data):
    """Whatever the decoder's levels were, and with what the recalibration does to them."""
    generator = torch.Generator().manual_seed(0)
    bias = model.expression.decoder[2].bias
    wrong = 0.7 * torch.randn(len(bias), generator=generator)
    with torch.no_grad():
        bias += wrong

    def off(model) -> float:
        how, made, true = model.config.recalibration, [], []
        with torch.inference_mode():
            for counts, _, latent, _ in finalise_module._drawn(model, data, "train", 10**6, 8, 5):
                rates, library = model.expression.decode(latent)
                u = torch.rand(len(counts), 8 if how else 4, len(bias), generator=generator)
                drawn = model.expression.draw(rates, library, u, how)
                made.append(model.expression.scaled(drawn).mean(dim=1))
                true.append(model.expression.scaled(counts))
        seen = torch.cat(true).mean(dim=0) > 0.2
        return float(
            (torch.cat(made).mean(dim=0) / torch.cat(true).mean(dim=0) - 1)[seen].abs().mean()
        )

    before = off(model)
    done = finalise(model, data)
    assert done.config.recalibration is not None
    assert before > 0.3
    assert off(done) < 0.05


def test_few_calibration_cells_leave_a_model_as_it_is(model, data, few):
    few(10**6)
    assert finalise(model, data).config.recalibration is None
    few(data.n_cells("cal") + 1)
    with pytest.raises(DataError, match=r"calibration part has \d+ cells"):
        phenoseq.calibrate(model, data.store)


def test_without_a_calibration_part_there_is_nothing_to_fit(model, store):
    data = StoreDataModule(store.path, replace(SPLIT, cal=0.0))
    data.setup()
    assert finalise(model, data).config.recalibration is None
    training = replace(model.config.training, split=asdict(data.split), split_digest="")
    model.config = replace(model.config, training=replace(training, identity=""))
    with pytest.raises(DataError, match="cal part has no cells"):
        phenoseq.calibrate(model, store.path)


def test_a_model_is_calibrated_later_by_the_command(model, data, tmp_path, capsys):
    finalise(model, data)
    model.config = replace(model.config, recalibration=None)
    alike = finalise_module.recalibration_of(model, model.expression, data)
    folder = model.save(tmp_path / "base")
    new = tmp_path / "new"
    assert main(["calibrate", str(folder), str(data.store), "-o", str(new)]) == 0
    assert str(new) in capsys.readouterr().out
    made = phenoseq.load_model(new)
    assert phenoseq.load_model(folder).config.recalibration is None
    assert made.config == replace(model.config, recalibration=alike)
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert main(["calibrate", str(folder), str(data.store), "-o", str(new)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_other_cells_than_were_kept_for_it_are_refused(model, data):
    model.config = replace(
        model.config, training=replace(model.config.training, split_digest="0" * 64)
    )
    with pytest.raises(DataError, match="calibrated on training cells"):
        phenoseq.calibrate(model, data.store)


def test_models_of_samples_too(counted, quick, few):
    few(10)
    split = SplitConfig(by="Metadata_Replicate", block=None, test=0.2, val=0.2, cal=0.2)
    data = SampleDataModule(counted.path, split, n_images=3, n_rna=2)
    data.setup()
    module = PhenoSeqModule(
        encoder=EncoderConfig("test_resnet"),
        denoiser=DenoiserConfig(dim=32, depth=2, heads=2, tokens=2),
        components=5,
        hidden=8,
    )
    model = finalise(module.build(data)[0], data)
    assert model.config.recalibration is not None
    with pytest.raises(ModelError, match="models of single cells"):
        phenoseq.calibrate(model, data.store)
