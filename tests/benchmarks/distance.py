"""What an `e_distance` is made of: levels of genes, their spread, and the rest.

    phenoseq evaluate --model MODEL --store STORE --split test -o FOLDER
    python tests/benchmarks/distance.py FOLDER [MODEL]

One draw a cell of the evaluated model, and of the regressor with counting noise. Then with each
gene's mean set to the true one, and with its deviation too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

import phenoseq
from phenoseq.evaluation.metrics import e_distance
from phenoseq.evaluation.report import normalised


def main(folder: str, name: str) -> None:
    tables = [
        ad.read_zarr(Path(folder) / f"{n}.zarr") for n in ("truth", "prediction", "baselines")
    ]
    truth, made, baselines = (table[tables[0].obs_names] for table in tables)
    median = phenoseq.load_model(name).config.expression.median_library
    true = normalised(sparse.csr_matrix(truth.X), median)
    seen = pd.read_parquet(Path(folder) / "genes.parquet")[name].notna().to_numpy()  # scored
    true = true[:, seen]
    mean, std = true.mean(axis=0), true.std(axis=0)
    draws = {
        "a draw of the model": made.layers["draw_0"],
        "regressor + counting noise": baselines.layers["regressor_nb_draw_0"],
    }
    print("| | shift of gene means | genes seen a cell | as it is | means set | and deviations |")
    print("|---|---|---|---|---|---|")
    for what, layer in draws.items():
        draw = (layer.toarray() if sparse.issparse(layer) else np.asarray(layer))[:, seen]
        centred = draw - draw.mean(axis=0) + mean
        scaled = (draw - draw.mean(axis=0)) / np.maximum(draw.std(axis=0), 1e-6) * std + mean
        found = (e_distance(true, x) for x in (draw, centred, scaled))
        shift = np.linalg.norm(draw.mean(axis=0) - mean)
        print(
            f"| {what} | {shift:.3f} | {(draw > 0).sum(axis=1).mean():.1f} | "
            + " | ".join(f"{value:.4f} ± {error:.4f}" for value, error in found)
            + " |"
        )
    print(
        f"\n{len(true)} cells, {seen.sum()} genes; truly seen {(true > 0).sum(axis=1).mean():.1f}"
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "xenium-pancreas")
