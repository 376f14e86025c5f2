"""Checkpoints: when they are made, and that a good one is always there."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from phenoseq.disk import room_for
from phenoseq.errors import ModelError

LAST, BEST = "last.ckpt", "best.ckpt"
#: Steps after which the clock is looked at: all devices must agree on what it says.
_LOOK = 10


def folder_of(root: str | Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(root) / "checkpoints"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, and moves it there when all of it is on the disk.

    Lightning's own is put together in memory and moved from the folder for temporary files, which
    may be another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Write a checkpoint, or leave the one that is there.

        Raises
        ------
        DataError
            Where the disk is full.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with room_for(path, "the checkpoint before it is as it was"):
            try:
                with partial.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        _sync(path.parent)


def steps_done(path: Path) -> int:
    """Return the number of optimiser steps before a checkpoint, 0 where there is none.

    Raises
    ------
    ModelError
        Where the checkpoint cannot be read.
    """
    if not path.exists():
        return 0
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        return int(checkpoint["global_step"])
    except Exception as error:
        raise ModelError(
            f"{path}: cannot be read ({error}); to begin anew, remove the folder {path.parent}"
        ) from error


@contextmanager
def resumable() -> Iterator[None]:
    """Let an interrupt be one, which Lightning turns into an exit, and say how to go on."""
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt("the same command goes on from the last checkpoint") from None
        raise


class Checkpoints(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` and ``checkpoints/best.ckpt`` in the folder of the run.

    The last one is made after each epoch, and within an epoch every so often; the best one after
    each validation whose ``val_loss`` is the least so far.

    Parameters
    ----------
    minutes
        Most minutes of training that are lost when it is killed, or a little more.
    steps
        Optimiser steps after which a checkpoint is made in any case.
    """

    def __init__(self, minutes: float = 10.0, steps: int | None = None) -> None:
        super().__init__()
        self.minutes, self.steps = minutes, steps
        self._least, self._least_step = math.inf, 0
        self._seen = 0
        self._due = False
        self._devices = 1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder."""
        self.folder = folder_of(trainer.default_root_dir)
        self._devices = trainer.world_size

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._time = time.monotonic()
        self._seen = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Save, where it is time, no gradient waits, and nothing else follows on this batch."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        if self.steps is not None and trainer.global_step % self.steps == 0:
            self._due = True
        if trainer.global_step % _LOOK == 0:
            over = time.monotonic() - self._time > 60 * self.minutes
            self._due |= bool(trainer.strategy.broadcast(over))
        if self._due and not _more_follows(trainer, batch_idx):
            self._save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the best."""
        loss = float(trainer.callback_metrics.get("val_loss", math.inf))
        if _in_training(trainer) and loss < self._least:
            self._least, self._least_step = loss, trainer.global_step
            trainer.save_checkpoint(self.folder / BEST)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last."""
        self._save_last(trainer)

    def _save_last(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST)
        self._due, self._time = False, time.monotonic()

    def state_dict(self) -> dict[str, float]:
        """Return the least validation loss and its step, and the number of devices."""
        return {"least": self._least, "step": self._least_step, "devices": self._devices}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on, on as many devices.

        Raises
        ------
        ModelError
            Where the number of devices differs, so that they would take other cells.
        """
        then, now = int(state_dict["devices"]), self._devices
        if then != now:
            raise ModelError(
                f"{self.folder}: the run was made on {then} devices, and this is {now}; each takes "
                f"its own share of the cells, so go on with {then} in all, on as many machines as "
                "you like"
            )
        self._least, self._least_step = state_dict["least"], int(state_dict["step"])


def _in_training(trainer: L.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _more_follows(trainer: L.Trainer, batch_idx: int) -> bool:
    """Tell whether a row is logged or a validation made after this batch.

    Lightning takes up a run after the batch whose end was saved, and would leave out both.
    """
    row: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    logged = row > 1 and trainer.global_step % row == 0
    whole = trainer.check_val_every_n_epoch is None
    number = trainer.fit_loop.total_batch_idx if whole else batch_idx
    every = trainer.val_check_batch or math.inf
    return trainer.is_last_batch or logged or (number + 1) % every == 0


def _sync(folder: Path) -> None:
    """Put a folder's table of names on the disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
