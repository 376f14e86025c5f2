"""Models by name: each is whole, small, documented, and does what its card says."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import phenoseq
from phenoseq.cli import main
from phenoseq.data.simulate import CHANNELS, simulate_plate
from phenoseq.errors import ModelError
from phenoseq.evaluation.metrics import pcc_gene
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.published_config import Origin, PublishedConfig
from phenoseq.zoo import cards
from phenoseq.zoo.about import stains_of
from phenoseq.zoo.checkpoint import HubCheckpoint
from phenoseq.zoo.convert import sha256_of
from phenoseq.zoo.registry import Embedded, find, list_models, load_model

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("xenium-pancreas", "simulated-plate")
FROM_HUB = ("scgenescope-scgpt",)
each = pytest.mark.parametrize("name", NAMES)


def test_names():
    assert tuple(entry.name for entry in list_models()) == NAMES + FROM_HUB
    assert all(isinstance(find(name).source, Embedded) for name in NAMES)
    assert all(isinstance(find(name).source, HubCheckpoint) for name in FROM_HUB)
    assert phenoseq.list_models() == list_models()


@each
def test_an_entry_agrees_with_its_files(name):
    entry = find(name)
    weights = entry.folder / "model.safetensors"
    assert sha256_of(weights) == entry.sha256
    assert weights.stat().st_size == entry.size
    config = load_model(name).config
    assert entry.pairing == config.pairing
    assert entry.channels == stains_of(config)
    assert entry.pixel_size == config.image.pixel_size
    assert (entry.n_vars, entry.unit) == (len(config.expression.genes), "genes")
    assert entry.is_here


@pytest.mark.parametrize("name", FROM_HUB)
def test_an_entry_of_the_hub_agrees_with_what_its_conversion_gives(name):
    entry, config = find(name), PublishedConfig(Origin("", "", "ema"))
    assert (entry.n_vars, entry.pairing) == (config.sizes.embedding, config.pairing)
    assert entry.channels == config.features.channels
    assert config.embedding in entry.unit
    assert not entry.sha256, "no digest is known"


@each
def test_a_folder_holds_config_scores_and_safetensors_alone(name):
    files = sorted(p.name for p in find(name).folder.rglob("*"))
    assert files == ["config.json", "metrics.json", "model.safetensors"]


def test_embedded_weights_are_small():
    embedded = [entry for entry in list_models() if isinstance(entry.source, Embedded)]
    files = [p for entry in embedded for p in entry.folder.rglob("*") if p.is_file()]
    assert len(files) == 3 * len(NAMES)
    assert sum(p.stat().st_size for p in files) < 60e6


@each
def test_a_model_loads_and_knows_where_it_comes_from(name):
    model = load_model(name)
    config = model.config
    assert not model.training
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    assert len(config.training.reliability) == len(config.expression.genes)
    assert np.isfinite(config.training.reliability).all()
    assert np.median(config.training.reliability) > 0
    assert len(config.training.identity) == len(config.training.split_digest) == 64
    assert config.training.n_cells > 1000
    assert "/" not in config.training.source
    assert not torch.equal(model.context_whiten, torch.eye(config.denoiser.dim))


def test_xenium_pancreas_reads_the_stains_of_a_section():
    config = load_model("xenium-pancreas").config
    assert config.image.channels == ("DNA", "Boundary", "18S", "InteriorProtein")
    assert len(config.expression.genes) == 377
    symbols = [g for g in config.expression.genes if not g.startswith("ENSG")]
    assert symbols == ["C1orf194", "CLECL1", "MTRNR2L11"]  # the panel has no id for them


@pytest.fixture(scope="module")
def plate():
    """A plate that no training saw; training plates have small seeds."""
    return simulate_plate(seed=900_001, wells_per_treatment=2, sites_per_well=1, cells_per_site=24)


@pytest.fixture(scope="module")
def predicted(plate):
    return phenoseq.predict(plate.source, model="simulated-plate", n_samples=8, device="cpu")


def test_simulated_plate_predicts_another_plate(plate, predicted):
    median = predicted.uns["phenoseq"]["median_library"]
    truth = np.log1p(plate.rates * median)
    real = pcc_gene(truth, np.asarray(predicted.X))
    shuffled = pcc_gene(truth[np.random.default_rng(0).permutation(len(truth))], predicted.X)
    assert np.median(real) > 0.4
    assert np.median(np.abs(shuffled)) < 0.12
    assert (real > np.quantile(shuffled, 0.95)).mean() > 0.75


def test_simulated_plate_tells_treatments_apart(plate, predicted):
    """The predicted change against the control points where the true one does."""
    treatment = predicted.obs["Metadata_Treatment"].to_numpy()
    median = predicted.uns["phenoseq"]["median_library"]
    truth = np.log1p(plate.rates * median)

    def change(values, name):
        return values[treatment == name].mean(axis=0) - values[treatment == "DMSO"].mean(axis=0)

    for name in ("drugA", "drugB", "drugC"):
        assert np.corrcoef(change(truth, name), change(predicted.X, name))[0, 1] > 0.6


def test_simulated_plate_finds_other_plates_familiar(predicted):
    assert 0.5 < np.median(predicted.obs["ood_score"]) < 2


def test_simulated_plate_spreads_its_draws_as_counts_do(plate, predicted):
    median = predicted.uns["phenoseq"]["median_library"]
    counts = plate.source.counts.toarray()
    measured = np.log1p(counts / counts.sum(axis=1, keepdims=True) * median)
    ratio = predicted.layers["draw"].toarray().var(axis=0) / measured.var(axis=0)
    assert 0.7 < np.median(ratio) < 1.4
    low, high = predicted.layers["q05"], predicted.layers["q95"]
    assert 0.8 < ((measured >= low - 1e-4) & (measured <= high + 1e-4)).mean() < 0.99


@pytest.mark.parametrize("missing", CHANNELS)
def test_simulated_plate_does_with_a_stain_missing(plate, predicted, missing):
    keep = [c for c in CHANNELS if c != missing]
    fields = {
        name: replace(
            image,
            levels=tuple(
                replace(level, read=lambda *at, read=level.read: read(*at)[_places(keep)])
                for level in image.levels
            ),
        )
        for name, image in plate.source.fields.items()
    }
    source = replace(plate.source, channels=tuple(keep), fields=fields)
    with pytest.warns(phenoseq.errors.PhenoseqWarning, match=missing):
        got = phenoseq.predict(source, model="simulated-plate", n_samples=2, device="cpu")
    truth = np.log1p(plate.rates * got.uns["phenoseq"]["median_library"])
    assert np.median(pcc_gene(truth, got.X)) > 0.2


def _places(names):
    return [CHANNELS.index(name) for name in names]


# ------------------------------------------------------------------------------------ bad names


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("xenium-pancras", "xenium-pancreas"),
        ("pancreas", "xenium-pancreas"),
        ("Simulated-Plate", "simulated-plate"),
        ("simulated_plate", "simulated-plate"),
    ],
)
def test_an_unknown_name_tells_the_nearest(name, near):
    with pytest.raises(ModelError, match=rf"no model '{name}'.*did you mean '{near}'\?"):
        load_model(name)


def test_a_name_like_no_other_tells_them_all():
    with pytest.raises(ModelError, match=r"no model 'qqq'.*'xenium-pancreas', 'simulated-plate'"):
        load_model("qqq")


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json there, so it is no phenoseq model"):
        load_model(tmp_path)


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A copy of the embedded weights, for a test to spoil."""
    folder = tmp_path / "weights" / "simulated-plate"
    shutil.copytree(find("simulated-plate").folder, folder)
    monkeypatch.setattr(cards, "files", lambda package: tmp_path)
    assert isinstance(load_model("simulated-plate"), PhenoSeq)
    return folder


def test_other_weights_than_the_released_are_refused(elsewhere):
    weights = elsewhere / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match="not the file that was released"):
        load_model("simulated-plate")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_installation_without_weights_says_so(elsewhere, name):
    (elsewhere / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_model("simulated-plate")


def test_a_reader_that_has_enough(monkeypatch):
    """As in ``phenoseq models | head -1``: no traceback."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["models", "where"]) == 1
