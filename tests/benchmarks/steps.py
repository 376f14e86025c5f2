"""Quality against cost of sampling: network evaluations a draw, on validation cells of a store.

    python tests/benchmarks/steps.py STORE.zarr [MODEL]

Time is that of the encoder and of 16 draws on the same crops, in this run.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

import phenoseq
from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.splits import SplitConfig
from phenoseq.evaluation.metrics import e_distance, pcc_gene, variance_ratio
from phenoseq.evaluation.report import normalised, scored_genes
from phenoseq.inference.inputs import open_inputs
from phenoseq.inference.predictor import BATCH, image_job
from phenoseq.inference.table import predict_table

CELLS = 4096


def main(store: str, name: str) -> None:
    model = phenoseq.load_model(name)
    data = StoreDataModule(store, SplitConfig(**model.config.training.split), max_val=CELLS)
    data.setup()
    rows = data.some("val", CELLS)
    median = model.config.expression.median_library
    genes = scored_genes(data.opened.counts(data.parts.rows("train")))
    truth = normalised(data.opened.counts(rows), median)[:, genes]
    inputs = open_inputs(data.opened, model.config.image, rows=rows)
    crops = torch.from_numpy(data.opened.take(rows[:BATCH]).astype(np.float32))
    noise = torch.randn(BATCH, 16, model.config.expression.latent_dim)
    with torch.inference_mode():
        encoder = timed(lambda: model.encode(crops))
        context = model.encode(crops)
        print(f"{len(rows)} validation cells; encoder {encoder / BATCH * 1e3:.2f} ms a cell")
        print(
            "| steps | 16 draws / encoder | median `pcc_gene` | `variance_ratio` | `e_distance` |"
        )
        print("|---|---|---|---|---|")
        for steps in (2, 4, 6, 8, 10, 14, 20):
            cost = timed(lambda n=steps: model.generate(context, noise, steps=n))
            made = predict_table(image_job(model, inputs, steps=steps))
            mean, draw = made.to_df().to_numpy()[:, genes], made.to_df("draw").to_numpy()[:, genes]
            distance, error = e_distance(truth, draw)
            print(
                f"| {steps} | {cost / encoder:.2f} | {np.median(pcc_gene(truth, mean)):.4f} | "
                f"{variance_ratio(truth, draw):.2f} | {distance:.4f} ± {error:.4f} |"
            )


def timed(call, runs: int = 5) -> float:
    """Return the median seconds of a call."""
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "xenium-pancreas")
