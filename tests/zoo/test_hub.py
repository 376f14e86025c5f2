"""Weights from the hub: asked for, fetched once, checked ever after. A local server stands in."""

from __future__ import annotations

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
LOAD = """
import sys, phenoseq
try:
    model = phenoseq.load_model({name!r}, download={download})
    print("LOADED", model.config.origin.commit, model.config.sizes.features)
except phenoseq.ModelError as error:
    print("REFUSED", error)
"""

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
    """A machine with a cache of its own; every call is a fresh interpreter."""

    def __init__(self, home: Path, endpoint: str) -> None:
        self.home, self.endpoint = home, endpoint
        self.kept = home / "assets" / "phenoseq" / REPO.replace("/", "--") / NAME

    def run(self, *command: str, offline: bool = False, text: str | None = None):
        drop = ("HF_", "HUGGINGFACE_", "XDG_", "TRANSFORMERS_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        env |= {"HF_HOME": str(self.home), "HF_ENDPOINT": self.endpoint, "HF_HUB_ETAG_TIMEOUT": "3"}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1" if offline else "0"}
        return subprocess.run(
            [sys.executable, *command], env=env, input=text or "", capture_output=True, text=True
        )

    def load(self, *, download: bool = False, offline: bool = False) -> str:
        done = self.run("-c", LOAD.format(name=NAME, download=download), offline=offline)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def machine(tmp_path, hub):
    return Machine(tmp_path / "home", hub.url)


def test_first_use_fetches_and_second_is_offline(machine, hub):
    refused = machine.load()
    assert refused.startswith("REFUSED")
    assert "2.7 GB" in refused
    assert "download=True" in refused
    assert "--yes" in refused
    assert not any("GET" in line for line in hub.asked)

    assert machine.load(download=True) == f"LOADED {COMMIT} 40"
    record = json.loads((machine.kept / "record.json").read_text())
    assert record["commit"] == COMMIT
    assert set(record["files"]) == {"best_model.pt", "img_norm.npz"}
    assert all(len(digest) == 64 for digest in record["files"].values())

    hub.asked.clear()
    assert machine.load(offline=True) == f"LOADED {COMMIT} 40"
    assert machine.load() == f"LOADED {COMMIT} 40"
    assert hub.asked == []


def test_a_changed_file_behind_the_same_commit_is_refused(machine, hub):
    machine.load(download=True)
    shutil.rmtree(machine.home / "hub")
    shutil.rmtree(machine.kept / "model")
    path = hub.folder / "img_norm.npz"
    original = path.read_bytes()
    np.savez(path, mean=np.zeros(40), std=np.ones(40))
    refused = machine.load(download=True)
    assert refused.startswith("REFUSED")
    assert "['img_norm.npz']" in refused
    assert COMMIT in refused
    assert str(machine.kept) in refused
    assert not (machine.kept / "model").exists()
    shutil.rmtree(machine.home / "hub")
    path.write_bytes(original)
    assert machine.load(download=True) == f"LOADED {COMMIT} 40"


def test_a_newer_commit_is_not_taken_unasked(machine, hub):
    machine.load(download=True)
    shutil.rmtree(machine.kept / "model")
    hub.commit = "d" * 40
    assert machine.load(download=True) == f"LOADED {COMMIT} 40"  # from the cache of the first


def test_what_is_cached_is_taken_without_asking_and_without_the_network(machine, hub):
    """Neither may a newer commit be downloaded where no download was allowed."""
    machine.load(download=True)
    shutil.rmtree(machine.kept)
    hub.commit = "d" * 40
    hub.asked.clear()
    assert machine.load() == f"LOADED {COMMIT} 40"
    assert hub.asked == []


def test_converted_weights_that_have_changed_are_refused(machine):
    machine.load(download=True)
    weights = machine.kept / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused = machine.load()
    assert "is not what was converted there" in refused
    shutil.rmtree(machine.kept / "model")
    assert machine.load() == f"LOADED {COMMIT} 40"  # what was fetched is still in the cache


def test_no_network(tmp_path, machine, hub):
    hub.shutdown()
    hub.server_close()
    for offline in (False, True):
        refused = machine.load(download=True, offline=offline)
        assert refused.startswith(f"REFUSED {REPO}: cannot fetch img_norm.npz from {hub.url}")
        assert "Check the network" in refused
        assert str(machine.home) in refused
    assert not (machine.kept / "record.json").exists()


def test_a_file_that_is_not_there(machine, hub):
    (hub.folder / "best_model.pt").unlink()
    assert "cannot fetch best_model.pt" in machine.load(download=True)


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
