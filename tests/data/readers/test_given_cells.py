"""`predict FOLDER --cells cells.csv` finds the same crops in every layout."""

from __future__ import annotations

import unicodedata

import numpy as np
import pandas as pd
import pytest
import tifffile

from phenoseq.data.readers import open_source
from phenoseq.errors import DataError, PhenoseqWarning
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


def bare(layout, tmp_path, fake, image_folder):
    """Write images of two fields (one for an OME-TIFF) of which nothing says where cells are."""
    if layout == "folder":  # without DNA, so that nuclei cannot be found either
        names = [f"P_{well}_s1_{stain}.tif" for well in ("A01", "b2") for stain in ("ER", "Mito")]
        return image_folder({name: k + 1 for k, name in enumerate(names)}), 0.5
    if layout == "ome-zarr":
        fake.plate(tmp_path / "plate.zarr", wells=("A/1",), labels=False)
        return tmp_path / "plate.zarr", None
    pixels, _, _ = fake.field(5)
    folder = tmp_path / "gallery"
    folder.mkdir()
    if layout == "ome-tiff":
        metadata = {"axes": "CYX", "Channel": {"Name": ["DAPI", "ConA", "MitoTracker"]}}
        tifffile.imwrite(folder / "f.ome.tif", pixels, metadata=metadata, photometric="minisblack")
        return folder / "f.ome.tif", 0.5
    for site in (1, 2):
        for stain, plane in zip(("DNA", "ER"), pixels, strict=False):
            tifffile.imwrite(folder / f"{site}_{stain}.tiff", plane + np.uint16(site))
    rows = [
        {"Metadata_Plate": "P", "Metadata_Well": "a1", "Metadata_Site": site}
        | {f"FileName_Orig{stain}": f"{site}_{stain}.tiff" for stain in ("DNA", "ER")}
        for site in (1, 2)
    ]
    pd.DataFrame(rows).to_csv(folder / "load_data.csv", index=False)
    return folder, 0.5


def given(source, *more):
    """Return a table of one cell in each field, and in some that are not there."""
    fields = [*source.fields, *more]
    index = pd.Index([f"c{k}" for k in range(len(fields))], name="cell_id")
    return pd.DataFrame({"field": fields, "x_centroid": 9.25, "y_centroid": 8.25}, index=index)


def image_of(source):
    n = len(source.channels)
    return ImageConfig(
        channels=source.channels, pixel_size=source.pixel_size, crop_px=8, dtype=str(source.dtype),
        mean=(0.0,) * n, std=(1.0,) * n, p999=(1.0,) * n,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["folder", "ome-zarr", "ome-tiff", "jump"])
def test_images_without_cells_of_their_own(layout, tmp_path, fake, image_folder):
    folder, pixel_size = bare(layout, tmp_path, fake, image_folder)
    with pytest.raises(DataError, match=r"cell|nuclei"):
        open_source(folder, pixel_size=pixel_size)
    source = open_source(folder, pixel_size=pixel_size, cells=False)
    assert source.kind == layout
    assert len(source.fields) == (1 if layout == "ome-tiff" else 2)
    inputs = open_inputs(folder, image_of(source), pixel_size=pixel_size, cells=given(source))
    assert list(inputs.obs["field"]) == list(source.fields)
    if layout != "ome-tiff":
        assert inputs.obs["Metadata_Well"].iloc[0] == "A01"
    for batch in inputs.crops(inputs.order, 1):
        field = source.fields[inputs.obs["field"].iloc[batch.rows[0]]]
        y, x = (round(c / source.pixel_size) - 4 for c in (8.25, 9.25))
        expected = field.levels[0].read(y, y + 8, x, x + 8)
        np.testing.assert_array_equal(batch.images[0], expected)


def test_fields_that_the_own_table_passes_over(image_folder):
    folder = image_folder({f"{f}_{s}.tif": 1 for f in "abc" for s in ("ER", "Mito")})
    (folder / "cells.csv").write_text("cell_id,field,x,y\n1,a,5,5\n")
    source = open_source(folder, pixel_size=0.5, cells=False)
    inputs = open_inputs(folder, image_of(source), pixel_size=0.5, cells=given(source))
    assert list(inputs.obs["field"]) == ["a", "b", "c"]


def test_a_field_that_cannot_be_read_costs_its_cells_alone(image_folder, cut_file):
    folder = image_folder({f"é{k}_{s}.tif": k for k in range(6) for s in ("ER", "Mito")})
    cut_file(folder / "é2_ER.tif", 0.5)
    with pytest.warns(PhenoseqWarning, match="1 of 6 fields"):
        source = open_source(folder, pixel_size=0.5, cells=False)
    image = image_of(source)
    table = given(source, "é2")
    table["Metadata_Well"] = "own"
    with pytest.warns(PhenoseqWarning, match="1 of 6 cells are left out"):
        inputs = open_inputs(folder, image, pixel_size=0.5, cells=table)
    assert inputs.unread == ("c5",)
    assert list(inputs.obs.index) == [f"c{k}" for k in range(5)]
    assert set(inputs.obs["Metadata_Well"]) == {"own"}
    (problem,) = inputs.problems
    assert problem.startswith("é2: ")
    assert problem.endswith("(1 cells)")
    decomposed = table.assign(field=[unicodedata.normalize("NFD", f) for f in table["field"]])
    with pytest.warns(PhenoseqWarning, match="1 of 6 cells are left out"):
        assert open_inputs(folder, image, pixel_size=0.5, cells=decomposed).unread == ("c5",)
    with (
        pytest.warns(PhenoseqWarning, match="1 of 6 fields"),
        pytest.raises(DataError, match=r"more than 20%.*\n.*\n?.*no image of it, only of \['é0'"),
    ):
        open_inputs(folder, image, pixel_size=0.5, cells=given(source, "x", "y"))
    with (
        pytest.warns(PhenoseqWarning, match="1 of 6 fields"),
        pytest.raises(DataError, match="needs a column 'field', of"),
    ):
        open_inputs(folder, image, pixel_size=0.5, cells=table.drop(columns="field"))
