"""Write a section as a store of samples: the cells of a block and a cluster, identity hidden.

    phenoseq prepare XENIUM_FOLDER section.zarr
    python examples/section_samples.py XENIUM_FOLDER section.zarr samples.zarr
    phenoseq train --data SampleDataModule --data.store samples.zarr --data.n_images 16 \\
        --data.n_rna 16 --data.batch_size 8 \\
        --data.split '{by: part, block: null, declared: {train: [train], val: [val]}}' \\
        --model.encoder '{backbone: tf_efficientnet_lite0, channel_mode: joint, norm: batch}' \\
        --model.encoder_weights tf_efficientnet_lite0.safetensors --model.components 64 \\
        --model.denoiser '{dim: 128, depth: 2, heads: 4, tokens: 1}' --model.diffusion.steps 10 \\
        --trainer.max_epochs 8 --trainer.gradient_clip_val 1.0 --export best \\
        --trainer.default_root_dir runs/section-samples
    python examples/section_labels.py section.zarr OUT --model runs/section-samples/model

The pretrained weights are as examples/embed_study.py writes them. A model trained on it knows which
sample an image cell and an RNA cell are of, as in scGeneScope, and not which of them are the same
cell. Only training and validation blocks are in it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from phenoseq.data.backed import Cells
from phenoseq.data.datamodule import split_of
from phenoseq.data.readers import open_source
from phenoseq.data.samplewriter import write_sample_store
from phenoseq.data.source import Source
from phenoseq.data.splits import SplitConfig
from phenoseq.data.store import Store
from phenoseq.progress import bar

COLUMNS = ("part", "block", "cluster")
_NONE = "none"


def main(source: Source, store: Store, out: Path, label: str) -> None:
    obs = store.obs()
    split = split_of(store, SplitConfig())
    names = pd.DataFrame(
        {"part": split.part, "block": split.group, "cluster": obs[label].astype(object)},
        index=obs.index,
    )
    used = names["part"].isin(["train", "val"]) & names["cluster"].notna()
    names = names[used].astype(str)
    rna = ad.AnnData(
        store.counts(np.flatnonzero(used.to_numpy())),
        obs=names.rename_axis(None),
        var=store.table().var.rename_axis(None),
    )
    images = replace(source, obs=source.obs.join(names).fillna(dict.fromkeys(COLUMNS, _NONE)))
    manifest = store.manifest
    with bar("preparing") as progress:
        _, pairing = write_sample_store(
            images,
            Cells(rna),
            out,
            columns=COLUMNS,
            pixel_size=manifest.pixel_size,
            crop_px=manifest.crop_px,
            progress=progress,
        )
    print(f"{out}: {len(pairing.samples):,} samples, {len(rna):,} cells")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the section")
    parser.add_argument("store", type=Path, help="made of it by 'phenoseq prepare'")
    parser.add_argument("out", type=Path, help="store to write")
    parser.add_argument("--label", default="graph_cluster", help="column of obs (%(default)s)")
    options = parser.parse_args()
    main(open_source(options.folder), Store(options.store), options.out, options.label)
