"""The scGeneScope layout in miniature: crops in zip files, features and RNA of two rounds."""

from __future__ import annotations

import io
import pickle
import re
import zipfile

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile

from phenoseq.cli import main
from phenoseq.data.backed import Cells
from phenoseq.data.crops import iter_crops
from phenoseq.data.readers import find_reader, open_source
from phenoseq.data.readers.pandashdf import read_pandas_hdf
from phenoseq.data.readers.scgenescope import CHANNELS, PROTOCOL, detect
from phenoseq.data.samplestore import SampleStore
from phenoseq.data.samplewriter import RnaConfig, write_sample_store
from phenoseq.errors import DataError

SIDE = 12


def write_fixed(path, table, block=None):
    """Write a data frame as pandas does by default, text as pickled arrays."""
    with h5py.File(path, "w") as file:
        group = file.create_group("manifest")
        group["axis0"] = np.array(list(table), dtype="S")
        group["axis1"] = np.arange(len(table))
        group.attrs["nblocks"] = len(table.columns)
        for number, name in enumerate(table):
            values = table[[name]].to_numpy()
            group[f"block{number}_items"] = np.array([name], dtype="S")
            if values.dtype == object:
                raw = pickle.dumps(values) if block is None else block
                kind = h5py.vlen_dtype(np.uint8)
                stored = group.create_dataset(f"block{number}_values", (1,), dtype=kind)
                stored[0] = np.frombuffer(raw, dtype=np.uint8)
            else:
                group[f"block{number}_values"] = values


def write_table(path, table):
    """Write a data frame as pandas does with ``format="table"``."""
    blocks = {f"values_block_{i}": [name] for i, name in enumerate(table)}
    columns = {
        field: table[name].map(lambda v: "nan" if v is None else v).to_numpy().astype("S")
        if table[name].dtype == object
        else table[name].to_numpy()
        for field, (name,) in blocks.items()
    }
    kinds = [("index", "<i8"), *((field, c.dtype, (1,)) for field, c in columns.items())]
    rows = np.zeros(len(table), dtype=kinds)
    for field, values in columns.items():
        rows[field][:, 0] = values
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("manifest/table", data=rows)
        for field, names in blocks.items():
            stored.attrs[f"{field}_kind"] = np.bytes_(pickle.dumps(names, protocol=0))


def pixels(cell, channel):
    """Every pixel says which cell and channel it is of, the corner where it is."""
    plane = np.full((SIDE, SIDE), 10 * channel + cell % 10, dtype=np.uint8)
    plane[0, 0], plane[-1, 0] = 200, 201
    return plane


@pytest.fixture
def folder(tmp_path):
    """Give the crops of 20 cells on two plates; one zip holds paths without the plate's name."""
    rows = []
    for plate in (1, 2):
        with zipfile.ZipFile(tmp_path / f"plate{plate}.zip", "w") as archive:
            for cell in range(10 * plate - 10, 10 * plate):
                row = {"cell_id": f"c{cell}", "Treatment": ["DMSO", "drugA"][cell % 2]}
                row.update(Replicate=str(2 + plate), batch=f"b{plate}", Group=None, number=cell)
                for k, name in enumerate(CHANNELS):
                    inside = f"{name}/{cell}.tif"
                    row[f"path-{name}"] = f"plate{plate}/{inside}"
                    out = io.BytesIO()
                    tifffile.imwrite(out, pixels(cell, k))
                    archive.writestr(inside if plate == 1 else f"plate2/{inside}", out.getvalue())
                rows.append(row)
    write_fixed(tmp_path / "manifest.h5", pd.DataFrame(rows))
    return tmp_path


@pytest.mark.parametrize("writer", [write_fixed, write_table])
def test_data_frame_of_pandas(tmp_path, writer):
    table = pd.DataFrame({"a": ["x", "é", None], "n": [1, 2, 3], "b-c": ["1", "2", "3"]})
    if writer is write_table:
        table.loc[1, "a"] = "e"
    writer(tmp_path / "t.h5", table)
    found = read_pandas_hdf(tmp_path / "t.h5", "manifest")
    pd.testing.assert_frame_equal(found, table)


class Harm:
    def __reduce__(self):
        return print, ("harm was done",)


def test_a_pickle_that_runs_something_is_refused(tmp_path, capsys):
    write_fixed(tmp_path / "t.h5", pd.DataFrame({"a": ["x"]}), block=pickle.dumps(Harm()))
    with pytest.raises(DataError, match=r"no data frame 'manifest'.*it names builtins\.print"):
        read_pandas_hdf(tmp_path / "t.h5", "manifest")
    assert "harm" not in capsys.readouterr().out


def test_crops(folder):
    assert find_reader(folder)[0].name == "scgenescope"
    source = open_source(folder, pixel_size=0.5)
    assert source.channels == CHANNELS
    assert list(source.obs.index) == [f"c{i}" for i in range(20)]
    assert source.obs["Replicate"].tolist() == ["3"] * 10 + ["4"] * 10
    seen = {}
    for batch in iter_crops(source, 0.5, SIDE):
        assert not batch.cut.any()
        seen.update(zip(batch.rows.tolist(), batch.images, strict=True))
    for cell in range(20):
        expected = np.stack([pixels(cell, k) for k in range(5)])
        np.testing.assert_array_equal(seen[cell], expected)


def test_other_hdf5_beside_zip_files_is_another_layout(folder):
    (folder / "manifest.h5").write_bytes(b"no HDF5")
    assert detect(folder) is None
    with h5py.File(folder / "counts.h5", "w") as file:
        file["matrix"] = [1]
    assert detect(folder) is None
    write_fixed(folder / "x.h5", pd.DataFrame({"cell_id": ["a"]}))
    assert "x.h5" in detect(folder)


def test_crops_become_a_store(folder, rna):
    source = open_source(folder, pixel_size=0.5)
    store, _ = write_sample_store(
        source,
        Cells(rna(replicates="34")),
        folder / "s.zarr",
        columns=["Treatment", "Replicate"],
        pixel_size=0.5,
        crop_px=SIDE,
    )
    cells = store.image_obs().index.str[1:].astype(int)
    np.testing.assert_array_equal(store.images.read(0, 20)[:, 0, 5, 5], cells % 10)


def zip_again(path, change):
    """Write a zip file again, each file as ``change(name, content)`` says."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in content.items():
            name, raw = change(name, raw)
            if raw is not None:
                archive.writestr(name, raw)


@pytest.fixture
def prepare(folder, write, rna):
    """Give a function that runs ``phenoseq prepare`` on the crops, with RNA of the same samples."""
    other = write(rna(replicates="34"), "other/rna")

    def run(*options):
        sample = ["--pair-by", "sample", "--sample-columns", "Treatment,Replicate"]
        size = ["--pixel-size", "0.5", "--crop-pixel-size", "0.5", "--crop-px", str(SIDE)]
        command = ["prepare", str(folder), str(folder / "s.zarr"), *sample, *size]
        return main([*command, "--rna", str(other), *options])

    return run


def test_broken_crops_are_left_out_told_and_listed(folder, prepare, capsys):
    """One is cut off, one is no TIFF, and one is missing; the other 17 cells are all there."""
    broken = {"plate2/ER/13.tif": 60, "plate2/DNA/17.tif": 3}
    zip_again(folder / "plate2.zip", lambda name, raw: (name, raw[: broken.get(name, len(raw))]))
    zip_again(folder / "plate1.zip", lambda name, raw: (name, None if name == "AGP/4.tif" else raw))
    assert prepare() == 0
    out = capsys.readouterr()
    assert "images left out, image that cannot be read: 3" in out.out
    assert "left out, c13 (1 cells): plate2/ER/13.tif: not a readable TIFF" in out.out
    assert "left out, c4 (1 cells): plate1/AGP/4.tif: in none of the zip files" in out.out
    assert "3 images cannot be read; 3 of 20 cells are left out" in out.err
    store = SampleStore(folder / "s.zarr")
    assert [p["where"] for p in store.manifest.problems] == ["c4", "c13", "c17"]
    obs = store.image_obs()
    assert sorted(obs.index) == sorted({f"c{i}" for i in range(20)} - {"c4", "c13", "c17"})
    numbers = obs.index.str[1:].astype(int)
    np.testing.assert_array_equal(store.images.read(0, 17)[:, 0, 5, 5], numbers % 10)
    names = store.samples.index[
        np.repeat(np.arange(4), store.samples.eval("image_stop-image_start"))
    ]
    assert names.tolist() == obs["sample_key"].tolist()


def test_too_many_broken_crops_stop_it(folder, prepare, capsys):
    zip_again(folder / "plate2.zip", lambda name, raw: (name, raw[:9] if "RNA" in name else raw))
    assert prepare() == 1
    err = capsys.readouterr().err
    assert "the images of 5 of 20 cells so far cannot be read, more than 20%" in err
    assert not (folder / "s.zarr").exists()
    assert not list(folder.glob(".s.zarr*"))


def test_cells_are_chosen_and_described_by_another_table(folder, prepare, write, features, capsys):
    """The obs of the features: 15 of the 20 cells, their sample, and a cell that has no crop."""
    table = features(16)
    table.obs.index = [*(f"c{i}" for i in range(15)), "lost"]
    table.obs = table.obs.assign(Treatment="drugB", Replicate="4", Sample_ID="S9")
    assert prepare("--metadata", str(write(table, "features/round_1"))) == 0
    out = capsys.readouterr()
    assert "does not tell of 5 cells, such as ['c15', 'c16', 'c17']" in out.err
    assert "1 of 16 cells are not in" in out.err
    store = SampleStore(folder / "s.zarr")
    assert set(store.image_obs()["Sample_ID"]) == {"S9"}
    assert store.samples.index.tolist() == ["drugB|4"]
    assert sorted(store.image_obs().index) == sorted(f"c{i}" for i in range(15))
    assert store.manifest.problems[0]["cells"] == 5


def test_manifest_in_place_of_its_folder(folder):
    file = folder / "manifest.h5"
    assert find_reader(file)[0].name == "scgenescope"
    assert len(open_source(file, pixel_size=0.5).fields) == 20


def test_zip_files_of_one_name_are_told_apart_by_their_folder(folder):
    """Each plate.zip has files of the same names; the manifest's paths start with its folder."""

    def renamed(name):
        return re.sub(r"(plate2/)?(\w+)/1?(\d)\.tif", r"\2/\3.tif", name)

    for plate in (1, 2):
        (folder / f"plate{plate}").mkdir()
        zip_again(folder / f"plate{plate}.zip", lambda name, raw: (renamed(name), raw))
        (folder / f"plate{plate}.zip").rename(folder / f"plate{plate}" / "plate.zip")
    table = read_pandas_hdf(folder / "manifest.h5", "manifest")
    paths = [f"path-{name}" for name in CHANNELS]
    plates = table[paths[0]].str[:7]
    table[paths] = table[paths].map(lambda path: renamed(path.removeprefix("plate1/")))
    write_fixed(folder / "manifest.h5", table.assign(**{p: plates + table[p] for p in paths}))
    fields = open_source(folder, pixel_size=0.5).fields
    seen = [fields[f"c{cell}"].levels[0].read(5, 6, 5, 6)[0] for cell in range(20)]
    assert np.ravel(seen).tolist() == [*range(10), *range(10)]
    assert fields["c13"].levels[0].read.archive._find("plate2/DNA/3.tif")[0].parent.name == "plate2"
    write_fixed(folder / "manifest.h5", table)
    with pytest.raises(DataError, match=r"DNA/0\.tif: stands in .*plate1.* and in .*plate2"):
        open_source(folder, pixel_size=0.5)


def test_nothing_is_written_outside_by_a_zip_that_climbs(folder, prepare, tmp_path_factory):
    """Names inside the zip file climb out of it; they are read by name or not at all."""
    (folder / "loop").symlink_to(folder)
    (folder / "loop.zip").symlink_to(folder / "loop.zip")
    before = set(folder.parent.rglob("*"))
    with zipfile.ZipFile(folder / "plate1.zip", "a") as archive:
        archive.writestr("../../escaped.tif", b"harm")
        archive.writestr("/tmp/escaped-phenoseq.tif", b"harm")
    assert prepare() == 0
    new = {p.relative_to(folder).parts[0] for p in set(folder.parent.rglob("*")) - before}
    assert new == {"s.zarr"}


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a/../../b", "C:\\x", "..\\x"])
def test_a_path_that_leaves_its_zip_is_refused(folder, path):
    table = read_pandas_hdf(folder / "manifest.h5", "manifest")
    table.loc[4, "path-AGP"] = path
    write_fixed(folder / "manifest.h5", table)
    with pytest.raises(DataError, match="leaves its zip file"):
        open_source(folder, pixel_size=0.5)


def test_what_is_missing(folder):
    with pytest.raises(DataError, match="--pixel-size"):
        open_source(folder)
    source = open_source(folder, pixel_size=0.5)
    (folder / "plate2.zip").unlink()
    source = open_source(folder, pixel_size=0.5)
    with pytest.raises(DataError, match=r"plate2/DNA/10\.tif: in none of the zip files"):
        source.fields["c10"].levels[0].read(0, 1, 0, 1)
    (folder / "plate2.zip").write_bytes(b"no zip")
    source = open_source(folder, pixel_size=0.5)
    with pytest.raises(DataError, match=r"plate2\.zip: no readable zip file"):
        source.fields["c10"].levels[0].read(0, 1, 0, 1)
    table = read_pandas_hdf(folder / "manifest.h5", "manifest")
    write_fixed(folder / "manifest.h5", table.drop(columns="path-ER"))
    with pytest.raises(DataError, match=r"no columns \['path-ER'\]"):
        open_source(folder, pixel_size=0.5)


def test_two_rounds_of_features_and_rna_by_the_protocol(tmp_path, write, features, rna):
    """Rounds in one folder each, ids that clash, a treatment without RNA in one replicate."""
    for number, replicates in ((1, "345"), (2, "12")):
        images, other = features(200, replicates, seed=number), rna(150, replicates, seed=number)
        lost = (other.obs["Treatment"] == "drugB") & (other.obs["Replicate"].isin(["5", "2"]))
        write(images, f"vit-l/round_{number}")
        write(other[~lost].copy(), f"scgpt/round_{number}")
    store, pairing = write_sample_store(
        Cells(tmp_path / "vit-l"),
        Cells(tmp_path / "scgpt"),
        tmp_path / "s.zarr",
        columns=["Treatment", "Replicate"],
        config=RnaConfig(embedding="scGPT"),
    )
    assert len(pairing.samples) == 13
    assert "in images only 2 (" in str(pairing)
    assert "drugB|2, drugB|5" in str(pairing)
    split = store.split(PROTOCOL)
    assert split.sizes() == {"train": 3, "val": 2, "test_we": 3, "test_he": 5}
    part = pd.Series(split.part, index=store.samples.index)
    for obs in (store.image_obs(), store.rna_obs()):
        replicate = obs["Replicate"].astype(str)
        where = {"3": "train", "5": "val", "4": "test_we", "1": "test_he", "2": "test_he"}
        assert (part[obs["sample_key"]].to_numpy() == replicate.map(where).to_numpy()).all()
