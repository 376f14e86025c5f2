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
from phenoseq.errors import ModelError
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.training.checkpoints import Checkpoints
from phenoseq.training.train import train

SCRIPT = Path(__file__).with_name("two_ranks.py")
SMALL = {
    "data.split": "{by: Metadata_Well, block: null, test: 0.2}",
    "model.encoder.backbone": "test_resnet",
    "model.denoiser.dim": 32,
    "model.denoiser.depth": 2,
    "model.denoiser.heads": 2,
    "model.components": 6,
    "model.hidden": 16,
    "model.warmup_steps": 5,
    "trainer.accelerator": "cpu",
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("two_ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture
def launched(store, tmp_path):
    """Two processes that have done all but their last run, which goes on."""
    settings = SMALL | {"data.store": store.path, "data.batch_size": 16, "trainer.devices": 2}
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = tmp_path / "said"
    with said.open("w") as file:
        process = subprocess.Popen(
            [*command, SCRIPT, store.path, tmp_path, *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
        )
    until = time.monotonic() + 400
    while not (tmp_path / "dies" / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, said.read_text()[-5000:]
        assert time.monotonic() < until, said.read_text()[-5000:]
        time.sleep(0.1)
    yield process
    process.terminate()
    process.wait()


@pytest.mark.filterwarnings("ignore")
def test_two_processes_train_like_one(store, script, launched, tmp_path):
    """One launch for all of it, since two processes take seconds to start."""
    same_gradients_and_weights(store, script, tmp_path)
    a_sharded_run_goes_on(tmp_path)
    phenoseq_train_leaves_one_model(store, tmp_path)
    a_rank_that_dies_ends_the_run(launched, tmp_path)


def same_gradients_and_weights(store, script, out: Path) -> None:
    """On the joined batch, at once and after 20 steps; equal on both ranks, and in shards."""
    ranks = [torch.load(out / f"rank{n}.pt") for n in range(2)]
    for precision, close in (("32-true", (1e-5, 1e-4)), ("bf16-mixed", (0.02, 0.05))):
        one = script.fit(store.path, "one", precision)
        for name in ranks[0].keys() & {f"ddp {precision}", f"fsdp {precision}"}:
            for what, near in zip(("gradient", "moved"), close, strict=True):
                made = ranks[0][name][what]
                assert torch.equal(made, ranks[1][name][what]), (name, what)
                assert relative(made, one[what]) < near, (name, what)


def a_sharded_run_goes_on(out: Path) -> None:
    """From a checkpoint of step 13 of 20."""
    made = torch.load(out / "rank0.pt")
    whole, continued = made["fsdp 32-true"]["mean"], made["fsdp continued"]["mean"]
    torch.testing.assert_close(continued, whole, rtol=1e-5, atol=1e-6)


def phenoseq_train_leaves_one_model(store, out: Path) -> None:
    """Whole and in shards the same, although the ranks' cells are uneven in number."""
    data = StoreDataModule(store.path, SplitConfig(by="Metadata_Well", block=None, test=0.2))
    data.setup()
    assert data.n_cells("train") % 2 == 1
    whole, shards = (
        PhenoSeq.load(out / run / "model").state_dict() for run in ("whole", "in-shards")
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(shards[name], tensor, rtol=1e-2, atol=1e-2)
    table = pd.read_csv(out / "whole" / "metrics.csv")
    assert table["val_loss"].notna().sum() == 1
    said = (out / "said").read_text()
    assert said.count("mean weights of last.ckpt") == 2  # of two runs: rank zero alone finalises


def a_rank_that_dies_ends_the_run(process: subprocess.Popen, out: Path) -> None:
    os.kill(int((out / "pid1").read_text()), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert "SIGKILL" in (out / "said").read_text()
    assert not Path(f"/proc/{(out / 'pid0').read_text()}").exists()


def test_another_number_of_devices_is_refused(tmp_path):
    """Each has its own share of the cells."""
    made = Checkpoints()
    made.folder = tmp_path
    with pytest.raises(ModelError, match="was made on 4 devices, and this is 1"):
        made.load_state_dict({"least": 1.0, "step": 3, "devices": 4})


# ------------------------------------------------------------------ what a CPU cannot, or not well


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 needs a GPU")
@pytest.mark.filterwarnings("ignore")
def test_float16(arguments):
    gpu = {"trainer.accelerator": "gpu", "trainer.devices": 1, "trainer.precision": "16-mixed"}
    assert finite(train(arguments(epochs=1, **gpu)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "settings",
    [
        {"trainer.strategy": "fsdp", "trainer.precision": "bf16-mixed"},
        {
            "trainer.strategy": "ddp",
            "trainer.sync_batchnorm": "true",
            "model.encoder.norm": "batch",
        },
    ],
    ids=["fsdp", "sync_batchnorm"],
)
def test_two_gpus(arguments, tmp_path, settings):
    two = {"trainer.accelerator": "gpu", "trainer.devices": 2, **settings}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*command, "-m", "phenoseq.cli", "train", *arguments(epochs=1, **two)],
        check=True,
        timeout=600,
    )
    assert finite(tmp_path / "run" / "model")


def finite(model: Path) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in PhenoSeq.load(model).state_dict().values())
