"""Simulate a small plate, predict its expression from its images, and compare with the truth.

    python examples/demo.py demo

writes ``demo/prediction.h5ad`` and ``demo/prediction.png``. The truth is the simulation's: the
expected expression of every cell. The model saw other simulated plates.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

import phenoseq
from phenoseq.data.crops import iter_crops
from phenoseq.data.simulate import PIXEL_SIZE, simulate_plate
from phenoseq.evaluation.metrics import pcc_gene

mpl.use("agg")
import matplotlib.pyplot as plt

MODEL, SEED, SHOWN = "simulated-plate", 2026, 5


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plate = simulate_plate(seed=SEED, wells_per_treatment=3, sites_per_well=2, cells_per_site=20)
    wells = plate.source.obs["Metadata_Well"].nunique()
    print(f"simulated plate: {len(plate.source.obs)} cells in {wells} wells (seed {SEED})")
    prediction = phenoseq.predict(plate.source, model=MODEL, out=folder / "prediction.h5ad", seed=0)
    rows = plate.source.obs.index.get_indexer(prediction.obs_names)
    median = prediction.uns["phenoseq"]["median_library"]
    truth = np.log1p(plate.rates[rows] * median)
    predicted = np.asarray(prediction.X)

    shuffled = np.random.default_rng(0).permutation(len(truth))
    real = pcc_gene(truth, predicted)
    chance = pcc_gene(truth[shuffled], predicted)
    print("gene-wise Pearson correlation of predicted and true expression, over cells:")
    for name, r in {"predicted from its image": real, "the same, cells shuffled": chance}.items():
        print(f"  {name:26} median {np.median(r):6.3f}   mean {r.mean():6.3f}")

    draw(folder / "prediction.png", plate.source, prediction, truth, real)
    print(f"wrote {folder / 'prediction.h5ad'} and {folder / 'prediction.png'}")


def draw(path: Path, source, prediction, truth, correlation) -> None:
    """Cells with low to high true expression of the best gene, images above profiles."""
    predicted = np.asarray(prediction.X)
    best = int(np.argmax(correlation))
    order = np.argsort(truth[:, best])
    cells = order[np.linspace(0.02 * len(order), 0.98 * len(order), SHOWN).astype(int)]
    crops = {}
    for batch in iter_crops(source, PIXEL_SIZE, 64):
        crops |= dict(zip(source.obs.index[batch.rows], batch.images, strict=True))
    genes = np.argsort(correlation)[::-1][:12]
    figure = plt.figure(figsize=(12, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2 * SHOWN + 5, height_ratios=(1, 1.15))
    for i, cell in enumerate(cells):
        axes = figure.add_subplot(grid[0, 2 * i : 2 * i + 2])
        axes.imshow(composite(crops[prediction.obs_names[cell]]))
        axes.set_title(prediction.obs_names[cell].partition("-")[2], fontsize=8)
        axes.set_axis_off()
        axes = figure.add_subplot(grid[1, 2 * i : 2 * i + 2])
        place = np.arange(len(genes))
        axes.barh(place - 0.2, truth[cell, genes], 0.4, color="0.35", label="true")
        axes.barh(place + 0.2, predicted[cell, genes], 0.4, color="tab:orange", label="predicted")
        axes.set_yticks(place, prediction.var["symbol"].iloc[genes] if i == 0 else [], fontsize=7)
        axes.set_xlim(0, max(truth[:, genes].max(), predicted[:, genes].max()))
        axes.invert_yaxis()
        axes.set_xlabel("log1p expression", fontsize=7)
        if i == 0:
            axes.legend(fontsize=7)
    axes = figure.add_subplot(grid[0, -5:])
    axes.scatter(truth[:, best], predicted[:, best], s=5, alpha=0.6, color="tab:orange")
    axes.set_title(
        f"{prediction.var['symbol'].iloc[best]}: r = {correlation[best]:.2f}", fontsize=9
    )
    axes.set_xlabel("true", fontsize=8)
    axes.set_ylabel("predicted", fontsize=8)
    axes = figure.add_subplot(grid[1, -5:])
    axes.hist(correlation, bins=20, color="tab:orange")
    axes.axvline(0, color="0.35", lw=1)
    axes.set_xlabel("gene-wise correlation with the truth", fontsize=8)
    axes.set_ylabel("genes", fontsize=8)
    figure.suptitle("Simulated Cell Painting: images, and expression predicted from them")
    figure.savefig(path, dpi=120)


def composite(crop):
    """DNA blue, RNA and ER green, AGP and mitochondria red."""
    scaled = [np.clip(c / np.quantile(c, 0.995), 0, 1) for c in crop.astype(float)]
    dna, rna, agp, mito, er = scaled
    return np.clip(np.stack([0.6 * agp + 0.5 * mito, 0.5 * rna + 0.5 * er, dna], -1), 0, 1)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
