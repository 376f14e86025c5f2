"""Averaged weights with warm-up, however the model is spread over devices."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor

#: Where a checkpoint keeps the weights in training; its ``state_dict`` holds their mean.
_CURRENT = "current_model_state"


class WarmEMA(Callback):
    """Moving average of the weights, validated, checkpointed and exported in their place.

    Each device averages what it holds, so that a sharded model stays so, which Lightning's own
    ``WeightAveraging`` does not allow.

    Parameters
    ----------
    decay
        Reached after a warm-up: after n steps it is ``min(decay, (1 + n) / (10 + n))``, so that the
        first, poor weights are soon forgotten.
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = decay
        self._mean: dict[str, Tensor] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []  # mean and weight, of what is not frozen
        self._n = 0  # updates
        self._step = 0  # of the last one

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from the weights as they are, or from a checkpoint's mean."""
        current = pl_module.state_dict()
        if self._mean:
            self._mean = {name: mean.to(current[name].device) for name, mean in self._mean.items()}
        else:
            self._mean = _clone(current)
        frozen = {name for name, p in pl_module.named_parameters() if not p.requires_grad}
        self._pairs = [
            (_local(mean), _local(current[name]))
            for name, mean in self._mean.items()
            if name not in frozen
        ]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object
    ) -> None:
        """Average, where the optimiser made a step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        rate = min(self.decay, (1 + self._n) / (10 + self._n)) if self._n else 0.0
        self._n += 1
        smooth = [pair for pair in self._pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([m for m, _ in smooth], [c for _, c in smooth], 1 - rate)
        for mean, now in self._pairs:
            if not mean.is_floating_point():  # such as the number of batches seen
                mean.copy_(now)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the mean."""
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on training with the weights themselves."""
        self._swap(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the mean in the model."""
        self._swap(pl_module)
        self._mean, self._pairs = {}, []

    def state_dict(self) -> dict[str, int]:
        """Return how often was averaged."""
        return {"n": self._n, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where a checkpoint was made."""
        self._n, self._step = state_dict["n"], state_dict["step"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the mean into ``state_dict``, and the weights in training beside it."""
        if self._mean:
            whole = {name: _whole(mean) for name, mean in self._mean.items()}  # on every rank
            checkpoint[_CURRENT] = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: whole[name] for name in checkpoint[_CURRENT]}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the mean, which was loaded, out of the model, and load the weights in training."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        if trainer.state.fn == TrainerFn.FITTING:
            self._mean = _clone(pl_module.state_dict())
            options = StateDictOptions(full_state_dict=True)
            set_model_state_dict(pl_module, checkpoint[_CURRENT], options=options)

    @torch.no_grad()
    def _swap(self, module: L.LightningModule) -> None:
        current = module.state_dict()
        for name, mean in self._mean.items():
            here, there = _local(mean), _local(current[name])
            kept = there.clone()
            there.copy_(here)
            here.copy_(kept)


def _clone(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
