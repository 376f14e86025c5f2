"""Weights from the hub: asked for, fetched once, checked ever after. A local server stands in."""

from __future__ import annotations

import hashlib
import json
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hub_server import Repo

NAME, REPO, COMMIT = "scgenescope-scgpt", "Sentinal4D/PhenoSeq", "c0ffee" + "0" * 34


@pytest.fixture(scope="module")
def files(tmp_path_factory, shared_data):
    """The two files of the repository, the checkpoint being the tiny one."""
    folder = tmp_path_factory.mktemp("repo")
    shutil.copy(shared_data / "reference_phenoseq" / "tiny_checkpoint.pt", folder / "best_model.pt")
    (folder / "best_model.pt").chmod(0o644)
    rng = np.random.default_rng(0)
    np.savez(folder / "img_norm.npz", mean=rng.normal(size=40), std=rng.random(40) + 0.5)
    return folder


@pytest.fixture
def repo(tmp_path, files, hub):
    """The repository on the hub."""
    repo = hub.repos[REPO] = Repo({}, {})
    repo.add(shutil.copytree(files, tmp_path / "repo"), COMMIT)
    return repo


@pytest.fixture
def kept(machine):
    """Where the converted model is kept."""
    return machine.home / "assets" / "phenoseq" / REPO.replace("/", "--") / NAME


def test_first_use_fetches_and_second_is_offline(machine, offline, hub, repo, kept):
    refused = machine.load(NAME)
    for part in ("REFUSED", "2.7 GB", "download=True", "--yes"):
        assert part in refused
    assert hub.asked == []
    assert machine.load(NAME, download=True) == str(kept / "model")
    record = json.loads((kept / "record.json").read_text())
    assert record["commit"] == COMMIT
    for name, digest in record["files"].items():
        assert digest == hashlib.sha256((repo.commits[COMMIT] / name).read_bytes()).hexdigest()
    assert set(record["files"]) == {"best_model.pt", "img_norm.npz"}
    hub.asked.clear()
    assert offline.load(NAME) == offline.load(NAME, download=True) == str(kept / "model")
    assert machine.load(NAME) == str(kept / "model")
    assert hub.asked == []
    assert machine.command("models", "verify", NAME) == (0, f"ok   {NAME} model.safetensors\n")


def test_what_has_changed_behind_the_same_commit_is_refused_and_removed(machine, repo, kept):
    assert machine.load(NAME, download=True) == str(kept / "model")
    shutil.rmtree(machine.home / "hub")
    shutil.rmtree(kept / "model")
    path = repo.commits[COMMIT] / "img_norm.npz"
    original = path.read_bytes()
    np.savez(path, mean=np.zeros(40), std=np.ones(40))
    refused = machine.load(NAME, download=True)
    assert refused.startswith(f"REFUSED {REPO}: ['img_norm.npz'] at commit {COMMIT} are not")
    assert str(kept) in refused
    assert not (kept / "model").exists()
    assert not machine.cached("hub/**/img_norm.npz")
    path.write_bytes(original)
    shutil.rmtree(machine.home / "hub")
    assert machine.load(NAME, download=True) == str(kept / "model")


def test_what_has_changed_among_what_was_converted_is_refused(machine, repo, kept):
    machine.load(NAME, download=True)
    weights = kept / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "is not what was converted there" in machine.load(NAME)
    status, printed = machine.command("models", "verify")
    assert status == 1
    assert f"BAD  {NAME} model.safetensors: " in printed
    assert "ok   xenium-pancreas model.safetensors\n" in printed
    shutil.rmtree(kept / "model")
    assert machine.load(NAME) == str(kept / "model")


def test_a_newer_commit_is_not_taken_unasked(machine, hub, repo, kept):
    """Nor is anything downloaded where that was not allowed."""
    assert machine.load(NAME, download=True) == str(kept / "model")
    repo.add(repo.commits[COMMIT], "d" * 40)
    hub.asked.clear()
    shutil.rmtree(kept / "model")
    assert machine.load(NAME, download=True) == str(kept / "model")
    shutil.rmtree(kept)
    assert machine.load(NAME) == str(kept / "model")
    assert hub.gets() == []


def test_no_network(machine, offline, hub, kept):
    with hub.down():
        refused = machine.load(NAME, download=True)
    assert refused.startswith(f"REFUSED {REPO}: cannot be had from {hub.url}")
    assert "Check the network" in refused
    assert str(machine.home) in refused
    assert "HF_HUB_OFFLINE" in offline.load(NAME, download=True)
    assert not (kept / "record.json").exists()


def test_a_file_that_is_not_there(machine, repo):
    folder = repo.commits.pop(COMMIT)
    (folder / "best_model.pt").unlink()
    repo.add(folder, "e" * 40)
    assert f"has no best_model.pt at commit {'e' * 40}" in machine.load(NAME, download=True)


def test_a_pickle_is_not_loaded_by_the_name_of_its_repository(machine, hub, repo):
    """It is not even fetched; and the message says how the zoo offers the same weights."""
    refused = machine.load(REPO)
    assert "no config.json there" in refused
    assert "['best_model.pt'] are pickles, which phenoseq never opens" in refused
    assert f"The zoo has it converted: '{NAME}'" in refused
    assert hub.gets() == []


def test_the_command_asks_before_it_downloads(tmp_path, machine, hub, repo):
    rng = np.random.default_rng(1)
    obs = pd.DataFrame({"Sample_ID": ["a", "b"] * 10}, index=[f"c{i}" for i in range(20)])
    features = ad.AnnData(rng.normal(size=(20, 40)).astype(np.float32), obs=obs)
    features.write_h5ad(tmp_path / "f.h5ad")
    command = ["predict", str(tmp_path / "f.h5ad"), "--model", NAME]
    command += ["--sample", "Sample_ID", "-o", str(tmp_path / "o.h5ad"), "--n-samples", "2"]
    command += ["--steps", "3", "--device", "cpu"]
    status, printed = machine.command(*command)
    assert status == 1
    assert "say --yes to download 2.7 GB" in printed
    assert hub.gets() == []
    status, printed = machine.command(*command, "--yes")
    assert status == 0, printed
    assert "2 bags, scGPT embeddings of 16 numbers" in printed
    origin = ad.read_h5ad(tmp_path / "o.h5ad").uns["phenoseq"]["origin"]
    assert (origin["repo"], origin["commit"], origin["weights"]) == (REPO, COMMIT, "ema")


ROAD = """
import phenoseq, torch
from torchvision.models import VisionTransformer
from phenoseq.models.features import FeatureConfig, FeatureExtractor
stains = ("DNA", "RNA", "AGP", "Mito", "ER")
sizes = dict(patch_size=32, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, image_size=224)
torch.manual_seed(0)
vit = VisionTransformer(**sizes)
small = FeatureExtractor(FeatureConfig("small", stains, **sizes), vit.state_dict(), "0" * 64)
phenoseq.load_model({name!r}, download=True)
phenoseq.predict({folder!r}, model={name!r}, sample="Metadata_Well", pixel_size=0.598,
                 eight_bit="full", extractor=small, n_samples=3, steps=4, device="cpu", out={out!r})
"""


def test_from_real_images_to_embeddings(tmp_path, machine, repo, shared_data):
    """Five stains of one field, by the names in its table; a small random network of features."""
    folder = shared_data / "cell_painting" / "pediatric"
    out = tmp_path / "o.h5ad"
    machine.run(ROAD.format(folder=str(folder), name=NAME, out=str(out)))
    made = ad.read_h5ad(out)
    assert made.shape == (1, 16)
    (bag,) = made.obs.itertuples()
    assert (bag.Metadata_Well, bag.n_cells, bag.n_cut_by_border, bag.filled) == ("C03", 5, 5, True)
    assert len(json.loads(bag.cells)) == 5
    assert len(json.loads(bag.filled_with)) == 11
    draws = [made.layers[f"draw_{k}"] for k in range(3)]
    np.testing.assert_array_equal(made.X, draws[0])
    assert np.isfinite(draws).all()
    assert np.abs(draws[0] - draws[1]).max() > 0.1
    how = made.uns["phenoseq"]
    assert (how["model"], how["pairing"]) == (NAME, "sample")
    assert how["features"]["eight_bit"] == "full"
    assert how["features"]["crop_pixel_size"] == 0.598
