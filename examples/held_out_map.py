"""Draw measured and predicted expression of some genes over the held-out blocks of a section.

    python examples/held_out_map.py STORE.zarr xenium-pancreas docs/images/xenium_pancreas.png

The genes shown are those at the 100th, 95th, 75th and 50th percentile of `pcc_gene`, so the picture
has good and middling ones. Cells of the test blocks only, which no training saw.
"""

from __future__ import annotations

import argparse

import matplotlib as mpl
import numpy as np

import phenoseq
from phenoseq.data.datamodule import split_of
from phenoseq.data.splits import SplitConfig
from phenoseq.evaluation.metrics import pcc_gene
from phenoseq.evaluation.report import normalised, scored_genes
from phenoseq.inference.inputs import open_inputs
from phenoseq.inference.predictor import image_job
from phenoseq.inference.table import predict_table

mpl.use("agg")
import matplotlib.pyplot as plt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("store")
parser.add_argument("model")
parser.add_argument("out")
options = parser.parse_args()

model, store = phenoseq.load_model(options.model), phenoseq.Store(options.store)
table = store.table()
split = split_of(store, SplitConfig(**model.config.training.split))
rows = split.rows("test")
prediction = predict_table(image_job(model, open_inputs(store, model.config.image, rows=rows)))
truth = normalised(table.X[rows], model.config.expression.median_library)
genes = np.flatnonzero(scored_genes(table.X[split.rows("train")]))
correlation = pcc_gene(truth[:, genes], np.asarray(prediction.X)[:, genes])
ranked = np.argsort(correlation)
shown = [ranked[int(q * (len(ranked) - 1))] for q in (1.0, 0.95, 0.75, 0.5)]

x, y = prediction.obsm["spatial"].T / 1000
figure, axes = plt.subplots(
    len(shown), 2, figsize=(11, 2.45 * len(shown)), layout="constrained", sharex=True, sharey=True
)
for (left, right), place in zip(axes, shown, strict=True):
    gene = genes[place]
    symbol = table.var["symbol"].iloc[gene]
    for ax, values, label in (
        (left, truth[:, gene], f"{symbol}, measured"),
        (right, np.asarray(prediction.X)[:, gene], f"predicted, r = {correlation[place]:.2f}"),
    ):
        order = np.argsort(values, kind="stable")
        top = max(np.quantile(values, 0.99), 1e-3)
        dots = ax.scatter(
            x[order], y[order], c=values[order], s=1.2, lw=0, cmap="magma", vmin=0, vmax=top
        )
        ax.set_title(label, fontsize=10)
        ax.set_aspect("equal")
        ax.set_facecolor("0.12")
        figure.colorbar(dots, ax=ax, pad=0.01)
axes[0, 0].invert_yaxis()
figure.supxlabel("mm", fontsize=9)
figure.suptitle(f"{options.model}: {len(rows):,} cells of held-out blocks, expected expression")
figure.savefig(options.out, dpi=110)
print(f"wrote {options.out}")
