"""Baselines: what they predict, and that they are fitted on the training cells alone."""

from __future__ import annotations

import errno
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse, stats
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from phenoseq.data.datamodule import split_of
from phenoseq.data.splits import SplitConfig
from phenoseq.errors import DataError, ModelError
from phenoseq.evaluation.report import normalised
from phenoseq.models.config import ImageConfig, PhenoSeqConfig, TrainingRecord
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.expression import fit_expression_space
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.training import regressor as regression
from phenoseq.training.baselines import BASELINES, fit_baselines, intensity_statistics
from phenoseq.training.checkpoints import steps_done
from phenoseq.training.regressor import CountingNoise, RegressorConfig, fit_noise, train_regressor

HOW = SplitConfig(by="Metadata_Well", block=None)
BUDGET = RegressorConfig(
    EncoderConfig("test_resnet"), dim=16, hidden=32, epochs=4, batch_size=32, warmup_steps=5
)  # fmt: skip


@pytest.fixture(scope="module")
def split(store):
    return split_of(store, HOW)


@pytest.fixture(scope="module")
def model(store) -> PhenoSeq:
    """One of random weights."""
    manifest = store.manifest
    space = fit_expression_space(
        store.table().X, manifest.genes, manifest.symbols, components=6, hidden=16
    )
    ones = (1.0,) * len(manifest.channels)
    image = ImageConfig(
        manifest.channels, manifest.pixel_size, manifest.crop_px, manifest.dtype,
        tuple(2000 * m for m in ones), tuple(1000 * m for m in ones), ones,
    )  # fmt: skip
    record = TrainingRecord("", manifest.identity, {}, "", 1, 0, "0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = PhenoSeqConfig(
            image, space.config, record, EncoderConfig("test_resnet"), DenoiserConfig(32, 2, 2)
        )
        return PhenoSeq(config, space).eval()


@pytest.fixture(scope="module")
def made(model, store, split, tmp_path_factory):
    return fit_baselines(
        model, store, split, HOW, split.rows("test"),
        regressor=BUDGET, folder=tmp_path_factory.mktemp("regressor") / "it", n_draws=3, seed=3,
    )  # fmt: skip


def test_intensity_statistics_by_hand():
    crops = np.zeros((1, 2, 8, 8), dtype=np.uint16)
    crops[0, 0] = 5
    crops[0, 1, 3:5, 3:5] = 32  # the middle quarter of each side
    mean, std, median, high, centre = intensity_statistics(crops)[0].reshape(5, 2)
    np.testing.assert_allclose(mean, [5, 2])
    np.testing.assert_allclose(std, [0, np.sqrt(32 * 32 * 4 / 64 - 4)], rtol=1e-6)
    np.testing.assert_allclose(median, [5, 0])
    np.testing.assert_allclose(high, [5, 32])
    np.testing.assert_allclose(centre, [5, 32])


def test_every_baseline_is_there(made, store, split):
    facts = made.uns["phenoseq"]
    assert facts["baselines"] == list(BASELINES)
    assert set(BASELINES) <= set(made.layers)
    assert len(made.layers) == len(BASELINES) + 2 * 3
    assert list(made.obs_names) == list(store.table().obs_names[split.rows("test")])
    assert all(np.isfinite(made.layers[key]).all() for key in BASELINES)
    assert facts["regressor"]["steps"] == 4 * -(-len(split.rows("train")) // 32)


def test_means_and_ridge_are_what_they_say(made, model, store, split):
    train, test = split.rows("train"), split.rows("test")
    median = model.config.expression.median_library
    known = normalised(store.table().X[train], median)
    np.testing.assert_allclose(made.layers["training_mean"], np.tile(known.mean(0), (len(test), 1)))
    scaler = StandardScaler()
    x = scaler.fit_transform(intensity_statistics(store.take(train)))
    ridge = RidgeCV(alphas=(0.1, 1, 10, 100, 1000, 10000)).fit(x, known)
    expected = ridge.predict(scaler.transform(intensity_statistics(store.take(test))))
    np.testing.assert_allclose(made.layers["ridge"], expected, rtol=1e-3, atol=1e-4)


def test_random_cells_are_real_training_cells(made, model, store, split):
    known = normalised(store.table().X[split.rows("train")], model.config.expression.median_library)
    profiles = {row.tobytes() for row in known}
    for k in range(3):
        drawn = made.layers[f"random_draw_{k}"]
        assert all(row.tobytes() in profiles for row in drawn.toarray())
    assert (made.layers["random_draw_0"] != made.layers["random_draw_1"]).nnz


def test_fitted_ones_beat_the_mean(made, model, store, split):
    """Images tell something, which all of them see."""
    table = store.table()
    true = normalised(table.X[split.rows("test")], model.config.expression.median_library)

    def error(key):
        return ((made.layers[key] - true) ** 2).mean()

    errors = {key: error(key) for key in BASELINES}
    assert max(errors[k] for k in ("ridge", "knn", "mlp")) < errors["training_mean"], errors
    assert errors["random"] > errors["training_mean"]


def test_crops_of_another_kind_are_refused(model, store, split, tmp_path):
    image = replace(model.config.image, crop_px=64)
    other = PhenoSeq(replace(model.config, image=image))
    with pytest.raises(DataError, match="fitted on crops as the model reads them"):
        fit_baselines(
            other, store, split, HOW, split.rows("test"), regressor=BUDGET, folder=tmp_path
        )


# ------------------------------------------------------------------------------------ the regressor


def test_a_stopped_regressor_goes_on_and_a_finished_one_is_taken(store, tmp_path, monkeypatch):
    """The disk is full after the second epoch, and it is killed when all is done but the saving."""
    config = replace(BUDGET, epochs=3)
    whole, _ = train_regressor(store, HOW, config, tmp_path / "whole", median=250.0)
    write, written = torch.save, []

    def full(checkpoint, file):
        written.append(checkpoint["global_step"])
        if len(written) == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(checkpoint, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DataError, match="the checkpoint before it is as it was"):
        train_regressor(store, HOW, config, tmp_path / "cut", median=250.0)
    (last,) = (tmp_path / "cut").glob("*.run/checkpoints/*")
    assert steps_done(last) == written[0] == written[1] / 2
    monkeypatch.undo()

    def killed(*args):
        raise RuntimeError("killed")

    monkeypatch.setattr(regression, "save_folder", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train_regressor(store, HOW, config, tmp_path / "cut", median=250.0)
    assert not (tmp_path / "cut" / "config.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(regression._RegressorModule, "training_step", killed)  # is not called
    again, facts = train_regressor(store, HOW, config, tmp_path / "cut", median=250.0)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip
    monkeypatch.setattr(regression, "_RegressorModule", None)  # nothing is trained any more
    taken, same = train_regressor(store, HOW, config, tmp_path / "cut", median=250.0)
    assert same == facts
    torch.testing.assert_close(taken.state_dict(), again.state_dict())
    with pytest.raises(ModelError, match="holds a regressor of another store, split or"):
        train_regressor(store, HOW, replace(config, epochs=9), tmp_path / "cut", median=250.0)


# ---------------------------------------------------------------------------------- counting noise


def test_the_noise_that_made_counts_is_found():
    rng = np.random.default_rng(0)
    n, theta = 8000, np.tile([0.5, 2.0, 8.0, 50.0], 20)
    share = rng.dirichlet(np.full(80, 5.0), n)
    log_library = rng.normal(7, 0.5, n)
    total = np.exp(log_library + 0.3 * rng.normal(size=n))
    mu = share * total[:, None]
    counts = rng.poisson(rng.gamma(theta, mu / theta)) + (np.arange(80) == 0)
    bias = rng.uniform(0.5, 2, 80)  # as of the mean of a logarithm
    mean = np.log1p(bias * share * 100).astype(np.float32)
    noise = fit_noise(sparse.csr_matrix(counts), mean, log_library.astype(np.float32))
    found = np.median(noise.theta.reshape(20, 4), axis=0)
    np.testing.assert_allclose(found, theta[:4], rtol=0.3)
    assert noise.library_std == pytest.approx(0.3, abs=0.05)
    found = noise.rates(mean)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(found.mean(axis=0)[1:], share.mean(axis=0)[1:], rtol=0.06)


def test_draws_are_negative_binomial():
    rng = np.random.default_rng(0)
    theta = np.array([2.0, 1e4])
    noise = CountingNoise(np.ones(2), theta, 0.0, 20.0)
    mean = np.log1p(np.tile([[1.0, 999.0]], (20_000, 1))).astype(np.float32)
    drawn = noise.draw(mean, np.full(20_000, np.log(5000.0), np.float32), 1000.0, rng)
    share = np.expm1(drawn.toarray()[:, 0]) / 1000
    counts = np.rint(share * 5000)  # the second gene is nearly all of the library
    assert counts.mean() == pytest.approx(5, rel=0.05)
    assert counts.var() == pytest.approx(5 + 25 / 2, rel=0.1)
    zeros = (counts == 0).mean()
    assert zeros == pytest.approx(stats.nbinom.pmf(0, 2, 2 / 7), abs=0.02)
