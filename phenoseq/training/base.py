"""What the training of every model shares: optimiser, random numbers, validation by sampling."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from phenoseq.data.datamodule import StreamDataModule
from phenoseq.data.handover import Batch
from phenoseq.evaluation.streaming import EDistance, PccGene, VarianceRatio
from phenoseq.models.load import Model
from phenoseq.training.optimiser import adamw, decayed_groups
from phenoseq.training.sharding import shard

#: What random numbers are for, so that no two draw alike.
Purpose = Literal["train", "val", "draw", "count"]
_PURPOSES: dict[Purpose, int] = {"train": 0, "val": 1, "draw": 2, "count": 3}


@dataclass(frozen=True)
class Drawn:
    """True and sampled expression of some RNA cells, each ``(n, g)``.

    Attributes
    ----------
    truth
        log1p at the median library size; or embeddings in their own scale.
    mean
        The mean of the draws.
    draw
        One draw a cell, counting noise included.
    rows
        Positions of the cells in the store, ``(n,)``.
    """

    truth: Tensor
    mean: Tensor
    draw: Tensor
    rows: Tensor

    def where(self, keep: Tensor) -> Drawn:
        """Return some of the cells."""
        return Drawn(self.truth[keep], self.mean[keep], self.draw[keep], self.rows[keep])


class TrainingModule(L.LightningModule):
    """Trains a model on a store.

    The validation loss, and the draws that are scored, use noise that depends on the seed and the
    RNA cell alone, so that the numbers can be compared between epochs, and between runs on any
    number of devices.

    Parameters
    ----------
    lr, weight_decay
        AdamW's highest learning rate, reached after ``warmup_steps`` and then lowered along a
        cosine to zero; weight decay on matrices.
    warmup_steps
        Steps of linear warm-up.
    sample_every
        Epochs after which the validation cells are sampled and scored: ``val_pcc_gene`` of the
        mean of draws, ``val_e_distance`` and ``val_variance_ratio`` of one draw.
    draws
        Draws a cell, there.
    seed
        Of all that is fitted and drawn.

    Attributes
    ----------
    model
        The model that is trained.
    scored
        Which genes, or dimensions, are scored, bool ``(g,)``.
    drawn
        What was sampled in the last validation on this rank; None where nothing was.
    """

    model: Model
    scored: Tensor
    drawn: Drawn | None = None

    def __init__(
        self,
        *,
        lr: float,
        weight_decay: float,
        warmup_steps: int,
        sample_every: int,
        draws: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self.sample_every, self.draws = sample_every, draws
        self.seed = seed
        # In a dictionary, not as submodules: the mean weights would average their buffers.
        self._means: dict[str, MeanMetric] = {}
        self._metrics: dict[str, Metric] = {}

    # ---------------------------------------------------------- what each family of models says

    @abstractmethod
    def build(self, data: StreamDataModule) -> tuple[Model, Tensor]:
        """Return an untrained model, fitted to the training cells where it must be, and ``scored``.

        Raises
        ------
        DataError, ModelError
            Where the store does not hold what such a model needs.
        """

    @abstractmethod
    def training_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the loss of a batch, a number."""

    @abstractmethod
    def validation_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return losses by name, each of every RNA cell ``(B, T)``, with fixed times and noise."""

    @abstractmethod
    def sample(self, batch: Batch) -> Drawn:
        """Draw for every RNA cell of a batch, with fixed noise; ``B * T`` cells."""

    @abstractmethod
    def finish(self, data: StreamDataModule, device: torch.device) -> Model:
        """Return the trained model on the CPU, with all that it learns about itself at last.

        That is computed on ``device``.
        """

    # ---------------------------------------------------------------------------------- Lightning

    def configure_model(self) -> None:
        """Build the model from the training part of the data, once."""
        if hasattr(self, "model"):
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model, self.scored = self.build(data)
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        part = batch_idx % self.trainer.accumulate_grad_batches  # of a step
        generator = self._generator(self.global_step, part)
        torch.manual_seed(generator.initial_seed())  # of dropout, so that a run can go on alike
        loss = self.training_loss(batch, generator)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["rows"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start counting; decide whether this validation samples."""
        self._means, self._metrics, self.drawn = {}, {}, None
        epoch = self.current_epoch + 1
        if not self.trainer.sanity_checking and epoch % self.sample_every == 0:
            genes = self.scored
            self._metrics = {
                "val_pcc_gene": PccGene(genes).to(self.device),
                "val_e_distance": EDistance(genes, self.seed).to(self.device),
                "val_variance_ratio": VarianceRatio(genes).to(self.device),
            }

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the losses, and to what is sampled."""
        _, keep = targets_of(batch)
        for name, loss in self.validation_losses(batch).items():
            mean = self._means.setdefault(name, MeanMetric().to(self.device))
            mean.update(loss[keep])
        if not self._metrics:
            return
        drawn = self.sample(batch).where(keep.flatten())
        self._metrics["val_pcc_gene"].update(drawn.mean, drawn.truth)
        self._metrics["val_variance_ratio"].update(drawn.draw, drawn.truth)
        self._metrics["val_e_distance"].update(drawn.draw, drawn.truth, drawn.rows)
        self.drawn = drawn if self.drawn is None else _joined(self.drawn, drawn)

    def on_validation_epoch_end(self) -> None:
        """Log the losses and scores of all ranks."""
        for name, metric in {**self._means, **self._metrics}.items():
            value = metric.compute().float()  # over all ranks, by torchmetrics
            self.log(name, value, prog_bar=name == "val_loss", sync_dist=True, batch_size=1)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's groups of parameters: weight decay on matrices alone."""
        return decayed_groups(self.model.parameters())

    def configure_optimizers(self) -> Any:
        """Return AdamW with linear warm-up and cosine decay, by step."""
        return adamw(
            self.parameter_groups(),
            lr=self.lr,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            total_steps=int(self.trainer.estimated_stepping_batches),
        )

    # ----------------------------------------------------------------------------- random numbers

    def _generator(self, step: int, part: int) -> torch.Generator:
        """Return the generator of a step, or of a part of it where gradients are accumulated."""
        words = [self.seed, _PURPOSES["train"], step, part, self.global_rank]
        state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))

    def _coins(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=generator).to(self.device)

    def fixed_normals(self, purpose: Purpose, rows: Tensor, n: int) -> Tensor:
        """Return n standard normals of every RNA cell, ``rows.shape + (n,)``, always the same."""
        return self._fixed(purpose, rows, n, lambda rng: rng.standard_normal(n, np.float32))

    def fixed_uniforms(self, purpose: Purpose, rows: Tensor, n: int) -> Tensor:
        """Return n numbers of [0, 1) of every RNA cell, ``rows.shape + (n,)``, always the same."""
        return self._fixed(purpose, rows, n, lambda rng: rng.random(n, np.float32))

    def _fixed(
        self,
        purpose: Purpose,
        rows: Tensor,
        n: int,
        numbers: Callable[[np.random.Generator], np.ndarray[Any, Any]],
    ) -> Tensor:
        words = [self.seed, _PURPOSES[purpose]]
        made = [numbers(np.random.default_rng([*words, row])) for row in rows.flatten().tolist()]
        return torch.from_numpy(np.stack(made)).view(*rows.shape, n).to(self.device)


def targets_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return where the RNA cells of a batch are in the store, and which count, both ``(B, T)``.

    A cell has one, its own.
    """
    rows = batch["rows"]
    if rows.ndim == 1:
        rows = rows[:, None]
    return rows, batch.get("keep_rna", torch.ones_like(rows, dtype=torch.bool))


def rna_of(batch: Batch) -> Tensor:
    """Return the RNA of a batch, counts or embeddings, ``(B, T, g)``."""
    found = batch["embedding"] if "embedding" in batch else batch["counts"]
    return found if found.ndim == 3 else found[:, None]


def _joined(some: Drawn, more: Drawn) -> Drawn:
    names = ("truth", "mean", "draw", "rows")
    return Drawn(*(torch.cat([getattr(some, k), getattr(more, k)]) for k in names))
