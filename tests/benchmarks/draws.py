"""`X`, from the mean latent that a regression gives, against means of draws.

    python tests/benchmarks/draws.py STORE.zarr [MODEL]

On validation cells of a store. More draws come after the same first ones.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

import phenoseq
from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.splits import SplitConfig
from phenoseq.evaluation.metrics import pcc_gene
from phenoseq.evaluation.report import normalised, scored_genes
from phenoseq.inference.randomness import cell_normals
from phenoseq.models.counts import summarise_mixture

CELLS, BATCH, DRAWS = 2048, 128, (2, 4, 8, 16, 32, 64)
WAYS = ("`X`", "mean latent of draws", "mean of counts, recalibrated", "mean of rates")


@torch.inference_mode()
def main(store: str, name: str) -> None:
    model = phenoseq.load_model(name)
    space, recalibration = model.expression, model.config.recalibration
    median = space.config.median_library
    data = StoreDataModule(store, SplitConfig(**model.config.training.split), max_val=CELLS)
    data.setup()
    rows = data.some("val", CELLS)
    genes = scored_genes(data.opened.counts(data.parts.rows("train")))
    truth = normalised(data.opened.counts(rows), median)[:, genes]
    made = {(way, k): [] for way in WAYS for k in DRAWS}
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        crops = torch.from_numpy(data.opened.take(some).astype(np.float32))
        names = [str(row) for row in some]
        noise = torch.from_numpy(cell_normals(0, names, max(DRAWS), space.config.latent_dim))
        context = model.encode(crops)
        latents = model.generate(context, noise)
        for k in DRAWS:
            latent = latents[:, :k]
            rates, library = space.decode(latent)
            total = library.mean(dim=1)
            warp = None if recalibration is None else recalibration.at(space.level(rates))
            mu = rates * total[:, None, None]
            values = (
                space.expected(model.expected(context, latent)),
                space.expected(latent.mean(dim=1)),
                summarise_mixture(mu, space.theta, median / total, (), warp)[0],
                torch.log1p(rates.mean(dim=1) * median),
            )
            for way, value in zip(WAYS, values, strict=True):
                made[way, k].append(value.numpy()[:, genes])
    print(f"{len(rows)} validation cells: median `pcc_gene`, MSE\n")
    print("| draws | " + " | ".join(WAYS) + " |\n|---|" + "---|" * len(WAYS))
    for k in DRAWS:
        cells = []
        for way in WAYS:
            mean = np.concatenate(made[way, k])
            error = ((mean - truth) ** 2).mean()
            cells.append(f"{np.median(pcc_gene(truth, mean)):.4f}, {error:.5f}")
        print(f"| {k} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "xenium-pancreas")
