"""A table made block by block is the one made in memory, however often the run was stopped."""

from __future__ import annotations

import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from phenoseq.errors import DataError
from phenoseq.inference import blocks as blocks_module
from phenoseq.inference.job import Field, Job
from phenoseq.inference.table import predict_file, predict_table

both = pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
N, WIDTH, BATCH, BLOCK = 103, 5, 8, 16


def make_job(n: int = N, *, seed: int = 0, computed: list[int] | None = None, pause=None) -> Job:
    """A job whose values follow from their row; notes which rows are computed."""

    def compute(rows):
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            if computed is not None:
                computed.extend(some.tolist())
            if pause is not None:
                pause(start)
            columns = np.arange(WIDTH)
            dense = (some[:, None] * 10 + columns + seed).astype(np.float32)
            yield (
                some,
                {
                    "X": dense,
                    "layers/draw": np.where((some[:, None] + columns) % 3 == 0, dense, 0),
                    "obsm/X_latent": dense[:, :2],
                    "obs/score": some * 0.5,
                    "obs/odd": some % 2 == 1,
                },
            )

    names = [f"cell{i}" for i in range(n)]
    obs = pd.DataFrame({"x_centroid": np.arange(n) * 1.0, "y_centroid": 2.0}, index=names)
    return Job(
        fields=(
            Field("X", WIDTH),
            Field("layers/draw", WIDTH, sparse=True),
            Field("obsm/X_latent", 2),
            Field("obs/score", 0),
            Field("obs/odd", 0, "bool"),
        ),
        order=np.random.default_rng(1).permutation(n),
        block=BLOCK,
        compute=compute,
        obs=obs,
        var=pd.DataFrame(index=[f"g{i}" for i in range(WIDTH)]),
        uns={"phenoseq": {"seed": seed, "none": []}},
        plan={"seed": seed},
    )


def read(path: Path) -> ad.AnnData:
    return ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)


def assert_same(a: ad.AnnData, b: ad.AnnData) -> None:
    np.testing.assert_array_equal(a.X, b.X)
    np.testing.assert_array_equal(a.layers["draw"].toarray(), b.layers["draw"].toarray())
    assert a.layers["draw"].nnz == b.layers["draw"].nnz
    assert set(a.obsm) == set(b.obsm)
    for name in a.obsm:
        np.testing.assert_array_equal(a.obsm[name], b.obsm[name])
    pd.testing.assert_frame_equal(a.obs, b.obs)
    pd.testing.assert_frame_equal(a.var, b.var)


def test_rows_are_in_their_own_order():
    made = predict_table(make_job())
    rows = np.arange(N)
    np.testing.assert_array_equal(made.X, rows[:, None] * 10 + np.arange(WIDTH))
    np.testing.assert_array_equal(made.obs["score"], rows * 0.5)
    np.testing.assert_array_equal(made.obs["odd"], rows % 2 == 1)
    np.testing.assert_array_equal(made.obsm["spatial"][:, 0], rows)
    assert made.layers["draw"].format == "csr"


@both
@pytest.mark.parametrize("at_once", [7, 2048])
def test_a_file_is_what_is_made_in_memory(tmp_path, suffix, at_once, monkeypatch):
    monkeypatch.setattr(blocks_module, "_AT_ONCE", at_once)
    out = tmp_path / f"o{suffix}"
    assert predict_file(make_job(), out) == 0
    assert_same(read(out), predict_table(make_job()))
    assert read(out).uns["phenoseq"]["seed"] == 0
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    if suffix == ".zarr":
        assert (out / "zarr.json").exists()
        assert len(list((out / "layers" / "draw" / "data").rglob("*"))) < 5


@both
@pytest.mark.parametrize("stop", [0, 8, 40, 96])
def test_a_run_that_was_stopped_goes_on(tmp_path, suffix, stop):
    out = tmp_path / f"o{suffix}"

    def fail(start):
        if start == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_file(make_job(pause=fail), out)
    assert not out.exists()
    computed: list[int] = []
    before = predict_file(make_job(computed=computed), out)
    assert before == stop // BLOCK * BLOCK
    assert len(computed) == N - before
    assert_same(read(out), predict_table(make_job()))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_blocks_of_another_run_are_not_taken(tmp_path):
    def fail(start):
        if start == 80:
            raise KeyboardInterrupt

    out = tmp_path / "o.h5ad"
    with pytest.raises(KeyboardInterrupt):
        predict_file(make_job(pause=fail), out)
    other = make_job(seed=1)
    assert predict_file(other, out) == 0
    assert_same(read(out), predict_table(other))


def test_blocks_of_other_fields_are_not_taken(tmp_path):
    def fail(start):
        if start == 80:
            raise KeyboardInterrupt

    out = tmp_path / "o.h5ad"
    job = make_job(pause=fail)
    with pytest.raises(KeyboardInterrupt):
        predict_file(replace(job, fields=job.fields[:1]), out)
    assert predict_file(make_job(), out) == 0
    assert_same(read(out), predict_table(make_job()))


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    out, save, saved = tmp_path / "o.h5ad", np.save, []

    def fill(path, array):
        saved.append(path)
        if len(saved) > 20:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(path, array)

    monkeypatch.setattr(blocks_module.np, "save", fill)
    with pytest.raises(DataError, match=r"disk is full.*what is done is kept.*run it again"):
        predict_file(make_job(), out)
    monkeypatch.undo()
    assert not out.exists()
    assert predict_file(make_job(), out) == 3 * BLOCK
    assert_same(read(out), predict_table(make_job()))


@both
def test_an_old_table_stays_until_the_new_is_whole(tmp_path, suffix, monkeypatch):
    out = tmp_path / f"o{suffix}"
    predict_file(make_job(), out)
    monkeypatch.setattr(blocks_module, "_append", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict_file(make_job(seed=3), out)
    assert_same(read(out), predict_table(make_job()))
    monkeypatch.undo()
    predict_file(make_job(seed=3), out)
    assert_same(read(out), predict_table(make_job(seed=3)))


RUN = """
import os, sys, time
os.environ.update(environment)
sys.path.insert(0, tests)
from test_table import make_job, predict_file
predict_file(make_job(pause=lambda start: time.sleep(pause)), out)
"""


@pytest.fixture
def start(fork):
    def start(out: Path, pause: float, **environment: str) -> BaseProcess:
        tests = str(Path(__file__).parent)
        return fork(RUN, tests=tests, out=out, pause=pause, environment=environment)

    return start


@pytest.mark.parametrize("blocks", [0, 2, 5])
def test_killed_at_any_moment(start, tmp_path, blocks):
    out = tmp_path / "o.h5ad"
    run = start(out, 0.1)
    folder, since = tmp_path / ".o.h5ad.blocks", time.monotonic()
    while len(list(folder.glob("0*"))) < blocks or not folder.exists():
        assert time.monotonic() - since < 60
        time.sleep(0.01)
    run.kill()
    run.join()
    computed: list[int] = []
    before = predict_file(make_job(computed=computed), out)
    assert before >= blocks * BLOCK
    assert len(computed) == N - before
    assert_same(read(out), predict_table(make_job()))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_several_ranks_make_one_file_in_the_order_of_the_rows(start, tmp_path):
    out = tmp_path / "o.h5ad"
    runs = [start(out, 0.01, RANK=str(rank), WORLD_SIZE="3") for rank in range(3)]
    for run in runs:
        run.join(timeout=120)
        assert run.exitcode == 0
    assert_same(read(out), predict_table(make_job()))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
