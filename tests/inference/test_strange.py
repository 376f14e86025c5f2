"""The out-of-distribution score on real images: held-out tissue against what is not tissue."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import phenoseq
from phenoseq.data.readers import open_source
from phenoseq.data.splits import SplitConfig, make_split

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "ood.py"
spec = importlib.util.spec_from_file_location("ood", BENCHMARK)
ood = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ood)


@pytest.mark.long
def test_what_is_grossly_wrong_is_told_from_held_out_tissue(shared_data):
    """By the released model as it is."""
    model = phenoseq.load_model("xenium-pancreas")
    image = model.config.image
    source = open_source(shared_data / "xenium_pancreas")
    split = make_split(
        SplitConfig(**model.config.training.split),
        source.obs,
        crop_width=image.crop_px * image.pixel_size,
        occupied=source.obs,
    )

    names, sizes = np.unique(split.group[split.rows("val")], return_counts=True)
    names = names[sizes >= 30][::5][:3]
    same = dict(zip(source.channels, image.channels, strict=True))
    blocks = [(split.part == "val") & (split.group == name) for name in names]
    each = [replace(source, obs=source.obs[block].iloc[:30]) for block in blocks]
    held_out = np.concatenate([ood.crops_of(some, image, same) for some in each])
    kinds = {k: v for k, v in ood.altered(held_out).items() if k in ood.GROSS}
    kinds["MERSCOPE"] = ood.crops_of(open_source(shared_data / "merscope"), image, ood.MERSCOPE)[
        :90
    ]
    kinds["Cell Painting"] = ood.painting(shared_data / "cell_painting" / "pediatric", image)
    assert set(kinds) == set(ood.GROSS)
    found = ood.table(model, held_out, kinds)
    assert min(found.values()) >= 0.95, found
