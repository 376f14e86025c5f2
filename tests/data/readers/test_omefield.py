"""One OME-TIFF with its cells beside it, as labels or as a table."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tifffile

from phenoseq.data.readers import find_reader, open_source
from phenoseq.errors import DataError


@pytest.fixture
def field(tmp_path, fake):
    """Write ``Probe é 1.ome.tif`` without cells; return its path, pixels, labels and centres."""
    pixels, masks, centres = fake.field(5)
    path = tmp_path / "Probe é 1.ome.tif"
    metadata = {
        "axes": "CYX",
        "Channel": {"Name": ["DAPI", "ConA", "MitoTracker"]},
        "PhysicalSizeX": 0.4,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": 0.4,
        "PhysicalSizeYUnit": "µm",
    }
    options = {"photometric": "minisblack", "tile": (32, 32)}
    with tifffile.TiffWriter(path, ome=True) as tif:
        tif.write(pixels, subifds=1, metadata=metadata, **options)
        tif.write(pixels[:, ::2, ::2], subfiletype=1, metadata=None, **options)
    return path, pixels, masks, centres


@pytest.mark.parametrize("name", ["Probe é 1_labels.tif", "labels.tif", "labels.ome.tif"])
def test_labels_beside_it(field, name):
    path, pixels, masks, centres = field
    tifffile.imwrite(path.parent / name, masks, tile=(16, 16), compression="zlib")
    assert find_reader(path)[0].name == "ome-tiff"
    source = open_source(path)
    assert source.channels == ("DNA", "ER", "Mito")
    assert list(source.obs.index) == [f"Probe é 1-{k}" for k in range(1, 10)]
    np.testing.assert_allclose(source.obs[["y_centroid", "x_centroid"]], 0.4 * centres)
    levels = source.fields["Probe é 1"].levels
    assert [level.pixel_size for level in levels] == [0.4, 0.8]
    np.testing.assert_array_equal(levels[0].read(7, 99, 3, 140), pixels[:, 7:99, 3:140])
    found = open_source(path, pixel_size=0.3).obs[["y_centroid", "x_centroid"]]
    np.testing.assert_allclose(found, 0.3 * centres)


@pytest.mark.parametrize("name", ["Probe é 1_cells.csv", "cells.csv", "cells.parquet"])
def test_table_beside_it_comes_before_labels(field, name):
    path, _, masks, _ = field
    tifffile.imwrite(path.parent / "labels.tif", masks)
    cells = pd.DataFrame({"cell_id": [2**60, 2**60 + 1], "x_centroid": [3.0, 4.0]})
    cells["y_centroid"] = [5.0, 6.0]
    if name.endswith("csv"):
        cells.to_csv(path.parent / name, index=False)
    else:
        cells.to_parquet(path.parent / name)
    source = open_source(path)
    assert list(source.obs.index) == [str(2**60), str(2**60 + 1)]
    np.testing.assert_array_equal(source.obs["x_centroid"], [3.0, 4.0])
    assert set(source.obs["field"]) == {"Probe é 1"}


def test_without_cells(field):
    with pytest.raises(DataError, match=r"Probe é 1\.ome\.tif: nothing says where .*_labels\.tif"):
        open_source(field[0])


def test_labels_that_do_not_fit(field):
    path, _, masks, _ = field
    for bad in (masks[:-1], masks.astype(np.float32), np.stack([masks, masks])):
        metadata = {"axes": "CYX", "Channel": {"Name": ["a", "b"]}} if bad.ndim == 3 else None
        tifffile.imwrite(path.parent / "labels.ome.tif", bad, metadata=metadata, ome=True)
        with pytest.raises(DataError, match=r"labels\.ome\.tif: .*a label image of Probe é 1 has"):
            open_source(path)


def test_truncated_labels(field, cut_file):
    path, _, masks, _ = field
    tifffile.imwrite(path.parent / "labels.tif", masks)
    cut_file(path.parent / "labels.tif", 0.6)
    with pytest.raises(DataError, match=r"labels\.tif: truncated"):
        open_source(path)


def test_pixel_size_is_asked_for(field):
    path, pixels, masks, _ = field
    tifffile.imwrite(path.parent / "labels.tif", masks)
    metadata = {"axes": "CYX", "Channel": {"Name": ["DAPI", "ConA", "MitoTracker"]}}
    tifffile.imwrite(path, pixels, metadata=metadata, photometric="minisblack")
    with pytest.raises(DataError, match=r"ome\.tif: states no pixel size.*--pixel-size"):
        open_source(path)
