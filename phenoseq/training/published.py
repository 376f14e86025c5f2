"""The training of the published PhenoSeq network on samples of features and embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from phenoseq.data.datamodule import StreamDataModule
from phenoseq.data.handover import Batch
from phenoseq.data.samplemodule import SampleDataModule
from phenoseq.errors import DataError
from phenoseq.models.embedding import standardise
from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.models.published_config import (
    FeatureConfig,
    PublishedConfig,
    PublishedNoise,
    PublishedSizes,
)
from phenoseq.training.base import Drawn, TrainingModule, targets_of
from phenoseq.training.build import STATISTICS_CELLS, embedding_of, record_of
from phenoseq.training.module import flat_drawn


class PublishedModule(TrainingModule):
    """Trains a :class:`~phenoseq.models.published.PublishedPhenoSeq` as its project does.

    Times are drawn evenly from the schedule's steps, and the error is that of the noise. Features
    and embeddings are standardised over the training samples.

    Parameters
    ----------
    features
        What made the features, and the stains whose features stand one after the other.
    dim, heads, layers, encoder_layers, time_dim, ff_mult, dropout
        Sizes; see :class:`~phenoseq.models.published_config.PublishedSizes`.
    noise
        Schedule, and how to sample by default.
    lr, weight_decay, warmup_steps, sample_every, draws, seed
        See :class:`~phenoseq.training.base.TrainingModule`.
    """

    model: PublishedPhenoSeq

    def __init__(
        self,
        features: FeatureConfig = FeatureConfig(),  # noqa: B008 - frozen, and shown by --help
        dim: int = 1024,
        heads: int = 8,
        layers: int = 6,
        encoder_layers: int = 2,
        time_dim: int = 256,
        ff_mult: int = 4,
        dropout: float = 0.1,
        noise: PublishedNoise = PublishedNoise(),  # noqa: B008
        lr: float = 1e-4,
        weight_decay: float = 1e-5,
        warmup_steps: int = 5000,
        sample_every: int = 5,
        draws: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            sample_every=sample_every,
            draws=draws,
            seed=seed,
        )
        self.features, self.noise = features, noise
        self.sizes = {
            "dim": dim,
            "heads": heads,
            "layers": layers,
            "encoder_layers": encoder_layers,
            "time_dim": time_dim,
            "ff_mult": ff_mult,
        }
        self.dropout = dropout

    def build(self, data: StreamDataModule) -> tuple[PublishedPhenoSeq, Tensor]:
        """Return an untrained network with statistics of the training samples."""
        held = data.opened.manifest
        if not isinstance(data, SampleDataModule) or (
            (data.opened.manifest.images, data.opened.manifest.rna) != ("features", "embedding")
        ):
            raise DataError(
                f"{data.store}: the published network reads features of samples and predicts "
                f"embeddings; this store pairs by {held.pairing}. Prepare one with 'phenoseq "
                "prepare FEATURES.h5ad STORE --rna RNA.h5ad --pair-by sample --sample-columns "
                "COLUMNS --embedding scGPT'"
            )
        space, scored = embedding_of(data)
        found = data.image_sample("train", STATISTICS_CELLS)
        width = space.config.width
        config = PublishedConfig(
            origin=record_of(data, self.seed),
            sizes=PublishedSizes(
                features=found.shape[1], embedding=width, dropout=self.dropout, **self.sizes
            ),
            noise=self.noise,
            features=self.features,
            embedding=space.config.name,
            bag_size=data.n_images,
        )
        model = PublishedPhenoSeq(config)
        mean, std = standardise(found)
        model.features_mean.copy_(mean)
        model.features_std.copy_(std)
        model.rna_mean.copy_(space.mean)
        model.rna_std.copy_(space.std)
        return model, scored

    def finish(self, data: StreamDataModule, device: torch.device) -> PublishedPhenoSeq:
        """Return the trained network."""
        return self.model.cpu().float().eval()

    def training_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the loss of a batch, a number."""
        rows, keep = targets_of(batch)
        steps = self.noise.timesteps
        t = torch.randint(1, steps + 1, rows.shape, generator=generator) / steps
        noise = torch.randn(batch["embedding"].shape, generator=generator)
        return self._losses(batch, t, noise)[keep].mean()

    def validation_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of every RNA cell at a time of its own."""
        rows, _ = targets_of(batch)
        z = self.fixed_normals("val", rows, 1 + batch["embedding"].shape[2])
        even = torch.special.ndtr(z[..., 0])
        steps = self.noise.timesteps
        t = ((even * steps).floor() + 1).clamp(max=steps) / steps
        return {"val_loss": self._losses(batch, t, z[..., 1:])}

    def _losses(self, batch: Batch, t: Tensor, noise: Tensor) -> Tensor:
        # A bag that was short counts those cells twice that fill it, as in prediction.
        context = self.model.encode(batch["features"])
        return self.model.denoising_loss(
            context, batch["embedding"], t.to(self.device), noise.to(self.device)
        )

    def sample(self, batch: Batch) -> Drawn:
        """Draw for every RNA cell of a batch, with fixed noise."""
        rows, _ = targets_of(batch)
        n, dim = max(self.draws, rows.shape[1]), batch["embedding"].shape[2]
        noise = self.fixed_normals("draw", rows[:, 0], n * dim).view(-1, n, dim)
        made = self.model.generate(self.model.encode(batch["features"]), noise).float()
        return flat_drawn(batch["embedding"], made.mean(dim=1), made, rows)
