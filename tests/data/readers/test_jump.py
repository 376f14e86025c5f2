"""Cell Painting Gallery: lists of images, illumination, and tables of nuclei of every kind."""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from phenoseq.data.crops import iter_crops
from phenoseq.data.readers import find_reader, open_source
from phenoseq.errors import DataError, PhenoseqWarning

FIELDS = (("a1", "1"), ("a1", "2"), ("B03", "1"), ("B03", "2"), ("b4", "1"))
STAINS = ("DNA", "ER")
NAMES = [f"BR01-{field}" for field in ("A01-s1", "A01-s2", "B03-s1", "B03-s2", "B04-s1")]


@dataclass
class Gallery:
    path: Path
    pixels: np.ndarray  # (field, stain, y, x)
    centres: np.ndarray  # (field, cell, 2) y and x in pixels from the corner of the image
    images: pd.DataFrame

    @property
    def list(self) -> Path:
        return self.path / "load_data.csv"

    def rewrite(self, **columns) -> None:
        self.images.assign(**columns).to_csv(self.list, index=False)

    def file(self, field: int, stain: str) -> Path:
        return self.path / "images" / self.images[f"FileName_Orig{stain}"][field]


def write_nuclei(folder: Path, centres: np.ndarray, kind: str) -> None:
    """Write positions as ``kind``: their origin is the centre of the first pixel."""
    field, cell = (axis.ravel() for axis in np.indices(centres.shape[:2]))
    y, x = centres.reshape(-1, 2).T - 0.5
    wells, sites = (np.array([f[k] for f in FIELDS]) for k in (0, 1))
    images = pd.DataFrame(
        {
            "ImageNumber": np.arange(len(FIELDS)) + 1,
            "Metadata_Plate": "BR01",
            "Metadata_Well": wells,
            "Metadata_Site": sites,
        }
    )
    nuclei = pd.DataFrame({"ImageNumber": field + 1, "ObjectNumber": cell + 1})
    prefix = "" if kind == "csv" else "Nuclei_"
    nuclei[f"{prefix}Location_Center_X"], nuclei[f"{prefix}Location_Center_Y"] = x, y
    nuclei["Nuclei_AreaShape_Area"] = 49
    if kind == "csv":
        nuclei.to_csv(folder / "Nuclei.csv", index=False)
        images.to_csv(folder / "Image.csv", index=False)
    elif kind == "sqlite":
        # Every image a table of its own: numbers of images repeat, 64-bit numbers tell them apart.
        images["TableNumber"] = 2**60 + np.arange(len(FIELDS))
        nuclei["TableNumber"] = images["TableNumber"].to_numpy()[field]
        images["ImageNumber"] = nuclei["ImageNumber"] = 1
        renamed = {c: f"Image_{c}" for c in images if c.startswith("Metadata")}
        with sqlite3.connect(folder / "BR01.sqlite") as base:
            nuclei.to_sql("Nuclei", base, index=False)
            images.rename(columns=renamed).to_sql("Image", base, index=False)
        base.close()
    elif kind == "parquet":
        merged = nuclei.merge(images, on="ImageNumber").rename(
            columns={
                "ImageNumber": "Metadata_ImageNumber",
                "ObjectNumber": "Metadata_Nuclei_Number_Object_Number",
                "Metadata_Site": "Image_Metadata_Site",
                "Metadata_Well": "Image_Metadata_Well",
                "Metadata_Plate": "Image_Metadata_Plate",
            }
        )
        merged["Image_Metadata_Site"] = merged["Image_Metadata_Site"].astype(float)
        merged.to_parquet(folder / "BR01.parquet")


@pytest.fixture
def gallery(tmp_path, fake):
    """Give a function that writes a folder with a list, images, and a table of nuclei."""

    def make(name: str = "été 1", kind: str = "csv", dtype: str = "uint16") -> Gallery:
        path = tmp_path / name
        (path / "images").mkdir(parents=True)
        drawn = [fake.field(k, channels=2) for k in range(len(FIELDS))]
        pixels = np.stack([p for p, _, _ in drawn]).astype(dtype)
        rows = []
        for k, (well, site) in enumerate(FIELDS):
            row = {"Metadata_Plate": "BR01", "Metadata_Well": well, "Metadata_Site": site}
            row["Metadata_Compound"] = f"DMSO {k}"
            for c, stain in enumerate(STAINS):
                row[f"FileName_Orig{stain}"] = f"feld {k} ch{c}.tiff"
                row[f"PathName_Orig{stain}"] = "images/"
                file = path / "images" / row[f"FileName_Orig{stain}"]
                tifffile.imwrite(file, pixels[k, c], compression="zlib", rowsperstrip=16)
            rows.append(row)
        out = Gallery(path, pixels, np.stack([c for _, _, c in drawn]), pd.DataFrame(rows))
        out.rewrite()
        write_nuclei(path, out.centres, kind)
        return out

    return make


def whole(source, field):
    level = source.fields[field].levels[0]
    return level.read(0, level.shape[0], 0, level.shape[1])


def check(source, fake) -> None:
    assert source.channels == STAINS
    assert list(source.fields) == NAMES
    found = source.obs[["y_centroid", "x_centroid"]].to_numpy()
    np.testing.assert_allclose(found, 0.6 * fake.centres.reshape(-1, 2))
    assert list(source.obs.index) == [f"{n}-{k}" for n in NAMES for k in range(1, 10)]
    assert list(source.obs["Metadata_Well"].unique()) == ["A01", "B03", "B04"]
    assert list(source.obs["Metadata_Compound"].unique()) == [f"DMSO {k}" for k in range(5)]
    for k, name in enumerate(NAMES):
        np.testing.assert_array_equal(whole(source, name), fake.pixels[k])
        part = source.fields[name].levels[0].read(17, 95, 30, 111)
        np.testing.assert_array_equal(part, fake.pixels[k][:, 17:95, 30:111])


@pytest.mark.parametrize("kind", ["csv", "sqlite", "parquet"])
def test_every_kind_of_table(gallery, kind):
    fake = gallery(kind=kind)
    assert find_reader(fake.path)[0].name == find_reader(fake.list)[0].name == "jump"
    check(open_source(fake.path, pixel_size=0.6), fake)
    check(open_source(fake.list, pixel_size=0.6), fake)


def test_paths_as_the_gallery_states_them(gallery, web):
    """URLs by stain, URLs of folders, and folders of another machine with the images beside."""
    fake = gallery("data")
    for stain in STAINS:
        fake.images[f"PathName_Orig{stain}"] = "/home/ubuntu/bucket/projects/images"
    fake.rewrite()
    check(open_source(fake.path, pixel_size=0.6), fake)
    base = f"{web.url}/data/images"
    fake.rewrite(**{f"PathName_Orig{stain}": base for stain in STAINS})
    check(open_source(fake.path, pixel_size=0.6), fake)
    images = fake.images.drop(columns=[c for c in fake.images if "Name_" in c])
    for stain in STAINS:
        images[f"URL_Orig{stain}"] = base + "/" + fake.images[f"FileName_Orig{stain}"]
    images.to_csv(fake.list, index=False)
    check(open_source(fake.path, pixel_size=0.6), fake)
    shutil.rmtree(fake.path / "images")

    with pytest.raises(DataError, match=r"feld 0 ch0\.tiff: no such file"):
        open_source(fake.path, pixel_size=0.6)


def test_pixel_size_is_asked_for(gallery):
    with pytest.raises(DataError, match=r"load_data\.csv: states no pixel size.*--pixel-size"):
        open_source(gallery().path)


# ------------------------------------------------------------------------------------ illumination


@pytest.mark.parametrize("folder", [".", "illum", "illum/BR01"])
def test_illumination_is_divided_by(gallery, folder):
    fake = gallery()
    (fake.path / folder).mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0.001, 4, 120 * 150).reshape(120, 150)
    for k, stain in enumerate(STAINS):
        np.save(fake.path / folder / f"BR01_Illum{stain}.npy", ramp + k)
    found = whole(open_source(fake.path, pixel_size=0.6), NAMES[1])
    for k in range(2):
        expected = np.clip(np.rint(fake.pixels[1, k] / (ramp + k)), 0, 65535)
        np.testing.assert_array_equal(found[k], expected.astype(np.uint16))
    assert (found[0] != fake.pixels[1, 0]).any()
    part = open_source(fake.path, pixel_size=0.6).fields[NAMES[1]].levels[0].read(5, 99, 7, 140)
    np.testing.assert_array_equal(part, found[:, 5:99, 7:140])


def test_corrected_pixels_keep_their_type(gallery):
    fake = gallery(dtype="uint8")
    for stain in STAINS:
        np.save(fake.path / f"BR01_Illum{stain}.npy", np.full((120, 150), 0.25))
    source = open_source(fake.path, pixel_size=0.6)
    found = whole(source, NAMES[0])
    assert source.dtype == found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.minimum(fake.pixels[0].astype(int) * 4, 255))


def test_illumination_named_by_the_list(gallery):
    fake = gallery()
    columns = {}
    for k, stain in enumerate(STAINS):
        np.save(fake.path / f"f{k}.npy", np.full((120, 150), 2.0 + k))
        columns |= {f"FileName_Illum{stain}": f"f{k}.npy", f"PathName_Illum{stain}": "/gone"}
    fake.images.assign(**columns).to_csv(fake.path / "load_data_with_illum.csv", index=False)
    assert "load_data_with_illum.csv" in find_reader(fake.path)[1]
    found = whole(open_source(fake.path, pixel_size=0.6), NAMES[0])
    np.testing.assert_array_equal(found[1], np.rint(fake.pixels[0, 1] / 3))
    (fake.path / "f1.npy").unlink()
    with pytest.raises(DataError, match=r"f1\.npy: missing, but other illumination"):
        open_source(fake.path, pixel_size=0.6)
    (fake.path / "f0.npy").unlink()
    with pytest.warns(PhenoseqWarning, match=r"none is there; images are read as they are"):
        check(open_source(fake.path, pixel_size=0.6), fake)


def test_illumination_that_cannot_be_used(gallery, cut_file):
    fake = gallery()
    file = fake.path / "BR01_IllumDNA.npy"
    np.save(fake.path / "BR01_IllumER.npy", np.ones((120, 150)))
    for bad, said in (
        (np.ones((120, 151)), r"shape \(120, 151\), the images are \(120, 150\)"),
        (np.zeros((120, 150)), "not positive"),
        (np.full((120, 150), np.nan), "not positive"),
        (np.array([{"a": 1}], dtype=object), "no readable illumination function"),
    ):
        np.save(file, bad, allow_pickle=True)
        with pytest.raises(DataError, match=rf"BR01_IllumDNA\.npy: .*{said}"):
            open_source(fake.path, pixel_size=0.6)
    np.save(file, np.ones((120, 150)))
    cut_file(file, 0.5)
    with pytest.raises(DataError, match=r"BR01_IllumDNA\.npy: no readable.*copy it"):
        open_source(fake.path, pixel_size=0.6)


# ----------------------------------------------------------------------------------------- trouble


def problem(folder, field, said):
    """Return the source, in which one field with its 9 cells is left out, told and recorded."""
    with pytest.warns(PhenoseqWarning, match=rf"1 of 5 fields cannot be .*9 cells.*\n.*{said}"):
        source = open_source(folder, pixel_size=0.6)
    assert list(source.fields) == [name for name in NAMES if name != field]
    assert set(source.obs["field"]) == set(source.fields)
    (one,) = source.problems
    assert (one.where, one.cells) == (field, 9)
    return source


def test_missing_image_of_one_well(gallery):
    fake = gallery()
    fake.file(2, "ER").unlink()
    problem(fake.path, NAMES[2], r"BR01-B03-s1: no image .*feld 2 ch1\.tiff; copy it")
    fake.file(0, "ER").unlink()
    with pytest.raises(DataError, match="2 of 5 fields cannot be used, more than 20%"):
        open_source(fake.path, pixel_size=0.6)


def test_stain_without_a_file(gallery):
    fake = gallery()
    names = fake.images["FileName_OrigDNA"].where(fake.images.index != 1, "")
    fake.rewrite(FileName_OrigDNA=names)
    problem(fake.path, NAMES[1], r"no image file stated for \['DNA'\]")


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("field", [0, 1])
def test_truncated_image(gallery, cut_file, share, field):
    fake = gallery()
    cut_file(fake.file(field, "ER"), share)
    source = problem(fake.path, NAMES[field], rf"feld {field} ch1\.tiff: .*copy it again")
    np.testing.assert_array_equal(whole(source, NAMES[3]), fake.pixels[3])


def test_image_damaged_inside(gallery):
    fake = gallery()
    file = fake.file(1, "DNA")
    with tifffile.TiffFile(file) as tif:
        start, n = tif.pages[0].dataoffsets[3], tif.pages[0].databytecounts[3]
    data = bytearray(file.read_bytes())
    data[start : start + n] = bytes(n)
    file.write_bytes(data)
    problem(fake.path, NAMES[1], r"feld 1 ch0\.tiff: its pixels cannot be decoded")


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((120, 151), "uint16", r"\(120, 15\d\) uint16 differs from .*must match"),
        ((120, 150), "uint8", "differs from .*must match"),
        ((120, 150, 3), "uint8", "one plane of one stain is expected"),
    ],
)
def test_images_that_differ_within_a_field(gallery, shape, dtype, said):
    fake = gallery()
    colour = "rgb" if len(shape) == 3 else "minisblack"
    tifffile.imwrite(fake.file(0, "DNA"), np.zeros(shape, dtype), photometric=colour)
    problem(fake.path, NAMES[0], said)


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((120, 151), "uint16", r"is of \(120, 151\) pixels, others of \(120, 150\)"),
        ((120, 150), "uint8", "pixels are uint8, those of other fields uint16"),
    ],
)
def test_fields_that_differ(gallery, shape, dtype, said):
    fake = gallery()
    for stain in STAINS:
        tifffile.imwrite(fake.file(0, stain), np.zeros(shape, dtype))
    problem(fake.path, NAMES[0], said)


def test_remote_images_that_cannot_be_read(gallery, web, cut_file):
    """They are not looked at before: what is missing or broken is left out when crops are cut."""
    fake = gallery("data")
    fake.rewrite(**{f"PathName_Orig{stain}": f"{web.url}/data/images" for stain in STAINS})
    cut_file(fake.file(2, "ER"), 0.5)
    fake.file(0, "DNA").unlink()
    with pytest.warns(PhenoseqWarning, match=r"1 of 5 fields .*\n.*feld 0 ch0\.tiff: no such file"):
        source = open_source(fake.path, pixel_size=0.6)  # the first is looked at
    lost = []
    batches = iter_crops(source, 0.6, 8, failed=lambda rows, problem: lost.append(problem))
    assert sum(len(batch.rows) for batch in batches) == 27
    (one,) = lost
    assert (one.where, one.cells) == (NAMES[2], 9)
    assert "feld 2 ch1.tiff: truncated" in one.reason
    with pytest.raises(DataError, match=r"feld 2 ch1\.tiff: truncated"):
        list(iter_crops(source, 0.6, 8))
    for file in (fake.path / "images").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"5 of 5 fields cannot be used"):
        open_source(fake.path, pixel_size=0.6)


@pytest.mark.parametrize(
    "columns",
    [
        {"PathName_OrigDNA": "../../secret"},
        {"PathName_OrigDNA": "/data/../../secret"},
        {"FileName_OrigER": "../../secret.tiff"},
        {"URL_OrigDNA": "s3://bucket/../other/x.tiff"},
        {"URL_OrigDNA": "file:///data/../x.tiff"},
        {"FileName_OrigER": "..\\secret.tiff"},
    ],
)
def test_paths_that_climb(gallery, columns):
    fake = gallery()
    fake.rewrite(**columns)
    with pytest.raises(DataError, match=r"load_data\.csv: states the path .*climbs out"):
        open_source(fake.path, pixel_size=0.6)


def test_plate_whose_name_climbs(gallery):
    fake = gallery()
    fake.rewrite(Metadata_Plate="../x")
    with pytest.raises(DataError, match=r"load_data\.csv: states the path '\.\./x'"):
        open_source(fake.path, pixel_size=0.6)


def test_one_file_for_two_fields(gallery):
    fake = gallery()
    fake.rewrite(FileName_OrigDNA="feld 0 ch0.tiff")
    with pytest.raises(DataError, match=r"feld 0 ch0\.tiff stands for two fields, BR01-A01-s1 and"):
        open_source(fake.path, pixel_size=0.6)


def test_loop_of_links(gallery):
    fake = gallery()
    file = fake.file(2, "DNA")
    file.unlink()
    file.symlink_to(file)
    (fake.path / "loop").symlink_to(fake.path)
    problem(fake.path, NAMES[2], "no image")


def test_lists_that_cannot_be_used(gallery):
    fake = gallery()
    for columns, said in (
        ({"Metadata_Well": ["A01", "", "A03", "A04", "A05"]}, "row 3 has no Metadata_Well"),
        ({"Metadata_Site": "1", "Metadata_Well": "a01"}, r"lists fields twice: \['BR01-A01-s1'\]"),
    ):
        fake.rewrite(**columns)
        with pytest.raises(DataError, match=rf"load_data\.csv: {said}"):
            open_source(fake.path, pixel_size=0.6)
    fake.images.drop(columns="Metadata_Plate").to_csv(fake.list, index=False)
    with pytest.raises(DataError, match=r"no column \['Metadata_Plate'\]"):
        open_source(fake.path, pixel_size=0.6)
    fake.images[["Metadata_Plate", "Metadata_Well", "Metadata_Site"]].to_csv(fake.list, index=False)
    with pytest.raises(DataError, match="no column 'FileName_OrigDNA'"):
        open_source(fake.path, pixel_size=0.6)


def test_no_positions(gallery):
    fake = gallery()
    (fake.path / "Nuclei.csv").unlink()
    with pytest.raises(DataError, match=r"nothing says where cells are; put beside .*Nuclei\.csv"):
        open_source(fake.path, pixel_size=0.6)


def test_nuclei_of_other_wells(gallery):
    fake = gallery()
    fake.rewrite(Metadata_Site=["1", "2", "9", "2", "1"])
    with pytest.warns(PhenoseqWarning, match=r"9 of 45 nuclei are of fields .*BR01-B03-s1"):
        source = open_source(fake.path, pixel_size=0.6)
    assert len(source.obs) == 36
    (one,) = source.problems
    assert (one.where, one.reason, one.cells) == (NAMES[2], "load_data.csv does not list it", 9)
    fake.rewrite(Metadata_Plate="BR02")
    with pytest.raises(DataError, match=r"no nucleus is of a field .*BR01-A01-s1.*one plate\?"):
        open_source(fake.path, pixel_size=0.6)


def test_tables_of_nuclei_that_cannot_be_used(gallery):
    fake = gallery()
    table = pd.read_csv(fake.path / "Nuclei.csv")
    for change, said in (
        (pd.concat([table, table.iloc[:1]]), r"1 cell ids stand there twice.*BR01-A01-s1-1'"),
        (table.assign(Location_Center_X=np.nan), "45 cells have no position"),
        (table.drop(columns="Location_Center_X"), "no column .*Location_Center_X"),
        (table.drop(columns="ImageNumber"), "does not say which image"),
    ):
        change.to_csv(fake.path / "Nuclei.csv", index=False)
        with pytest.raises(DataError, match=rf"Nuclei\.csv: {said}"):
            open_source(fake.path, pixel_size=0.6)
    table.to_csv(fake.path / "Nuclei.csv", index=False)
    images = pd.read_csv(fake.path / "Image.csv")
    pd.concat([images, images]).to_csv(fake.path / "Image.csv", index=False)
    with pytest.raises(DataError, match="lists the number 1 twice"):
        open_source(fake.path, pixel_size=0.6)
    (fake.path / "Image.csv").unlink()
    with pytest.raises(DataError, match="does not say which image a nucleus is of"):
        open_source(fake.path, pixel_size=0.6)


@pytest.mark.parametrize("kind", ["sqlite", "parquet"])
def test_truncated_tables(gallery, cut_file, kind):
    fake = gallery(kind=kind)
    cut_file(fake.path / f"BR01.{kind}", 0.3)
    with pytest.raises(DataError, match=rf"BR01\.{kind}: .*copy it again"):
        open_source(fake.path, pixel_size=0.6)


def test_sqlite_without_nuclei(gallery):
    fake = gallery(kind="sqlite")
    with sqlite3.connect(fake.path / "BR01.sqlite") as base:
        base.execute("ALTER TABLE Nuclei RENAME TO Cells")
    base.close()
    with pytest.raises(DataError, match=r"BR01\.sqlite: no table 'Nuclei'; it has \['Cells'"):
        open_source(fake.path, pixel_size=0.6)


def test_real_field(shared_data, tmp_path):
    """A field of a plate of JUMP with its table, as they stand."""
    folder = shared_data / "cell_painting" / "jump"
    if not folder.is_dir():
        pytest.skip("cell_painting/jump absent: no such folder in the real data")
    (tmp_path / "BR.parquet").symlink_to(folder / "BR00117006_shrunken.parquet")
    row = {"Metadata_Plate": "BR00117006", "Metadata_Well": "A01", "Metadata_Site": "1"}
    for stain, channel in (("AGP", 2), ("RNA", 3), ("DNA", 5)):
        row[f"FileName_Orig{stain}"] = f"r01c01f01p01-ch{channel}sk1fk1fl1.tiff"
        row[f"PathName_Orig{stain}"] = str(folder / "images" / "orig")
    pd.DataFrame([row]).to_csv(tmp_path / "load_data.csv", index=False)
    source = open_source(tmp_path, pixel_size=0.6)
    assert source.channels == ("AGP", "RNA", "DNA")
    pixels = whole(source, "BR00117006-A01-s1")
    assert pixels.dtype == np.uint16
    centres = (source.obs[["y_centroid", "x_centroid"]].to_numpy() / 0.6).astype(int)
    dna = np.array([pixels[2, y - 4 : y + 5, x - 4 : x + 5].mean() for y, x in centres])
    assert len(dna) == 5
    assert (dna > 2 * np.median(pixels[2])).all()
