"""Weights from the hub: asked for, fetched once, checked ever after. A local server stands in."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

NAME, REPO, COMMIT = "scgenescope-scgpt", "Sentinal4D/PhenoSeq", "c0ffee" + "0" * 34
#: What every script can do: load, and remove what is cached or kept. Loads print their outcome.
START = """
import shutil
from pathlib import Path
import numpy as np, phenoseq
HUB, KEPT, FILES = Path({home!r}) / "hub", Path({kept!r}), Path({files!r})
def load(download=False):
    try:
        model = phenoseq.load_model({name!r}, download=download)
        print("LOADED", model.config.origin.commit, model.config.sizes.features)
    except phenoseq.ModelError as error:
        print("REFUSED", error)
"""
LOADED = f"LOADED {COMMIT} 40"

PATH = Path(__file__).with_name("hub_server.py")
spec = importlib.util.spec_from_file_location("hub_server", PATH)
hub_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub_server)


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
def hub(tmp_path, files):
    folder = shutil.copytree(files, tmp_path / "repo")
    with hub_server.serve(folder, REPO, COMMIT) as server:
        yield server


class Machine:
    """A machine with a cache of its own; every run is a fresh interpreter."""

    def __init__(self, home: Path, hub) -> None:
        self.home, self.endpoint, self.files = home, hub.url, hub.folder
        self.kept = home / "assets" / "phenoseq" / REPO.replace("/", "--") / NAME

    def run(self, *command: str, offline: bool = False):
        drop = ("HF_", "HUGGINGFACE_", "XDG_", "TRANSFORMERS_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        env |= {"HF_HOME": str(self.home), "HF_ENDPOINT": self.endpoint, "HF_HUB_ETAG_TIMEOUT": "3"}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1" if offline else "0"}
        return subprocess.run(
            [sys.executable, *command], env=env, input="", capture_output=True, text=True
        )

    def script(self, code: str, *, offline: bool = False) -> list[str]:
        """Run some code after `START`; return what its loads printed."""
        paths = {"home": str(self.home), "kept": str(self.kept), "files": str(self.files)}
        done = self.run("-c", START.format(name=NAME, **paths) + code, offline=offline)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


@pytest.fixture
def machine(tmp_path, hub):
    return Machine(tmp_path / "home", hub)


def test_first_use_fetches_and_second_is_offline(machine, hub):
    (refused,) = machine.script("load()")
    assert refused.startswith("REFUSED")
    for part in ("2.7 GB", "download=True", "--yes"):
        assert part in refused
    assert not any("/resolve/" in line for line in hub.asked)
    assert machine.script("load(True)") == [LOADED]
    record = json.loads((machine.kept / "record.json").read_text())
    assert record["commit"] == COMMIT
    for name, digest in record["files"].items():
        assert digest == hashlib.sha256((hub.folder / name).read_bytes()).hexdigest()
    assert set(record["files"]) == {"best_model.pt", "img_norm.npz"}
    hub.asked.clear()
    assert machine.script("load(); load(True)", offline=True) == [LOADED] * 2
    assert hub.asked == []


def test_what_has_changed_is_refused(machine):
    """Behind the same commit, and among what was converted."""
    first, changed, mended, spoiled, again = machine.script(
        """
load(True)
shutil.rmtree(HUB)
shutil.rmtree(KEPT / "model")
path = FILES / "img_norm.npz"
original = path.read_bytes()
np.savez(path, mean=np.zeros(40), std=np.ones(40))
load(True)
assert not (KEPT / "model").exists()
shutil.rmtree(HUB)
path.write_bytes(original)
load(True)
weights = KEPT / "model" / "model.safetensors"
data = bytearray(weights.read_bytes())
data[-1] ^= 1
weights.write_bytes(data)
load()
shutil.rmtree(KEPT / "model")
load()
"""
    )
    assert first == mended == again == LOADED
    assert changed.startswith(f"REFUSED {REPO}: ['img_norm.npz'] at commit {COMMIT} are not")
    assert str(machine.kept) in changed
    assert "is not what was converted there" in spoiled


def test_a_newer_commit_is_not_taken_unasked(machine, hub):
    """Nor is anything downloaded where that was not allowed."""
    assert machine.script("load(True)") == [LOADED]
    hub.commit = "d" * 40
    hub.asked.clear()
    code = "shutil.rmtree(KEPT / 'model'); load(True); shutil.rmtree(KEPT); load()"
    assert machine.script(code) == [LOADED] * 2
    assert not any("d" * 40 in line or "main" in line for line in hub.asked)


@pytest.mark.parametrize("offline", [True, False])
def test_no_network(machine, hub, offline):
    hub.shutdown()
    hub.server_close()
    (refused,) = machine.script("load(True)", offline=offline)
    assert refused.startswith(f"REFUSED {REPO}: cannot fetch img_norm.npz from {hub.url}")
    assert "Check the network" in refused
    assert str(machine.home) in refused
    assert not (machine.kept / "record.json").exists()


def test_a_file_that_is_not_there(machine, hub):
    (hub.folder / "best_model.pt").unlink()
    (refused,) = machine.script("load(True)")
    assert "cannot fetch best_model.pt" in refused


def test_the_command_asks_before_it_downloads(tmp_path, machine, hub):
    rng = np.random.default_rng(1)
    obs = pd.DataFrame({"Sample_ID": ["a", "b"] * 10}, index=[f"c{i}" for i in range(20)])
    features = ad.AnnData(rng.normal(size=(20, 40)).astype(np.float32), obs=obs)
    features.write_h5ad(tmp_path / "f.h5ad")
    command = ["-m", "phenoseq.cli", "predict", str(tmp_path / "f.h5ad"), "--model", NAME]
    command += ["--sample", "Sample_ID", "-o", str(tmp_path / "o.h5ad"), "--n-samples", "2"]
    command += ["--steps", "3", "--device", "cpu"]
    asked = machine.run(*command)
    assert asked.returncode == 1
    assert "2.7 GB" in asked.stdout
    assert "say --yes" in asked.stderr
    assert not any("GET" in line for line in hub.asked)
    done = machine.run(*command, "--yes")
    assert done.returncode == 0, done.stderr
    assert "2 bags, scGPT embeddings of 16 numbers" in done.stdout
    origin = ad.read_h5ad(tmp_path / "o.h5ad").uns["phenoseq"]["origin"]
    assert (origin["repo"], origin["commit"], origin["weights"]) == (REPO, COMMIT, "ema")


ROAD = """
import torch
from torchvision.models import VisionTransformer
from phenoseq.models.features import FeatureConfig, FeatureExtractor
stains = ("DNA", "RNA", "AGP", "Mito", "ER")
sizes = dict(patch_size=32, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, image_size=224)
torch.manual_seed(0)
vit = VisionTransformer(**sizes)
small = FeatureExtractor(FeatureConfig("small", stains, **sizes), vit.state_dict(), "0" * 64)
load(True)
phenoseq.predict({folder!r}, model={name!r}, sample="Metadata_Well", pixel_size=0.598,
                 eight_bit="full", extractor=small, n_samples=3, steps=4, device="cpu", out={out!r})
"""


def test_from_real_images_to_embeddings(tmp_path, machine, shared_data):
    """Five stains of one field, by the names in its table; a small random network of features."""
    folder = shared_data / "cell_painting" / "pediatric"
    out = tmp_path / "o.h5ad"
    assert machine.script(ROAD.format(folder=str(folder), name=NAME, out=str(out))) == [LOADED]
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
