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
def launch(store, tmp_path):
    """Give a function that starts the script on two processes."""
    started = []

    def start(how: str) -> subprocess.Popen:
        settings = SMALL | {
            "data.store": store.path,
            "data.batch_size": 16,
            "trainer.devices": 2,
            "trainer.default_root_dir": tmp_path / "run",
        }
        arguments = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        with (tmp_path / "said").open("w") as said:
            process = subprocess.Popen(
                [*command, "--nproc-per-node=2", SCRIPT, how, store.path, tmp_path, *arguments],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=said,
                stderr=said,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()
        process.wait()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_two_processes_train_like_one(store, script, launch, tmp_path):
    """One launch for all of it, since two processes take seconds to start."""
    process = launch("ddp")
    last = tmp_path / "dies" / "checkpoints" / "last.ckpt"
    until = time.monotonic() + 400
    while not last.exists():
        assert process.poll() is None, (tmp_path / "said").read_text()[-5000:]
        assert time.monotonic() < until, (tmp_path / "said").read_text()[-5000:]
        time.sleep(0.1)
    for precision, close in (("32-true", (1e-5, 1e-4)), ("bf16-mixed", (0.02, 0.05))):
        same_gradients_and_weights(
            script.fit(store.path, "one", precision), precision, close, tmp_path
        )
    phenoseq_train_left_a_model(store, tmp_path)
    a_rank_that_dies_ends_the_run(process, tmp_path)


def same_gradients_and_weights(
    one: dict[str, torch.Tensor], name: str, close: tuple[float, float], out: Path
) -> None:
    """As on the joined batch, at once and after 20 steps; and equal on both ranks."""
    ranks = [torch.load(out / f"rank{n}.pt")[name] for n in range(2)]
    for what, near in zip(("gradient", "moved"), close, strict=True):
        assert torch.equal(ranks[0][what], ranks[1][what]), (name, what)
        assert relative(ranks[0][what], one[what]) < near, (name, what)


def phenoseq_train_left_a_model(store, out: Path) -> None:
    """Although the ranks' cells are uneven in number; and rank zero alone finalised."""
    data = StoreDataModule(store.path, SplitConfig(by="Metadata_Well", block=None, test=0.2))
    data.setup()
    assert data.n_cells("train") % 2 == 1
    assert finite(out / "run" / "model")
    assert pd.read_csv(out / "run" / "metrics.csv")["val_loss"].notna().sum() == 1
    assert (out / "said").read_text().count("mean weights of last.ckpt") == 1


def a_rank_that_dies_ends_the_run(process: subprocess.Popen, out: Path) -> None:
    os.kill(int((out / "pid1").read_text()), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert "SIGKILL" in (out / "said").read_text()
    assert not Path(f"/proc/{(out / 'pid0').read_text()}").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_in_shards(store, script, launch, tmp_path):
    """FSDP trains as one process does, goes on from step 13 of 20, and leaves a whole model."""
    assert launch("fsdp").wait(timeout=400) == 0, (tmp_path / "said").read_text()[-5000:]
    one = script.fit(store.path, "one", "32-true")
    same_gradients_and_weights(one, "32-true", (1e-5, 1e-4), tmp_path)
    made = torch.load(tmp_path / "rank0.pt")
    torch.testing.assert_close(made["continued"]["mean"], made["32-true"]["mean"])
    phenoseq_train_left_a_model(store, tmp_path)


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
