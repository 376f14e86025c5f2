"""CellProfiler folders: stains by name, fields apart, cells where they are, bad input told."""

from __future__ import annotations

import os
import warnings

import numpy as np
import pandas as pd
import pytest
import tifffile

from phenoseq.data.crops import iter_crops
from phenoseq.data.readers import open_source, read_cellprofiler
from phenoseq.data.storewriter import write_store
from phenoseq.errors import DataError, PhenoseqWarning

CANONICAL = ("RNA", "DNA", "Brightfield", "Mito", "ER", "AGP")
TWO_PLATES = (("P1", "B03", 1), ("P1", "B03", 2), ("P2", "B03", 1), ("P2", "C12", 1))


def middle(source, crop_px=4):
    """Return the middle of the crop of every cell, in the order of ``obs``."""
    out = {}
    for batch in iter_crops(source, source.pixel_size, crop_px):
        for row, crop in zip(batch.rows, batch.images, strict=True):
            out[row] = crop[:, 1:3, 1:3]
    return np.array([out[row] for row in range(len(source.obs))])


@pytest.mark.parametrize(
    ("table", "style", "dtype", "compression"),
    [
        ("cells.parquet", "cytotable", "uint16", "lzw"),
        ("cells.csv", "cytotable", "uint8", None),
        ("cells.csv.gz", "prefixed", "uint16", None),
        ("single_cells.parquet", "prefixed", "float32", "deflate"),
    ],
)
def test_every_table_and_pixel_type_reads_the_same(
    cellprofiler_folder, table, style, dtype, compression
):
    fake = cellprofiler_folder(
        table=table, style=style, dtype=dtype, compression=compression, byteorder=">"
    )
    source = open_source(fake.path, pixel_size=0.5)

    assert source.kind == "cellprofiler"
    assert source.channels == CANONICAL
    assert source.pixel_size == 0.5
    assert source.dtype == np.dtype(dtype)
    assert source.dtype.isnative
    assert source.counts is None
    assert list(source.fields) == ["P1_B03_1", "P1_B03_2"]
    assert list(source.obs.index) == [f"P1_B03_{s}_{n}" for s in (1, 2) for n in (3, 5, 7, 9)]
    assert list(source.obs["Metadata_Plate"]) == ["P1"] * 8
    assert list(source.obs["Metadata_Well"]) == ["B03"] * 8
    assert list(source.obs["Metadata_Site"]) == ["1"] * 4 + ["2"] * 4
    np.testing.assert_allclose(
        source.obs[["y_centroid", "x_centroid"]], (fake.pixels + 0.5) * 0.5
    )  # a pixel's number is that of its middle

    found = middle(source)
    expected = [[fake.blob(k, stain) for stain in CANONICAL] for k in range(8)]
    np.testing.assert_array_equal(
        found, np.broadcast_to(np.array(expected)[:, :, None, None], found.shape)
    )


def test_region_of_the_file_is_the_region_of_the_image(cellprofiler_folder):
    fake = cellprofiler_folder()
    level = open_source(fake.path, pixel_size=0.5).fields["P1_B03_2"].levels[0]
    assert level.shape == (90, 120)
    part = level.read(17, 71, 50, 101)
    for c, stain in enumerate(CANONICAL):
        whole = tifffile.imread(fake.images["P1_B03_2", stain])
        np.testing.assert_array_equal(part[c], whole[17:71, 50:101])


def test_plates_with_files_of_one_name_are_told_apart_by_their_folder(cellprofiler_folder):
    fake = cellprofiler_folder(fields=TWO_PLATES)
    assert len({path.name for path in fake.images.values()}) < len(fake.images)
    source = open_source(fake.path, pixel_size=0.5)
    assert list(source.fields) == ["P1_B03_1", "P1_B03_2", "P2_B03_1", "P2_C12_1"]
    for field, image in source.fields.items():
        for plane, stain in zip(image.levels[0].read(0, 90, 0, 120), CANONICAL, strict=True):
            np.testing.assert_array_equal(plane, tifffile.imread(fake.images[field, stain]))


def test_stains_go_by_name_and_not_by_number(cellprofiler_folder):
    """Two plates, whose channels are numbered otherwise."""
    one = cellprofiler_folder("one", fields=(("P1", "B03", 1),))
    back = cellprofiler_folder("back", fields=(("P1", "B03", 1),), stains=CANONICAL[::-1])
    first, second = (open_source(f.path, pixel_size=0.5) for f in (one, back))
    assert second.channels == CANONICAL[::-1]
    field = "P1_B03_1"
    planes = [s.fields[field].levels[0].read(0, 90, 0, 120) for s in (first, second)]
    np.testing.assert_array_equal(planes[0], planes[1][::-1])


def test_aliases_of_stains(cellprofiler_folder):
    fake = cellprofiler_folder()
    fake.rewrite(fake.frame.rename(columns=lambda c: c.replace("OrigDNA", "OrigHoechst")))
    assert open_source(fake.path, pixel_size=0.5).channels == CANONICAL


def test_two_names_of_one_stain(cellprofiler_folder):
    fake = cellprofiler_folder()
    fake.rewrite(fake.frame.rename(columns=lambda c: c.replace("OrigER", "OrigDAPI")))
    with pytest.raises(DataError, match=r"cells\.parquet: .*all mean the stain 'DNA'"):
        open_source(fake.path, pixel_size=0.5)


@pytest.mark.parametrize(
    ("written", "read"), [("a1", "A01"), ("B003", "B03"), ("aa12", "AA12"), ("north", "north")]
)
def test_names_of_wells(cellprofiler_folder, written, read):
    fake = cellprofiler_folder(fields=(("P1", "B03", 1),))
    fake.rewrite(fake.frame.assign(Image_Metadata_Well=written))
    source = open_source(fake.path, pixel_size=0.5)
    assert set(source.obs["Metadata_Well"]) == {read}
    assert source.obs.index[0] == f"P1_{read}_1_3"


@pytest.mark.parametrize("table", ["cells.parquet", "cells.csv"])
def test_64_bit_ids_and_zeros_stay(cellprofiler_folder, table):
    fake = cellprofiler_folder(table=table, fields=(("P1", "B03", 1),))
    ids = np.array([2**62, 2**62 + 1, 2**63 - 1, 2**53 + 1], dtype=np.int64)
    fake.rewrite(
        fake.frame.assign(
            Nuclei_Number_Object_Number=ids, Image_Metadata_Plate="007", Image_Metadata_Site="01"
        )
    )
    source = open_source(fake.path, pixel_size=0.5)
    assert list(source.obs.index) == [f"007_B03_01_{i}" for i in ids.tolist()]


def test_whole_numbers_that_became_floats(cellprofiler_folder):
    fake = cellprofiler_folder(fields=(("P1", "B03", 1),))
    fake.rewrite(fake.frame.assign(Image_Metadata_Site=1.0, Metadata_Dose=[0.1, 2.0, np.nan, 4.0]))
    obs = open_source(fake.path, pixel_size=0.5).obs
    assert obs.index[0] == "P1_B03_1_3"
    assert list(obs["Metadata_Dose"]) == ["0.1", "2", "", "4"]


def test_image_number_stands_for_the_site(cellprofiler_folder):
    fake = cellprofiler_folder()
    fake.rewrite(fake.frame.drop(columns="Image_Metadata_Site"))
    assert list(open_source(fake.path, pixel_size=0.5).fields) == ["P1_B03_1", "P1_B03_2"]
    fake.rewrite(fake.frame.drop(columns=["Image_Metadata_Site", "Metadata_ImageNumber"]))
    with pytest.raises(DataError, match=r"fields of a well apart.*Metadata_ImageNumber"):
        open_source(fake.path, pixel_size=0.5)


def test_there_is_nothing_to_train_on(cellprofiler_folder, tmp_path):
    source = open_source(cellprofiler_folder().path, pixel_size=0.5)
    with pytest.raises(DataError, match="no count matrix"):
        write_store(source, tmp_path / "store.zarr")


# ------------------------------------------------------------------------------------ pixel size


def test_pixel_size_must_be_given(cellprofiler_folder):
    fake = cellprofiler_folder(resolution=(1550.0, 1550.0), resolutionunit="CENTIMETER")
    with pytest.raises(DataError, match=r"cells\.parquet: .*states a pixel size.*--pixel-size"):
        open_source(fake.path)  # the resolution of a TIFF is that of the camera, or made up


def test_pixel_size_of_the_table_and_of_the_images(cellprofiler_folder):
    ome = {"ome": True, "metadata": {"PhysicalSizeX": 0.65, "PhysicalSizeXUnit": "µm"}}
    fake = cellprofiler_folder(**ome)
    assert open_source(fake.path).pixel_size == 0.65
    assert open_source(fake.path, pixel_size=0.5).pixel_size == 0.5
    fake.rewrite(fake.frame.assign(Image_Metadata_ImageResolutionX=0.598e-6))
    with pytest.raises(DataError, match=r"pixel sizes of \[0\.598, 0\.65\]"):
        open_source(fake.path)
    plain = cellprofiler_folder("plain")
    plain.rewrite(plain.frame.assign(Image_Metadata_ImageResolutionX=0.598e-6))
    assert open_source(plain.path).pixel_size == pytest.approx(0.598)


@pytest.mark.parametrize("size", [0.0, -0.5, 598.0, float("nan")])
def test_pixel_size_that_cannot_be(cellprofiler_folder, size):
    with pytest.raises(DataError, match="cannot be right"):
        open_source(cellprofiler_folder().path, pixel_size=size)


# ---------------------------------------------------------------------------------------- images


FIVE = tuple(("P1", "B03", k) for k in range(1, 6))


def test_missing_image_leaves_out_its_field_and_says_so(cellprofiler_folder):
    fake = cellprofiler_folder(fields=FIVE)
    fake.images["P1_B03_1", "ER"].unlink()
    with pytest.warns(
        PhenoseqWarning, match=r"1 of 5 fields cannot be used.*\n.*P1_B03_1.*ch5\.tiff"
    ):
        source = open_source(fake.path, pixel_size=0.5)
    assert list(source.fields) == [f"P1_B03_{k}" for k in (2, 3, 4, 5)]
    assert set(source.obs["field"]) == set(source.fields)
    assert source.channels == CANONICAL
    (problem,) = source.problems
    assert problem.where == "P1_B03_1"
    assert "ch5.tiff" in problem.reason


def test_whole_plate_raises_no_warning(cellprofiler_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not open_source(cellprofiler_folder().path, pixel_size=0.5).problems


def test_stain_without_images_is_left_out(cellprofiler_folder):
    """The table names it, but nobody downloaded it."""
    fake = cellprofiler_folder(fields=(("P1", "B03", 1), ("P1", "B03", 2), ("P1", "B03", 3)))
    fake.images["P1_B03_1", "Brightfield"].unlink()
    fake.images["P1_B03_3", "Brightfield"].unlink()
    with pytest.warns(PhenoseqWarning, match=r"stains \{'Brightfield': 'B03f01p01-ch3"):
        source = open_source(fake.path, pixel_size=0.5)
    assert source.channels == ("RNA", "DNA", "Mito", "ER", "AGP")
    assert len(source.fields) == 3


def test_no_image_at_all(cellprofiler_folder):
    fake = cellprofiler_folder()
    for path in fake.images.values():
        path.unlink()
    with pytest.raises(DataError, match=r"not below it, e\.g\. 'B03f01p01-ch1\.tiff'"):
        open_source(fake.path, pixel_size=0.5)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_truncated_image(cellprofiler_folder, cut_file, share):
    one = cellprofiler_folder("one", fields=(("P1", "B03", 1),))
    cut_file(one.images["P1_B03_1", "Mito"], share)
    with pytest.raises(DataError, match=r"ch4\.tiff: .*copy it again"):
        open_source(one.path, pixel_size=0.5)
    several = cellprofiler_folder("several", fields=FIVE)
    cut_file(several.images["P1_B03_2", "Mito"], share)
    with pytest.warns(PhenoseqWarning, match=r"f02p01-ch4\.tiff: .*copy it again"):
        source = open_source(several.path, pixel_size=0.5)
    assert [p.where for p in source.problems] == ["P1_B03_2"]


def test_image_damaged_inside(cellprofiler_folder):
    fake = cellprofiler_folder(fields=FIVE, compression="deflate")
    path = fake.images["P1_B03_1", "DNA"]
    with tifffile.TiffFile(path) as tif:
        start, n = tif.pages[0].dataoffsets[1], tif.pages[0].databytecounts[1]
    data = bytearray(path.read_bytes())
    data[start : start + n] = bytes(n)
    path.write_bytes(data)
    with pytest.warns(PhenoseqWarning, match=rf"{path.name}: its pixels cannot be decoded"):
        source = open_source(fake.path, pixel_size=0.5)
    assert [(p.where, p.cells) for p in source.problems] == [("P1_B03_1", 4)]


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((90, 121), "uint16"), r"\(90, 121\) uint16 differs from .*must match"),
        (np.zeros((90, 120), "uint8"), r"\(90, 120\) uint8 differs from .*must match"),
        (np.zeros((90, 120, 3), "uint16"), r"YXS \(90, 120, 3\), where one plane"),
        (np.zeros((2, 90, 120), "uint16"), r"QYX \(2, 90, 120\), where one plane"),
    ],
)
def test_image_of_another_kind(cellprofiler_folder, pixels, message):
    fake = cellprofiler_folder(fields=(("P1", "B03", 1),))
    colour = {"photometric": "rgb"} if pixels.shape[-1] == 3 else {"photometric": "minisblack"}
    tifffile.imwrite(fake.images["P1_B03_1", "ER"], pixels, **colour)
    with pytest.raises(DataError, match=message):
        open_source(fake.path, pixel_size=0.5)


def test_field_of_another_pixel_type(cellprofiler_folder):
    fake = cellprofiler_folder(fields=FIVE)
    for (field, _), path in fake.images.items():
        if field == "P1_B03_2":
            tifffile.imwrite(path, tifffile.imread(path).astype(np.uint8))
    with pytest.warns(PhenoseqWarning, match=r"P1_B03_2: pixels are uint8, those of other"):
        assert len(open_source(fake.path, pixel_size=0.5).fields) == 4


def test_file_of_an_ambiguous_name(cellprofiler_folder):
    fake = cellprofiler_folder()
    path = fake.images["P1_B03_1", "DNA"]
    other = fake.path / "backup" / path.parent.name / path.name
    other.parent.mkdir(parents=True)
    other.write_bytes(path.read_bytes())
    assert len(open_source(fake.path, pixel_size=0.5).fields) == 2  # the plate's folder tells
    elsewhere = [c for c in fake.frame if c.startswith("Image_PathName")]
    fake.rewrite(fake.frame.assign(**dict.fromkeys(elsewhere, "/elsewhere")))
    with pytest.raises(DataError, match=rf"backup.*{path.name} and .*{path.name}: two files"):
        open_source(fake.path, pixel_size=0.5)
    fake.rewrite(fake.frame.drop(columns=elsewhere))
    with pytest.raises(DataError, match="two files of one name"):
        open_source(fake.path, pixel_size=0.5)


def test_image_of_another_plate_is_not_taken(cellprofiler_folder):
    """The other plate's images bear the same names, and were not copied."""
    fake = cellprofiler_folder(fields=TWO_PLATES)
    for (field, _), path in fake.images.items():
        if field.startswith("P2"):
            path.unlink()
    with pytest.raises(DataError, match=r"of field P2_B03_1, but also of RNA of field P1_B03_1"):
        open_source(fake.path, pixel_size=0.5)


def test_names_with_folders_in_them(cellprofiler_folder):
    fake = cellprofiler_folder()
    column = "Image_FileName_OrigDNA"
    fake.rewrite(fake.frame.assign(**{column: "..\\..\\x/" + fake.frame[column]}))
    assert open_source(fake.path, pixel_size=0.5).channels == CANONICAL


def test_links_out_of_the_folder_are_not_followed(cellprofiler_folder, tmp_path):
    fake = cellprofiler_folder(fields=(("P1", "B03", 1),))
    outside = tmp_path / "outside"
    (fake.path / "images").rename(outside)
    os.symlink(outside, fake.path / "images")
    with pytest.raises(DataError, match="links out of the folder are not followed"):
        open_source(fake.path, pixel_size=0.5)
    (fake.path / "images").unlink()
    (fake.path / "images").mkdir()
    for path in outside.rglob("*.tiff"):
        os.symlink(path, fake.path / "images" / path.name)
    with pytest.raises(DataError, match="links out of the folder are not followed"):
        open_source(fake.path, pixel_size=0.5)


def test_links_within_the_folder_do_no_harm(cellprofiler_folder, tmp_path):
    fake = cellprofiler_folder()
    os.symlink(fake.path, fake.path / "images" / "loop")
    path = fake.images["P1_B03_1", "DNA"]
    os.symlink(path, fake.path / path.name)
    assert len(open_source(fake.path, pixel_size=0.5).fields) == 2
    os.symlink(fake.path, tmp_path / "link")
    assert len(open_source(tmp_path / "link", pixel_size=0.5).fields) == 2


# --------------------------------------------------------------------------------------- the table


def test_two_tables(cellprofiler_folder):
    fake = cellprofiler_folder()
    fake.frame.to_csv(fake.path / "copy.csv", index=False)
    with pytest.raises(DataError, match=r"\['cells\.parquet', 'copy\.csv'\].*keep one"):
        open_source(fake.path, pixel_size=0.5)


def test_other_tables_are_no_matter(cellprofiler_folder):
    fake = cellprofiler_folder()
    pd.DataFrame({"well": ["B03"], "compound": ["DMSO"]}).to_csv(fake.path / "platemap.csv")
    (fake.path / "notes.csv").write_text("")
    assert len(open_source(fake.path, pixel_size=0.5).fields) == 2


def test_folder_without_a_table_names_both_layouts(tmp_path):
    pd.DataFrame({"well": ["B03"]}).to_csv(tmp_path / "platemap.csv")
    with pytest.raises(DataError, match=r"(?s)morphology_focus.*CellProfiler.*Image_FileName_Orig"):
        open_source(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_truncated_table(cellprofiler_folder, cut_file, share):
    fake = cellprofiler_folder()
    cut_file(fake.table, share)
    with pytest.raises(DataError, match=r"cells\.parquet: cannot be read"):
        open_source(fake.path, pixel_size=0.5)


def test_csv_cut_off_in_a_row(cellprofiler_folder):
    fake = cellprofiler_folder(table="cells.csv")
    text = fake.table.read_text()
    fake.table.write_text(text[: text.rindex(",P1,") + 8])
    with pytest.raises(DataError, match=r"cells\.csv: 1 cells have no Site"):
        open_source(fake.path, pixel_size=0.5)


def test_zero_cells(cellprofiler_folder):
    fake = cellprofiler_folder()
    fake.rewrite(fake.frame.iloc[:0])
    with pytest.raises(DataError, match=r"cells\.parquet: no cells in it"):
        open_source(fake.path, pixel_size=0.5)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("Nuclei_Location_Center_X", "1 cells have no position"),
        ("Image_Metadata_Well", "1 cells have no Well in 'Image_Metadata_Well'"),
        ("Nuclei_Number_Object_Number", "1 cells have no object in 'Nuclei_Number_Object_Number'"),
    ],
)
@pytest.mark.parametrize("table", ["cells.parquet", "cells.csv"])
def test_cell_that_lacks_something(cellprofiler_folder, table, column, message):
    fake = cellprofiler_folder(table=table)
    frame = fake.frame.copy()
    frame[column] = [None, *frame[column].iloc[1:]]
    fake.rewrite(frame)
    with pytest.raises(DataError, match=rf"{table}: {message}"):
        open_source(fake.path, pixel_size=0.5)


def test_table_without_numbers_or_centres(cellprofiler_folder):
    fake = cellprofiler_folder()
    fake.rewrite(fake.frame.drop(columns="Nuclei_Number_Object_Number"))
    with pytest.raises(DataError, match=r"no column for the number of the object"):
        open_source(fake.path, pixel_size=0.5)
    fake.rewrite(fake.frame.drop(columns=[c for c in fake.frame if c.endswith("Center_X")]))
    with pytest.raises(DataError, match=r"no column for the centre.*Nuclei_Location_Center_X"):
        open_source(fake.path, pixel_size=0.5)


def test_objects_that_stand_twice(cellprofiler_folder):
    fake = cellprofiler_folder()
    fake.rewrite(pd.concat([fake.frame, fake.frame.iloc[[2]]], ignore_index=True))
    with pytest.raises(DataError, match=r"1 cell ids stand there twice, e\.g\. \['P1_B03_1_7'\]"):
        open_source(fake.path, pixel_size=0.5)


def test_fields_that_the_columns_do_not_tell_apart(cellprofiler_folder):
    """Two plates in one table whose column of plates is missing."""
    fake = cellprofiler_folder(fields=TWO_PLATES)
    fake.rewrite(fake.frame.drop(columns="Image_Metadata_Plate"))
    with pytest.raises(DataError, match=r"field 'B03_1' name different images"):
        open_source(fake.path, pixel_size=0.5)


def test_identity_changes_with_cells_positions_and_pixel_size(cellprofiler_folder):
    fake = cellprofiler_folder()
    seen = {open_source(fake.path, pixel_size=0.5).identity for _ in range(2)}
    seen.add(open_source(fake.path, pixel_size=0.6).identity)
    moved = fake.frame.copy()
    moved.loc[0, "Nuclei_Location_Center_Y"] += 1e-3
    for frame in (moved, fake.frame.iloc[1:]):
        fake.rewrite(frame)
        seen.add(open_source(fake.path, pixel_size=0.5).identity)
    assert len(seen) == 4


# -------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(
    ("name", "channels", "pixel_size", "cells"),
    [
        (
            "pediatric",
            ("AGP", "Brightfield", "DNA", "ER", "Mito", "RNA"),
            0.598,
            [f"BR00143976_C03_3_{n}" for n in (3, 4, 6, 7, 8)],
        ),
        ("jump", ("AGP", "DNA", "RNA"), None, [f"BR00117006_A01_1_{n}" for n in (1, 2, 3, 4, 5)]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*stains .*'HighZBF'.* are left out")
def test_real_field(shared_data, name, channels, pixel_size, cells):
    source = read_cellprofiler(shared_data / "cell_painting" / name, pixel_size=pixel_size)
    assert source.channels == channels
    assert source.pixel_size == pytest.approx(0.598, abs=1e-4)
    assert source.dtype == np.uint16
    assert list(source.obs.index) == cells
    assert set(source.obs["Metadata_Well"]) == {"C03" if name == "pediatric" else "A01"}
    ((_, image),) = source.fields.items()
    assert image.levels[0].shape == (1080, 1080)
    whole = image.levels[0].read(0, 1080, 0, 1080)
    dna = channels.index("DNA")
    at = {b: [] for b in (4, 64)}
    for side in at:
        for batch in iter_crops(source, source.pixel_size, side):
            at[side] += list(np.median(batch.images[:, dna], axis=(1, 2)))
    assert (np.array(at[4]) > 5 * np.median(whole[dna])).all()  # nuclei are where the table says
    assert np.mean(at[4]) > 2 * np.mean(at[64])
    cut = [batch.cut for batch in iter_crops(source, source.pixel_size, 224)]
    assert np.concatenate(cut).all()  # all five lie near the upper border


def test_real_stains_are_those_that_the_table_says(shared_data):
    """Numbers of channels differ between these plates, and the table tells them apart."""
    folder = shared_data / "cell_painting" / "pediatric"
    source = read_cellprofiler(folder, pixel_size=0.598)
    numbers = {"AGP": 3, "Brightfield": 1, "DNA": 5, "ER": 2, "Mito": 4, "RNA": 6}
    ((_, image),) = source.fields.items()
    for plane, stain in zip(image.levels[0].read(0, 300, 0, 200), source.channels, strict=True):
        file = folder / "images" / "orig" / f"r03c03f03p01-ch{numbers[stain]}sk1fk1fl1.tiff"
        np.testing.assert_array_equal(plane, tifffile.imread(file)[:300, :200])
