"""Large models, sharded over devices: weights, gradients and the optimiser's state (FSDP)."""

from __future__ import annotations

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from phenoseq.models.load import Model

#: What a training module calls of a model besides ``forward``.
_CALLED = ("encode", "denoising_loss", "mean_loss", "generate")


class ShardedStrategy(ModelParallelStrategy):
    """``trainer.strategy: fsdp``: torch's second FSDP over all devices, one file a checkpoint."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Spread over the data alone."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        self._tensor_parallel_size = 1
        super().setup_environment()


def shard(model: Model, mesh: DeviceMesh) -> None:
    """Shard a model over a mesh: each block of an encoder by itself, and all the rest together.

    A block is gathered when it is used and let go again, so that a device holds one at a time.
    """
    for weight in model.parameters():
        weight.data = weight.data.contiguous()  # not channels last, which FSDP does not know
    backbone = getattr(getattr(model, "encoder", None), "backbone", None)
    stages = () if backbone is None else backbone.children()
    for stage in stages:
        for block in stage if isinstance(stage, nn.Sequential | nn.ModuleList) else ():
            if next(block.parameters(), None) is not None:
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The root too is let go after each use, since the mean weights take the place of its own.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for name in _CALLED:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
