"""MERSCOPE folders: cells land on their pixels, contradictions are told, ids stay apart."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

from phenoseq.data.crops import outside
from phenoseq.data.readers import find_reader, open_source
from phenoseq.errors import DataError, PhenoseqWarning

# The tables of this instrument have no Ensembl ids.
pytestmark = pytest.mark.filterwarnings("ignore:.*go by their symbol:UserWarning")


def at_cells(source):
    """Return the pixel under the centroid of each cell, ``(n, C)``."""
    (level,) = next(iter(source.fields.values())).levels
    image = level.read(0, level.shape[0], 0, level.shape[1])
    x, y = (
        (source.obs[f"{axis}_centroid"].to_numpy() // level.pixel_size).astype(int) for axis in "xy"
    )
    return image[:, y, x].T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "uint8"},
        {"bigtiff": True, "rowsperstrip": 7},
        {"byteorder": ">"},
        {"tile": (32, 32), "compression": "deflate"},
        {"rowsperstrip": 1000, "compression": "lzw"},
    ],
)
def test_cells_land_on_their_pixels(merscope_folder, options):
    fake = merscope_folder(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PhenoseqWarning)
        warnings.filterwarnings("ignore", message=".*go by their symbol")
        source = open_source(fake.path)
    assert source.kind == "merscope"
    assert source.channels == ("Cellbound1", "DNA", "PolyT")
    assert source.pixel_size == pytest.approx(fake.pixel_size)
    assert source.dtype == np.dtype(options.get("dtype", "uint16"))
    values = 10 * (np.arange(12)[:, None] + 1) + np.arange(3)
    np.testing.assert_array_equal(at_cells(source), values)


def test_counts_follow_the_cells_without_blanks(merscope_folder):
    fake = merscope_folder()
    source = open_source(fake.path)
    assert list(source.obs.index) == list(fake.cells.index)
    assert source.obs.index.is_unique
    assert list(source.var.index) == list(source.var["symbol"]) == [f"GENE{g}" for g in range(5)]
    np.testing.assert_array_equal(source.counts.toarray(), fake.counts)


def test_genes_by_symbol_are_told(merscope_folder):
    with pytest.warns(PhenoseqWarning, match="5 genes have no Ensembl id.* ids of 0 of them"):
        open_source(merscope_folder().path)


def test_folder_without_counts(merscope_folder):
    fake = merscope_folder()
    (fake.path / "cell_by_gene.csv").unlink()
    source = open_source(fake.path)
    assert source.counts is None
    assert len(source.obs) == 12


def test_older_tables_have_no_name_for_the_ids(merscope_folder):
    fake = merscope_folder()
    fake.cells.rename_axis(None).to_csv(fake.path / "cell_metadata.csv")
    fake.counts.rename_axis(None).to_csv(fake.path / "cell_by_gene.csv")
    source = open_source(fake.path)
    assert list(source.obs.index) == list(fake.cells.index)
    np.testing.assert_array_equal(source.counts.toarray(), fake.counts)


# ------------------------------------------------------------------------------------ z planes


def test_plane_with_most_stains_is_used_and_told(merscope_folder):
    fake = merscope_folder(stains={0: ("DAPI",), 1: ("DAPI", "PolyT"), 6: ("DAPI",)})
    with pytest.warns(PhenoseqWarning, match=r"z0: DAPI; z1: DAPI, PolyT; z6: DAPI\); z1 is used"):
        source = open_source(fake.path)
    assert source.channels == ("DNA", "PolyT")
    assert set(source.fields) == set(source.obs["field"]) == {"z1"}


@pytest.mark.parametrize(("planes", "chosen"), [(range(7), "z3"), ([2, 9, 10], "z9"), ([5], "z5")])
def test_middle_of_equal_planes_is_used_silently(merscope_folder, planes, chosen):
    fake = merscope_folder(stains=dict.fromkeys(planes, ("DAPI", "PolyT")))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PhenoseqWarning)
        warnings.filterwarnings("ignore", message=".*go by their symbol")
        source = open_source(fake.path)
    assert set(source.fields) == {chosen}


def test_stains_that_no_single_plane_has_are_told(merscope_folder):
    fake = merscope_folder(stains={1: ("DAPI", "PolyT"), 2: ("DAPI", "Cellbound1")})
    with pytest.warns(PhenoseqWarning, match=r"z2 is used, without \['PolyT'\]"):
        assert open_source(fake.path).channels == ("Cellbound1", "DNA")


# ---------------------------------------------------------------------------------- pixel size


def test_box_wins_over_the_stated_pixel_size(merscope_folder):
    fake = merscope_folder()
    fake.manifest(microns_per_pixel=0.432)
    message = r"over 120 x 90 pixels: 0\.108 um.*'microns_per_pixel': 0\.432\. 0\.108 is used"
    with pytest.warns(PhenoseqWarning, match=message):
        source = open_source(fake.path)
    assert source.pixel_size == pytest.approx(0.108)


def test_given_pixel_size_wins_over_the_box(merscope_folder):
    fake = merscope_folder()
    with pytest.warns(PhenoseqWarning, match=r"--pixel-size: 0\.2 um.*0\.108.*0\.2 is used"):
        assert open_source(fake.path, pixel_size=0.2).pixel_size == 0.2


def test_pixels_that_the_manifest_counts_otherwise(merscope_folder):
    fake = merscope_folder()
    fake.manifest(mosaic_width_pixels=480)
    with pytest.warns(PhenoseqWarning, match=r"says 480 x 90 pixels"):
        assert open_source(fake.path).pixel_size == pytest.approx(0.108)


def test_transform_in_place_of_the_manifest(merscope_folder):
    fake = merscope_folder(transform=True)
    (fake.path / "images" / "manifest.json").unlink()
    source = open_source(fake.path)
    assert source.pixel_size == pytest.approx(0.108)
    np.testing.assert_array_equal(at_cells(source)[:, 0], 10 * (np.arange(12) + 1))


def test_transform_that_contradicts_the_box(merscope_folder):
    fake = merscope_folder(transform=True)
    path = fake.path / "images" / "micron_to_mosaic_pixel_transform.csv"
    path.write_text("2 0 -13000\n0 2 240\n0 0 1\n")
    with pytest.warns(PhenoseqWarning, match=r"transform\.csv: 0\.5\. 0\.108 is used"):
        source = open_source(fake.path)
    np.testing.assert_array_equal(at_cells(source)[:, 0], 10 * (np.arange(12) + 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0 0\n0 1 0\n", "no 3 x 3 matrix"),
        ("1 0 0\n0 -1 0\n0 0 1\n", "positive scales"),
        ("1 1 0\n-1 1 0\n0 0 1\n", "rotated"),
        ("one\n", "cannot be read"),
    ],
)
def test_broken_transform(merscope_folder, text, message):
    fake = merscope_folder()
    (fake.path / "images" / "micron_to_mosaic_pixel_transform.csv").write_text(text)
    with pytest.raises(DataError, match=rf"transform\.csv: .*{message}"):
        open_source(fake.path)


def test_box_that_is_not_square_in_pixels(merscope_folder):
    fake = merscope_folder()
    x0, y0 = fake.corner
    fake.manifest(bbox_microns=[x0, y0, x0 + 12.96, y0 + 12.96])
    with pytest.raises(DataError, match=r"0\.108 um a pixel across and 0\.144 down"):
        open_source(fake.path)
    with pytest.warns(PhenoseqWarning, match="contradictory"):
        assert open_source(fake.path, pixel_size=0.144).pixel_size == 0.144


def test_image_that_nothing_places(merscope_folder):
    fake = merscope_folder()
    fake.manifest(bbox_microns=None)
    with pytest.raises(DataError, match="where the image lies among the cells; copy one of them"):
        open_source(fake.path, pixel_size=0.108)


@pytest.mark.parametrize(
    "changes", [{"bbox_microns": [1, 2, 3]}, {"bbox_microns": "x"}, {"microns_per_pixel": "thin"}]
)
def test_broken_manifest(merscope_folder, changes):
    fake = merscope_folder()
    fake.manifest(**changes)
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read"):
        open_source(fake.path)


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), 1e4])
def test_pixel_size_that_cannot_be(merscope_folder, size):
    with pytest.raises(DataError, match="cannot be right"):
        open_source(merscope_folder().path, pixel_size=size)


# ------------------------------------------------------------------------------------- refusals


def test_cells_outside_the_box_are_kept(merscope_folder):
    fake = merscope_folder()
    cells = fake.cells.copy()
    cells.iloc[0, cells.columns.get_loc("center_x")] = fake.corner[0] - 3
    cells.to_csv(fake.path / "cell_metadata.csv")
    source = open_source(fake.path)
    assert list(np.flatnonzero(outside(source))) == [0]
    assert source.obs["x_centroid"].iloc[0] == pytest.approx(-3)


def test_stains_that_differ_in_size(merscope_folder):
    fake = merscope_folder()
    other = merscope_folder("other", size=(90, 129))
    path = fake.path / "images" / "mosaic_PolyT_z3.tif"
    path.write_bytes((other.path / "images" / path.name).read_bytes())
    with pytest.raises(DataError, match=r"mosaic_PolyT_z3\.tif.*must match"):
        open_source(fake.path)


@pytest.mark.parametrize("name", ["cell_metadata.csv", "cell_by_gene.csv"])
def test_damaged_tables(merscope_folder, name):
    fake = merscope_folder()
    lines = (fake.path / name).read_text().splitlines()
    (fake.path / name).write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:25] + ',"')
    with pytest.raises(DataError, match=rf"{name}: (cannot be read|not a readable)"):
        open_source(fake.path)
    (fake.path / name).write_text("")
    with pytest.raises(DataError, match=rf"{name}: (cannot be read|not a readable)"):
        open_source(fake.path)


def test_counts_cut_off_at_a_cell(merscope_folder):
    fake = merscope_folder()
    path = fake.path / "cell_by_gene.csv"
    path.write_text(path.read_text().rstrip().rpartition(",")[0])
    with pytest.raises(DataError, match="counts are missing"):
        open_source(fake.path)


def test_counts_of_other_cells(merscope_folder):
    fake = merscope_folder()
    other = fake.counts.set_axis([str(i) for i in range(12)]).rename_axis("cell")
    other.to_csv(fake.path / "cell_by_gene.csv")
    with pytest.raises(DataError, match=r"cell_by_gene\.csv: 0% of the 12 cells"):
        open_source(fake.path)


def test_missing_parts(merscope_folder):
    fake = merscope_folder()
    (fake.path / "cell_metadata.csv").unlink()
    with pytest.raises(DataError, match=r"cell_metadata\.csv: missing"):
        open_source(fake.path, format="merscope")
    for image in (fake.path / "images").glob("*.tif"):
        image.unlink()
    with pytest.raises(DataError, match=r"no image; expected 'mosaic_STAIN_zN\.tif'"):
        open_source(fake.path, format="merscope")


def test_real_folder(shared_data):
    path = shared_data / "merscope"
    assert find_reader(path)[0].name == "merscope"
    with pytest.warns(PhenoseqWarning) as told:
        source = open_source(path)
    messages = [str(warning.message) for warning in told]
    assert any("z3 is used" in m and "z1: Cellbound2, DAPI" in m for m in messages)
    assert any("0.432 um a pixel, but" in m and "0.108" in m for m in messages)
    assert source.channels == ("Cellbound1", "Cellbound2", "Cellbound3", "DNA", "PolyT")
    assert source.pixel_size == pytest.approx(0.432, abs=1e-3)
    assert source.counts.shape == (1058, 49)
    assert source.obs.index.nunique() == 1058
    away = outside(source)
    assert away.sum() == 43
    # Cells stand on nuclei: DNA is brighter at them than at the same places of the mirrored image.
    inside = source.obs[~away]
    x, y = ((inside[f"{a}_centroid"].to_numpy() // source.pixel_size).astype(int) for a in "xy")
    dna = source.fields["z3"].levels[0].read(0, 695, 0, 695)[3].astype(float)
    assert dna[y, x].mean() > dna[::-1][y, x].mean() + 3
    table = pd.read_csv(path / "cell_by_gene.csv", index_col=0, dtype={"cell": str})
    cell = source.obs.index[700]
    np.testing.assert_array_equal(
        source.counts[700].toarray()[0], table.loc[cell, source.var.index].to_numpy()
    )
