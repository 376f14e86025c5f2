"""A regressor trained end to end: the strongest baseline for the mean of each cell."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from phenoseq.data.handover import Batch
from phenoseq.data.selection import SelectedDataModule, SelectedStore
from phenoseq.data.splits import SplitConfig
from phenoseq.data.store import Store
from phenoseq.errors import DataError, ModelError
from phenoseq.models.encoder import Encoder, EncoderConfig
from phenoseq.models.files import load_weights, save_folder
from phenoseq.models.phenoseq import pool
from phenoseq.models.pretrained import Pretrained
from phenoseq.training.augment import augment
from phenoseq.training.callbacks import WarmEMA
from phenoseq.training.checkpoints import (
    LAST,
    AtomicCheckpointIO,
    Checkpoints,
    folder_of,
    resumable,
    steps_done,
)
from phenoseq.training.optimiser import adamw, decayed_groups
from phenoseq.training.trainer import placed, quiet

_STATISTICS_CELLS, _BATCH = 4096, 256


@dataclass(frozen=True)
class RegressorConfig:
    """The regressor and the budget it is trained with; by default that of ``xenium-pancreas``.

    Attributes
    ----------
    encoder, dim
        As of the model that it is compared with: backbone, and width of its tokens.
    hidden
        Width of the layer between pooled tokens and genes.
    epochs, batch_size, lr, weight_decay, warmup_steps, ema, seed
        Of the training, as for ``phenoseq train``.
    """

    encoder: EncoderConfig
    dim: int = 128
    hidden: int = 256
    epochs: int = 10
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 300
    ema: float = 0.999
    seed: int = 0


class Regressor(nn.Module):
    """Crops to the expected log1p-normalised expression of each gene, and the log library size.

    Attributes
    ----------
    target_mean, target_std
        ``(g + 1,)`` of the training cells, the library size last; genes are not scaled.
    """

    image_mean: Tensor
    image_std: Tensor
    target_mean: Tensor
    target_std: Tensor

    def __init__(self, config: RegressorConfig, n_channels: int, crop_px: int, genes: int) -> None:
        super().__init__()
        self.encoder = Encoder(config.encoder, n_channels, crop_px, config.dim)
        self.head = nn.Sequential(
            nn.Linear(config.dim, config.hidden), nn.SiLU(), nn.Linear(config.hidden, genes + 1)
        )
        self.register_buffer("image_mean", torch.zeros(n_channels, 1, 1))
        self.register_buffer("image_std", torch.ones(n_channels, 1, 1))
        self.register_buffer("target_mean", torch.zeros(genes + 1))
        self.register_buffer("target_std", torch.ones(genes + 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return targets ``(B, g + 1)``, less their mean, in their scale; images are raw."""
        scaled = (images.float() - self.image_mean) / self.image_std
        there = torch.ones(scaled.shape[:2], dtype=torch.bool, device=scaled.device)
        out: Tensor = self.head(pool(*self.encoder(scaled, there)))
        return out

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return expected expression ``(B, g)`` and expected log library size ``(B,)``."""
        out = self(images).float() * self.target_std + self.target_mean
        return out[:, :-1], out[:, -1]


class _RegressorModule(L.LightningModule):
    """Trains a regressor by squared error, with the same augmentation as the model."""

    def __init__(self, config: RegressorConfig, median: float, start: Pretrained | None) -> None:
        super().__init__()
        self.config, self.median, self.start = config, median, start

    def configure_model(self) -> None:
        """Build the network, and the statistics of the training cells, once."""
        if hasattr(self, "network"):
            return
        data: SelectedDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        manifest = data.opened.manifest
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.network = Regressor(
                self.config, len(manifest.channels), manifest.crop_px, len(manifest.genes)
            )
        if self.start is not None:
            self.start.put_into(self.network.encoder)
        pixels = data.opened.take(data.some("train", _STATISTICS_CELLS)).astype(np.float32)
        counts = data.opened.counts(data.parts.rows("train"))
        target = self._targets(torch.from_numpy(counts.toarray().astype(np.float32)))
        network = self.network
        network.image_mean.copy_(_column(pixels.mean(axis=(0, 2, 3))))
        network.image_std.copy_(_column(np.maximum(pixels.std(axis=(0, 2, 3)), 1e-6)))
        network.target_mean.copy_(target.mean(dim=0))
        network.target_std[-1] = target[:, -1].std().clamp(min=1e-3)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the squared error of a batch."""
        words = [self.config.seed, self.global_step, self.global_rank]
        seed = int(np.random.SeedSequence(words).generate_state(1)[0])
        images = augment(batch["images"].float(), torch.Generator().manual_seed(seed))
        network = self.network
        wanted = (self._targets(batch["counts"]) - network.target_mean) / network.target_std
        loss: Tensor = (network(images).float() - wanted).square().mean()
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW with linear warm-up and cosine decay, by step."""
        config = self.config
        return adamw(
            decayed_groups(self.network.parameters()),
            lr=config.lr,
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup_steps,
            total_steps=int(self.trainer.estimated_stepping_batches),
        )

    def _targets(self, counts: Tensor) -> Tensor:
        total = counts.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.cat([torch.log1p(counts / total * self.median), total.log()], dim=1)


def regressor_folder(
    store: Store, split_digest: str, config: RegressorConfig, start: Pretrained | None = None
) -> Path:
    """Return where a regressor is kept, beside the store that it is trained on."""
    key = _key(store, split_digest, config, start)
    return store.path.parent / f"{store.path.stem}-regressors" / key


def _key(store: Store, split_digest: str, config: RegressorConfig, start: Pretrained | None) -> str:
    facts = [store.manifest.identity, split_digest, asdict(config), _origin(start)]
    if isinstance(store, SelectedStore):
        read, full = ([m.channels, m.genes] for m in (store.manifest, store.full))
        facts += read if read != full else []
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _origin(start: Pretrained | None) -> dict[str, str]:
    return {} if start is None else start.origin


def train_regressor(
    store: Store,
    split: SplitConfig,
    config: RegressorConfig,
    folder: str | Path,
    *,
    median: float,
    start: Pretrained | None = None,
    device: str = "auto",
) -> tuple[Regressor, dict[str, Any]]:
    """Train a regressor, or take the one that a folder holds already.

    A run that was stopped goes on from its last checkpoint, as ``phenoseq train`` does.

    Parameters
    ----------
    store, split
        The training part of the store is trained on.
    config
        The network and its budget.
    folder
        Where it is, or will be.
    median
        Library size to which counts are scaled.
    start
        Pretrained weights that the encoder starts from; None for none.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"mps"``.

    Returns
    -------
    The regressor in evaluation mode, and what its training took.

    Raises
    ------
    ModelError
        Where the folder holds the regressor of another store, split or configuration, or a
        checkpoint that cannot be read.
    DataError
        Where the disk is full; the checkpoint before is as it was.
    """
    root = Path(folder)
    manifest = store.manifest
    data = SelectedDataModule(
        store.path,
        split,
        config.batch_size,
        seed=config.seed,
        channels=manifest.channels,
        genes=manifest.genes,
    )
    data.setup()
    key = _key(store, data.parts.digest, config, start)
    record = root / "config.json"
    if record.exists():
        facts: dict[str, Any] = json.loads(record.read_text())
        if facts.get("key") != key:
            raise ModelError(
                f"{root}: holds a regressor of another store, split or configuration; name another "
                "folder with --regressor, or leave it out"
            )
        shape = len(manifest.channels), manifest.crop_px, len(manifest.genes)
        regressor = Regressor(config, *shape)
        load_weights(regressor, root)
        return regressor.eval(), facts
    run = root / f"{key}.run"
    last = folder_of(run) / LAST
    module = _RegressorModule(config, median, start)
    began = time.monotonic()
    with quiet(), resumable():
        trainer = L.Trainer(
            default_root_dir=run,
            max_epochs=config.epochs,
            **placed(device),
            precision="32-true",
            gradient_clip_val=1.0,
            logger=False,
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=False,
            callbacks=[WarmEMA(config.ema), Checkpoints()],
            plugins=[AtomicCheckpointIO()],
        )
        trainer.fit(module, datamodule=data, ckpt_path=last if steps_done(last) else None)
    # The mean weights, which Lightning leaves out of the module where all epochs were done before.
    module.load_state_dict(torch.load(last, map_location="cpu", weights_only=False)["state_dict"])
    regressor = module.network.cpu().float().eval()
    facts = {
        "key": key,
        "config": asdict(config),
        "encoder_weights": _origin(start),
        "n_cells": len(data.parts.rows("train")),
        "steps": trainer.global_step,
        "seconds_of_last_run": round(time.monotonic() - began, 1),
    }
    save_folder(root, json.dumps(facts, indent=1), regressor.state_dict())
    shutil.rmtree(run)
    return regressor, facts


@torch.inference_mode()
def predict_means(
    regressor: Regressor, store: Store, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return expected expression ``(n, g)`` and log library size ``(n,)`` of cells of a store."""
    parts = [regressor.predict(images) for images in crops_of(store, rows)]
    return tuple(torch.cat(part).numpy() for part in zip(*parts, strict=True))  # type: ignore[return-value]


def crops_of(store: Store, rows: NDArray[np.int64]) -> Iterator[Tensor]:
    """Yield crops of cells as float tensors, batch by batch."""
    for start in range(0, len(rows), _BATCH):
        yield torch.from_numpy(store.take(rows[start : start + _BATCH]).astype(np.float32))


@dataclass(frozen=True)
class CountingNoise:
    """Negative-binomial noise about a regressor's mean, fitted on training cells.

    Attributes
    ----------
    gain
        What each gene's rate is multiplied by, so that its mean count is right: the mean of the
        logarithm is not the logarithm of the mean, ``(g,)``.
    theta
        Dispersion of each gene, ``(g,)``.
    library_std
        Deviation of the log library size about its prediction.
    least
        Lowest library size of the training cells.
    """

    gain: NDArray[np.float64]
    theta: NDArray[np.float64]
    library_std: float
    least: float

    def rates(self, mean: NDArray[np.float32]) -> NDArray[np.float64]:
        """Turn expected expression ``(n, g)`` to shares of the counts, summing to one."""
        share = np.expm1(np.maximum(mean, 0.0).astype(np.float64)) * self.gain + 1e-9
        return np.asarray(share / share.sum(axis=1, keepdims=True))

    def draw(
        self,
        mean: NDArray[np.float32],
        log_library: NDArray[np.float32],
        median: float,
        rng: np.random.Generator,
    ) -> sparse.csr_matrix:
        """Draw one measured profile of each cell, log1p of counts at the median library size."""
        library = np.exp(log_library + self.library_std * rng.standard_normal(len(mean)))
        mu = self.rates(mean) * np.maximum(library, self.least)[:, None]
        counts = rng.poisson(rng.gamma(self.theta, mu / self.theta)).astype(np.float64)
        total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
        return sparse.csr_matrix(np.log1p(counts / total * median).astype(np.float32))


def fit_noise(
    counts: sparse.csr_matrix, mean: NDArray[np.float32], log_library: NDArray[np.float32]
) -> CountingNoise:
    """Fit negative-binomial noise to training cells.

    The dispersion is that of moments: ``sum(mu^2) / sum((y - mu)^2 - mu)`` over cells.

    Parameters
    ----------
    counts
        Raw counts, ``(n, g)``.
    mean, log_library
        What the regressor predicts for the same cells.

    Raises
    ------
    DataError
        Where a cell has no counts.
    """
    y = counts.toarray().astype(np.float64)
    total = y.sum(axis=1)
    if not total.all():
        raise DataError("a training cell has no counts; leave such cells out of the store")
    g = y.shape[1]
    noise = CountingNoise(
        np.ones(g), np.ones(g), float((np.log(total) - log_library).std()), float(total.min())
    )
    mu = noise.rates(mean) * total[:, None]
    gain = np.ones(g)
    for _ in range(20):  # the shares are scaled to sum to one, so that gains hang together
        gain *= (y.sum(axis=0) + 1e-3) / (mu.sum(axis=0) + 1e-3)
        noise = CountingNoise(gain, noise.theta, noise.library_std, noise.least)
        mu = noise.rates(mean) * total[:, None]
    over = np.maximum(((y - mu) ** 2 - mu).sum(axis=0), 1e-9)
    theta = np.clip((mu**2).sum(axis=0) / over, 1e-2, 1e4)
    return CountingNoise(gain, theta, noise.library_std, noise.least)


def _column(values: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))[:, None, None]
