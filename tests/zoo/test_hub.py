"""Models on the hub, with the real client: pushed, pulled, and the ways in which it goes wrong."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import Repo, blob_id
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from phenoseq.zoo.hub import parse_reference

FROZEN = Path(__file__).with_name("frozen")
REPO, NEWER = "lab/tiny", "b" * 40


@pytest.fixture
def folder(tmp_path):
    """A model of the tests, as its author keeps it."""
    folder = tmp_path / "model"
    shutil.copytree(FROZEN / "v1-phenoseq", folder, ignore=shutil.ignore_patterns("expected*"))
    return folder


@pytest.fixture
def commit(tmp_path):
    """A commit of this test's own: a process remembers what it has seen of one."""
    return hashlib.sha1(str(tmp_path).encode()).hexdigest()


@pytest.fixture
def repo(hub, folder, commit):
    """The same on the hub."""
    repo = hub.repos[REPO] = Repo({}, {})
    repo.add(folder, commit)
    return repo


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("lab/tiny", "lab/tiny", None),
        ("lab/tiny@v1.0", "lab/tiny", "v1.0"),
        (f"lab/tiny@{NEWER}", "lab/tiny", NEWER),
        ("lab/tiny@refs/pr/1", "lab/tiny", "refs/pr/1"),
    ],
)
def test_a_reference(text, repo, revision):
    reference = parse_reference(text)
    assert (reference.repo, reference.revision) == (repo, revision)
    assert str(reference) == text


@pytest.mark.parametrize(
    "text",
    ["tiny", "a/b/c", "/a/b", "../b", "a/..", "a/b@", "a/b@../../x", "./b/", "./b", "a/.b",
     "a/b@x y", "a\n/b", "a//b", "a/b--c", "C:\\a", "https://a/b", "å/b"],
)  # fmt: skip
def test_what_is_no_reference(text):
    assert parse_reference(text) is None


# ------------------------------------------------------------------------------------ pull and push


def test_pull_from_a_clean_cache_then_offline(machine, offline, hub, repo, folder, commit):
    loaded = Path(machine.load(REPO))
    assert loaded == machine.home / "hub" / "models--lab--tiny" / "snapshots" / commit
    for name in ("config.json", "model.safetensors"):
        assert (loaded / name).read_bytes() == (folder / name).read_bytes()
    assert len(hub.gets()) == 2
    hub.asked.clear()
    assert Path(machine.load(f"{REPO}@{commit}")) == loaded
    assert Path(offline.load(REPO)) == Path(offline.load(f"{REPO}@main")) == loaded
    assert hub.gets() == []
    with hub.down():
        assert Path(machine.load(REPO)) == Path(machine.load(f"{REPO}@{commit}")) == loaded


def test_only_files_of_a_model_are_fetched(machine, hub, repo, folder):
    for name in ("evil.py", "notes.txt", "pytorch_model.bin"):
        (folder / name).write_text("x")
    machine.load(REPO)
    assert [line.rpartition("/")[2] for line in hub.gets()] == ["config.json", "model.safetensors"]


def test_a_changed_branch_is_pulled_and_a_commit_stays(
    machine, hub, repo, folder, tmp_path, commit
):
    first = machine.load(REPO)
    newer = shutil.copytree(folder, tmp_path / "newer")
    tensors = load_file(newer / "model.safetensors")
    tensors["context_mean"] += 1
    save_file(tensors, newer / "model.safetensors")
    repo.add(newer, NEWER)
    repo.heads["v1"] = commit
    assert machine.load(REPO).endswith(NEWER)
    assert machine.load(f"{REPO}@v1") == machine.load(f"{REPO}@{commit}") == first
    assert len([line for line in hub.gets() if line.endswith(".safetensors")]) == 2


def test_push_and_pull_give_the_same_model(machine, stranger, hub, folder):
    (folder.parent / "config.yaml").write_text(
        yaml.safe_dump({"data": {"store": "/home/me/secret/cells.zarr"}, "seed": 3})
    )
    scores = [{"name": "me", "pcc_gene_median": 0.25, "mse": 1 / 3}, {"name": "mean", "mse": 1.0}]
    metrics = {"model": "me", "data": "slide 7", "part": "test", "scores": scores}
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# Mine\n")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    printed = machine.run(
        f"import phenoseq\nmodel = phenoseq.load_model({str(folder)!r})\n"
        f"print(model.push_to_hub({REPO!r}, private=True, datasets=['lab/slides']))"
    )
    pushed = hub.repos[REPO]
    assert printed.strip().endswith(f"{hub.url}/{REPO}/commit/{pushed.heads['main']}")
    assert pushed.private
    files = pushed.commits[pushed.heads["main"]]
    names = ["README.md", "config.json", "metrics.json", "model.safetensors", "training.yaml"]
    assert sorted(p.name for p in files.iterdir()) == names
    settings = (files / "training.yaml").read_text()
    assert yaml.safe_load(settings) == {"data": {"store": "cells.zarr"}, "seed": 3}

    card = ModelCard((files / "README.md").read_text())
    assert card.text.strip() == "# Mine"
    assert card.data.library_name == "phenoseq"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.license == "mit"
    assert card.data.datasets == ["lab/slides"]
    assert card.data.tags == ["phenoseq", "mine"]
    assert card.data.model_name == "tiny"
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results == {"pcc_gene_median": 0.25, "mse": 0.333333}
    assert {r.dataset_name for r in card.data.eval_results} == {"slide 7"}

    assert "is private" in stranger.load(REPO)
    same = machine.run(
        "import phenoseq, torch\n"
        f"a, b = phenoseq.load_model({str(folder)!r}), phenoseq.load_model({REPO!r})\n"
        "b = b.state_dict()\n"
        "print(all(torch.equal(t, b[n]) for n, t in a.state_dict().items()))"
    )
    assert same.strip().endswith("True")


def test_a_changed_model_is_pushed_without_the_scores_of_the_old(machine, hub, folder):
    (folder / "metrics.json").write_text(json.dumps({"scores": [{"name": "old", "mse": 1.0}]}))
    machine.run(
        f"import phenoseq\nmodel = phenoseq.load_model({str(folder)!r})\n"
        f"model.context_mean += 1\nmodel.push_to_hub({REPO!r})"
    )
    files = hub.repos[REPO].commits[hub.repos[REPO].heads["main"]]
    assert sorted(p.name for p in files.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    card = ModelCard((files / "README.md").read_text())
    assert card.data.eval_results is None
    assert card.data.license == "unknown"
    assert "Predicts 6 genes from DNA, RNA in crops of 32 pixels at 0.5 µm" in card.text
    assert "- best: S0 0.50, S1 0.40" in card.text
    assert not hub.repos[REPO].private


def test_the_commands(machine, hub, folder, tmp_path):
    status, printed = machine.command("models", "push", str(folder), REPO, "--licence", "mit")
    assert (status, "published: " in printed) == (0, True)
    status, printed = machine.command("models", "show", f"{REPO}@main")
    assert status == 0
    for part in (f"{REPO}@{hub.repos[REPO].heads['main']}", "6 genes", "mit", "tiny"):
        assert part in printed
    assert not any(line.endswith(".safetensors") for line in hub.gets())
    status, printed = machine.command("models", "download", REPO)
    assert (status, "HF_HUB_OFFLINE=1" in printed) == (0, True)
    status, printed = machine.command("models", "verify", REPO)
    assert (status, printed.count("ok ")) == (0, 3)
    assert REPO in machine.command("models", "where")[1]
    status, printed = machine.command("models", "card", REPO)
    pushed = hub.repos[REPO]
    assert printed == (pushed.commits[pushed.heads["main"]] / "README.md").read_text()


def test_a_private_push_to_what_everyone_sees_is_refused(machine, hub, repo, folder, commit):
    status, printed = machine.command("models", "push", str(folder), REPO, "--private")
    assert status == 1
    assert "is there already, for everyone to see" in printed
    assert list(repo.commits) == [commit]


def test_a_push_without_a_token(stranger, hub, folder):
    status, printed = stranger.command("models", "push", str(folder), REPO)
    assert status == 1
    assert f"error: {REPO}: " in printed
    assert "HF_TOKEN" in printed
    assert hub.repos == {}


@pytest.mark.parametrize("name", ["tiny", "lab/tiny@main", "lab/a/b"])
def test_a_push_to_no_name(machine, folder, name):
    status, printed = machine.command("models", "push", str(folder), name)
    assert (status, "OWNER/NAME" in printed) == (1, True)


PINNED = """
from dataclasses import replace
import phenoseq
from phenoseq.zoo import registry
entries = registry._ENTRIES
source = registry.HubModel({repo!r}, {commit!r})
entry = replace(entries[0], name="pinned", source=source, sha256={digest!r}, size=2_000_000_000)
registry._ENTRIES = (entry,)
for download in {downloads}:
    try:
        print(phenoseq.load_model("pinned", download=download).folder)
    except phenoseq.ModelError as error:
        print("REFUSED", error)
registry._ENTRIES = entries
"""


def test_an_entry_of_the_zoo_at_a_pinned_commit(machine, hub, repo, folder, commit):
    """Asked for, fetched once, at its commit and with its digest whatever the branch has become."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    repo.heads["main"] = NEWER
    what = {"repo": REPO, "commit": commit, "downloads": (False, True, False)}
    refused, *loaded = machine.run(PINNED.format(digest=digest, **what)).splitlines()
    assert "takes 2.0 GB to download" in refused
    assert "download=True" in refused
    assert len(loaded) == 2
    assert all(line.endswith(commit) for line in loaded)
    assert len([line for line in hub.gets() if line.endswith(".safetensors")]) == 1
    refused, again, _ = machine.run(PINNED.format(digest="0" * 64, **what)).splitlines()
    assert "is not the file that was released; it was removed" in refused
    assert "is not the file that was released; it was removed" in again
    assert not machine.cached("hub/**/model.safetensors")


# ----------------------------------------------------------------------------------- a bad network


CHUNKS = "from huggingface_hub import constants\nconstants.DOWNLOAD_CHUNK_SIZE = {}"


@pytest.fixture
def in_pieces(machine):
    """The machine writes what it gets in pieces of 16 kB: the weights are some of them."""
    machine.run(CHUNKS.format(1 << 14))
    yield 1 << 14
    machine.run(CHUNKS.format(10 << 20))


def test_a_connection_that_breaks_halfway_goes_on_from_there(
    machine, hub, repo, folder, commit, in_pieces
):
    hub.trouble.breaks = 1
    assert machine.load(REPO).endswith(commit)
    half = (folder / "model.safetensors").stat().st_size // 2
    assert hub.ranges == [f"bytes={half - half % in_pieces}-"]


def test_a_connection_that_breaks_each_time_goes_on_another_time(
    machine, hub, repo, commit, in_pieces
):
    machine.run("import time; time.sleep, time.slept = (lambda s: None), time.sleep")
    hub.trouble.breaks = 100
    refused = machine.load(REPO)
    machine.run("import time; time.sleep = time.slept")
    assert refused.startswith(f"REFUSED {REPO}@{commit}: ")
    assert "try again" in refused or "Check the network" in refused
    assert not machine.cached("hub/**/model.safetensors")
    (partial,) = machine.cached("hub/*/blobs/*incomplete*")
    size = partial.stat().st_size
    hub.trouble.breaks = 0
    hub.ranges.clear()
    assert machine.load(REPO).endswith(commit)
    assert hub.ranges == ([f"bytes={size}-"] if size else [])
    assert not machine.cached("hub/*/blobs/*incomplete*")


def test_a_download_that_was_killed_goes_on_from_there(machine, to_kill, hub, repo, folder):
    hub.trouble.pause = 0.1
    load = f"\nimport phenoseq; phenoseq.load_model({REPO!r})"
    to_kill.begin(CHUNKS.format(1 << 14) + load)
    size, end = 0, time.monotonic() + 60
    while not size and time.monotonic() < end:
        time.sleep(0.02)
        size = sum(path.stat().st_size for path in machine.cached("hub/*/blobs/*incomplete*"))
    to_kill.kill()
    (partial,) = machine.cached("hub/*/blobs/*incomplete*")
    size, whole = partial.stat().st_size, (folder / "model.safetensors").read_bytes()
    assert 0 < size < len(whole)
    hub.trouble.pause = 0
    loaded = Path(machine.load(REPO))
    assert hub.ranges == [f"bytes={size}-"]
    assert (loaded / "model.safetensors").read_bytes() == whole
    assert not partial.exists()


@pytest.mark.parametrize("more", [0, 1])
def test_what_a_killed_run_left_is_not_trusted(machine, repo, folder, commit, more):
    """Other bytes of the right number, or too many: told, removed or dropped, never loaded."""
    machine.command("models", "show", REPO)  # all but the weights
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    size = (folder / "model.safetensors").stat().st_size
    (blobs,) = machine.cached("hub/*/blobs")
    (blobs / f"{digest}.phenoseq.incomplete").write_bytes(bytes(size + more))
    first = machine.load(REPO)
    assert ("is not the file that the hub has" in first) == (more == 0)
    assert machine.load(REPO).endswith(commit)


def test_wrong_bytes_are_removed_and_never_loaded(machine, hub, repo, commit):
    hub.trouble.spoilt = True
    refused = machine.load(REPO)
    assert "model.safetensors: is not the file that the hub has (sha256 hash" in refused
    assert "was removed" in refused
    assert not machine.cached("hub/**/model.safetensors")
    hub.trouble.spoilt = False
    assert machine.load(REPO).endswith(commit)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_changed_in_the_cache_is_fetched_again(machine, hub, repo, name, commit):
    blob = (Path(machine.load(REPO)) / name).resolve()
    data = bytearray(blob.read_bytes())
    data[-2] ^= 1
    blob.write_bytes(data)
    status, printed = machine.command("models", "verify", REPO)
    assert (status, f"BAD  {REPO}@{commit} {name}: " in printed) == (1, name != "config.json")
    assert f"{name}: is not the file that the hub has" in machine.load(f"{REPO}@{commit}")
    assert machine.load(f"{REPO}@{commit}").endswith(commit)


def test_a_slow_hub_is_waited_for(machine, hub, repo, commit):
    hub.trouble.pause = 0.1
    begin = time.monotonic()
    assert machine.load(REPO).endswith(commit)
    assert time.monotonic() - begin > 0.9


def test_no_network_and_nothing_in_the_cache(machine, offline, hub, repo):
    with hub.down():
        refused = machine.load(REPO)
    assert refused.startswith(f"REFUSED {REPO}: cannot be had from {hub.url}")
    assert "Check the network and its proxy" in refused
    refused = offline.load(REPO)
    assert "HF_HUB_OFFLINE says not to use the network" in refused
    assert str(machine.home) in refused


# -------------------------------------------------------------------------------- what is not there


def test_no_such_repository(machine, hub):
    refused = machine.load("lab/other")
    assert "has no such repository, or it is private" in refused
    assert "no folder here is named so" in refused
    assert "did you mean 'Sentinal4D/PhenoSeq'" in machine.load("sentinal4d/phenoseq")


def test_the_nearest_in_the_cache_is_named(machine, hub, repo):
    machine.load(REPO)
    assert f"did you mean {REPO!r}" in machine.load("lab/tinny")
    del hub.repos[REPO]
    assert "did you mean" not in machine.load(REPO)


def test_a_private_repository(stranger, machine, hub, repo, commit):
    repo.private = True
    assert "or it is private" in stranger.load(REPO)
    assert "hf auth login" in stranger.load(REPO)
    assert machine.load(REPO).endswith(commit)


def test_a_gated_repository(stranger, hub, repo):
    repo.gated = True
    refused = stranger.load(REPO)
    assert f"is gated: open {hub.url}/{REPO}, ask for access" in refused


def test_a_revision_that_is_gone(machine, repo):
    for revision in ("v9", "c" * 40):
        refused = machine.load(f"{REPO}@{revision}")
        assert f"{REPO} has no revision '{revision}', or not any longer" in refused


@pytest.mark.parametrize("name", ["best.ckpt", "model.pt", "pytorch_model.bin", "a.PKL"])
def test_a_pickle_is_refused_unfetched(machine, hub, repo, folder, name):
    (folder / "model.safetensors").rename(folder / name)
    refused = machine.load(REPO)
    assert "no model.safetensors there" in refused
    assert f"['{name}'] are pickles, which phenoseq never opens" in refused
    assert "model.save(folder)" in refused
    assert not any(line.endswith(name) for line in hub.gets())


def test_a_pickle_by_the_name_of_safetensors_is_not_run(machine, repo, folder, tmp_path):
    mark = tmp_path / "run"
    evil = pickle.dumps(Evil(str(mark)))
    (folder / "model.safetensors").write_bytes(evil)
    assert "does not hold the weights of its config" in machine.load(REPO)
    assert not mark.exists()


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_config_of_a_newer_phenoseq_is_refused_before_its_weights(machine, hub, repo, folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"schema_version": 99}))
    refused = machine.load(REPO)
    assert "schema version 99, this phenoseq" in refused
    assert "pip install --upgrade phenoseq" in refused
    assert not any(line.endswith(".safetensors") for line in hub.gets())


def test_weights_that_do_not_fit_the_config(machine, repo, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["context_mean"] = torch.zeros(17)
    save_file(tensors, folder / "model.safetensors")
    assert "context_mean is (17,), by the config (16,)" in machine.load(REPO)


def test_names_of_a_tree_do_not_leave_the_cache(machine, hub, repo, commit):
    hub.trouble.names = ["../../../config.json", "/tmp/README.md", "a/../../README.md"]
    assert machine.load(REPO).endswith(commit)
    assert [line.rpartition("/")[2] for line in hub.gets()] == ["config.json", "model.safetensors"]


def test_the_server_hashes_as_git_does():
    assert blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
