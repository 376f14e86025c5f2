"""A run that was killed goes on as if nothing had been; what it wrote is whole at any moment."""

from __future__ import annotations

import errno
import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from phenoseq.errors import DataError, ModelError
from phenoseq.training.checkpoints import AtomicCheckpointIO, Checkpoints, steps_done
from phenoseq.training.logs import CsvLogger, draw_curves
from phenoseq.training.settings import keep_settings, same_settings
from phenoseq.training.train import train

quiet = pytest.mark.filterwarnings("ignore")
EVERY = {"trainer.log_every_n_steps": 1, "checkpoint.steps": 4, "trainer.max_epochs": 2}


#: `phenoseq train` in a process of its own, as the fixture `quick` has it, that waits in step 19.
RUN = """
import time
from phenoseq.cli import main
from phenoseq.models import expression
from phenoseq.training import finalise
from phenoseq.training.module import PhenoSeqModule

expression._MIN_STEPS, finalise._CELLS = 20, 64
step = PhenoSeqModule.training_step

def waits(self, batch, batch_idx):
    if self.global_step == 18:
        time.sleep(600)
    return step(self, batch, batch_idx)

PhenoSeqModule.training_step = waits
main(["train", *arguments])
"""


def kill_when(process: BaseProcess, ready, timeout: float = 240.0) -> None:
    """Send SIGKILL as soon as `ready()` is true."""
    until = time.monotonic() + timeout
    while not ready():
        assert process.is_alive()
        assert time.monotonic() < until, "the run did not get so far"
        time.sleep(0.002)
    process.kill()
    process.join()


def rows(root: Path) -> pd.DataFrame:
    table = pd.read_csv(root / "metrics.csv")
    return table.drop(columns="epoch")


@quiet
@pytest.mark.usefixtures("quick")
def test_killed_in_mid_epoch_and_continued_is_as_uninterrupted(arguments, fork, tmp_path, capsys):
    """Two epochs of about 11 steps; killed after the checkpoint of step 16, in the second."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(arguments("whole", **EVERY))
    process = fork(RUN, arguments=arguments("killed", **EVERY))
    last = killed / "checkpoints" / "last.ckpt"

    def in_second_epoch() -> bool:
        return steps_done(last) >= 16

    kill_when(process, in_second_epoch)
    done = steps_done(last)
    assert done == 16
    assert len(rows(killed)) >= done
    assert not (killed / "model").exists()

    capsys.readouterr()
    train(arguments("killed", **EVERY))
    assert f"continuing from {last}, step {done}" in capsys.readouterr().out
    uninterrupted, continued = rows(whole), rows(killed)
    assert continued["step"].tolist() == uninterrupted["step"].tolist()
    pd.testing.assert_frame_equal(
        continued[uninterrupted.columns], uninterrupted, rtol=1e-5, atol=1e-6
    )
    one, other = (
        torch.load(root / "checkpoints" / "last.ckpt", weights_only=False)
        for root in (whole, killed)
    )
    for part in ("state_dict", "current_model_state", "optimizer_states", "StoreDataModule"):
        assert_equal(other[part], one[part])
    assert one["callbacks"] == other["callbacks"]


def assert_equal(a, b) -> None:
    if isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in b:
            assert_equal(a[key], b[key])
    elif isinstance(b, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(b, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    else:
        assert a == b


#: Writes one checkpoint after the other.
WRITE = """
import torch
from phenoseq.training.checkpoints import AtomicCheckpointIO

for n in range(1, 10**6):
    state = {"global_step": n, "weights": torch.full((2_000_000,), float(n))}
    AtomicCheckpointIO().save_checkpoint(state, path)
"""


def test_killed_while_writing_a_whole_checkpoint_is_there(fork, tmp_path):
    """Killed at several moments of writing the next one."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    for wait in (0.0, 0.001, 0.004, 0.011):
        process = fork(WRITE, path=path)
        until = time.monotonic() + 60
        while not (path.exists() and path.with_name("last.ckpt.partial").exists()):
            assert time.monotonic() < until
        time.sleep(wait)
        process.kill()
        process.join()
        state = torch.load(path)
        assert (state["weights"] == state["global_step"]).all()
        path.unlink()


@pytest.mark.parametrize("when", ["writing", "fsync"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, when):
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 3}, path)
    full = OSError(errno.ENOSPC, "No space left on device")

    def half(state, file):
        file.write(b"PK half of it")
        raise full

    def fail(handle):
        raise full

    if when == "writing":
        monkeypatch.setattr(torch, "save", half)
    else:
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match=r"disk is full .* the checkpoint before it is as it was"):
        AtomicCheckpointIO().save_checkpoint({"global_step": 4}, path)
    monkeypatch.undo()
    assert steps_done(path) == 3
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "last.ckpt"
    assert steps_done(path) == 0
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match=r"last\.ckpt: cannot be read .* remove the folder"):
        steps_done(path)


def test_rows_of_the_log_are_neither_lost_nor_doubled(tmp_path):
    first = CsvLogger(tmp_path)
    for step in range(5):
        first.log_metrics({"train_loss": 1.0 - step / 10, "epoch": 0}, step)
    first.log_metrics({"val_loss": torch.tensor(0.5), "epoch": 0}, 4)
    first.log_metrics({"train_loss": 0.4, "epoch": 1}, 5)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("6,0.3")  # cut off by a kill
    second = CsvLogger(tmp_path, done=5)
    second.log_metrics({"train_loss": 0.7, "epoch": 1}, 5)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["step"].tolist() == [0, 1, 2, 3, 4, 4, 5]
    np.testing.assert_allclose(table["train_loss"].dropna(), [1.0, 0.9, 0.8, 0.7, 0.6, 0.7])
    assert table["val_loss"].dropna().tolist() == [0.5]
    anew = CsvLogger(tmp_path)
    anew.log_metrics({"val_loss": 2.0}, 9)
    assert len(pd.read_csv(tmp_path / "metrics.csv")) == 1


def test_learning_curves_are_drawn_whole(tmp_path):
    draw_curves(tmp_path)  # nothing to draw yet
    log = CsvLogger(tmp_path)
    for step in range(3):
        log.log_metrics({"train_loss": 1.0}, step)
    log.log_metrics({"val_loss": 1.0, "val_pcc_gene": 0.1}, 2)
    draw_curves(tmp_path)
    made = tmp_path / "checkpoints" / "learning_curves.png"
    assert made.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in made.parent.iterdir()] == [made.name]


def test_settings_that_change_the_result_are_named(tmp_path):
    keep_settings(tmp_path, "model: {lr: 0.1, encoder: {norm: group}}\ntrainer: {max_epochs: 2}\n")
    same_settings(
        tmp_path,
        "model: {lr: 0.1, encoder: {norm: group}}\nout: elsewhere\n"
        "trainer: {max_epochs: 2, devices: 4, logger: {class_path: x}, num_nodes: 2}\n",
    )
    with pytest.raises(ModelError) as told:
        same_settings(
            tmp_path, "model: {lr: 0.2, encoder: {norm: batch}}\ntrainer: {max_epochs: 2}\n"
        )
    assert "model.lr is 0.2, and was 0.1" in str(told.value)
    assert "model.encoder.norm is 'batch', and was 'group'" in str(told.value)
    assert "max_epochs" not in str(told.value)


class FakeTrainer:
    """As far as the checkpoints look at it: epochs of 24 steps, a row each 5, validation each 8."""

    log_every_n_steps, val_check_batch, check_val_every_n_epoch = 5, 8, 1
    world_size = 1
    strategy = SimpleNamespace(broadcast=lambda value: value)

    def __init__(self, root: Path) -> None:
        self.default_root_dir = root
        self.global_step = 0
        self.saved: list[int] = []

    @property
    def is_last_batch(self) -> bool:
        return self.global_step % 24 == 0

    def save_checkpoint(self, path: Path) -> None:
        assert path == Path(self.default_root_dir) / "checkpoints" / "last.ckpt"
        self.saved.append(self.global_step)


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"steps": 4}, [4, 9, 12, 17, 21, 26, 28, 33, 36, 41, 44]),  # 8, 16, 20, 24 one later
        ({"minutes": 0.0}, [11, 21, 31, 41]),  # the clock is looked at each 10 steps
        ({}, []),  # not for 10 minutes
    ],
)
def test_when_a_checkpoint_is_made(tmp_path, settings, saved):
    """After steps and by the clock; not where a row or a validation would be left out."""
    trainer, made = FakeTrainer(tmp_path), Checkpoints(**settings)
    made.setup(trainer, None, "fit")
    made.on_train_start(trainer, None)
    for batch in range(96):  # two batches a step
        trainer.global_step = (batch + 1) // 2
        made.on_train_batch_end(trainer, None, None, None, trainer.global_step % 24 - 1)
    assert trainer.saved == saved
