"""A prediction is written whole or not at all, and never over something else."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from phenoseq.errors import DataError
from phenoseq.inference.writer import check_out, write_whole

both = pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])


def table(value: float = 1.0) -> ad.AnnData:
    adata = ad.AnnData(np.full((5, 3), value, dtype=np.float32), uns={"phenoseq": {"none": []}})
    adata.layers["draw"] = adata.X.copy()
    return adata


def read(path: Path) -> ad.AnnData:
    return ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)


@pytest.fixture
def full_disk(monkeypatch):
    """Let a file be half written, then fail as a full disk does."""

    def half(self, path, **_):
        Path(path).write_bytes(b"half") if Path(path).suffix == ".h5ad" else Path(path).mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ad.AnnData, "write_h5ad", half)
    monkeypatch.setattr(ad.AnnData, "write_zarr", half)


@both
def test_written_and_replaced(tmp_path, suffix):
    path = check_out(tmp_path / f"out{suffix}")
    for value in (1.0, 2.0):
        write_whole(table(value), path)
        assert (value == read(path).X).all()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@both
def test_zarr_is_version_three_and_h5ad_opens(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    write_whole(table(), path)
    assert (path / "zarr.json").exists() == (suffix == ".zarr")


@pytest.mark.parametrize("name", ["out", "out.csv", "out.h5", "out.H5AD", "out.zarr.zip"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"name the output OUT\.h5ad or OUT\.zarr"):
        check_out(tmp_path / name)


def test_a_bucket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"s3://bucket/out\.h5ad: a URL; stores and predictions"):
        check_out("s3://bucket/out.h5ad")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_made(tmp_path):
    path = check_out(tmp_path / "a" / "b" / "out.h5ad")
    write_whole(table(), path)
    assert read(path).shape == (5, 3)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be made"):
        check_out(tmp_path / "file" / "out.h5ad")


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match="no permission to write"):
        check_out(tmp_path / "out.h5ad")


@both
def test_a_full_disk_leaves_nothing(tmp_path, suffix, full_disk):
    with pytest.raises(DataError, match=r"the disk is full.*GB free.*Free some space"):
        write_whole(table(), tmp_path / f"out{suffix}")
    assert not any(tmp_path.iterdir())


@both
def test_a_full_disk_keeps_what_was_there(tmp_path, suffix, monkeypatch, request):
    path = tmp_path / f"out{suffix}"
    write_whole(table(7.0), path)
    request.getfixturevalue("full_disk")
    with pytest.raises(DataError, match="disk is full"):
        write_whole(table(8.0), path)
    monkeypatch.undo()
    assert (read(path).X == 7).all()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_as_hdf5_tells_it(tmp_path, monkeypatch):
    def fail(self, path, **_):
        raise OSError("Unable to write (file write failed: errno = 28, 'No space left on device')")

    monkeypatch.setattr(ad.AnnData, "write_h5ad", fail)
    with pytest.raises(DataError, match="disk is full"):
        write_whole(table(), tmp_path / "out.h5ad")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device stands for a full disk")
def test_a_disk_that_is_truly_full(tmp_path, monkeypatch):
    """The error of a real full device, not an imitation of it."""
    whole = ad.AnnData.write_zarr

    def fail(self, path, **_):
        whole(self, path)
        with open("/dev/full", "wb") as device:
            device.write(b"x")

    monkeypatch.setattr(ad.AnnData, "write_zarr", fail)
    with pytest.raises(DataError, match="disk is full"):
        write_whole(table(), tmp_path / "out.zarr")
    assert not any(tmp_path.iterdir())


@both
def test_other_errors_and_interrupts_leave_nothing_either(tmp_path, suffix, monkeypatch):
    for error in (OSError(errno.EIO, "broken"), KeyboardInterrupt()):

        def fail(self, path, *, error=error, **_):
            Path(path).mkdir()
            raise error

        monkeypatch.setattr(ad.AnnData, "write_h5ad", fail)
        monkeypatch.setattr(ad.AnnData, "write_zarr", fail)
        with pytest.raises(type(error)):
            write_whole(table(), tmp_path / f"out{suffix}")
        assert not any(tmp_path.iterdir())


@both
def test_what_is_no_table_of_cells_is_not_replaced(tmp_path, suffix):
    """A folder of the user's, or a store that took an hour, by that name."""
    path = tmp_path / f"mine{suffix}"
    (path / "precious").mkdir(parents=True)
    with pytest.raises(DataError, match=r"exists.*no prediction"):
        check_out(path)
    assert (path / "precious").exists()


def test_a_training_store_is_not_replaced(store):
    with pytest.raises(DataError, match=r"exists.*no prediction"):
        check_out(store.path)


def test_a_zarr_folder_is_moved_aside_whole(tmp_path, monkeypatch):
    """Half removed, it would look like a table."""
    path = tmp_path / "out.zarr"
    write_whole(table(1.0), path)
    removed, rmtree = [], shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda p, *a, **k: removed.append(Path(p)) or rmtree(p, *a, **k)
    )
    write_whole(table(2.0), path)
    assert (read(path).X == 2).all()
    assert path not in removed
