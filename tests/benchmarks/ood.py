"""How well ``ood_score`` tells other images from held-out tissue, on cells of a Xenium store.

    python tests/benchmarks/ood.py STORE.zarr [MODEL] [FOLDER]

AUROC of each kind of image against the validation cells as they are. ``FOLDER`` holds the
folders ``merscope`` and ``cell_painting/pediatric``; their stains are given the names of the
model's, so that what is found is not merely a stain that is missing.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

import phenoseq
from phenoseq.data.crops import iter_crops, outside
from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.nuclei import segment_folder
from phenoseq.data.readers import open_source, read_cells
from phenoseq.data.readers.cells import place_cells
from phenoseq.data.source import Source
from phenoseq.data.splits import SplitConfig
from phenoseq.errors import PhenoseqWarning
from phenoseq.models.config import ImageConfig
from phenoseq.models.phenoseq import PhenoSeq

CELLS = 1500
#: Stains of other assays under the names of the section's, where each is the likest.
MERSCOPE = {"DNA": "DNA", "Cellbound1": "Boundary", "PolyT": "18S", "Cellbound3": "InteriorProtein"}
PAINTING = {"DNA": "DNA", "AGP": "Boundary", "RNA": "18S", "Mito": "InteriorProtein"}
#: Kinds of image that must be told from tissue.
GROSS = (
    "empty (zeros)",
    "empty (noise of one grey value)",
    "saturated",
    "stains in each other's place",
    "MERSCOPE",
    "Cell Painting",
)

Crops = NDArray[np.generic]


def main(store: str, name: str, shared: str) -> None:
    model = phenoseq.load_model(name)
    assert isinstance(model, PhenoSeq)
    image = model.config.image
    data = StoreDataModule(store, SplitConfig(**model.config.training.split))
    data.setup()
    tissue = data.opened.take(data.some("val", CELLS))
    kinds = altered(tissue)
    folder = Path(shared)
    if shared and (folder / "merscope").is_dir():
        kinds["MERSCOPE"] = crops_of(open_source(folder / "merscope"), image, MERSCOPE)
        kinds["Cell Painting"] = painting(folder / "cell_painting" / "pediatric", image)
    table(model, tissue, kinds)


def table(model: PhenoSeq, tissue: Crops, kinds: dict[str, Crops]) -> dict[str, float]:
    """Print the AUROC of each kind against tissue, and return those of ``ood_score``."""
    own = scores(model, tissue)
    middle = ", ".join(f"{np.median(values):.2f}" for values in own)
    print(f"{len(tissue)} validation cells, medians of score, context alone and spread: {middle}")
    print(
        "| images | cells | median `ood_score` | AUROC | of the context alone | of `draw_spread` |"
    )
    print("|---|---|---|---|---|---|")
    found = {}
    for kind, crops in kinds.items():
        other = scores(model, crops)
        labels = np.repeat([0, 1], [len(tissue), len(crops)])
        auc = [roc_auc_score(labels, np.concatenate(pair)) for pair in zip(own, other, strict=True)]
        found[kind] = float(auc[0])
        shown = f"**{kind}**" if kind in GROSS else kind
        values = " | ".join(f"{value:.3f}" for value in auc)
        print(f"| {shown} | {len(crops)} | {np.median(other[0]):.2f} | {values} |", flush=True)
    return found


def scores(model: PhenoSeq, crops: Crops) -> list[Crops]:
    """Return the ``ood_score`` of crops, its part of the context alone, and ``draw_spread``."""
    image = model.config.image
    plain = copy(model).with_image(appearance=None)
    how = {"channels": image.channels, "pixel_size": image.pixel_size, "device": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PhenoseqWarning)
        made = phenoseq.predict(crops, model=model, n_samples=8, **how)
        context = phenoseq.predict(crops, model=plain, n_samples=1, steps=1, **how)
    columns = (made.obs["ood_score"], context.obs["ood_score"], made.obs["draw_spread"])
    return [column.to_numpy() for column in columns]


def altered(tissue: Crops) -> dict[str, Crops]:
    """Return what can go wrong with crops of tissue ``(n, C, H, W)``, 8 bit."""
    rng = np.random.default_rng(0)
    top = np.iinfo(tissue.dtype).max
    real = tissue.astype(np.float32)

    def blurred(sigma: float) -> Crops:
        return np.rint(gaussian_filter(real, (0, 0, sigma, sigma))).astype(tissue.dtype)

    def swapped(a: int, b: int) -> Crops:
        order = list(range(tissue.shape[1]))
        order[a], order[b] = b, a
        return tissue[:, order]

    few = tissue[:200]
    return {
        "empty (zeros)": np.zeros_like(few),
        "empty (noise of one grey value)": rng.poisson(1, few.shape).astype(tissue.dtype),
        "saturated": np.full_like(few, top),
        "stains in each other's place": np.roll(tissue, 1, axis=1),
        "first and second stain swapped": swapped(0, 1),
        "second and third stain swapped": swapped(1, 2),
        "third and fourth stain swapped": swapped(2, 3),
        "ten times as bright": np.clip(10 * real, 0, top).astype(tissue.dtype),
        "three times as bright": np.clip(3 * real, 0, top).astype(tissue.dtype),
        "a third as bright": (real / 3).astype(tissue.dtype),
        "blurred by 1 pixel": blurred(1),
        "blurred by 2 pixels": blurred(2),
        "blurred by 4 pixels": blurred(4),
    }


def crops_of(source: Source, image: ImageConfig, names: dict[str, str]) -> Crops:
    """Return crops of a source, its stains under the names of the model's."""
    source = replace(source, obs=source.obs[~outside(source)], counts=None, var=None)
    order = [source.channels.index(stain) for stain in names]
    assert tuple(names.values()) == image.channels
    each = iter_crops(source, image.pixel_size, image.crop_px)
    return np.concatenate([batch.images[:, order] for batch in each])


def painting(folder: Path, image: ImageConfig) -> Crops:
    """Return crops of all nuclei of a field of Cell Painting."""
    with tempfile.TemporaryDirectory() as out:
        segment_folder(folder, out, pixel_size=0.598)
        source = open_source(folder, pixel_size=0.598, cells=False)
        source, _ = place_cells(source, read_cells(Path(out) / "cells.csv"), "nuclei")
        return crops_of(source, image, PAINTING)


if __name__ == "__main__":
    main(*[*sys.argv[1:], *("", "xenium-pancreas", "")[len(sys.argv) - 1 :]])
