"""What test_ddp.py runs on two processes, and on one: trainings whose noise is that of a cell.

Run by torchrun, with "ddp" or "fsdp", the store, a folder for what comes out, and arguments of
`phenoseq train`, whose last run goes on until it is killed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.splits import SplitConfig
from phenoseq.models import expression
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.encoder import EncoderConfig
from phenoseq.training import finalise
from phenoseq.training.callbacks import WarmEMA
from phenoseq.training.checkpoints import AtomicCheckpointIO
from phenoseq.training.module import PhenoSeqModule
from phenoseq.training.sharding import ShardedStrategy
from phenoseq.training.train import train

STEPS, BATCH = 20, 16


class Module(PhenoSeqModule):
    """Noise and times that depend on the cell alone, not on the batch and rank."""

    def __init__(self) -> None:
        super().__init__(
            encoder=EncoderConfig(backbone="test_resnet"),
            denoiser=DenoiserConfig(dim=32, depth=2, heads=2),
            components=6,
            hidden=16,
            warmup_steps=5,
        )
        self.first = torch.empty(0)
        self.start = torch.empty(0)

    def configure_optimizers(self):
        """Not Adam, which makes whole steps of the rounding of small gradients."""
        return torch.optim.SGD(self.parameters(), lr=0.004, momentum=0.9)

    def on_train_start(self) -> None:
        self.start = _flat(self.parameters())

    def training_loss(self, batch, generator):
        dim = self.model.config.expression.latent_dim
        drawn = torch.stack(
            [torch.randn(4, dim + 1, generator=_generator(row)) for row in batch["rows"].tolist()]
        )
        t, noise = torch.sigmoid(drawn[..., 0]), drawn[..., 1:]
        drop = torch.zeros(len(t), dtype=torch.bool)
        context = self.model.encode(batch["images"])
        loss = self.model.denoising_loss(context, batch["counts"], t, noise, drop).mean()
        return loss + self.mean_loss(batch, context)

    def on_before_optimizer_step(self, optimizer) -> None:
        if not len(self.first):
            self.first = _flat(p.grad for p in self.parameters() if p.grad is not None)


class Data(StoreDataModule):
    """The same batches for any number of ranks, each taking its part."""

    start = 0

    def train_dataloader(self):
        return self

    def __len__(self) -> int:
        return STEPS

    def __iter__(self):
        for step in range(self.start, STEPS):
            self.start = step + 1
            rows = self.parts.rows("train")
            drawn = np.random.default_rng(step).choice(rows, 2 * BATCH, replace=False)
            mine = np.sort(drawn[self.trainer.global_rank :: self.trainer.world_size])
            yield {
                "images": torch.from_numpy(self.opened.take(mine).astype(np.float32)),
                "counts": torch.from_numpy(self.opened.counts(mine).toarray()).float(),
                "rows": torch.from_numpy(mine),
            }

    def state_dict(self):
        return {"start": self.start}

    def load_state_dict(self, state_dict):
        self.start = state_dict["start"]

    def val_dataloader(self):
        return []


def fit(
    store: Path,
    how: str,
    precision: str,
    *,
    save: Save | None = None,
    ckpt_path: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Make 20 steps; `how` is "one", "ddp" or "fsdp"."""
    ranks = 1 if how == "one" else 2
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy={"one": "auto", "ddp": "ddp", "fsdp": ShardedStrategy()}[how],
        precision=precision,
        max_epochs=1,
        max_steps=STEPS,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[WarmEMA(0.9)] if save is None else [WarmEMA(0.9), save],
    )
    module = Module()
    data = Data(store, SplitConfig(by="Metadata_Well", block=None, test=0.2))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    mean = _flat(module.parameters())
    return {"gradient": module.first, "mean": mean, "moved": mean - module.start}


class Save(Callback):
    """A checkpoint after some steps."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def _flat(tensors) -> torch.Tensor:
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
    return torch.cat([t.detach().flatten() for t in whole])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def main() -> None:
    expression._MIN_STEPS, finalise._CELLS = 20, 64  # as the fixture `quick`
    how, store, folder, *arguments = sys.argv[1:]
    out = Path(folder)
    (out / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    if how == "ddp":
        made = {p: fit(Path(store), "ddp", p) for p in ("32-true", "bf16-mixed")}
    else:
        half = out / "half.ckpt"
        made = {"32-true": fit(Path(store), "fsdp", "32-true", save=Save(half, 13))}
        made["continued"] = fit(Path(store), "fsdp", "32-true", ckpt_path=half)
    torch.save(made, out / f"rank{os.environ['RANK']}.pt")
    arguments += ["--trainer.strategy", how, "--trainer.num_sanity_val_steps", "0"]
    train([*arguments, "--trainer.max_epochs", "1"])
    if how == "ddp":
        for_ever = {"max_epochs": 10**6, "default_root_dir": out / "dies"}
        more = [part for k, v in for_ever.items() for part in (f"--trainer.{k}", str(v))]
        train([*arguments, *more, "--checkpoint.steps", "2"])


if __name__ == "__main__":
    main()
