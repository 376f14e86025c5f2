"""Fine-tuning: a trained model goes on learning on other data, and the old one stays as it is."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from timm.models import group_parameters
from torch import Tensor, nn

from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.handover import Batch
from phenoseq.data.selection import SelectedDataModule
from phenoseq.data.splits import SplitConfig
from phenoseq.errors import DataError, ModelError, PhenoseqWarning
from phenoseq.models.adapt import Adaptation, adapt, stem_name
from phenoseq.models.diffusion import logit_normal
from phenoseq.models.encoder import Encoder
from phenoseq.models.files import digest_of_model
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.progress import bar
from phenoseq.training.build import image_of, record_of
from phenoseq.training.cache import CachedDataModule, cache_tokens
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
from phenoseq.training.logs import CsvLogger, LearningCurves
from phenoseq.training.module import PhenoSeqModule
from phenoseq.training.settings import keep_settings, same_settings

Freeze = Literal["encoder", "none", "all-but-head"]
#: Below so many training cells a warning is given.
FEW_CELLS = 1000
#: Highest learning rates, where the encoder is frozen and where it is not.
_LR = {"encoder": 1e-3, "all-but-head": 1e-3, "none": 3e-4}
#: What each stage of the encoder's backbone learns slower than the stage after it.
LAYER_DECAY = 0.7
#: Epochs without a better validation loss after which training stops.
PATIENCE = 8
#: Batches an epoch that few cells are still cut into, and the least and largest batch.
_BATCHES, _LEAST, _LARGEST = 16, 16, 128
#: In the folder of the run: what of the base model was kept, every gene and stain by name.
KEPT = "kept.json"
#: Parts of the denoiser that are trained where all but the head is frozen.
_HEAD = ("inward", "last", "outward")


def finetune(
    base: PhenoSeq,
    store: str | Path,
    *,
    name: str = "",
    freeze: Freeze = "encoder",
    genes: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
    split: SplitConfig | None = None,
    epochs: int = 30,
    lr: float | None = None,
    cache: bool = True,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    report: Callable[[str], None] | None = None,
) -> PhenoSeq:
    """Fine-tune a model; see :func:`phenoseq.finetune`, which loads it by ``name``."""
    if freeze not in get_args(Freeze):
        raise ModelError(f"freeze is {freeze!r}; choose from {list(get_args(Freeze))}")
    if not isinstance(base, PhenoSeq):
        raise ModelError(
            f"{name or 'this model'}: only models of single cells can be fine-tuned; train a model "
            "of samples with 'phenoseq train'"
        )
    base = deepcopy(base).cpu()  # wherever it is, there it stays
    target = _free(out)
    data = FinetuneData(store, base, split, channels=channels, genes=genes, seed=seed)
    data.setup()
    model, kept = _adapted(base, data, name, freeze, seed)
    if report is not None:
        report(str(kept))
    _warn(kept, data, freeze)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) if target is None else target.with_name(f"{target.name}.run")
        root.mkdir(parents=True, exist_ok=True)
        (root / KEPT).write_text(json.dumps(asdict(kept), indent=1) + "\n")
        used: StoreDataModule = data
        if cache and freeze != "none":
            rows = np.union1d(data.parts.rows("train"), data.some("val", data.max_val))
            folder = root / "tokens"
            with bar("encoding cells") as progress:
                tokens = cache_tokens(model, data.opened, rows, folder, progress=progress)
            used = CachedDataModule(data, tokens)
        module = FinetuneModule(
            model,
            freeze=freeze,
            new_stains=bool(kept.stains.new),
            lr=_LR[freeze] if lr is None else lr,
            seed=seed,
        )
        settings = {
            "base": model.config.training.base,
            "store": data.opened.manifest.identity,
            "split": data.parts.digest,
            "genes": list(data.opened.manifest.symbols),
            "channels": list(data.opened.manifest.channels),
            "epochs": epochs,
            "lr": module.lr,
            "cache": cache,
            "seed": seed,
        }
        fit(module, used, root, settings, epochs=epochs, device=device)
        done = module.finish(data)
        assert isinstance(done, PhenoSeq)
        if target is not None:
            done.save(target)
            shutil.rmtree(root / "tokens", ignore_errors=True)
    return done.eval()


class FinetuneData(SelectedDataModule):
    """Streams the stains and genes of a store that a model is fine-tuned on.

    Parameters
    ----------
    store
        Path of a store of cells.
    base
        Whose split is used, where none is given.
    split, seed
        See :class:`~phenoseq.data.datamodule.StoreDataModule`.
    channels, genes
        See :class:`~phenoseq.data.selection.SelectedDataModule`.
    """

    def __init__(
        self,
        store: str | Path,
        base: PhenoSeq,
        split: SplitConfig | None,
        *,
        channels: Sequence[str] | None,
        genes: Sequence[str] | None,
        seed: int,
    ) -> None:
        split = split or SplitConfig(**base.config.training.split)  # type: ignore[arg-type]
        super().__init__(store, split, seed=seed, channels=channels, genes=genes)
        self._base = base.config.training

    def setup(self, stage: str | None = None) -> None:
        """Open the store and divide its cells; raises :class:`~phenoseq.errors.DataError`."""
        super().setup(stage)
        same = self.split == SplitConfig(**self._base.split)  # type: ignore[arg-type]
        if (
            same
            and self.opened.manifest.identity == self._base.identity
            and self.parts.digest != self._base.split_digest
        ):
            raise DataError(
                f"{self.store}: divides its cells otherwise than the base model was trained with, "
                "so that cells it has seen would be tested; prepare the store with the same options"
            )
        n = self.n_cells("train")
        self.batch_size = int(np.clip(n // _BATCHES, _LEAST, _LARGEST))


class FinetuneModule(PhenoSeqModule):
    """Trains a model on from where it is, all of it or a part.

    Where the batches hold cached tokens of a frozen encoder, each cell takes one noise level a step
    in place of several: these share the cost of encoding, of which none is left. The level is drawn
    from the same mixture, so that the expected gradient is the same.

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

    model: PhenoSeq
    cached_levels = 1

    def __init__(
        self, model: PhenoSeq, *, freeze: Freeze, new_stains: bool, lr: float, seed: int
    ) -> None:
        super().__init__(lr=lr, warmup_steps=50, seed=seed)
        self.model = model
        self.scored = torch.ones(len(model.config.expression.genes), dtype=torch.bool)
        self.new_stains = new_stains
        if freeze != "none":
            model.encoder.requires_grad_(False)
        if freeze == "all-but-head":
            for name, weights in model.denoiser.named_parameters():
                weights.requires_grad_(name.split(".")[0] in _HEAD)

    def training_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the loss of a batch, a number."""
        if "tokens" not in batch:
            return super().training_loss(batch, generator)
        shape = (len(batch["rows"]), self.cached_levels)
        drop = self._coins(shape[:1], generator) < self.drop_context
        t = logit_normal(shape[0] * shape[1], generator).view(shape)
        t[torch.rand(shape, generator=generator) < 1 / self.levels] = 1.0
        noise = torch.randn(*shape, self.model.config.expression.latent_dim, generator=generator)
        return self.model.denoising_loss(
            self.encode(batch), batch["counts"], t.to(self.device), noise.to(self.device), drop
        ).mean()

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Encode the images of a batch as they are, or take their tokens."""
        if "tokens" not in batch:
            return super().encode(batch)
        tokens = batch["tokens"]
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups by learning rate: weight decay on matrices alone."""
        slower = _slower(self.model.encoder)
        if self.new_stains and not self.model.encoder.separate:
            slower.pop(f"{stem_name(self.model.encoder)}.weight")
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
    data: StoreDataModule,
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
        Where the folder holds a run with other settings, or a checkpoint that cannot be read.
    """
    text = yaml.safe_dump(settings)
    same_settings(root, text)
    keep_settings(root, text)
    last, best = (folder_of(root) / file for file in (LAST, BEST))
    done = steps_done(last)
    kind, _, number = device.partition(":")
    stop = EarlyStopping("val_loss", patience=PATIENCE, check_on_train_epoch_end=False)
    with _quiet(), resumable():
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator={"cuda": "gpu"}.get(kind, kind),
            devices=[int(number)] if number else 1,
            callbacks=[WarmEMA(), Checkpoints(), LearningCurves(), stop],
            logger=CsvLogger(root, done),
            plugins=[AtomicCheckpointIO()],
            gradient_clip_val=1.0,
            num_sanity_val_steps=0,
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=False,
            default_root_dir=root,
        )
        trainer.fit(module, datamodule=data, ckpt_path=last if done else None, weights_only=False)
    module.load_state_dict(torch.load(best, map_location="cpu", weights_only=False)["state_dict"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Lightning says about devices and loaders to itself."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        log.setLevel(level)


def _adapted(
    base: PhenoSeq, data: FinetuneData, name: str, freeze: Freeze, seed: int
) -> tuple[PhenoSeq, Adaptation]:
    record = base.config.training
    origin = {
        "model": name,
        "digest": digest_of_model(base),
        "source": record.source,
        "identity": record.identity,
        "freeze": freeze,
    }
    manifest = data.opened.manifest
    return adapt(
        base,
        image_of(data),
        data.opened.counts(data.parts.rows("train")),
        manifest.genes,
        manifest.symbols,
        replace(record_of(data, seed), base=origin, encoder_weights=record.encoder_weights),
        seed=seed,
    )


def _warn(kept: Adaptation, data: FinetuneData, freeze: Freeze) -> None:
    """Warn of what makes the new model worse than it could be."""
    found = []
    n = data.n_cells("train")
    if n < FEW_CELLS:
        found.append(
            f"{data.store}: {n} training cells are few: below {FEW_CELLS:,} compare the new model "
            "with the ridge of 'phenoseq evaluate' before you use it"
        )
    if kept.rescaled:
        old, new = kept.pixel_size
        found.append(
            f"{data.store}: a pixel is {new} um, and was {old} um to the base model, which takes "
            f"cells for {old / new:.2g} times their size. 'phenoseq prepare --crop-pixel-size "
            f"{old} --crop-px {kept.crop_px[0]}' makes crops as it knows them; else unfreeze the "
            "encoder"
        )
    if kept.stains.new and freeze != "none":
        found.append(
            f"{data.store}: the stains {list(kept.stains.new)} are new to the encoder, which is "
            "frozen and reads them as the mean of those it knows; freeze='none' lets it learn them"
        )
    for text in found:
        warnings.warn(text, PhenoseqWarning, stacklevel=4)


def _free(out: str | Path | None) -> Path | None:
    """Check that a model may be written there."""
    if out is None:
        return None
    path = Path(out)
    if path.exists():
        raise DataError(f"{path}: exists already; remove it, or choose another folder")
    return path
