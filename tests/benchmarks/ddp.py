"""Two processes of one thread against one process of one thread: targets a second.

Trains the denoiser and a small encoder on simulated crops in memory, with gradients exchanged over
gloo, as `phenoseq train` does on two devices. A target is a cell at one noise level.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from scipy import sparse

from phenoseq.data.handover import Batch
from phenoseq.models.config import ImageConfig, PhenoSeqConfig
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.expression import fit_expression_space
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.record import TrainingRecord
from phenoseq.training.callbacks import WarmEMA
from phenoseq.training.module import PhenoSeqModule

BATCH, GENES, CROP, WARM, SECONDS = 64, 200, 48, 3, 15.0
WANTED = 1.7


class Module(PhenoSeqModule):
    """The small model of the Xenium section's size, untrained."""

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        counts = np.random.default_rng(0).poisson(1.0, (512, GENES)).astype(np.float32)
        names = tuple(f"ENSG{i:011d}" for i in range(GENES))
        space = fit_expression_space(
            sparse.csr_matrix(counts), names, names, components=32, hidden=64, seed=0
        )
        config = PhenoSeqConfig(
            image=ImageConfig(
                channels=("DNA", "ER", "RNA", "AGP"),
                pixel_size=0.5,
                crop_px=CROP,
                dtype="uint8",
                mean=(10.0,) * 4,
                std=(10.0,) * 4,
                p999=(200.0,) * 4,
            ),
            expression=space.config,
            training=TrainingRecord("", "", {}, "", 512, 0, ""),
            encoder=EncoderConfig(backbone="regnetx_002", channel_mode="joint", norm="group"),
            denoiser=self.denoiser,
            diffusion=self.diffusion,
        )
        self.model = PhenoSeq(config, space)


class Cells:
    """The same cells again and again."""

    def __len__(self) -> int:
        return 10**6

    def __iter__(self) -> Iterator[Batch]:
        made = torch.Generator().manual_seed(0)
        batch = {
            "images": torch.randint(0, 255, (BATCH, 4, CROP, CROP), generator=made).byte(),
            "counts": torch.poisson(torch.ones(BATCH, GENES), generator=made),
            "rows": torch.arange(BATCH),
        }
        while True:
            yield batch


class Clock(Callback):
    """Counts steps after the first few, and ends the run."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.times.append(time.perf_counter())
        over = len(self.times) > WARM and self.times[-1] - self.times[WARM] > SECONDS
        if trainer.strategy.broadcast(over):
            trainer.should_stop = True


def train(ranks: int) -> None:
    """Train for some seconds, and print targets a second over all ranks."""
    torch.set_num_threads(1)
    clock, module = Clock(), Module()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=1,
        limit_val_batches=0,
        callbacks=[WarmEMA(), clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Cells())
    if trainer.is_global_zero:
        steps = len(clock.times) - 1 - WARM
        a_second = steps / (clock.times[-1] - clock.times[WARM])
        print(f"targets {a_second * BATCH * ranks * module.levels}")


def measure(ranks: int) -> float:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    ran = subprocess.run(
        [*command, f"--nproc-per-node={ranks}", str(Path(__file__)), str(ranks)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=timedelta(minutes=10).total_seconds(),
    )
    if ran.returncode:
        sys.exit(ran.stderr)
    return float(ran.stdout.split("targets ")[1].split()[0])


def main() -> None:
    if len(sys.argv) > 1:
        train(int(sys.argv[1]))
        return
    one, two = measure(1), measure(2)
    print("| | targets a second |\n|---|---|")
    print(f"| one process of one thread | {one:.0f} |")
    print(f"| two processes of one thread | {two:.0f} |")
    print(f"\nratio {two / one:.2f}, wanted {WANTED}")


if __name__ == "__main__":
    main()
