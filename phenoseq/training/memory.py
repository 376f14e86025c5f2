"""Batches that fit into memory: found beforehand, or given in pieces when one did not fit."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor

from phenoseq.data.dataset import StreamLoader
from phenoseq.data.handover import Batch
from phenoseq.errors import ModelError
from phenoseq.training.checkpoints import folder_of


@dataclass(frozen=True)
class Fit:
    """What fits into memory; kept in the folder of a run, which goes on with it.

    Parameters
    ----------
    batch_size
        Items a batch that were found to fit; None leaves the setting.
    pieces
        Pieces in which each batch is computed.
    """

    batch_size: int | None = None
    pieces: int = 1

    @classmethod
    def read(cls, root: Path) -> Self:
        """Return what a run found, or what it starts with."""
        file = _file(root)
        return cls(**json.loads(file.read_text())) if file.exists() else cls()

    def write(self, root: Path) -> None:
        """Keep it, whole or not at all."""
        file = _file(root)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)))
        os.replace(partial, file)

    def halved(self) -> Self:
        """Return this with twice as many pieces."""
        return replace(self, pieces=2 * self.pieces)


def _file(root: Path) -> Path:
    return folder_of(root) / "memory.json"


class InPieces(Callback):
    """Computes each batch in pieces and adds up their gradients, so that each needs less memory.

    The loader gives the same batches, so that no item is lost or seen twice where a run goes on in
    other pieces than before. A piece counts by its share of the batch: the gradient is that of the
    batch.

    Parameters
    ----------
    data
        Whose training batches are cut.
    pieces
        In how many; the trainer must accumulate the gradients of so many.
    """

    def __init__(self, data: L.LightningDataModule, pieces: int) -> None:
        self.pieces = pieces
        self.validating = False
        self._loader: _Pieces | None = None
        if pieces > 1:
            whole: Callable[[], StreamLoader] = data.train_dataloader

            def cut() -> _Pieces:
                self._loader = _Pieces(whole(), pieces)
                return self._loader

            data.train_dataloader = cut  # type: ignore[method-assign]

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Weigh the loss of a piece, which the trainer divided by the number of pieces."""
        if self._loader is not None:
            loss.mul_(self._loader.share * self.pieces)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Know it: validation is not cut."""
        self.validating = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Know it."""
        self.validating = False

    def state_dict(self) -> dict[str, int]:
        """Return the number of pieces."""
        return {"pieces": self.pieces}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count batches in these pieces, where the checkpoint counted them in others."""
        then = checkpoint["callbacks"][self.state_key]["pieces"]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            done = counts["ready"]
            for name, n in counts.items():  # one of them may be one behind
                counts[name] = done * self.pieces // then - (done - n)


class _Pieces:
    """Gives the batches of a loader in pieces.

    Attributes
    ----------
    share
        Of the batch, that the piece given last is.
    """

    def __init__(self, loader: StreamLoader, pieces: int) -> None:
        self.loader, self.pieces = loader, pieces
        self.share = 1.0

    def __len__(self) -> int:
        return len(self.loader) * self.pieces

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            cut = {name: tensor.tensor_split(self.pieces) for name, tensor in batch.items()}
            size = len(next(iter(batch.values())))
            if size < self.pieces:
                raise ModelError(
                    f"out of memory: a batch of {size} cannot be computed in {self.pieces} pieces; "
                    "use a smaller encoder, or smaller crops"
                )
            for parts in zip(*cut.values(), strict=True):
                self.share = len(parts[0]) / size
                yield dict(zip(cut, parts, strict=True))

    def state_dict(self) -> dict[str, int]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loader.load_state_dict(state)


def out_of_memory(error: BaseException) -> bool:
    """Tell whether a device, or the allocator, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or is_oom_error(error)


def largest_batch(try_one: Callable[[int], None], start: int, most: int) -> int:
    """Return the largest batch that fits: ``start`` times or over a power of two.

    Parameters
    ----------
    try_one
        Makes some steps with batches of this size; raises where they do not fit.
    start
        Size to try first.
    most
        Size that is not passed, such as the number of items.

    Raises
    ------
    ModelError
        Where not even one item fits.
    """
    size = min(start, most)
    fits = _fits(try_one, size)
    while fits and 2 * size <= most and _fits(try_one, 2 * size):
        size *= 2
    while not fits:
        if size == 1:
            raise ModelError("out of memory with a single item; use a smaller encoder or crops")
        size //= 2
        fits = _fits(try_one, size)
    return size


def _fits(try_one: Callable[[int], None], size: int) -> bool:
    try:
        try_one(size)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fits = False
    else:
        fits = True
    free_memory()
    return fits


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
