"""Coverage of a model on validation cells, as it predicts and recalibrated.

python tests/benchmarks/calibration.py STORE [MODEL]

It is fitted to the calibration part of the store, and nothing looks at the test part.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import phenoseq
from phenoseq.data.backed import Cells
from phenoseq.data.selection import SelectedDataModule
from phenoseq.data.splits import SplitConfig
from phenoseq.evaluation.report import MIN_COUNTS, scored_genes
from phenoseq.evaluation.scoring import score
from phenoseq.evaluation.tables import Truth, open_prediction
from phenoseq.inference.inputs import open_inputs
from phenoseq.inference.predictor import image_job
from phenoseq.inference.table import predict_table

CELLS, DRAWS = 4000, 32


def main(store: Path, name: str) -> None:
    model = phenoseq.load_model(name)
    config = model.config
    data = SelectedDataModule(
        store,
        SplitConfig(**config.training.split),
        channels=config.image.channels,
        genes=config.expression.genes,
    )
    data.setup()
    rows = data.some("val", CELLS)
    total = np.asarray(data.opened.counts(rows).sum(axis=1)).ravel()
    rows, total = rows[total >= MIN_COUNTS], total[total >= MIN_COUNTS]
    table = data.opened.table()
    genes = scored_genes(table.X[data.parts.rows("train")])
    seen = np.asarray((table.X[rows] > 0).mean(axis=0)).ravel()
    groups, group = np.unique(data.parts.group[rows], return_inverse=True)
    truth = Truth(
        counts=Cells(table[rows].copy()).matrix(),
        rows=np.arange(len(rows)),
        obs=table.obs.iloc[rows],
        var=table.var,
        genes=genes,
        common=(seen > 0.2)[genes],
        total=total,
        group=group,
        groups=groups,
        median=config.expression.median_library,
    )
    print(
        f"{len(rows):,} validation cells, {len(groups)} groups, {genes.sum()} genes, {DRAWS} draws"
    )
    without = phenoseq.load_model(name)
    without.config = replace(config, recalibration=None)
    for title, it in (
        ("as predicted", without),
        ("recalibrated", phenoseq.calibrate(model, store)),
    ):
        inputs = open_inputs(data.opened, config.image, rows=rows)
        table = predict_table(image_job(it, inputs, n_samples=DRAWS, keep_draws=True))
        result = score(truth, open_prediction(table, truth, title))
        found, values = result.calibration, result.values
        names = ("crps", "energy_score", "e_distance", "variance_ratio", "coexpression_error")
        print(f"\n{title}: " + ", ".join(f"{n} {values[n]:.4f}" for n in names))
        print(f"[0, 0] covers {found.empty:.1%}, its crps {found.empty_crps:.4f}\n")
        total_edges = ", ".join(f"{np.ceil(edge):.0f}" for edge in found.total_edges)
        print(
            "| level | PIT | in > 20% of cells | closed | width | group means | by total counts "
            f"({total_edges}) | by predicted level {found.level_edges} |\n" + "|---" * 8 + "|"
        )
        for level in found.coverage:
            parts = (found.coverage, found.coverage_common, found.closed)
            cells = [f"{part[level]:.1%}" for part in parts]
            cells += [f"{found.width[level]:.3f}", f"{found.group_means[level]:.1%}"]
            for binned in (found.by_total, found.by_level):
                cells.append(", ".join(f"{100 * value:.1f}" for value in binned[level]))
            print(f"| {float(level):.0%} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "xenium-pancreas")
