"""The training of PhenoSeq, on cells or on samples: noise levels, loss, and the model's making."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from phenoseq.data.datamodule import StreamDataModule
from phenoseq.data.handover import Batch
from phenoseq.data.samplemodule import SampleDataModule
from phenoseq.errors import DataError, ModelError
from phenoseq.models.config import DiffusionConfig, PhenoSeqConfig, SampleConfig
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.diffusion import logit_normal
from phenoseq.models.embedding import EmbeddingSpace, standardise
from phenoseq.models.encoder import Encoder, EncoderConfig
from phenoseq.models.expression import ExpressionSpace
from phenoseq.models.givenfeatures import FeatureEncoder, GivenFeatures
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.pretrained import Pretrained
from phenoseq.models.published_config import FeatureConfig
from phenoseq.models.sample import SamplePhenoSeq
from phenoseq.training.augment import augment
from phenoseq.training.base import Drawn, TrainingModule, rna_of, targets_of
from phenoseq.training.build import (
    STATISTICS_CELLS,
    image_of,
    pretrained_for,
    record_of,
    space_of,
)
from phenoseq.training.finalise import finalise


class PhenoSeqModule(TrainingModule):
    """Trains PhenoSeq: on a store of cells, or on one of samples.

    It makes a :class:`~phenoseq.models.phenoseq.PhenoSeq` of the one, and a
    :class:`~phenoseq.models.sample.SamplePhenoSeq` of the other.

    Each cell's image, or each bag of cells, is encoded once and serves ``levels`` noise levels of
    each of its RNA cells: one at pure noise, where the best prediction of the clean latent is its
    mean given the image, and the others at logit-normal times (Esser et al. 2024). The error of
    the clean latent is weighted to that of the velocity.

    Parameters
    ----------
    encoder, denoiser, diffusion
        Parts of the model; the encoder is of crops.
    features
        What the features are, where the store holds features: what made them, and the stains
        whose features stand one after the other (none, where they are not of one stain each).
    components, hidden
        Sizes of the expression space (see :class:`~phenoseq.models.expression.ExpressionConfig`).
    levels
        Noise levels of an RNA cell and step.
    mean_weight
        Of the regression's loss, beside that of the diffusion, where this is centred; above 0.
    drop_context
        Share of the cells or bags trained without context, for classifier-free guidance.
    drop_channel
        Chance of each stain to be dropped, so that a missing one does little harm.
    encoder_weights
        Pretrained weights that the encoder's backbone starts from: ``hub`` for those that timm
        knows, from the Hugging Face hub or its cache, or a file of them (.pth, .safetensors).
    frozen_stages
        Stages of the encoder's backbone, from the image on, that are not trained; ``"all"`` of it.
    recompute
        Gradient checkpointing of the encoder: less memory, more time.
    lr, weight_decay, warmup_steps, sample_every, draws, seed
        See :class:`~phenoseq.training.base.TrainingModule`.
    """

    model: PhenoSeq | SamplePhenoSeq

    def __init__(
        self,
        encoder: EncoderConfig = EncoderConfig(),  # noqa: B008 - frozen, and shown by --help
        denoiser: DenoiserConfig = DenoiserConfig(),  # noqa: B008
        diffusion: DiffusionConfig = DiffusionConfig(),  # noqa: B008
        features: FeatureConfig = FeatureConfig("features", (), 1),  # noqa: B008
        components: int = 32,
        hidden: int = 256,
        levels: int = 4,
        mean_weight: float = 4.0,
        drop_context: float = 0.1,
        drop_channel: float = 0.05,
        encoder_weights: str | None = None,
        frozen_stages: int | Literal["all"] = 0,
        recompute: bool = False,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 300,
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
        if mean_weight <= 0:
            raise ModelError(f"mean_weight = {mean_weight}: give a number above 0")
        self.encoder, self.denoiser, self.diffusion = encoder, denoiser, diffusion
        self.features = features
        self.components, self.hidden = components, hidden
        self.levels, self.mean_weight = levels, mean_weight
        self.drop_context, self.drop_channel = drop_context, drop_channel
        self.encoder_weights = encoder_weights
        self.frozen_stages, self.recompute = frozen_stages, recompute

    # ---------------------------------------------------------------------------------- the model

    def build(self, data: StreamDataModule) -> tuple[PhenoSeq | SamplePhenoSeq, Tensor]:
        """Return an untrained model whose data-dependent parts are fitted to the training cells."""
        start = pretrained_for(data, self.encoder, self.encoder_weights)
        space, scored = space_of(
            data, components=self.components, hidden=self.hidden, seed=self.seed
        )
        model: PhenoSeq | SamplePhenoSeq
        if isinstance(data, SampleDataModule):
            model = self._of_samples(data, space)
        else:
            assert isinstance(space, ExpressionSpace)
            config = PhenoSeqConfig(
                image=image_of(data), encoder=self.encoder, **self._parts(data, space)
            )
            model = PhenoSeq(config, space)
        self._prepare(model, start)
        return model, scored

    def _of_samples(
        self, data: SampleDataModule, space: ExpressionSpace | EmbeddingSpace
    ) -> SamplePhenoSeq:
        more = {"bag_size": data.n_images, **self._parts(data, space)}
        if data.opened.manifest.images == "crops":
            config = SampleConfig(cells=image_of(data), encoder=self.encoder, **more)
            return SamplePhenoSeq(config, space)
        found = data.image_sample("train", STATISTICS_CELLS)
        how = self.features
        cells = GivenFeatures(how.extractor, how.channels, how.crop_px, width=found.shape[1])
        cells.check(str(data.store))
        model = SamplePhenoSeq(SampleConfig(cells=cells, encoder=None, **more), space)
        assert isinstance(model.encoder, FeatureEncoder)
        mean, std = standardise(found)
        model.encoder.mean.copy_(mean)
        model.encoder.std.copy_(std)
        return model

    def _parts(
        self, data: StreamDataModule, space: ExpressionSpace | EmbeddingSpace
    ) -> dict[str, Any]:
        return {
            "expression": space.config,
            "training": record_of(data, self.seed),
            "denoiser": self.denoiser,
            "diffusion": self.diffusion,
        }

    def _prepare(self, model: PhenoSeq | SamplePhenoSeq, start: Pretrained | None) -> None:
        """Start the encoder from pretrained weights; freeze and recompute what is to be."""
        if isinstance(model.encoder, Encoder):
            if start is not None:
                start.put_into(model.encoder)
                model.with_record(replace(model.config.training, encoder_weights=start.origin))
            model.encoder.freeze(self.frozen_stages)
            if self.recompute:
                model.encoder.recompute()
        elif self.frozen_stages or self.recompute:
            raise DataError(
                "features have no backbone that could be frozen or recomputed: leave out "
                "'frozen_stages' and 'recompute'"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep where the encoder's weights came from."""
        checkpoint["encoder_weights"] = self.model.config.training.encoder_weights

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the encoder began with the weights that the model's record will name.

        Raises
        ------
        ModelError
            Where the file of weights is no longer what the run began with.
        """
        then = checkpoint.get("encoder_weights", {})
        if (now := self.model.config.training.encoder_weights) != then:
            raise ModelError(
                f"encoder_weights: {self.encoder_weights} is {now}, and was {then} when the run "
                "began; bring that back, or begin anew in another default_root_dir"
            )

    def finish(self, data: StreamDataModule, device: torch.device) -> PhenoSeq | SamplePhenoSeq:
        """Return the trained model, which knows its contexts, and how far to trust a gene."""
        return finalise(self.model.to(device).float(), data, self.seed).cpu()

    # ----------------------------------------------------------------------------------- the loss

    def training_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the loss of a batch, a number."""
        rows, keep = targets_of(batch)
        context = self.encode_augmented(batch, generator)
        drop = self._coins((len(rows),), generator) < self.drop_context
        t = logit_normal(rows.numel() * self.levels, generator).view(*rows.shape, self.levels)
        noise = torch.randn(*t.shape, self.model.expression.config.latent_dim, generator=generator)
        loss = self._losses(batch, context, t, noise, drop)[keep].mean()
        return loss + self.mean_loss(batch, context)

    def mean_loss(self, batch: Batch, context: tuple[Tensor, Tensor]) -> Tensor | float:
        """Return the weighted loss of the regression, a number; 0 where there is none."""
        if not self.model.config.diffusion.centred:
            return 0.0
        _, keep = targets_of(batch)
        return self.mean_weight * self.model.mean_loss(context, rna_of(batch))[keep].mean()

    def validation_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss over all times, and at pure noise, of every RNA cell."""
        rows, _ = targets_of(batch)
        dim = self.model.expression.config.latent_dim
        z = self.fixed_normals("val", rows, self.levels * (1 + dim))
        z = z.view(*rows.shape, self.levels, 1 + dim)
        loss = self._losses(batch, self.encode(batch), torch.sigmoid(z[..., 0]), z[..., 1:])
        return {"val_loss": loss.mean(dim=-1), "val_mean_loss": loss[..., 0]}

    def encode_augmented(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Encode the images of a batch, turned and brightened, without some of their stains."""
        cells = batch["images"].float() if "images" in batch else batch["features"]
        if "images" in batch:
            cells = augment(cells.flatten(0, -4), generator).view_as(cells)
        n_stains = max(len(self._stains), 1)
        present = self._coins((len(cells), n_stains), generator) >= self.drop_channel
        present |= ~present.any(dim=1, keepdim=True)
        return self._encode(batch, cells, present)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Encode the images of a batch as they are."""
        return self._encode(batch, batch["images" if "images" in batch else "features"], None)

    def _encode(self, batch: Batch, cells: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        if isinstance(self.model, SamplePhenoSeq):
            return self.model.encode(cells, present, batch["keep"])
        return self.model.encode(cells, present)

    def _losses(
        self,
        batch: Batch,
        context: tuple[Tensor, Tensor],
        t: Tensor,
        noise: Tensor,
        drop: Tensor | None = None,
    ) -> Tensor:
        """Return the loss at times ``(B, T, levels)``, of which the first are made pure noise."""
        t = torch.cat([torch.ones_like(t[..., :1]), t[..., 1:]], dim=-1)
        if drop is None:
            drop = torch.zeros(len(t), dtype=torch.bool, device=self.device)
        flat = self.model.denoising_loss(
            context,
            rna_of(batch),
            t.flatten(1).to(self.device),
            noise.flatten(1, 2).to(self.device),
            drop,
        )
        return flat.view(t.shape)

    @property
    def _stains(self) -> tuple[str, ...]:
        config = self.model.config
        return (config.cells if isinstance(config, SampleConfig) else config.image).channels

    # -------------------------------------------------------------------------------- the samples

    def sample(self, batch: Batch) -> Drawn:
        """Draw for every RNA cell of a batch, with fixed noise; a bag's draws are of all of its."""
        rows, _ = targets_of(batch)
        rna, space = rna_of(batch), self.model.expression
        n_draws = max(self.draws, rows.shape[1])
        dim = space.config.latent_dim
        noise = self.fixed_normals("draw", rows[:, 0], n_draws * dim).view(-1, n_draws, dim)
        context = self.encode(batch)
        latent = self.model.generate(context, noise).float()
        mean = self.model.expected(context, latent)
        if isinstance(space, EmbeddingSpace):
            return flat_drawn(rna, space.decode(mean), space.decode(latent), rows)
        rates, library = space.decode(latent)
        uniform = self.fixed_uniforms("count", rows, rna.shape[2])
        made = space.draw(rates, library, uniform)
        return flat_drawn(space.scaled(rna), space.expected(mean), space.scaled(made), rows)


def flat_drawn(truth: Tensor, mean: Tensor, draws: Tensor, rows: Tensor) -> Drawn:
    """Put the RNA cells of bags side by side.

    Truth is ``(B, T, g)``, the mean ``(B, g)``, draws ``(B, T or more, g)``, rows ``(B, T)``.
    """
    each = rows.shape[1]
    return Drawn(
        truth.flatten(0, 1),
        mean.repeat_interleave(each, dim=0),
        draws[:, :each].flatten(0, 1),
        rows.flatten(),
    )
