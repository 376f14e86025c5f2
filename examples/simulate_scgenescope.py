"""Write a simulated miniature of scGeneScope, to try its configs on.

    python examples/simulate_scgenescope.py scgenescope
    phenoseq prepare scgenescope/features/imaging/imagenet/vit-l scgenescope.zarr \
        --pair-by sample --sample-columns Treatment,Replicate \
        --rna scgenescope/features/rnaseq/scgpt --embedding scGPT
    phenoseq train --config examples/scgenescope_published.yaml
    phenoseq train --config examples/scgenescope_phenoseq.yaml

Its files and columns are those of the real data. In place of ViT-L features there are statistics
of each stain's pixels, and in place of scGPT embeddings principal components; image cells and RNA
cells are different cells of the same wells.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from phenoseq.data.crops import iter_crops
from phenoseq.data.simulate import PIXEL_SIZE, simulate_plate
from phenoseq.training.baselines import intensity_statistics

#: Replicates of each round.
ROUNDS = {1: ("3", "4", "5"), 2: ("1", "2")}


def main(folder: Path, cells_per_site: int, treatments: int, width: int, seed: int) -> None:
    names = ["DMSO", *(f"drug{i}" for i in range(1, treatments))]
    plate = simulate_plate(
        seed=seed, treatments=names, wells_per_treatment=5, cells_per_site=cells_per_site
    )
    source = plate.source
    obs = pd.DataFrame(
        {
            "Sample_ID": source.obs["Metadata_Well"].to_numpy(),
            "Treatment": source.obs["Metadata_Treatment"].to_numpy(),
            "Replicate": source.obs["Metadata_Replicate"].astype(str).to_numpy(),
            "Group": np.where(source.obs["Metadata_Treatment"] == "DMSO", "control", "treatment"),
        },
        index=source.obs.index,
    )
    imaged = np.random.default_rng(seed).random(len(obs)) < 0.5
    features = np.zeros((len(obs), 5 * len(source.channels)), dtype=np.float32)
    for batch in iter_crops(source, PIXEL_SIZE, 64):
        n = len(batch.rows)
        by_kind = intensity_statistics(batch.images).reshape(n, 5, len(source.channels))
        features[batch.rows] = by_kind.transpose(0, 2, 1).reshape(n, -1)  # stain by stain
    counts = source.counts[~imaged]
    scaled = np.log1p(counts.toarray() / counts.sum(axis=1).A1[:, None] * 300)
    scaled -= scaled.mean(axis=0)
    embedding = (scaled @ np.linalg.svd(scaled, full_matrices=False)[2][:width].T).astype("f4")

    for number, replicates in ROUNDS.items():
        images = obs["Replicate"].isin(replicates) & imaged
        rna = obs["Replicate"].isin(replicates) & ~imaged
        vit = ad.AnnData(features[images], obs=obs[images])
        scgpt = ad.AnnData(
            counts[rna[~imaged].to_numpy()],
            obs=obs[rna],
            var=source.var.rename_axis(None),
            obsm={"scGPT": embedding[rna[~imaged].to_numpy()]},
        )
        for table, place in ((vit, "imaging/imagenet/vit-l"), (scgpt, "rnaseq/scgpt")):
            path = folder / "features" / place / f"round_{number}.h5ad"
            path.parent.mkdir(parents=True, exist_ok=True)
            table.write_h5ad(path)
            print(f"{path}: {table.n_obs} cells")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--cells", type=int, default=40, help="cells a field (%(default)s)")
    parser.add_argument("--treatments", type=int, default=5, help="DMSO included (%(default)s)")
    parser.add_argument("--width", type=int, default=16, help="of embeddings (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the plate (%(default)s)")
    options = parser.parse_args()
    main(options.folder, options.cells, options.treatments, options.width, options.seed)
