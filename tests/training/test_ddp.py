"""Two processes train like one: gradients, weights, whole runs; and a dead one ends the run."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.splits import SplitConfig
from phenoseq.models.phenoseq import PhenoSeq

SCRIPT = Path(__file__).with_name("two_ranks.py")
TWO = {
    "trainer.devices": 2,
    "trainer.strategy": "ddp",
    "data.batch_size": 16,
    "trainer.log_every_n_steps": 1,
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("two_ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    return float((a - b).norm() / (b if scale is None else scale).norm())


@pytest.mark.filterwarnings("ignore")
def test_two_processes_train_like_one(store, script, arguments, tmp_path):
    """One launch for all: DDP in both precisions, FSDP and its resume, and `phenoseq train`."""
    data = StoreDataModule(store.path, SplitConfig(by="Metadata_Well", block=None, test=0.2))
    data.setup()
    assert len(data.parts.rows("train")) % 2 == 1, "the shards of the two ranks must be uneven"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ran = subprocess.run(
        [*command, SCRIPT, store.path, tmp_path, *arguments("two", epochs=1, **TWO)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]

    ranks = [torch.load(tmp_path / f"rank{n}.pt") for n in range(2)]
    for name, made in ranks[0].items():  # one gradient and one model on both ranks
        for what in ("gradient", "mean"):
            assert torch.equal(made[what], ranks[1][name][what]), (name, what)
    # Adam turns rounding of small gradients into steps, so weights agree less well than gradients.
    close = {"32-true": (1e-5, 0.01), "bf16-mixed": (0.02, 0.2)}
    for precision, (gradient, moved) in close.items():
        one = script.fit(store.path, "one", precision)
        started = script.fit(store.path, "one", precision, steps=0)["mean"]
        for name in ranks[0].keys() & {f"ddp {precision}", f"fsdp {precision}"}:
            made = ranks[0][name]
            assert relative(made["gradient"], one["gradient"]) < gradient, name
            assert relative(made["mean"], one["mean"], one["mean"] - started) < moved, name
    whole, continued = ranks[0]["fsdp 32-true"], ranks[0]["fsdp continued"]
    torch.testing.assert_close(continued["mean"], whole["mean"], rtol=1e-5, atol=1e-6)

    models = [PhenoSeq.load(tmp_path / run / "model").state_dict() for run in ("two", "sharded")]
    assert all(bool(torch.isfinite(t).all()) for t in models[0].values())
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-2, atol=1e-2)
    table = pd.read_csv(tmp_path / "two" / "metrics.csv")
    assert table["step"].is_monotonic_increasing
    assert table["val_loss"].notna().sum() == 1
    assert ran.stdout.count("mean weights of last.ckpt") == 2  # rank zero alone finalises


@pytest.mark.filterwarnings("ignore")
def test_a_rank_that_dies_ends_the_run(arguments, tmp_path):
    many = arguments("dies", epochs=1000, **TWO, **{"checkpoint.steps": 2})
    run = subprocess.Popen(
        [sys.executable, "-m", "phenoseq.cli", "train", *many],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    last = tmp_path / "dies" / "checkpoints" / "last.ckpt"
    until = time.monotonic() + 240
    while not last.exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    (other,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(other), signal.SIGKILL)
    error = run.communicate(timeout=60)[1]
    assert run.returncode != 0
    assert "Error" in error
