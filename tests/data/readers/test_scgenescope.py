"""The scGeneScope layout in miniature: crops in zip files, features and RNA of two rounds."""

from __future__ import annotations

import io
import pickle
import zipfile

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile

from phenoseq.data.backed import Cells
from phenoseq.data.crops import iter_crops
from phenoseq.data.readers import find_reader, open_source
from phenoseq.data.readers.pandashdf import read_pandas_hdf
from phenoseq.data.readers.scgenescope import CHANNELS, PROTOCOL, detect, read_scgenescope
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


def test_cells_without_a_manifest_row(folder):
    wanted = pd.Index(["c3", "lost", "c15"])
    with pytest.warns(UserWarning, match=r"1 of 3 cells have no row and are left out.*'lost'"):
        source = read_scgenescope(folder, pixel_size=0.5, cells=wanted)
    assert list(source.obs.index) == ["c3", "c15"]
    with (
        pytest.raises(DataError, match="none of the cells wanted"),
        pytest.warns(UserWarning, match="1 of 1 cells have no row"),
    ):
        read_scgenescope(folder, pixel_size=0.5, cells=pd.Index(["lost"]))


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
