"""An epoch of fine-tuning on a store: with the tokens of a frozen encoder cached, and without.

    python tests/benchmarks/caching.py STORE.zarr [MODEL]

Every way trains on the same cells in batches of the same size, as `phenoseq finetune` does, mean
weights and all; the seconds of an epoch are those of some of its batches, times their share.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning as L
import numpy as np

import phenoseq
from phenoseq.data.splits import SplitConfig
from phenoseq.training.cache import CachedDataModule, cache_tokens
from phenoseq.training.callbacks import WarmEMA
from phenoseq.training.finetune import FinetuneModule
from phenoseq.training.finetunedata import open_data

WARM, STEPS = 4, 40


class Clock(L.Callback):
    """Times the batches after the first few."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == WARM:
            self.start = time.perf_counter()

    def on_train_end(self, trainer, module) -> None:
        self.seconds = time.perf_counter() - self.start


def epoch(data, model: str, *, freeze: str, levels: int = 1) -> float:
    """Return the seconds of an epoch."""
    module = FinetuneModule(
        phenoseq.load_model(model).train(), freeze=freeze, new_stains=False, lr=1e-4, seed=0
    )
    module.cached_levels = levels
    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=WARM + STEPS,
        limit_val_batches=0,
        callbacks=[WarmEMA(), clock],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return clock.seconds / STEPS * len(data.train_dataloader())


def main(store: str, name: str) -> None:
    warnings.simplefilter("ignore")
    model = phenoseq.load_model(name)
    data = open_data(store, model, SplitConfig(), channels=None, genes=None, seed=0)
    rows = data.parts.rows("train")
    with tempfile.TemporaryDirectory() as where:
        some = rows[: 8 * data.batch_size]
        start = time.perf_counter()
        cache_tokens(model, data.opened, some, Path(where) / "some")
        encode = (time.perf_counter() - start) / len(some) * len(rows)
        many = rows[: (WARM + STEPS) * data.batch_size]
        cache = cache_tokens(model, data.opened, many, Path(where))
        cached = CachedDataModule(data, cache)
        cached.parts = type(data.parts)(
            np.where(np.isin(np.arange(len(data.opened)), many), "train", "out"),
            data.parts.group,
            data.parts.digest,
        )
        share = len(many) / len(rows)
        seconds = {
            "encoder trained": epoch(data, name, freeze="none"),
            "encoder frozen": epoch(data, name, freeze="encoder"),
            "cached, 4 noise levels a cell, as without": epoch(
                cached, name, freeze="encoder", levels=4
            )
            / share,
            "cached": epoch(cached, name, freeze="encoder") / share,
        }
    print(f"{len(rows):,} training cells, batches of {data.batch_size}, {name}\n")
    print("| an epoch | seconds | times as long as cached |\n|---|---|---|")
    for way, took in seconds.items():
        print(f"| {way} | {took:.1f} | {took / seconds['cached']:.1f} |")
    size = cache.tokens.nbytes / len(many) * len(rows) / 1e6
    print(f"\nEncoding once: {encode:.0f} s and {size:.0f} MB.")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "xenium-pancreas")
