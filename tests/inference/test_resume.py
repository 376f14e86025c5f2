"""Predictions of cells and of bags go on after `kill -9`, alone and on several ranks."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import phenoseq
from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.models.published_config import (
    Origin,
    PublishedConfig,
    PublishedNoise,
    PublishedSizes,
)

#: `phenoseq.predict` in small blocks, slowly enough to be killed at a moment that is chosen.
RUN = """
import os, time, warnings
import numpy as np
from phenoseq import predict
from phenoseq.inference import bagged, blocks, predictor

warnings.simplefilter("ignore")
os.environ.update(environment)
predictor._BLOCK = bagged.BLOCK = 1
for job in (predictor.image_job, bagged.bag_job):
    job.__kwdefaults__["batch_size"] = 8

def slowly(function):
    def slow(*args):
        time.sleep(pause)
        return function(*args)
    return slow

blocks.Blocks.flush = slowly(blocks.Blocks.flush)
blocks._append = slowly(blocks._append)
predict(source, out=out, device="cpu", n_samples=2, **how)
"""
WHICH = ["cells", "bags"]


@pytest.fixture(scope="module")
def start(fork):
    """Give a function that starts a prediction in a process of its own."""

    def start(source, out: Path, pause: float = 0.0, environment=None, **how):
        names = {"source": str(source), "out": str(out), "pause": pause, "how": how}
        return fork(RUN, environment=environment or {}, **names)

    return start


@pytest.fixture(scope="module")
def routes(model_folder, store, tmp_path_factory):
    """Give for each route what it predicts from, and how."""
    folder = tmp_path_factory.mktemp("bags")
    sizes = PublishedSizes(6, 5, 16, 4, 2, 1, 8, 2, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PublishedPhenoSeq(PublishedConfig(Origin("", "", "raw"), sizes,
                                                    PublishedNoise(steps=3)))  # fmt: skip
    rng = np.random.default_rng(0)
    table = ad.AnnData(
        rng.normal(size=(1000, 6)).astype(np.float32),
        obs=pd.DataFrame({"Well": rng.choice(["a", "b", "c"], 1000)},
                         index=[f"cell{i}" for i in range(1000)]),
    )  # fmt: skip
    table.write_h5ad(folder / "features.h5ad")
    return {
        "cells": (store.path, {"model": str(model_folder)}),
        "bags": (folder / "features.h5ad",
                 {"model": str(network.save(folder / "network")), "sample": "Well"}),
    }  # fmt: skip


def read(path: Path) -> ad.AnnData:
    return ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)


def assert_same(got: Path, want: Path) -> None:
    a, b = read(got), read(want)
    pd.testing.assert_frame_equal(a.obs, b.obs)
    pd.testing.assert_frame_equal(a.var, b.var)
    np.testing.assert_array_equal(a.X, b.X)
    assert set(a.layers) == set(b.layers)
    for name in a.layers:
        np.testing.assert_array_equal(*(
            x.layers[name].toarray() if sparse.issparse(x.layers[name]) else x.layers[name]
            for x in (a, b)
        ))  # fmt: skip
    assert a.uns["phenoseq"]["source"] == b.uns["phenoseq"]["source"]


def blocks(out: Path) -> dict[str, int]:
    """Return the blocks that are done, and which directory each is."""
    found = {}
    for path in out.with_name(f".{out.name}.blocks").glob("0*"):
        with suppress(FileNotFoundError):  # the end of the run removes them
            found[path.name] = path.stat().st_ino
    return found


def kill(process, until) -> None:
    """Kill a process by force, as soon as something is so."""
    since = time.monotonic()
    while not until():
        assert process.is_alive()
        assert time.monotonic() - since < 100
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def finish(process) -> None:
    process.join(timeout=100)
    assert process.exitcode == 0


@pytest.mark.long
@pytest.mark.parametrize(("which", "suffix"), list(zip(WHICH, [".zarr", ".h5ad"], strict=True)))
def test_killed_again_and_again(routes, start, tmp_path, which, suffix):
    """Before any block, in the middle twice, and while the blocks are put together."""
    source, how = routes[which]
    out, whole = tmp_path / f"out{suffix}", tmp_path / f"whole{suffix}"
    folder = tmp_path / f".out{suffix}.blocks"
    finish(start(source, whole, **how))
    before: dict[str, int] = {}
    for least in (0, 2, 4):
        run = start(source, out, 0.03, **how)
        kill(run, lambda least=least: folder.exists() and len(blocks(out)) >= least)
        after = blocks(out)
        assert len(after) >= least
        assert before.items() <= after.items()  # the very blocks: none is made again
        before = after
        assert not out.exists()
    run = start(source, out, 0.03, **how)
    kill(run, lambda: list(folder.glob(f".partial-*/out{suffix}")))
    after = blocks(out)
    assert before.items() <= after.items()
    assert not out.exists()
    run = start(source, out, 0.03, **how)
    seen = dict(after)
    while run.is_alive():
        seen.update(blocks(out))
        time.sleep(0.002)
    assert run.exitcode == 0
    assert seen == after
    assert_same(out, whole)
    assert {path.name for path in tmp_path.iterdir()} == {out.name, whole.name}


@pytest.mark.long
@pytest.mark.parametrize("which", WHICH)
def test_ranks_share_the_blocks(routes, start, tmp_path, which):
    """Two ranks, killed once, and again when all blocks were made: nobody waits for ever."""
    source, how = routes[which]
    out, whole = tmp_path / "out.h5ad", tmp_path / "whole.h5ad"
    finish(start(source, whole, **how))

    def ranks(pause):
        environments = [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
        return [start(source, out, pause, environment, **how) for environment in environments]

    one, two = ranks(0.03)
    kill(one, lambda: len(blocks(out)) >= 2)
    kill(two, lambda: True)
    first, second = ranks(0.03)
    kill(first, lambda: list(tmp_path.glob(".out.h5ad.blocks/.partial-*/out.h5ad")))
    kill(second, lambda: True)
    done = blocks(out)
    assert not out.exists()
    for process in ranks(0.0):
        finish(process)
    assert len(done) >= 5
    assert_same(out, whole)
    assert {path.name for path in tmp_path.iterdir()} == {out.name, whole.name}


def test_positions_of_another_table_are_another_prediction(model, plate, tmp_path, monkeypatch):
    """The same ids at other places: blocks of the first run must not be taken."""
    obs = plate.source.obs[["field", "x_centroid", "y_centroid"]].iloc[:20]
    out, how = tmp_path / "out.h5ad", {"model": model, "n_samples": 1, "device": "cpu"}
    with monkeypatch.context() as patch:
        patch.setattr("phenoseq.inference.blocks.put_in_place", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            phenoseq.predict(plate.source, cells=obs, out=out, **how)
    moved = obs.assign(x_centroid=obs["x_centroid"] + 1)
    got = phenoseq.predict(plate.source, cells=moved, out=out, **how)
    want = phenoseq.predict(plate.source, cells=moved, **how)
    np.testing.assert_array_equal(got.X[:], want.X)
