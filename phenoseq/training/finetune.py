"""The training that fine-tunes a model: what of it is trained, how fast, and until when."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from scipy import sparse
from timm.models import group_parameters
from torch import Tensor, nn

from phenoseq.data.datamodule import StoreDataModule, StreamDataModule
from phenoseq.data.handover import Batch
from phenoseq.errors import ModelError
from phenoseq.models.adapt import Adaptation, adapt, stem_name
from phenoseq.models.diffusion import logit_normal
from phenoseq.models.embedding import EmbeddingConfig
from phenoseq.models.encoder import Encoder
from phenoseq.models.expression import ExpressionConfig
from phenoseq.models.files import digest_of_model
from phenoseq.models.givenfeatures import FeatureEncoder
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.sample import SamplePhenoSeq
from phenoseq.training.base import targets_of
from phenoseq.training.build import RNA_CELLS, STATISTICS_CELLS, image_of, record_of
from phenoseq.training.callbacks import WarmEMA
from phenoseq.training.checkpoints import (
    BEST,
    LAST,
    AtomicCheckpointIO,
    Checkpoints,
    folder_of,
    resumable,
    steps_done,
)
from phenoseq.training.finetunedata import Data
from phenoseq.training.logs import CsvLogger, LearningCurves
from phenoseq.training.module import PhenoSeqModule
from phenoseq.training.settings import keep_settings, same_settings
from phenoseq.training.trainer import placed, quiet

Freeze = Literal["encoder", "none", "all-but-head"]
#: Below so many training cells a warning is given.
FEW_CELLS = 1000
#: Or so many training samples.
FEW_SAMPLES = 20
#: Highest learning rates, where the encoder is frozen and where it is not.
LR = {"encoder": 1e-3, "all-but-head": 1e-3, "none": 3e-4}
#: What each stage of the encoder's backbone learns slower than the stage after it.
LAYER_DECAY = 0.7
#: Epochs without a better validation loss after which training stops.
PATIENCE = 8
#: Training cells or bags that tell how pixels are best scaled before training.
_PIXEL_CELLS = 1024
#: Parts of the denoiser that are trained where all but the head is frozen.
_HEAD = ("inward", "last", "outward")


class StopEarly(EarlyStopping):
    """Stops where the validation loss no longer falls, and when a stopped run is taken up again."""

    def __init__(self) -> None:
        super().__init__("val_loss", patience=PATIENCE, check_on_train_epoch_end=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop at once where the checkpoint was made after the last epoch."""
        trainer.should_stop = trainer.should_stop or self.stopped_epoch > 0


class FinetuneModule(PhenoSeqModule):
    """Trains a model on from where it is, all of it or a part.

    Where the batches hold cached tokens of a frozen encoder, each cell takes one noise level a step
    in place of several: these share the cost of encoding, of which none is left. The level is drawn
    from the same mixture, so that the expected gradient is the same. The RNA cells of a bag take
    several, which share the cost of reading all its tokens.

    Parameters
    ----------
    model
        To train; see :func:`~phenoseq.models.adapt.adapt`.
    freeze
        What is not trained.
    new_stains
        Whether the stem has channels that the encoder was not trained with.
    lr, seed
        See :class:`~phenoseq.training.base.TrainingModule`. Stages of the encoder's backbone learn
        slower towards the image, by 0.7 each (layer-wise decay; Howard and Ruder 2018).
    """

    cached_levels = 1

    def __init__(
        self,
        model: PhenoSeq | SamplePhenoSeq,
        *,
        freeze: Freeze,
        new_stains: bool,
        lr: float,
        seed: int,
    ) -> None:
        super().__init__(lr=lr, warmup_steps=50, seed=seed)
        self.model = model
        predicts = model.config.expression
        width = predicts.width if isinstance(predicts, EmbeddingConfig) else len(predicts.genes)
        self.scored = torch.ones(width, dtype=torch.bool)
        self.new_stains = new_stains
        if isinstance(model.encoder, Encoder):
            model.encoder.hold_norms()  # few batches would spoil what many have told
        if freeze != "none":
            model.encoder.requires_grad_(False)
        if freeze == "all-but-head":
            for name, weights in model.denoiser.named_parameters():
                weights.requires_grad_(name.split(".")[0] in _HEAD)

    def training_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the loss of a batch, a number."""
        if "tokens" not in batch or isinstance(self.model, SamplePhenoSeq):
            return super().training_loss(batch, generator)
        shape = (len(batch["rows"]), self.cached_levels)
        drop = self._coins(shape[:1], generator) < self.drop_context
        t = logit_normal(shape[0] * shape[1], generator).view(shape)
        t[torch.rand(shape, generator=generator) < 1 / self.levels] = 1.0
        noise = torch.randn(*shape, self.model.config.expression.latent_dim, generator=generator)
        context = self.encode(batch)
        loss = self.model.denoising_loss(
            context, batch["counts"], t.to(self.device), noise.to(self.device), drop
        )
        return loss.mean() + self.mean_loss(batch, context)

    def encode_augmented(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Encode the images of a batch, augmented, or take their tokens."""
        if "tokens" in batch:
            return self.encode(batch)
        return super().encode_augmented(batch, generator)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Encode the images of a batch as they are, or take their tokens."""
        if "tokens" not in batch:
            return super().encode(batch)
        tokens = batch["tokens"].float()
        if "keep" not in batch:
            return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        keep = batch["keep"][:, :, None].expand(tokens.shape[:3])  # of all tokens of a cell
        return tokens.flatten(1, 2), keep.flatten(1)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups by learning rate: weight decay on matrices alone."""
        encoder = self.model.encoder
        slower = _slower(encoder) if isinstance(encoder, Encoder) else {}
        if isinstance(encoder, Encoder) and self.new_stains and not encoder.separate:
            slower.pop(f"{stem_name(encoder)}.weight")
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, weights in self.model.named_parameters():
            if weights.requires_grad:
                scale = slower.get(name.removeprefix("encoder.backbone."), 1.0)
                groups.setdefault((scale, weights.ndim > 1), []).append(weights)
        return [
            {
                "params": params,
                "lr": self.lr * scale,
                "weight_decay": self.weight_decay if matrix else 0.0,
            }
            for (scale, matrix), params in groups.items()
        ]


def _slower(encoder: Encoder) -> dict[str, float]:
    """Return for each parameter of the backbone what its learning rate is multiplied by."""
    backbone = encoder.backbone
    if not hasattr(backbone, "group_matcher"):  # whose stages timm does not know
        return {name: LAYER_DECAY for name, _ in backbone.named_parameters()}
    stages = group_parameters(backbone, backbone.group_matcher(coarse=True))  # type: ignore[operator]
    return {
        name: LAYER_DECAY ** (len(stages) - place)
        for place, stage in enumerate(sorted(stages))
        for name in stages[stage]
    }


def fit(
    module: FinetuneModule,
    data: StreamDataModule,
    root: Path,
    settings: dict[str, Any],
    *,
    epochs: int,
    device: str,
) -> None:
    """Train, going on where a killed run stopped, and leave the best weights in the module.

    Parameters
    ----------
    module, data
        What is trained, on what.
    root
        Folder of the run.
    settings
        By which a run is known; one with others is refused.
    epochs
        At most.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.

    Raises
    ------
    ModelError
        Where the folder holds a run with other settings, or a checkpoint that cannot be read, or
        the loss was never a number.
    """
    text = yaml.safe_dump(settings)
    same_settings(root, text)
    keep_settings(root, text)
    last, best = (folder_of(root) / file for file in (LAST, BEST))
    done = steps_done(last)
    with quiet(), resumable():
        trainer = L.Trainer(
            max_epochs=epochs,
            **placed(device),
            callbacks=[WarmEMA(), Checkpoints(), LearningCurves(), StopEarly()],
            logger=CsvLogger(root, done),
            plugins=[AtomicCheckpointIO()],
            gradient_clip_val=1.0,
            num_sanity_val_steps=0,
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=False,
            default_root_dir=root,
        )
        trainer.fit(module, datamodule=data, ckpt_path=last if done else None, weights_only=False)
    if not best.exists():
        raise ModelError(f"{root}: the validation loss was never a number; set a lower lr")
    module.load_state_dict(torch.load(best, map_location="cpu", weights_only=False)["state_dict"])


def adapted(
    base: PhenoSeq | SamplePhenoSeq, data: Data, name: str, freeze: Freeze, seed: int
) -> tuple[PhenoSeq | SamplePhenoSeq, Adaptation]:
    """Fit a model to the training cells of data; see :func:`~phenoseq.models.adapt.adapt`."""
    record = base.config.training
    origin = {
        "model": name,
        "digest": digest_of_model(base),
        "source": record.source,
        "identity": record.identity,
        "freeze": freeze,
    }
    manifest = data.opened.manifest
    counts = None
    if isinstance(base.config.expression, ExpressionConfig):
        of_cells = isinstance(data, StoreDataModule)
        found = data.rna_sample("train", data.n_cells("train") if of_cells else RNA_CELLS)
        counts = sparse.csr_matrix(found)
    model, kept = adapt(
        base,
        data.image_sample("train", STATISTICS_CELLS)
        if isinstance(base.encoder, FeatureEncoder)
        else image_of(data),
        counts,
        manifest.genes,
        manifest.symbols,
        replace(record_of(data, seed), base=origin, encoder_weights=record.encoder_weights),
        seed=seed,
    )
    crops = kept.cells
    if crops is not None and _keep_pixels(model, base, data, seed):
        kept = replace(kept, cells=replace(crops, pixels_kept=True))
    return model, kept


@torch.inference_mode()
def _keep_pixels(
    model: PhenoSeq | SamplePhenoSeq, base: PhenoSeq | SamplePhenoSeq, data: Data, seed: int
) -> bool:
    """Scale the pixels of shared stains as the base model does, where it then predicts better.

    Brighter images may be of brighter cells, or of another microscope; what the loss at pure noise
    of up to 1,024 training cells or bags is before any training tells them apart. Pixels
    of another type are scaled by the new cells.

    Returns
    -------
    Whether the scale was kept.
    """
    own, old = model.image_config, base.image_config
    assert own is not None
    assert old is not None
    if own.dtype != old.dtype:
        return False
    module = FinetuneModule(model, freeze="none", new_stains=False, lr=0.0, seed=seed)
    was_training = model.training
    model.eval()

    def loss() -> float:
        found = [
            module.validation_losses(batch)["val_mean_loss"][targets_of(batch)[1]]
            for batch in data.fixed("train", _PIXEL_CELLS)
        ]
        return float(torch.cat(found).mean())

    def known(of_base: tuple[float, ...], of_cells: tuple[float, ...]) -> tuple[float, ...]:
        by_name = dict(zip(old.channels, of_base, strict=True))
        pairs = zip(own.channels, of_cells, strict=True)
        return tuple(by_name.get(name, value) for name, value in pairs)

    by_cells = loss()
    model.with_image(mean=known(old.mean, own.mean), std=known(old.std, own.std))
    kept = loss() < by_cells
    if not kept:
        model.with_image(mean=own.mean, std=own.std)
    model.train(was_training)  # Lightning trains in the mode that it finds
    return kept


def warnings_of(kept: Adaptation, data: Data, freeze: Freeze) -> list[str]:
    """Say what makes the new model worse than it could be."""
    found = []
    if isinstance(data, StoreDataModule):
        n = data.n_cells("train")
        if n < FEW_CELLS:
            found.append(
                f"{data.store}: {n} training cells are few: below {FEW_CELLS:,} compare the new "
                "model with the ridge of 'phenoseq evaluate' before you use it"
            )
    elif len(data.parts.rows("train")) < FEW_SAMPLES:
        found.append(
            f"{data.store}: {len(data.parts.rows('train'))} training samples are few, however "
            f"many their cells: below {FEW_SAMPLES} compare the new model with the old one, by "
            "'phenoseq predict' on samples that neither has seen, before you use it"
        )
    crops = kept.cells
    if crops is not None and crops.rescaled:
        old, new = crops.pixel_size
        found.append(
            f"{data.store}: a pixel is {new} um, and was {old} um to the base model, which takes "
            f"cells for {old / new:.2g} times their size. 'phenoseq prepare --crop-pixel-size "
            f"{old} --crop-px {crops.crop_px[0]}' makes crops as it knows them; else unfreeze the "
            "encoder"
        )
    if crops is not None and crops.stains.new and freeze != "none":
        found.append(
            f"{data.store}: the stains {list(crops.stains.new)} are new to the encoder, which is "
            "frozen and reads them as the mean of those it knows; freeze='none' lets it learn them"
        )
    return found
