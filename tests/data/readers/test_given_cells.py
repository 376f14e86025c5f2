"""`predict FOLDER --cells cells.csv` finds the same crops in every layout."""

from __future__ import annotations

import numpy as np
import pytest

from phenoseq.data.readers import open_source
from phenoseq.inference.inputs import open_inputs
from phenoseq.models.config import ImageConfig


def check(folder, tmp_path, pixel_size=None):
    """Predict at some of the folder's own cells, under other names, in another order."""
    source = open_source(folder, pixel_size=pixel_size)
    n = len(source.channels)
    image = ImageConfig(
        channels=source.channels, pixel_size=source.pixel_size, crop_px=8, dtype=str(source.dtype),
        mean=(0.0,) * n, std=(1.0,) * n, p999=(1.0,) * n,
    )  # fmt: skip
    rows = np.arange(len(source.obs))[::-2]
    table = source.obs.iloc[rows][["field", "x_centroid", "y_centroid"]]
    table = table.set_axis([f"{k:03d}" for k in range(len(rows))]).rename_axis("cell_id")
    table["kind"] = [None if k == 1 else f"é{k}" for k in range(len(rows))]
    if len(source.fields) == 1:
        table = table.drop(columns="field")
    table.to_csv(tmp_path / "given.csv")

    def crops(**options):
        inputs = open_inputs(folder, image, pixel_size=pixel_size, **options)
        out = np.zeros((len(inputs.obs), n, 8, 8))
        for batch in inputs.crops(inputs.order, 3):
            out[batch.rows] = batch.images
        return inputs, out

    inputs, found = crops(cells=tmp_path / "given.csv")
    assert list(inputs.obs.index) == list(table.index)
    assert inputs.obs["kind"].isna().tolist() == [k == 1 for k in range(len(rows))]
    assert inputs.obs["kind"].iloc[0] == "é0"
    assert list(inputs.obs["field"]) == list(source.obs["field"].iloc[rows])
    np.testing.assert_array_equal(found, crops()[1][rows])
    assert len({crop.tobytes() for crop in found}) > 1  # so that the comparison can fail


@pytest.mark.parametrize("layout", ["xenium", "merscope", "cellprofiler", "ome-zarr", "folder"])
def test_given_cells(
    layout, tmp_path, xenium_folder, merscope_folder, cellprofiler_folder, plate, fake
):
    pixel_size = None
    if layout == "xenium":
        folder = xenium_folder().path
    elif layout == "merscope":
        folder = merscope_folder().path
    elif layout == "cellprofiler":
        folder, pixel_size = cellprofiler_folder().path, 0.5
    elif layout == "ome-zarr":
        folder = tmp_path / "plate.zarr"
        fake.plate(folder)
    else:
        folder, pixel_size = plate(3), 0.5
    check(folder, tmp_path, pixel_size)
