"""The LightningModule: noise levels, loss, optimiser, and the model built from the data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from phenoseq._version import __version__
from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.handover import Batch
from phenoseq.models.config import (
    DiffusionConfig,
    ImageConfig,
    PhenoSeqConfig,
    TrainingRecord,
)
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.diffusion import logit_normal
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.expression import fit_expression_space
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.training.augment import augment

#: Training crops whose pixels set the channel statistics.
_STATISTICS_CELLS = 4096


class PhenoSeqModule(L.LightningModule):
    """Trains a :class:`~phenoseq.models.phenoseq.PhenoSeq` on a store.

    Each cell's image is encoded once and serves ``levels`` noise levels of its expression: one at
    pure noise, where the best prediction of the clean latent is its mean given the image, and the
    others at logit-normal times (Esser et al. 2024). The error of the clean latent is weighted to
    that of the velocity.

    Parameters
    ----------
    encoder, denoiser, diffusion
        Parts of the model.
    components, hidden
        Sizes of the expression space (see :class:`~phenoseq.models.expression.ExpressionConfig`).
    lr, weight_decay
        AdamW's highest learning rate, reached after ``warmup_steps`` and then lowered along a
        cosine to zero; weight decay on matrices.
    warmup_steps
        Steps of linear warm-up.
    levels
        Noise levels a cell and step.
    drop_context
        Share of the cells trained without context, for classifier-free guidance.
    drop_channel
        Chance of each stain to be dropped, so that a missing one does little harm.
    seed
        Of the expression space's fit, and of the noise.
    """

    model: PhenoSeq

    def __init__(
        self,
        encoder: EncoderConfig = EncoderConfig(),  # noqa: B008 - frozen, and shown by --help
        denoiser: DenoiserConfig = DenoiserConfig(),  # noqa: B008
        diffusion: DiffusionConfig = DiffusionConfig(),  # noqa: B008
        components: int = 32,
        hidden: int = 256,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 300,
        levels: int = 4,
        drop_context: float = 0.1,
        drop_channel: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.denoiser, self.diffusion = encoder, denoiser, diffusion
        self.components, self.hidden = components, hidden
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self.levels, self.drop_context, self.drop_channel = levels, drop_context, drop_channel
        self.seed = seed

    def configure_model(self) -> None:
        """Build the model from the training part of the data, once."""
        if hasattr(self, "model"):
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model = self._build(data)

    def _build(self, data: StoreDataModule) -> PhenoSeq:
        """Build an untrained model whose data-dependent parts are fitted to the training cells."""
        manifest = data.opened.manifest
        rows = data.parts.rows("train")
        pixels = data.opened.take(data.some("train", _STATISTICS_CELLS)).astype(np.float32)
        space = fit_expression_space(
            data.opened.counts(rows),
            manifest.genes,
            manifest.symbols,
            components=self.components,
            hidden=self.hidden,
            seed=self.seed,
        )
        config = PhenoSeqConfig(
            image=ImageConfig(
                channels=manifest.channels,
                pixel_size=manifest.pixel_size,
                crop_px=manifest.crop_px,
                dtype=manifest.dtype,
                mean=tuple(pixels.mean(axis=(0, 2, 3)).tolist()),
                std=tuple(np.maximum(pixels.std(axis=(0, 2, 3)), 1e-6).tolist()),
                p999=tuple(np.quantile(pixels, 0.999, axis=(0, 2, 3)).tolist()),
            ),
            expression=space.config,
            training=TrainingRecord(
                source=manifest.source,
                identity=manifest.identity,
                split=asdict(data.split),
                split_digest=data.parts.digest,
                n_cells=len(rows),
                seed=self.seed,
                version=__version__,
            ),
            encoder=self.encoder,
            denoiser=self.denoiser,
            diffusion=self.diffusion,
        )
        return PhenoSeq(config, space)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        generator = self._generator("train", self.global_step)
        images = augment(batch["images"].float(), generator)
        present = self._coins(images.shape[:2], generator) >= self.drop_channel
        present |= ~present.any(dim=1, keepdim=True)
        drop = self._coins(images.shape[:1], generator) < self.drop_context
        loss = self._loss(images, batch["counts"], present, drop, generator).mean()
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss at fixed times and noise, so that epochs can be compared."""
        generator = self._generator("val", batch_idx)
        images = batch["images"].float()
        n, c = images.shape[:2]
        present = torch.ones(n, c, dtype=torch.bool, device=self.device)
        drop = torch.zeros(n, dtype=torch.bool, device=self.device)
        loss = self._loss(images, batch["counts"], present, drop, generator)
        self.log("val_loss", loss.mean(), prog_bar=True, sync_dist=True, batch_size=n)
        self.log("val_mean_loss", loss[:, 0].mean(), sync_dist=True, batch_size=n)

    def _loss(
        self,
        images: Tensor,
        counts: Tensor,
        present: Tensor,
        drop: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the loss of each cell at one time of pure noise and ``levels - 1`` others."""
        n, levels = len(images), self.levels
        dim = self.model.config.expression.latent_dim
        t = logit_normal(n * levels, generator).view(n, levels)
        t[:, 0] = 1.0
        noise = torch.randn(n, levels, dim, generator=generator)
        context = self.model.encode(images, present)
        return self.model.denoising_loss(
            context, counts, t.to(self.device), noise.to(self.device), drop
        )

    def configure_optimizers(self) -> Any:
        """Return AdamW with linear warm-up and cosine decay, by step."""
        trained: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        warm = min(self.warmup_steps, max(total // 2, 1))
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimiser,
            [
                torch.optim.lr_scheduler.LinearLR(optimiser, 0.01, total_iters=warm),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(total - warm, 1)),
            ],
            milestones=[warm],
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        words = [self.seed, {"train": 0, "val": 1}[purpose], number, self.global_rank]
        state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))

    def _coins(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=generator).to(self.device)
