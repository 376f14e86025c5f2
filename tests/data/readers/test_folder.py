"""Plain folders: stains by name, cells from a table, masks or nuclei, and trouble in one field."""

from __future__ import annotations

import os
import unicodedata
import warnings

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import tifffile

from phenoseq.data.readers import find_reader, open_source
from phenoseq.errors import DataError, PhenoseqWarning

CELLS = "cell_id,field,x_centroid,y_centroid\n"


def write_cells(folder, fields, per_field=2):
    rows = [f"{f}:{k},{f},{5 + k},10\n" for f in fields for k in range(per_field)]
    (folder / "cells.csv").write_text(CELLS + "".join(rows), encoding="utf-8")


def values(source):
    """Return the first pixel of every channel of every field."""
    return {name: list(f.levels[0].read(0, 1, 0, 1)[:, 0, 0]) for name, f in source.fields.items()}


def quietly(folder, **options):
    """Open a folder that there is nothing to tell about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PhenoseqWarning)
        return open_source(folder, **{"pixel_size": 0.5, **options})


# -------------------------------------------------------------------------------------- images


def test_stains_by_name(image_folder):
    names = {"A01_DAPI.tif": 1, "A01_ConA.tif": 2, "A02_ER.tif": 4, "A02_Hoechst.tif": 3}
    folder = image_folder(names)
    write_cells(folder, ["A01", "A02"])
    reader, reason = find_reader(folder)
    assert (reader.name, reason) == ("folder", "it has images such as 'A01_ConA.tif'")
    source = quietly(folder)
    assert source.channels == ("DNA", "ER")
    assert values(source) == {"A01": [1, 2], "A02": [3, 4]}
    assert source.pixel_size == 0.5
    assert source.counts is None
    assert list(source.obs["Metadata_Well"]) == ["A01", "A01", "A02", "A02"]
    (level,) = source.fields["A01"].levels
    assert level.shape == (40, 50)


def test_numbers_need_a_map(image_folder):
    names = {f"r01c0{c}f01p01-ch{k}sk1fk1fl1.tiff": 10 * c + k for c in (1, 2) for k in (1, 2, 10)}
    folder = image_folder(names)
    write_cells(folder, ["r01c01f01", "r01c02f01"])
    with pytest.raises(
        DataError, match=r"only: 1, 2, 10 \(such as r01.*\nchannel,stain\n1,DNA\n2,ER"
    ):
        open_source(folder, pixel_size=0.5)
    (folder / "channels.csv").write_text("channel,stain\n1,ER\n2,Hoechst\n")
    with pytest.raises(DataError, match="numbers only: 10 "):
        open_source(folder, pixel_size=0.5)
    (folder / "channels.csv").write_text("channel,stain\n1,ER\n2,Hoechst\n10,\n")
    source = quietly(folder)
    assert source.channels == ("DNA", "ER")
    assert values(source) == {"r01c01f01": [12, 11], "r01c02f01": [22, 21]}
    assert list(source.obs["Metadata_Well"].unique()) == ["A01", "A02"]
    assert set(source.obs["Metadata_Site"]) == {"1"}


def test_imagexpress_names_and_thumbnails(image_folder):
    guid = "2A3B4C5D-1234-4321-ABCD-0123456789AB"
    names = {f"P1_c04_s2_w{w}{guid}.TIF": w for w in (1, 2)}
    folder = image_folder({**names, f"P1_c04_s2_w1_thumb{guid}.tif": 9})
    (folder / "channels.json").write_text('{"1": "DAPI", "2": "Mito"}')
    write_cells(folder, ["P1_c04_s2"])
    source = quietly(folder)
    assert values(source) == {"P1_c04_s2": [1, 2]}
    told = ["Metadata_Plate", "Metadata_Well", "Metadata_Site"]
    assert list(source.obs[told].iloc[0]) == ["P1", "C04", "2"]


def test_multichannel_ome_tiff_in_any_order(tmp_path):
    for name, stains in (("a", ["ER", "DAPI", "CD8"]), ("b", ["CD8", "ER", "DAPI"])):
        image = np.stack([np.full((40, 50), len(s), np.uint16) for s in stains])
        metadata = {"axes": "CYX", "Channel": {"Name": stains}, "PhysicalSizeX": 0.3}
        tifffile.imwrite(tmp_path / f"{name}.ome.tif", image, metadata=metadata)
    write_cells(tmp_path, ["a", "b"])
    source = quietly(tmp_path, pixel_size=None)
    assert source.channels == ("DNA", "ER", "CD8")
    assert values(source) == {"a": [4, 2, 3], "b": [4, 2, 3]}
    assert source.pixel_size == 0.3
    assert quietly(tmp_path, pixel_size=0.6).pixel_size == 0.6


def test_pixel_size_absent_contradictory_or_impossible(image_folder, tmp_path):
    folder = image_folder({"A01_DAPI.tif": 1})
    write_cells(folder, ["A01"])
    with pytest.raises(DataError, match="--pixel-size"):
        open_source(folder)
    with pytest.raises(DataError, match="cannot be right"):
        open_source(folder, pixel_size=-1.0)
    for k in (1, 2):
        metadata = {"axes": "YX", "Channel": {"Name": "DAPI"}, "PhysicalSizeX": 0.2 * k}
        tifffile.imwrite(tmp_path / f"{k}.ome.tif", np.ones((9, 9), np.uint16), metadata=metadata)
    write_cells(tmp_path, ["1", "2"])
    folder.rename(tmp_path / "masks")
    with pytest.raises(DataError, match=r"2 says 0\.4 um a pixel, 1 says 0\.2.*--pixel-size"):
        open_source(tmp_path)


def test_two_images_of_one_stain(image_folder):
    folder = image_folder({"A01_DAPI.tif": 1, "A01_Hoechst.tif": 1})
    with pytest.raises(DataError, match=r"A01_Hoechst\.tif: a second image of 'DNA'.*A01_DAPI"):
        open_source(folder, pixel_size=0.5)


def test_planes_of_one_field_are_not_chosen_silently(image_folder):
    folder = image_folder({f"r01c01f01p0{p}-ch1sk1fk1fl1.tiff": 1 for p in (1, 2)})
    (folder / "channels.csv").write_text("channel,stain\n1,DNA\n")
    with pytest.raises(DataError, match=r"p02-ch1.*a second image.*keep one plane and one time"):
        open_source(folder, pixel_size=0.5)


def test_names_that_say_nothing(image_folder):
    with pytest.raises(DataError, match=r"a stain has no name.*'field_foo\.tif' is no stain"):
        open_source(image_folder({"field_foo.tif": 1}), pixel_size=0.5)


# --------------------------------------------------------------------------------------- cells


def test_table_in_micrometres_keeps_its_columns(image_folder):
    folder = image_folder({"A01_DAPI.tif": 1})
    text = "cell_id,field,x_centroid,y_centroid,Metadata_Well,age\n007,A01,1.5,2.5,Z9,3\n"
    (folder / "cells.csv").write_text(text)
    obs = quietly(folder).obs
    assert list(obs.index) == ["007"]
    assert obs.iloc[0].to_dict() == {
        "field": "A01", "x_centroid": 1.5, "y_centroid": 2.5, "Metadata_Well": "Z9", "age": 3,
    }  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_table_in_pixels(image_folder, suffix):
    """The middle of the first pixel is 0, 0; micrometres count from its corner."""
    folder = image_folder({"001_DAPI.tif": 1})
    table = pd.DataFrame({"cell_id": [1, 2], "field": "001", "x": [0, 10], "y": [4, 7.5]})
    path = folder / f"cells.{suffix}"
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    obs = quietly(folder).obs
    np.testing.assert_allclose(obs[["x_centroid", "y_centroid"]], [[0.25, 2.25], [5.25, 4]])


def test_table_without_field(image_folder):
    folder = image_folder({"A01_DAPI.tif": 1})
    (folder / "cells.csv").write_text("cell_id,x,y\n1,2,3\n")
    assert list(quietly(folder).obs["field"]) == ["A01"]
    folder = image_folder({"A01_DAPI.tif": 1, "A02_DAPI.tif": 1}, "two")
    (folder / "cells.csv").write_text("cell_id,x,y\n1,2,3\n")
    with pytest.raises(DataError, match="no column 'field'"):
        open_source(folder, pixel_size=0.5)


def test_table_of_other_images(image_folder):
    folder = image_folder({"A01_DAPI.tif": 1})
    write_cells(folder, ["B01", "../../secret"])
    with pytest.raises(DataError, match=r"names \['B01', '\.\./\.\./secret'\].*\['A01'\]"):
        open_source(folder, pixel_size=0.5)


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_masks(image_folder, suffix):
    folder = image_folder({"A01_DAPI.tif": 1, "x/B02_DAPI.tif": 1})
    labels = np.zeros((40, 50), dtype=np.uint16)
    labels[10:13, 20:25] = 7
    labels[30, 40] = 300
    for field in ("A01", "x/B02"):
        path = folder / "masks" / f"{field}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == "png":
            path.write_bytes(imagecodecs.png_encode(labels))
        else:
            tifffile.imwrite(path, labels)
        labels = np.where(labels == 300, 0, labels)
    source = quietly(folder)
    assert list(source.obs.index) == ["A01-7", "A01-300", "x/B02-7"]
    np.testing.assert_allclose(
        source.obs[["x_centroid", "y_centroid"]], [[11.25, 5.75], [20.25, 15.25], [11.25, 5.75]]
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((40, 51), np.uint8), r"\(40, 51\), but the images of its field are \(40, 50\)"),
        (np.zeros((40, 50), np.float32), "is no mask"),
        (np.zeros((40, 50, 3), np.uint8), "is no mask"),
        (None, "not a readable image"),
    ],
)
def test_masks_that_are_none(image_folder, mask, message):
    folder = image_folder({"A01_DAPI.tif": 1})
    (folder / "masks").mkdir()
    path = folder / "masks" / "A01.tif"
    path.write_bytes(b"no TIFF") if mask is None else tifffile.imwrite(path, mask)
    with pytest.raises(DataError, match=rf"A01\.tif: .*{message}"):
        open_source(folder, pixel_size=0.5)


def test_fields_without_a_mask_are_left_out(image_folder):
    folder = image_folder({f"A0{k}_DAPI.tif": 1 for k in range(1, 7)})
    (folder / "masks").mkdir()
    labels = np.ones((40, 50), np.uint8)
    for k in range(1, 6):
        tifffile.imwrite(folder / "masks" / f"A0{k}.tif", labels)
    with pytest.warns(PhenoseqWarning, match=r"1 of 6 fields.*\n  A06: .*no mask of this field"):
        source = open_source(folder, pixel_size=0.5)
    assert len(source.obs) == len(source.fields) == 5


def test_nuclei_are_found_and_their_number_is_told(plate):
    with pytest.warns(PhenoseqWarning, match=r"6 nuclei were found in 3 fields \(1 to 3 a field"):
        source = open_source(plate(3), pixel_size=1.0)
    assert list(source.obs.index) == ["A01-1", "A02-1", "A02-2", "A03-1", "A03-2", "A03-3"]
    last = source.obs.iloc[-1]
    assert (last["x_centroid"], last["y_centroid"]) == pytest.approx((80.5, 30.5), abs=0.5)


def test_no_nuclei_and_no_dna(image_folder):
    with pytest.raises(DataError, match=r"no nuclei found in 1 fields at 0\.5 um"):
        open_source(image_folder({"A01_DAPI.tif": 1}), pixel_size=0.5)
    with pytest.raises(DataError, match="no stain DNA to find nuclei in"):
        open_source(image_folder({"A01_ER.tif": 1}, "er"), pixel_size=0.5)


# ------------------------------------------------------------------------------------- trouble


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("damage", ["cut", "empty", "inside", "gone"])
def test_one_bad_image_among_many_is_left_out_and_told(plate, cut_file, compression, damage):
    folder = plate(6, compression=compression)
    write_cells(folder, [f"A0{k}" for k in range(1, 7)])
    bad = folder / "A03_ER.tif"
    if damage == "inside":
        with tifffile.TiffFile(bad) as tif:
            at = tif.pages[0].dataoffsets[0]
        data = bytearray(bad.read_bytes())
        data[at : at + 20] = bytes(20)
        bad.write_bytes(data)
        if compression is None:
            assert len(open_source(folder, pixel_size=0.5).fields) == 6  # plain numbers are numbers
            return
    elif damage == "gone":
        bad.unlink()
    else:
        cut_file(bad, 0.6 if damage == "cut" else 0)
    with pytest.warns(PhenoseqWarning, match=r"1 of 6 fields .*with 2 cells.*\n  A03: "):
        source = open_source(folder, pixel_size=0.5)
    assert sorted(source.fields) == ["A01", "A02", "A04", "A05", "A06"]
    assert len(source.obs) == 10
    (problem,) = source.problems
    assert (problem.where, problem.cells) == ("A03", 2)
    assert (
        "no image of ['ER']" in problem.reason if damage == "gone" else bad.name in problem.reason
    )


def test_too_many_bad_images_stop_it(plate):
    folder = plate(6)
    write_cells(folder, [f"A0{k}" for k in range(1, 7)])
    for k in (2, 5):
        (folder / f"A0{k}_ER.tif").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 6 fields cannot be used, more than 20%.*\n  A02.*"):
        open_source(folder, pixel_size=0.5)


def test_cells_of_an_absent_image_are_left_out(plate):
    folder = plate(5)
    write_cells(folder, [f"A0{k}" for k in range(1, 7)])
    with pytest.warns(PhenoseqWarning, match=r"A06: no image of it, but cells\.csv has its cells"):
        source = open_source(folder, pixel_size=0.5)
    assert len(source.obs) == 10
    assert [(p.where, p.cells) for p in source.problems] == [("A06", 2)]


def test_field_of_another_pixel_type(plate):
    folder = plate(6)
    write_cells(folder, [f"A0{k}" for k in range(1, 7)])
    for stain in ("DAPI", "ER"):
        tifffile.imwrite(folder / f"A02_{stain}.tif", np.ones((60, 200), np.uint8))
    with pytest.warns(PhenoseqWarning, match="A02: pixels are uint8, those of other fields uint16"):
        assert "A02" not in open_source(folder, pixel_size=0.5).fields


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_spaces_and_accents(image_folder, form):
    """Some file systems write an accent as a character of its own."""
    name = unicodedata.normalize(form, "Übung é 1")
    folder = image_folder({f"{name}_DAPI.tif": 5}, "ein Ordner mit ñ")
    write_cells(folder, ["Übung é 1"])
    assert values(quietly(folder)) == {"Übung é 1": [5]}


def test_links_that_run_in_circles(image_folder):
    folder = image_folder({"a/A01_DAPI.tif": 5})
    (folder / "a" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "a" / "self").symlink_to(folder / "a" / "self")
    (folder / "a" / "A02_DAPI.tif").symlink_to(folder / "a" / "A02_DAPI.tif")
    for k in range(3, 8):
        os.link(folder / "a" / "A01_DAPI.tif", folder / "a" / f"A0{k}_DAPI.tif")
    write_cells(folder, ["a/A01"])
    with pytest.warns(PhenoseqWarning, match=r"1 of 7 fields.*\n  a/A02: .*A02_DAPI\.tif"):
        source = open_source(folder, pixel_size=0.5)
    assert values(source) == {"a/A01": [5]}


def test_linked_folder_is_read(image_folder, tmp_path):
    image_folder({"A01_DAPI.tif": 5}, "elsewhere")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "p").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    write_cells(tmp_path / "images", ["p/A01"])
    assert values(quietly(tmp_path / "images")) == {"p/A01": [5]}


def test_many_fields_keep_no_file_open(plate):
    folder = plate(4)
    write_cells(folder, [f"A0{k}" for k in range(1, 5)])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    source = open_source(folder, pixel_size=0.5)
    values(source)
    if before is None:
        pytest.skip("this system does not list open files")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_real_plate(shared_data, tmp_path):
    folder = tmp_path / "pediatric"
    folder.mkdir()
    for path in (shared_data / "cell_painting" / "pediatric" / "images" / "orig").iterdir():
        (folder / path.name).symlink_to(path)
    with pytest.raises(DataError, match="numbers only: 1, 2, 3, 4, 5, 6"):
        open_source(folder, pixel_size=0.598)
    (folder / "channels.csv").write_text("channel,stain\n1,\n2,ER\n3,AGP\n4,Mito\n5,DNA\n6,RNA\n")
    with pytest.warns(PhenoseqWarning, match="39 nuclei were found in 1 fields"):
        source = open_source(folder, pixel_size=0.598)
    assert source.channels == ("DNA", "ER", "RNA", "AGP", "Mito")
    assert set(source.obs["Metadata_Well"]) == {"C03"}
