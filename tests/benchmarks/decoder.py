"""Quality against cost of the decoder's size: denoisers trained on one frozen encoder.

    python tests/benchmarks/decoder.py STORE.zarr [MODEL] [EPOCHS]

Every denoiser is trained alike, from scratch, on the contexts of the training cells, and scored on
validation cells. So the sizes can be compared; the released weights were trained for longer, with
their encoder.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch
from steps import timed

import phenoseq
from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.splits import SplitConfig
from phenoseq.evaluation.metrics import pcc_gene
from phenoseq.evaluation.report import normalised, scored_genes
from phenoseq.models.denoiser import Denoiser, DenoiserConfig
from phenoseq.models.diffusion import logit_normal
from phenoseq.models.phenoseq import PhenoSeq

BATCH, LEVELS, DRAWS = 256, 4, 16
SIZES = tuple(
    DenoiserConfig(dim=128, depth=depth, heads=4, tokens=tokens)
    for depth, tokens in ((1, 1), (1, 2), (2, 2), (3, 2), (3, 4), (4, 4))
)


def main(store: str, name: str, epochs: int) -> None:
    model = phenoseq.load_model(name)
    data = StoreDataModule(store, SplitConfig(**model.config.training.split))
    data.setup()
    train, val = data.parts.rows("train"), data.some("val", 4096)
    contexts = {part: encode(model, data, rows) for part, rows in (("train", train), ("val", val))}
    crops = torch.from_numpy(data.opened.take(val[:128]).astype(np.float32))
    with torch.inference_mode():
        encoder = timed(lambda: model.encode(crops))
    median = model.config.expression.median_library
    truth = normalised(data.opened.counts(val), median)
    genes = scored_genes(data.opened.counts(train))
    print(f"{len(train)} training cells, {epochs} epochs each; {len(val)} validation cells")
    print("| depth | tokens | parameters | 16 draws / encoder | loss | median `pcc_gene` |")
    print("|---|---|---|---|---|---|")
    for size in SIZES:
        torch.manual_seed(0)
        model.config = replace(model.config, denoiser=size)
        model.denoiser = Denoiser(size, model.config.expression.latent_dim)
        fit(model, contexts["train"], data.opened.counts(train), epochs)
        with torch.inference_mode():
            keep = torch.ones(contexts["val"].shape[:2], dtype=torch.bool)
            few = (contexts["val"][:128], keep[:128])
            noise = torch.randn(128, DRAWS, model.config.expression.latent_dim)
            cost = timed(lambda few=few, noise=noise: model.generate(few, noise))
            loss, predicted = judge(model, contexts["val"], data.opened.counts(val))
        r = np.median(pcc_gene(truth[:, genes], predicted[:, genes]))
        n = sum(p.numel() for p in model.denoiser.parameters())
        print(
            f"| {size.depth} | {size.tokens} | {n / 1e6:.2f} M | {cost / encoder:.2f} | "
            f"{loss:.4f} | {r:.4f} |",
            flush=True,
        )


@torch.inference_mode()
def encode(model: PhenoSeq, data: StoreDataModule, rows: np.ndarray) -> torch.Tensor:
    parts = []
    for i in range(0, len(rows), 512):
        crops = torch.from_numpy(data.opened.take(rows[i : i + 512]).astype(np.float32))
        parts.append(model.encode(crops)[0])
    return torch.cat(parts)


def fit(model: PhenoSeq, contexts: torch.Tensor, counts, epochs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = epochs * (len(contexts) // BATCH)
    optimiser = torch.optim.AdamW(model.denoiser.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps, pct_start=0.1)
    for _ in range(steps):
        rows = torch.randint(len(contexts), (BATCH,), generator=generator)
        loss = losses(model, contexts[rows], counts[rows.numpy()], generator).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def losses(model: PhenoSeq, context: torch.Tensor, counts, generator: torch.Generator):
    n, dim = len(context), model.config.expression.latent_dim
    t = logit_normal(n * LEVELS, generator).view(n, LEVELS)
    noise = torch.randn(n, LEVELS, dim, generator=generator)
    t[:, 0] = 1.0
    keep = torch.ones(context.shape[:2], dtype=torch.bool)
    dense = torch.from_numpy(counts.toarray()).float()
    return model.denoising_loss((context, keep), dense, t, noise)


def judge(model: PhenoSeq, contexts: torch.Tensor, counts) -> tuple[float, np.ndarray]:
    generator = torch.Generator().manual_seed(1)
    loss, mean = [], []
    for i in range(0, len(contexts), BATCH):
        some = contexts[i : i + BATCH]
        loss.append(losses(model, some, counts[i : i + BATCH], generator))
        keep = torch.ones(some.shape[:2], dtype=torch.bool)
        shape = (len(some), DRAWS // 2, model.config.expression.latent_dim)
        half = torch.randn(shape, generator=generator)
        latent = model.generate((some, keep), torch.cat([half, -half], dim=1))
        mean.append(model.expression.decode(latent)[0].mean(dim=1))
    median = model.config.expression.median_library
    return float(torch.cat(loss).mean()), torch.log1p(torch.cat(mean) * median).numpy()


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *("", "xenium-pancreas", "6")[len(sys.argv) - 1 :]]
    main(arguments[0], arguments[1], int(arguments[2]))
