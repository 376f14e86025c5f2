"""Readers: every layout that the instrument writes comes out the same, and bad input says so."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tifffile

from phenoseq.data.crops import iter_crops
from phenoseq.data.readers import find_reader, open_source, read_cells, read_xenium
from phenoseq.errors import DataError

FOUR = ("DNA", "Boundary", "18S", "InteriorProtein")

# The fake matrix has one gene without an Ensembl id, as the instrument's has.
pytestmark = pytest.mark.filterwarnings("ignore:.*have no Ensembl id:UserWarning")


def middle(source, pixel_size, crop_px=4):
    """Return the middle of the crop of every cell, in the order of ``obs``."""
    out = {}
    for batch in iter_crops(source, pixel_size, crop_px):
        for row, crop in zip(batch.rows, batch.images, strict=True):
            out[row] = crop[:, 1:3, 1:3]
    return np.array([out[row] for row in range(len(source.obs))])


@pytest.mark.parametrize(
    ("layout", "table", "dtype", "compression"),
    [
        ("one", "csv", "uint16", None),
        ("one", "parquet", "uint8", "jpeg2000"),
        ("stains", "parquet", "uint8", "jpeg2000"),
        ("stains", "csv", "uint16", "deflate"),
        ("set", "parquet", "uint8", None),
        ("set", "csv", "uint16", "jpeg2000"),
    ],
)
def test_every_layout_and_table_reads_the_same(xenium_folder, layout, table, dtype, compression):
    fake = xenium_folder(layout=layout, table=table, dtype=dtype, compression=compression)
    source = open_source(fake.path)

    assert source.kind == "xenium"
    assert source.channels == FOUR[: len(fake.stains)]
    assert source.pixel_size == fake.pixel_size
    assert source.dtype == np.dtype(dtype)
    assert list(source.obs.index) == list(fake.cells.index)
    np.testing.assert_allclose(
        source.obs[["x_centroid", "y_centroid"]], fake.cells[["x_centroid", "y_centroid"]]
    )
    np.testing.assert_array_equal(source.counts.toarray(), fake.counts)
    assert list(source.var["symbol"]) == list(fake.counts)

    (field,) = source.fields.values()
    assert [level.shape for level in field.levels] == [(420, 530), (210, 265), (105, 132)]
    assert [level.pixel_size for level in field.levels] == pytest.approx([0.2125, 0.425, 0.85])
    cells, channels = np.arange(len(fake.cells)), np.arange(len(fake.stains))
    expected = fake.blob(cells[:, None], channels[None, :])[:, :, None, None]
    for pixel_size in (0.2125, 0.425):
        found = middle(source, pixel_size)
        np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


def test_fake_set_is_one_multi_file_ome_tiff(xenium_set):
    """Opening any one file of it yields every stain, as with the instrument's."""
    for image in xenium_set.images:
        with tifffile.TiffFile(image) as tif:
            assert tif.series[0].shape == (4, 420, 530)
            assert tif.pages[0].shape == (420, 530)


def test_region_of_the_file_is_the_region_of_the_image(xenium_set):
    (field,) = read_xenium(xenium_set.path).fields.values()
    for k, level in enumerate(field.levels):
        height, width = level.shape
        whole = level.read(0, height, 0, width)
        with tifffile.TiffFile(xenium_set.images[0]) as tif:
            np.testing.assert_array_equal(whole, tif.series[0].levels[k].asarray())
        part = level.read(17, 91, 50, 101)
        np.testing.assert_array_equal(part, whole[:, 17:91, 50:101])


def test_control_features_are_dropped(xenium_folder, rewrite_matrix):
    fake = xenium_folder(layout="one")
    ids = [f"ENSG{g:011d}" for g in range(fake.counts.shape[1])]
    rewrite_matrix(fake, fake.counts, ids, controls=True)
    with_controls = read_xenium(fake.path)
    rewrite_matrix(fake, fake.counts, ids, controls=False)
    without = read_xenium(fake.path)
    assert (with_controls.counts != without.counts).nnz == 0
    pd.testing.assert_frame_equal(with_controls.var, without.var)


def test_matrix_with_control_features_only(xenium_folder, rewrite_matrix):
    fake = xenium_folder(layout="one")
    rewrite_matrix(fake, fake.counts.iloc[:, :0], [])
    with pytest.raises(DataError, match=r"cell_feature_matrix\.h5.*'Gene Expression'"):
        read_xenium(fake.path)


def test_gene_without_id_goes_by_symbol_with_a_warning(xenium_folder):
    fake = xenium_folder(layout="one")
    with pytest.warns(UserWarning, match=r"1 genes have no Ensembl id .*'NOID'"):
        source = read_xenium(fake.path)
    assert source.var.index[-1] == "NOID"
    assert list(source.var.index[:2]) == ["ENSG00000000000", "ENSG00000000001"]  # no version


def test_no_warning_where_every_gene_has_an_id(xenium_folder, rewrite_matrix):
    fake = xenium_folder(layout="one")
    rewrite_matrix(fake, fake.counts, [f"ENSG{g:011d}" for g in range(12)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_xenium(fake.path)


def test_folder_without_matrix(xenium_folder):
    source = open_source(xenium_folder(layout="one", matrix=False).path)
    assert source.counts is None
    assert source.var is None
    assert len(source.obs) == 48


# ----------------------------------------------------------------------------------- pixel size


def test_pixel_size_from_the_image_alone(xenium_folder):
    fake = xenium_folder(layout="stains", image_pixel_size=0.2125)
    (fake.path / "experiment.xenium").unlink()
    assert open_source(fake.path).pixel_size == 0.2125


@pytest.mark.parametrize("present", [True, False])
def test_pixel_size_absent(xenium_folder, present):
    fake = xenium_folder(layout="one")
    experiment = fake.path / "experiment.xenium"
    experiment.write_text("{}") if present else experiment.unlink()
    with pytest.raises(DataError, match=r"experiment\.xenium.*pixel_size.*--pixel-size"):
        open_source(fake.path)
    assert open_source(fake.path, pixel_size=0.3).pixel_size == 0.3


def test_pixel_size_contradictory(xenium_folder):
    fake = xenium_folder(layout="set", pixel_size=0.2125, image_pixel_size=0.425)
    with pytest.raises(DataError, match=r"experiment\.xenium.*0\.2125.*0\.425.*--pixel-size"):
        open_source(fake.path)
    assert open_source(fake.path, pixel_size=0.425).pixel_size == 0.425


def test_pixel_size_in_nanometres_is_not_taken_for_micrometres(xenium_folder):
    fake = xenium_folder(layout="set")
    for image in fake.images:
        text = image.read_bytes()
        image.write_bytes(
            text.replace(b'PhysicalSizeXUnit="&#181;m"', b'PhysicalSizeXUnit="nm"    ')
        )
    (fake.path / "experiment.xenium").unlink()
    with pytest.raises(DataError, match="pixel_size"):
        open_source(fake.path)


@pytest.mark.parametrize("size", [0.0, -0.2125, 2125.0, float("nan")])
def test_pixel_size_that_cannot_be(xenium_folder, size):
    fake = xenium_folder(layout="one")
    with pytest.raises(DataError, match="cannot be right"):
        open_source(fake.path, pixel_size=size)
    (fake.path / "experiment.xenium").write_text(json.dumps({"pixel_size": size}))
    with pytest.raises(DataError, match=r"experiment\.xenium.*cannot be right"):
        open_source(fake.path)


def test_experiment_file_that_is_not_json(xenium_folder):
    fake = xenium_folder(layout="one")
    (fake.path / "experiment.xenium").write_text('{"pixel_si')
    with pytest.raises(DataError, match=r"experiment\.xenium: not JSON"):
        open_source(fake.path)


# --------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("layout", ["one", "stains", "set"])
@pytest.mark.parametrize("compression", [None, "jpeg2000"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 0.99])
def test_truncated_image_is_refused_when_opened(
    xenium_folder, cut_file, layout, compression, share
):
    fake = xenium_folder(layout=layout, compression=compression, n_cells=8)
    cut_file(fake.images[-1], share)
    with pytest.raises(DataError, match=rf"{fake.images[-1].name}.*(truncated|copy it again)"):
        open_source(fake.path)


@pytest.mark.parametrize("layout", ["one", "set"])
def test_image_cut_off_after_its_full_resolution(xenium_folder, layout):
    """All pixels of the first level are there, and none of the others."""
    fake = xenium_folder(layout=layout, compression="jpeg2000")
    path = fake.images[-1]
    with tifffile.TiffFile(path) as tif:
        end = tif.pages[0].subifds[0]
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(DataError, match=rf"{path.name}.*(truncated|copy it again)"):
        open_source(fake.path)


def test_image_with_broken_ome_xml(xenium_folder):
    fake = xenium_folder(layout="set")
    data = fake.images[0].read_bytes()
    fake.images[0].write_bytes(data.replace(b"</Pixels>", b"<!Pixels>"))
    with pytest.raises(DataError, match=r"_0000\.ome\.tif: its OME-XML is broken"):
        open_source(fake.path)


def test_image_damaged_inside_is_refused_when_read(xenium_folder):
    fake = xenium_folder(layout="one", compression="jpeg2000")
    with tifffile.TiffFile(fake.images[0]) as tif:
        start, n = tif.pages[0].dataoffsets[3], tif.pages[0].databytecounts[3]
    data = bytearray(fake.images[0].read_bytes())
    data[start : start + n] = bytes(n)
    fake.images[0].write_bytes(data)
    source = open_source(fake.path)
    with pytest.raises(DataError, match=r"morphology_focus\.ome\.tif.*cannot be decoded"):
        list(iter_crops(source, 0.2125, 16))


@pytest.mark.parametrize("member", [0, 2])
def test_set_with_a_missing_member(xenium_folder, member):
    fake = xenium_folder(layout="set")
    fake.images[member].unlink()
    with pytest.raises(DataError, match=rf"{fake.images[member].name}: missing.*its set"):
        open_source(fake.path)


def test_missing_image(xenium_folder):
    fake = xenium_folder(layout="one")
    fake.images[0].unlink()
    with pytest.raises(DataError, match=r"no image; expected 'morphology_focus"):
        open_source(fake.path)


@pytest.mark.parametrize("content", [b"", b"not a TIFF at all, but long enough to look at"])
def test_image_that_is_no_tiff(xenium_folder, content):
    fake = xenium_folder(layout="stains")
    fake.images[1].write_bytes(content)
    with pytest.raises(DataError, match=rf"{fake.images[1].name}: not a readable TIFF"):
        open_source(fake.path)


def test_stains_without_names(xenium_folder):
    one = xenium_folder("one", layout="one", names=False)
    assert open_source(one.path).channels == ("DNA",)  # the only image of this layout is of DAPI
    several = xenium_folder("several", layout="stains", names=False)
    with pytest.raises(DataError, match="a stain has no name"):
        open_source(several.path)


def test_stains_that_differ_in_size_or_type(xenium_folder):
    fake = xenium_folder("a", layout="stains")
    other = xenium_folder("b", layout="stains", size=(420, 540))
    fake.images[2].write_bytes(other.images[2].read_bytes())
    with pytest.raises(DataError, match=rf"{fake.images[2].name}.*stains of one field must match"):
        open_source(fake.path)
    other = xenium_folder("c", layout="stains", dtype="uint16")
    fake.images[2].write_bytes(other.images[2].read_bytes())
    with pytest.raises(DataError, match=rf"{fake.images[2].name}.*uint16.*must match"):
        open_source(fake.path)
    other = xenium_folder("d", layout="stains", levels=2)
    fake.images[2].write_bytes(other.images[2].read_bytes())
    with pytest.raises(DataError, match=rf"{fake.images[2].name}: its pyramid differs"):
        open_source(fake.path)


def test_one_stain_twice(xenium_folder):
    fake = xenium_folder(layout="stains")
    fake.images[3].write_bytes(fake.images[0].read_bytes())
    with pytest.raises(DataError, match=r"\['DAPI', 'DAPI'\] all mean the stain 'DNA'"):
        open_source(fake.path)


def test_folder_of_another_layout(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a layout that phenoseq reads"):
        open_source(tmp_path)


# ---------------------------------------------------------------------------------------- cells


@pytest.mark.parametrize("table", ["parquet", "csv"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_truncated_table_of_cells(xenium_folder, cut_file, table, share):
    fake = xenium_folder(layout="one", table=table)
    (path,) = fake.path.glob("cells.*")
    cut_file(path, share)
    with pytest.raises(DataError, match=rf"{path.name}: cannot be read"):
        open_source(fake.path)


def test_damaged_gzip_table_of_cells(xenium_folder):
    fake = xenium_folder(layout="one", table="csv")
    path = fake.path / "cells.csv.gz"
    data = bytearray(path.read_bytes())
    data[100:200] = bytes(byte ^ 0xFF for byte in data[100:200])
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cells\.csv\.gz: cannot be read"):
        open_source(fake.path)


def test_absent_table_of_cells(xenium_folder, tmp_path):
    fake = xenium_folder(layout="one", table="none")
    with pytest.raises(DataError, match="no table of cells; expected one of"):
        open_source(fake.path)
    with pytest.raises(DataError, match=r"cells\.csv: no such file"):
        read_cells(tmp_path / "cells.csv")


@pytest.mark.parametrize("table", ["parquet", "csv"])
def test_cells_without_position(xenium_folder, table):
    fake = xenium_folder(layout="one", table="none")
    cells = fake.cells.copy()
    cells.iloc[5, cells.columns.get_loc("x_centroid")] = np.nan
    cells.iloc[9, cells.columns.get_loc("y_centroid")] = np.inf
    cells = cells.reset_index()
    if table == "parquet":
        cells.to_parquet(fake.path / "cells.parquet")
    else:
        cells.to_csv(fake.path / "cells.csv.gz", index=False)
    with pytest.raises(DataError, match=rf"cells\..*2 cells have no position.*{cells.cell_id[5]}"):
        open_source(fake.path)


def test_cells_with_text_for_a_position(tmp_path):
    (tmp_path / "cells.csv").write_text("cell_id,x_centroid,y_centroid\na,1,2\nb,one,2\n")
    with pytest.raises(DataError, match="1 cells have no position"):
        read_cells(tmp_path / "cells.csv")


def test_cell_ids_that_stand_twice(xenium_folder, rewrite_cells):
    fake = xenium_folder(layout="one")
    cells = fake.cells.rename(index={fake.cells.index[3]: fake.cells.index[4]})
    rewrite_cells(fake, cells)
    with pytest.raises(DataError, match=r"cells\.parquet: 1 cell ids stand there twice"):
        open_source(fake.path)


@pytest.mark.parametrize("table", ["parquet", "csv"])
def test_cells_without_an_id(tmp_path, table):
    frame = pd.DataFrame(
        {"cell_id": ["a", None, "c"], "x_centroid": [1.0, 2, 3], "y_centroid": [1.0, 2, 3]}
    )
    path = tmp_path / f"cells.{table}"
    frame.to_parquet(path) if table == "parquet" else frame.to_csv(path, index=False)
    with pytest.raises(DataError, match="1 cells have no id"):
        read_cells(path)


@pytest.mark.parametrize("table", ["parquet", "csv"])
def test_zero_cells(xenium_folder, table):
    fake = xenium_folder(layout="one", table=table, n_cells=8)
    (path,) = fake.path.glob("cells.*")
    empty = fake.cells.iloc[:0].reset_index()
    empty.to_parquet(path) if table == "parquet" else empty.to_csv(path, index=False)
    with pytest.raises(DataError, match=rf"{path.name}: no cells in it"):
        open_source(fake.path)


def test_table_without_a_column(tmp_path):
    (tmp_path / "cells.csv").write_text("cell_id,x,y\n1,2,3\n")
    with pytest.raises(DataError, match=r"no column \['x_centroid', 'y_centroid'\]"):
        read_cells(tmp_path / "cells.csv")


@pytest.mark.parametrize("table", ["parquet", "csv"])
def test_64_bit_ids_stay_apart(tmp_path, table):
    """Neighbouring 64-bit ids fall together when they pass through a float."""
    ids = np.array([2**62, 2**62 + 1, 2**63 - 1, 2**53 + 1], dtype=np.int64)
    frame = pd.DataFrame({"cell_id": ids, "x_centroid": 1.0, "y_centroid": [1.0, 2, 3, 4]})
    path = tmp_path / f"cells.{table}"
    frame.to_parquet(path) if table == "parquet" else frame.to_csv(path, index=False)
    assert list(read_cells(path).index) == [str(i) for i in ids.tolist()]


def test_ids_keep_their_zeros(tmp_path):
    (tmp_path / "cells.csv").write_text("cell_id,x_centroid,y_centroid\n007,1,2\n7,1,2\n")
    assert list(read_cells(tmp_path / "cells.csv").index) == ["007", "7"]


def test_ids_as_bytes(xenium_folder, rewrite_cells):
    """As early instrument software wrote them."""
    fake = xenium_folder(layout="one")
    rewrite_cells(
        fake, fake.cells.set_axis(fake.cells.index.map(str.encode)).rename_axis("cell_id")
    )
    source = open_source(fake.path)
    assert list(source.obs.index) == list(fake.cells.index)
    np.testing.assert_array_equal(source.counts.toarray(), fake.counts)


# --------------------------------------------------------------------------------------- counts


def test_matrix_of_other_cells(xenium_folder, rewrite_matrix):
    fake = xenium_folder(layout="one")
    ids = [f"ENSG{g:011d}" for g in range(12)]
    rewrite_matrix(fake, fake.counts.set_axis([f"other-{i}" for i in range(48)]), ids)
    with pytest.raises(DataError, match=r"cell_feature_matrix\.h5: 0% of the 48 cells.*one run"):
        open_source(fake.path)


def test_matrix_that_lacks_some_cells_gives_them_no_counts(xenium_folder, rewrite_matrix):
    fake = xenium_folder(layout="one")
    rewrite_matrix(fake, fake.counts.drop(fake.counts.index[[7, 30]]), [f"G{g}" for g in range(12)])
    counts = open_source(fake.path).counts.toarray()
    expected = fake.counts.to_numpy().copy()
    expected[[7, 30]] = 0
    np.testing.assert_array_equal(counts, expected)


def test_matrix_with_a_barcode_twice(xenium_folder, rewrite_matrix):
    fake = xenium_folder(layout="one")
    twice = pd.concat([fake.counts, fake.counts.iloc[:1]])
    rewrite_matrix(fake, twice, [f"ENSG{g:011d}" for g in range(12)])
    with pytest.raises(DataError, match=r"cell_feature_matrix\.h5.*twice"):
        open_source(fake.path)


def test_matrix_with_a_gene_twice(xenium_folder, rewrite_matrix):
    fake = xenium_folder(layout="one")
    rewrite_matrix(fake, fake.counts, [f"ENSG{g // 2:011d}" for g in range(12)])
    with pytest.raises(DataError, match=r"cell_feature_matrix\.h5: genes listed more than once"):
        open_source(fake.path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_truncated_matrix(xenium_folder, cut_file, share):
    fake = xenium_folder(layout="one")
    cut_file(fake.path / "cell_feature_matrix.h5", share)
    with pytest.raises(DataError, match=r"cell_feature_matrix\.h5: not a readable 10x"):
        open_source(fake.path)


# ------------------------------------------------------------------------------------- identity


def test_identity_changes_with_what_it_covers(xenium_folder, rewrite_cells, rewrite_matrix):
    fake = xenium_folder(layout="one")
    ids = [f"ENSG{g:011d}" for g in range(12)]
    rewrite_matrix(fake, fake.counts, ids)
    first = open_source(fake.path).identity
    assert open_source(fake.path).identity == first
    seen = {first, open_source(fake.path, pixel_size=0.25).identity}

    more = fake.counts.copy()
    more.iloc[10, 3] += 1
    # The same numbers in the same columns, but one count moved from a cell to the next.
    moved = fake.counts.copy()
    moved.iloc[20:22] = 0
    other = moved.copy()
    moved.iloc[20, 4], other.iloc[21, 4] = 9, 9
    for counts in (more, moved, other):
        rewrite_matrix(fake, counts, ids)
        seen.add(open_source(fake.path).identity)
    rewrite_matrix(fake, fake.counts, [*ids[:-1], "ENSG00000099999"])
    seen.add(open_source(fake.path).identity)
    (fake.path / "cell_feature_matrix.h5").unlink()
    seen.add(open_source(fake.path).identity)
    rewrite_cells(fake, fake.cells.rename(index={fake.cells.index[0]: "zzz-1"}))
    seen.add(open_source(fake.path).identity)
    cells = fake.cells.copy()
    cells.iloc[0, 0] += 1e-6
    rewrite_cells(fake, cells)
    seen.add(open_source(fake.path).identity)
    assert len(seen) == 9


# ------------------------------------------------------------------------------------ real data


@pytest.mark.long
def test_real_section(shared_data):
    folder = shared_data / "xenium_pancreas"
    if not folder.is_dir():
        pytest.skip("xenium_pancreas absent: no such folder in the real data")
    source = open_source(folder)
    assert source.channels == FOUR
    assert source.pixel_size == 0.2125
    assert source.dtype == np.uint8
    assert source.counts.shape == (113688, 377)
    assert len(source.obs) == 113688
    (field,) = source.fields.values()
    assert field.levels[0].shape == (13770, 34155)
    assert len(field.levels) == 4
    assert not [c for c in source.var["symbol"] if c.startswith(("NegControl", "BLANK"))]
    # DNA stands where the cells are: brighter in the middle of crops than in the whole image.
    some = replace(source, obs=source.obs.iloc[::400])
    centres = np.concatenate([b.images[:, 0, 12:20, 12:20] for b in iter_crops(some, 0.85, 32)])
    coarse = field.levels[-1]
    assert centres.mean() > 1.5 * coarse.read(0, coarse.shape[0], 0, coarse.shape[1])[0].mean()


# ---------------------------------------------------------------------------- choice of the reader


def test_the_reader_is_found_with_its_reason(xenium_folder):
    folder = xenium_folder()
    reader, reason = find_reader(folder.path)
    assert (reader.name, reason) == ("xenium", "it has 'experiment.xenium'")
    (folder.path / "experiment.xenium").unlink()
    assert "cells.parquet" in find_reader(folder.path)[1]
    assert find_reader(folder.path, "xenium")[1] == "as asked for"


def test_an_unknown_format_names_the_nearest(tmp_path):
    with pytest.raises(DataError, match=r"no format 'xenum'.*did you mean 'xenium'"):
        open_source(tmp_path, format="xenum")
