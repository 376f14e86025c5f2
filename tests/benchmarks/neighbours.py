"""How many neighbours `decode` should average: counts split in two halves, on the Xenium section.

    python tests/benchmarks/neighbours.py STORE.zarr

Each cell's counts are split at random. One half, as principal components, is the embedding; the
other half of held-out cells is decoded from the same half of training cells.
"""

from __future__ import annotations

import sys
import warnings

import anndata as ad
import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA

from phenoseq import decode
from phenoseq.data.datamodule import split_of
from phenoseq.data.splits import SplitConfig
from phenoseq.data.store import Store
from phenoseq.evaluation.metrics import mse, pcc_gene, variance_ratio
from phenoseq.evaluation.report import normalised, scored_genes

MIN_COUNTS, HELD_OUT, COMPONENTS = 40, 2000, 50


def main(path: str) -> None:
    store = Store(path)
    split, rng = split_of(store, SplitConfig()), np.random.default_rng(0)
    rich = store.obs()["total_counts"].to_numpy() >= MIN_COUNTS
    known, new = (rows[rich[rows]] for rows in (split.rows("train"), split.rows("val")))
    new = np.sort(rng.choice(new, HELD_OUT, replace=False))
    genes = scored_genes(store.counts(known))
    halves = {}
    for name, rows in {"known": known, "new": new}.items():
        counts = store.counts(rows)
        first = counts.copy()
        first.data = rng.binomial(counts.data.astype(int), 0.5).astype(np.float32)
        median = float(np.median(np.asarray(counts.sum(axis=1)))) / 2
        halves[name] = [normalised(sparse.csr_matrix(h), median) for h in (first, counts - first)]
    pca = PCA(COMPONENTS, random_state=0).fit(halves["known"][0])
    reference = ad.AnnData(halves["known"][1])
    reference.obsm["pca"] = pca.transform(halves["known"][0])
    queries = ad.AnnData(pca.transform(halves["new"][0]))
    truth = halves["new"][1][:, genes]
    sizes = f"{len(known):,} reference cells, {len(new):,} cells of validation blocks"
    print(f"{sizes}, {genes.sum()} genes")
    print("| k | weighting | MSE | median `pcc_gene` | `variance_ratio` |\n|---|---|---|---|---|")
    for k in (1, 5, 10, 30, 100):
        for weighting in ("distance", "uniform"):
            made = decode(queries, reference, key="pca", k=k, weighting=weighting).X[:, genes]
            r = np.median(pcc_gene(truth, made))
            spread = variance_ratio(truth, made)
            print(
                f"| {k} | {weighting} | {mse(truth, made):.4f} | {r:.3f} | {spread:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1])
