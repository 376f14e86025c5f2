"""The store holds what its source holds, and is there whole or not at all."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import tracemalloc
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse
from zarr.storage import LocalStore

from phenoseq.data import arrays as arrays_module
from phenoseq.data import crops as crops_module
from phenoseq.data import storewriter as storewriter_module
from phenoseq.data.crops import iter_crops
from phenoseq.data.readers import open_source
from phenoseq.data.source import FieldImage, Level, Problem
from phenoseq.data.store import Manifest, Store, is_store
from phenoseq.data.storewriter import write_store
from phenoseq.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def small(path, source, **options):
    return write_store(source, path, **{"pixel_size": 0.5, "crop_px": 16, **options})


@pytest.fixture(scope="module")
def source(ramp_source):
    return ramp_source(250)


@pytest.fixture(scope="module")
def written(tmp_path_factory, source):
    return small(tmp_path_factory.mktemp("written") / "s.zarr", source)


@pytest.fixture
def store(tmp_path, written):
    """Give a copy of one store, which a test may damage."""
    return Store(shutil.copytree(written.path, tmp_path / "s.zarr"))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ----------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("shard", [64, 128, 2048])
def test_round_trip(tmp_path, source, monkeypatch, shard):
    monkeypatch.setattr(arrays_module, "SHARD", shard)
    store = small(tmp_path / "s.zarr", source)
    table = store.table()

    rows = source.obs.index.get_indexer(table.obs_names)
    assert len(store) == len(table) == len(set(rows)) > 200
    assert (rows >= 0).all()
    np.testing.assert_array_equal(table.X.toarray(), source.counts[rows].toarray())
    assert sparse.issparse(table.X)
    for column in source.obs:
        np.testing.assert_array_equal(table.obs[column], source.obs[column].iloc[rows])
    np.testing.assert_array_equal(
        table.obs["total_counts"], np.asarray(source.counts.sum(axis=1)).ravel()[rows]
    )
    np.testing.assert_array_equal(
        table.obsm["spatial"], source.obs[["x_centroid", "y_centroid"]].to_numpy()[rows]
    )
    assert list(table.var_names) == list(source.var.index)
    assert list(table.var["symbol"]) == list(source.var["symbol"])

    crops = {
        r: c for b in iter_crops(source, 0.5, 16) for r, c in zip(b.rows, b.images, strict=True)
    }
    np.testing.assert_array_equal(store.crops[:], np.stack([crops[row] for row in rows]))


def test_table_opens_with_anndata_alone(store):
    table = ad.read_zarr(store.path / "table")
    assert list(table.obs_names) == list(store.table().obs_names)
    assert all(name.startswith("cell") for name in table.obs_names)


def test_from_a_xenium_folder(tmp_path, xenium_set):
    """Each crop shows the cell of its own row, through the reader and the pyramid."""
    with pytest.warns(UserWarning, match="no Ensembl id"):
        source = open_source(xenium_set.path)
    store = write_store(source, tmp_path / "s.zarr", pixel_size=0.425, crop_px=8)
    table = store.table()
    assert store.manifest.excluded == {"no counts": 1, "fewer than 20 counts": 1}
    cell = xenium_set.cells.index.get_indexer(table.obs_names)
    expected = xenium_set.blob(cell[:, None], np.arange(4)[None])
    np.testing.assert_array_equal(store.crops[:, :, 4, 4], expected)
    np.testing.assert_array_equal(table.X.toarray(), xenium_set.counts.iloc[cell])


def test_writing_and_reading_warn_of_nothing(tmp_path, source):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = small(tmp_path / "s.zarr", source)
        store.table()
        store.all_cells()


def test_one_cell(tmp_path, ramp_source):
    store = small(tmp_path / "s.zarr", ramp_source(np.array([[200.0, 150.0]])))
    assert len(store) == 1
    assert store.read(0, 1).shape == (1, 2, 16, 16)


def test_format(store):
    root = json.loads((store.path / "zarr.json").read_text())
    assert root["zarr_format"] == 3
    assert json.loads((store.path / "table" / "zarr.json").read_text())["zarr_format"] == 3
    crops = zarr.open_array(store.path / "crops", mode="r")
    assert crops.metadata.zarr_format == 3
    assert crops.shards == (1024, 2, 16, 16)
    assert crops.chunks == (64, 2, 16, 16)
    assert len(list((store.path / "crops" / "c").iterdir())) == 1


def test_counts_and_crops_of_some_cells_in_any_order(store):
    rows = np.random.default_rng(0).permutation(len(store))[:50]
    rows = np.concatenate([rows, rows[:3]])
    whole = store.table().X
    np.testing.assert_array_equal(store.counts(rows).toarray(), whole[rows].toarray())
    np.testing.assert_array_equal(store.take(rows), store.crops[:][rows])
    assert store.counts(rows[:0]).shape == (0, whole.shape[1])
    pd.testing.assert_frame_equal(store.obs(), store.table().obs)


def test_large_crops_have_fewer_cells_in_a_chunk(tmp_path, source, monkeypatch):
    monkeypatch.setattr(arrays_module, "CHUNK_BYTES", 5000)
    crops = small(tmp_path / "s.zarr", source, crop_px=24).crops
    assert crops.chunks[0] == 5000 // (2 * 24 * 24 * 2)
    assert crops.shards[0] == 16 * crops.chunks[0]


def test_manifest(store, source):
    manifest = Store(store.path).manifest
    raw = json.loads((store.path / "zarr.json").read_text())["attributes"]["phenoseq"]
    assert manifest == store.manifest == Manifest.from_json(raw, "here")
    assert manifest.schema_version == 1
    assert (manifest.kind, manifest.source, manifest.identity) == ("test", "ramp", "0" * 64)
    assert manifest.pairing == "cell"
    assert manifest.channels == ("DNA", "RNA")
    assert (manifest.pixel_size, manifest.crop_px, manifest.crop_width) == (0.5, 16, 8.0)
    assert (manifest.source_pixel_size, manifest.dtype) == (0.5, "uint16")
    assert manifest.genes == tuple(source.var.index)
    assert manifest.symbols == tuple(source.var["symbol"])
    assert manifest.min_counts == 20


def test_source_in_the_manifest_is_a_name_not_a_path(tmp_path, source):
    store = small(tmp_path / "s.zarr", replace(source, name="/home/somebody/section"))
    assert store.manifest.source == "section"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_channel_statistics(tmp_path, ramp_source, dtype):
    """Against numpy, over all pixels of all crops of each channel."""
    source = ramp_source(200)
    rng = np.random.default_rng(0)
    pixels = rng.gamma(2.0, 12.0, (2, 600, 800)) * [[[1.0]], [[0.3]]]
    pixels = pixels / 300 if dtype == "float32" else pixels
    pixels = pixels.astype(dtype)
    image = FieldImage(
        (Level(0.5, (600, 800), lambda y0, y1, x0, x1: pixels[:, y0:y1, x0:x1]),), pixels.dtype
    )
    store = small(tmp_path / "s.zarr", replace(source, fields={"f0": image}))
    assert list(store.manifest.channel_stats) == ["DNA", "RNA"]
    for channel, stats in enumerate(store.manifest.channel_stats.values()):
        values = store.crops[:, channel].ravel().astype(np.float64)
        np.testing.assert_allclose(stats["mean"], values.mean(), rtol=1e-9)
        np.testing.assert_allclose(stats["std"], values.std(), rtol=1e-6)
        p999 = np.quantile(values, 0.999, method="inverted_cdf")
        assert stats["p999"] == pytest.approx(p999, abs=2e-5 if dtype == "float32" else 0)


def test_read_and_take(tmp_path, ramp_source):
    store = small(tmp_path / "s.zarr", ramp_source(400))
    whole = store.crops[:]
    assert len(store) > 300
    np.testing.assert_array_equal(store.read(60, 70), whole[60:70])
    rows = np.random.default_rng(0).permutation(len(store))[:150]
    np.testing.assert_array_equal(store.take(rows), whole[rows])
    np.testing.assert_array_equal(store.take(np.array([len(store) - 1, 0, 0])), whole[[-1, 0, 0]])
    assert store.take(np.array([], dtype=np.int64)).shape == (0, 2, 16, 16)


def test_progress(tmp_path, source):
    seen = []
    store = small(tmp_path / "s.zarr", source, progress=lambda *x: seen.append(x))
    done, total = zip(*seen, strict=True)
    assert set(total) == {len(store)}
    assert list(done) == sorted(done)
    assert done[-1] == len(store)


# ----------------------------------------------------------------------------------- exclusions


def excluded_of(store):
    return ad.io.read_elem(zarr.open_group(store.path, mode="r")["excluded"])


def test_exclusions_are_counted_and_listed(tmp_path, ramp_source):
    positions = np.full((8, 2), 150.0)
    positions[0] = [-3, 150]  # outside
    positions[1] = [150, 300]  # outside, and without counts: told once
    positions[2] = [3.9, 150]  # within half a crop of the border
    positions[3] = [150, 296.1]
    counts = np.full((8, 3), 10)
    counts[[1, 4]] = 0
    counts[5] = [19, 0, 0]
    counts[6] = [20, 0, 0]
    store = small(tmp_path / "s.zarr", ramp_source(positions, counts=counts))
    assert sorted(store.table().obs_names) == ["cell6", "cell7"]
    assert store.manifest.excluded == {
        "outside the image": 2,
        "cut by the border": 2,
        "no counts": 1,
        "fewer than 20 counts": 1,
    }
    listed = excluded_of(store)
    assert dict(listed["reason"]) == {
        "cell0": "outside the image",
        "cell1": "outside the image",
        "cell2": "cut by the border",
        "cell3": "cut by the border",
        "cell4": "no counts",
        "cell5": "fewer than 20 counts",
    }
    assert listed.loc["cell2", "x_centroid"] == 3.9


def test_no_crop_in_the_store_is_cut(tmp_path, ramp_source):
    """Neither at full resolution nor where it is read from a lower level."""
    for pixel_size in (0.5, 1.0, 2.0):
        source = ramp_source(400, factors=(1, 2, 4))
        store = small(tmp_path / f"{pixel_size}.zarr", source, pixel_size=pixel_size)
        cut = {
            source.obs.index[row]: cut
            for b in iter_crops(source, pixel_size, 16)
            for row, cut in zip(b.rows, b.cut, strict=True)
        }
        kept = store.table().obs_names
        assert not any(cut[name] for name in kept)
        assert len(kept) > 200


def test_min_counts_of_zero_keeps_all_but_the_empty(tmp_path, ramp_source):
    counts = np.zeros((20, 3))
    counts[:15, 0] = 1
    source = ramp_source(np.full((20, 2), 150.0), counts=counts)
    store = small(tmp_path / "s.zarr", source, min_counts=0)
    assert len(store) == 15
    assert store.manifest.excluded == {"no counts": 5}


def test_border_goes_by_the_cells_own_field(tmp_path, ramp_source):
    """Also where fields differ in size and pixel size."""
    source = ramp_source(np.array([[150.0, 120.0]] * 6), fields=2)
    coarse = ramp_source(1, size=(150, 160), pixel_size=1.0).fields["f0"]
    source = replace(source, fields={**source.fields, "f1": coarse})
    store = small(tmp_path / "s.zarr", source)
    assert len(store) == 6
    smaller = ramp_source(1, size=(250, 290), pixel_size=0.5).fields["f0"]
    source = replace(source, fields={"f1": smaller, "f0": coarse})
    store = small(tmp_path / "t.zarr", source, min_counts=0)
    assert sorted(store.table().obs_names) == ["cell0", "cell2", "cell4"]
    assert store.manifest.excluded == {"outside the image": 3}


def test_no_cell_left(tmp_path, ramp_source):
    source = ramp_source(np.full((4, 2), 150.0), counts=np.ones((4, 3)))
    with pytest.raises(DataError, match=r"no cell is left.*'fewer than 20 counts': 4"):
        small(tmp_path / "s.zarr", source)
    assert names_in(tmp_path) == []


def test_source_without_counts(tmp_path, source):
    with pytest.raises(DataError, match=r"no count matrix.*phenoseq predict"):
        small(tmp_path / "s.zarr", replace(source, counts=None, var=None))


def test_field_without_image(tmp_path, ramp_source):
    source = ramp_source(20, fields=2)
    with pytest.raises(DataError, match="'f1', which has no image"):
        small(tmp_path / "s.zarr", replace(source, fields={"f0": source.fields["f0"]}))


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("categorical", [False, True])
def test_all_cells_are_those_of_the_source(tmp_path, ramp_source, exclude, categorical):
    rng = np.random.default_rng(0)
    source = ramp_source(rng.uniform(20, 280, (40, 2)), fields=2)
    if categorical:
        source = replace(source, obs=source.obs.astype({"field": "category"}))
    if exclude:
        counts = source.counts.toarray()
        counts[1::2] = 1  # all cells of the second field
        source = replace(source, counts=sparse.csr_matrix(counts))
    store = small(tmp_path / "s.zarr", source)
    assert len(store) == (20 if exclude else 40)
    cells = store.all_cells()
    columns = ["field", "x_centroid", "y_centroid", "Metadata_Well"]
    pd.testing.assert_frame_equal(
        cells.loc[source.obs.index, columns],
        source.obs[columns],
        check_dtype=False,
        check_categorical=False,
    )
    assert len(cells) == 40


# ---------------------------------------------------------------------------- whole, or not there


def failing_after(source, n_batches, error):
    """Return the source, which fails once ``n_batches`` regions are read."""
    image = source.fields["f0"]
    done = [0]

    def read(*region):
        done[0] += 1
        if done[0] > n_batches:
            raise error
        return image.levels[0].read(*region)

    level = replace(image.levels[0], read=read)
    return replace(source, fields={"f0": FieldImage((level,), image.dtype)})


@pytest.fixture
def small_regions(monkeypatch):
    monkeypatch.setattr(crops_module, "REGION", 100)
    monkeypatch.setattr(arrays_module, "CHUNK", 16)
    monkeypatch.setattr(arrays_module, "SHARD", 64)


def test_existing_target_is_refused(store, source):
    before = store.path.stat().st_mtime_ns
    with pytest.raises(DataError, match=r"s\.zarr: exists already.*--overwrite"):
        small(store.path, source)
    assert store.path.stat().st_mtime_ns == before


def test_overwrite_replaces_the_store(store, ramp_source):
    other = small(store.path, ramp_source(100, seed=5), overwrite=True)
    assert len(other) < 100
    assert len(Store(store.path)) == len(other)
    assert names_in(store.path.parent) == ["s.zarr"]


@pytest.mark.usefixtures("small_regions")
def test_overwrite_keeps_the_old_store_until_the_new_is_whole(store, ramp_source):
    crops = store.crops[:]
    seen = []

    def look(done, total):
        seen.append((Store(store.path).manifest, done))

    source = ramp_source(100, seed=5)
    small(store.path, source, overwrite=True, progress=look)
    assert len(seen) > 3
    assert all(manifest == store.manifest for manifest, _ in seen)

    source = failing_after(ramp_source(250), 10, DataError("broken image"))
    old = Store(store.path)
    with pytest.raises(DataError, match="broken image"):
        small(store.path, source, overwrite=True)
    np.testing.assert_array_equal(Store(store.path).crops[:], old.crops[:])
    assert len(old) != len(crops)
    assert names_in(store.path.parent) == ["s.zarr"]


def test_overwrite_interrupted_while_the_old_store_is_removed(store, ramp_source, monkeypatch):
    """Half a store still looks like one, so what is removed is elsewhere by then."""

    def interrupted(folder, **_):
        next(path for path in Path(folder).rglob("crops/c/**/*") if path.is_file()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(store.path, ramp_source(100, seed=5), overwrite=True)
    monkeypatch.undo()
    left = Store(store.path)
    assert left.manifest != store.manifest
    assert left.read(0, len(left)).any()
    small(store.path, ramp_source(100, seed=5), overwrite=True)
    assert names_in(store.path.parent) == ["s.zarr"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_overwrite_spares_what_is_no_store(tmp_path, source, kind):
    """Or a slip of the hand would remove somebody's folder."""
    target = tmp_path / "precious"
    if kind == "folder":
        target.mkdir()
        (target / "thesis.txt").write_text("years")
    else:
        target.write_text("years")
    with pytest.raises(DataError, match=r"precious: exists already and is no store"):
        small(target, source, overwrite=True)
    assert (target / "thesis.txt" if kind == "folder" else target).read_text() == "years"


@pytest.mark.usefixtures("small_regions")
@pytest.mark.parametrize("error", [DataError("broken"), ValueError("?"), KeyboardInterrupt()])
def test_exception_in_the_middle_leaves_nothing(tmp_path, source, error):
    with pytest.raises(type(error)):
        small(tmp_path / "s.zarr", failing_after(source, 10, error))
    assert names_in(tmp_path) == []


def test_exception_at_the_end_leaves_nothing(tmp_path, source, monkeypatch):
    def fail(*_, **__):
        raise ValueError("last step")

    monkeypatch.setattr(storewriter_module, "Manifest", fail)
    with pytest.raises(ValueError, match="last step"):
        small(tmp_path / "s.zarr", source)
    assert names_in(tmp_path) == []


KILLED = """
import sys, time
sys.path.insert(0, tests)
from conftest import make_source
from phenoseq.data import arrays, crops
from phenoseq.data.storewriter import write_store
crops.REGION, arrays.CHUNK, arrays.SHARD = 100, 16, 64

def wait(done, total):
    if done > 100:
        writing.set()
        time.sleep(60)

write_store(make_source(250), path, pixel_size=0.5, crop_px=16, progress=wait)
"""


def test_killed_in_the_middle(tmp_path, source, fork):
    path = tmp_path / "s.zarr"
    writing = multiprocessing.get_context("forkserver").Event()
    process = fork(KILLED, tests=str(ROOT / "tests"), path=path, writing=writing)
    assert writing.wait(timeout=60)
    (running,) = names_in(tmp_path)
    with pytest.raises(DataError, match=r"s\.zarr: another process is writing it; wait"):
        small(path, source, overwrite=True)
    assert names_in(tmp_path) == [running]
    process.kill()
    process.join()
    assert names_in(tmp_path) == [running]
    assert list((tmp_path / running).rglob("crops/c/*"))  # it had begun to write
    assert not is_store(path)
    with pytest.raises(DataError, match="no phenoseq store"):
        Store(path)
    assert len(small(path, source)) > 200
    assert names_in(tmp_path) == ["s.zarr"]


@pytest.mark.usefixtures("small_regions")
@pytest.mark.parametrize("overwrite", [False, True])
def test_another_process_was_faster(tmp_path, source, ramp_source, overwrite):
    """Both began at the same moment: one store is there, whole, whichever it is."""
    path, other = tmp_path / "s.zarr", ramp_source(100, seed=5)

    def meanwhile(done, total):
        if not path.exists():
            small(tmp_path / "elsewhere.zarr", other).path.rename(path)

    if overwrite:
        store = small(path, source, overwrite=True, progress=meanwhile)
        assert store.manifest.excluded != small(tmp_path / "t.zarr", other).manifest.excluded
        assert len(store) > 200
    else:
        with pytest.raises(DataError, match=r"another process has written it meanwhile.*kept"):
            small(path, source, progress=meanwhile)
        assert names_in(tmp_path) == ["s.zarr"]
        assert len(Store(path)) < 100
    left = Store(path)
    assert len(left.table()) == len(left.read(0, len(left)))


def test_other_files_beside_the_store_stay(tmp_path, source):
    for name in (".s.zarr.partial-notes", ".t.zarr.partial-999999", "s.zarr.partial-999999"):
        (tmp_path / name).mkdir()
    before = names_in(tmp_path)
    small(tmp_path / "s.zarr", source)
    assert names_in(tmp_path) == sorted([*before, "s.zarr"])


def test_parent_folders_are_made(tmp_path, source):
    small(tmp_path / "a" / "b" / "s.zarr", source)
    assert is_store(tmp_path / "a" / "b" / "s.zarr")


# -------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("when", ["crops", "table", "close"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path, source, ramp_source, monkeypatch, overwrite, when, code):
    path = tmp_path / "s.zarr"
    old = small(path, ramp_source(50)).manifest if overwrite else None
    before = names_in(tmp_path)

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    original = LocalStore.set

    async def full_set(self, key, value, *rest, **options):
        if (when == "crops" and key.startswith("crops/c")) or (
            when == "table" and "table/X/data/c" in key
        ):
            fail()
        return await original(self, key, value, *rest, **options)

    monkeypatch.setattr(LocalStore, "set", full_set)
    if when == "close":
        monkeypatch.setattr(storewriter_module, "Manifest", fail)
    with pytest.raises(DataError, match=r"s\.zarr: the disk is full .*nothing was written"):
        small(path, source, overwrite=overwrite)
    monkeypatch.undo()
    assert names_in(tmp_path) == before
    if overwrite:
        assert Store(path).manifest == old


@pytest.mark.parametrize("how", ["cause", "context"])
def test_full_disk_that_a_library_wraps(tmp_path, source, monkeypatch, how):
    def wrap(*_, **__):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if how == "cause":
                raise RuntimeError("error raised while writing key 'X'") from error
            raise RuntimeError("error raised while writing key 'X'")  # noqa: B904

    monkeypatch.setattr(ad.io, "write_elem", wrap)
    with pytest.raises(DataError, match="the disk is full"):
        small(tmp_path / "s.zarr", source)
    assert names_in(tmp_path) == []


def test_other_system_errors_are_not_called_a_full_disk(tmp_path, source, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(ad.io, "write_elem", denied)
    with pytest.raises(PermissionError):
        small(tmp_path / "s.zarr", source)
    assert names_in(tmp_path) == []


# ------------------------------------------------------------------------------- damaged, or none


def test_corrupt_chunk(store):
    (file,) = [path for path in (store.path / "crops" / "c").rglob("*") if path.is_file()]
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 0x01  # one bit
    file.write_bytes(data)
    damaged = Store(store.path)
    with pytest.raises(DataError, match=r"s\.zarr/crops/c/0/0/0/0, rows 0 to \d+: cannot be read"):
        damaged.read(0, len(damaged))
    with pytest.raises(DataError, match=r"s\.zarr/crops/c/0/0/0/0, rows"):
        damaged.take(np.arange(len(damaged)))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_shard(store, cut_file, share):
    (file,) = [path for path in (store.path / "crops" / "c").rglob("*") if path.is_file()]
    cut_file(file, share)
    with pytest.raises(DataError, match=r"s\.zarr/crops.*damaged"):
        Store(store.path).read(0, 10)


def test_missing_shard(tmp_path, source, monkeypatch):
    """Zarr would read zeros for it."""
    monkeypatch.setattr(arrays_module, "SHARD", 64)
    store = small(tmp_path / "s.zarr", source)
    (store.path / "crops" / "c" / "2" / "0" / "0" / "0").unlink()
    with pytest.raises(DataError, match=r"s\.zarr/crops/c/2/0/0/0: missing.*damaged"):
        Store(store.path)


def test_black_images_are_no_missing_shards(tmp_path, ramp_source):
    source = ramp_source(100)
    black = Level(0.5, (600, 800), lambda y0, y1, x0, x1: np.zeros((2, y1 - y0, x1 - x0), "u2"))
    image = FieldImage((black,), np.dtype(np.uint16))
    store = small(tmp_path / "s.zarr", replace(source, fields={"f0": image}))
    assert not Store(store.path).read(0, len(store)).any()


@pytest.mark.parametrize("part", ["crops", "table", "excluded"])
def test_missing_part(store, part):
    shutil.rmtree(store.path / part)
    with pytest.raises(DataError, match=rf"s\.zarr/{part}: missing.*damaged"):
        Store(store.path)


def test_damaged_table(store):
    (file,) = [path for path in (store.path / "table/X/data/c").rglob("*") if path.is_file()]
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(DataError, match=r"s\.zarr/table: cannot be read"):
        Store(store.path).table()


def test_what_is_no_store(tmp_path, store):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    zarr.create_group(tmp_path / "other.zarr", zarr_format=3)
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "broken.zarr" / "zarr.json").write_text("{")
    for path in ("nowhere", "file", "folder", "other.zarr", "broken.zarr", "s.zarr/crops"):
        assert not is_store(tmp_path / path)
        with pytest.raises(DataError, match="no phenoseq store; make one with 'phenoseq prepare"):
            Store(tmp_path / path)
    assert is_store(str(store.path))


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_other_schema_version(store, version):
    file = store.path / "zarr.json"
    raw = json.loads(file.read_text())
    raw["attributes"]["phenoseq"]["schema_version"] = version
    file.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=rf"s\.zarr: manifest of schema version {version}.*reads 1"):
        Store(store.path)


@pytest.mark.parametrize("change", ["lost", "unknown", "text"])
def test_broken_manifest(store, change):
    file = store.path / "zarr.json"
    raw = json.loads(file.read_text())
    manifest = raw["attributes"]["phenoseq"]
    if change == "lost":
        del manifest["pixel_size"]
    elif change == "unknown":
        manifest["colour"] = "blue"
    else:
        raw["attributes"]["phenoseq"] = "a store"
    file.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"s\.zarr: (broken manifest|manifest of schema version)"):
        Store(store.path)


# ----------------------------------------------------------------------------------------- memory


@pytest.mark.long
def test_memory_does_not_grow_with_the_image(tmp_path, ramp_source, monkeypatch):
    """Sixteen times the area and cells: the same crops in memory, only the tables grow."""
    monkeypatch.setattr(crops_module, "REGION", 256)
    monkeypatch.setattr(arrays_module, "SHARD", 128)
    template = ramp_source(1)

    def peak(side, n):
        rng = np.random.default_rng(0)
        source = ramp_source(rng.uniform(20, side / 2 - 20, (n, 2)))

        def read(y0, y1, x0, x1):
            return np.full((2, y1 - y0, x1 - x0), 7, dtype=np.uint16)

        image = FieldImage((Level(0.5, (side, side), read),), np.dtype(np.uint16))
        source = replace(source, fields={"f0": image}, var=template.var)
        tracemalloc.start()
        small(tmp_path / f"{side}.zarr", source, crop_px=32)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(512, 100)  # what libraries load once
    little, much = peak(750, 300), peak(3000, 4800)
    assert 4800 * 2 * 32 * 32 * 2 > 19e6  # the crops alone
    assert much - little < 5e6


def test_problems_of_the_source_are_in_the_manifest(ramp_source, tmp_path):
    problem = Problem("A03", "A03_ER.tif: truncated", 7)
    source = replace(ramp_source(), problems=(problem,))
    store = write_store(source, tmp_path / "a.zarr", pixel_size=0.5, crop_px=16)
    assert store.manifest.problems == (asdict(problem),)
    assert Store(tmp_path / "a.zarr").manifest.problems == (asdict(problem),)


# ---------------------------------------------------------------------------------------- names


def renamed(source, names):
    return replace(source, obs=source.obs.set_axis(pd.Index(names, dtype=object)))


def test_cell_ids_that_stand_there_twice(tmp_path, ramp_source):
    source = ramp_source(40)
    names = [f"c{min(k, 37)}" for k in range(40)]
    with pytest.raises(DataError, match=r"2 cell ids stand there more than once, e\.g\. \['c37'\]"):
        small(tmp_path / "s.zarr", renamed(source, names))
    assert names_in(tmp_path) == []


def test_long_integers_stay_cell_ids(tmp_path, ramp_source):
    """As floats, they would all be one."""
    source = ramp_source(40)
    names = [str(2**62 + k) for k in range(40)]
    store = small(tmp_path / "s.zarr", renamed(source, names))
    found = Store(store.path).obs().index
    assert found.is_unique
    assert set(found) <= set(names)
    assert all(isinstance(name, str) for name in found)


def test_spaces_and_accents_in_the_path(tmp_path, source):
    path = tmp_path / "Übung é 1 [a]*" / "größe 2.zarr"
    store = small(path, source)
    assert len(Store(path)) == len(store)
    small(path, source, overwrite=True)
    assert names_in(path.parent) == ["größe 2.zarr"]
    np.testing.assert_array_equal(store.read(3, 5), store.crops[3:5])


@pytest.mark.parametrize("part", ["data", "indices"])
def test_broken_counts(store, cut_file, part):
    (file,) = [p for p in (store.path / f"table/X/{part}/c").rglob("*") if p.is_file()]
    cut_file(file, 0.5)
    with pytest.raises(DataError, match=rf"table/X/{part}/c/0, rows 0 to \d+: cannot be read"):
        Store(store.path).counts(np.arange(10))
    Store(store.path).read(0, 10)


def test_a_store_lies_on_the_disk(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    for make in (Store, lambda path: small(path, source)):
        with pytest.raises(DataError, match=r"s3://bucket/s\.zarr: a URL"):
            make("s3://bucket/s.zarr")
    assert not list(tmp_path.iterdir())
