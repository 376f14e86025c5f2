"""Arrays are read as Zarr reads them, whatever phenoseq or anndata wrote, or not at all."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from phenoseq.data.arrays import RowReader, RowWriter, create_rows
from phenoseq.errors import DataError

CODECS = {
    "zstd": ZstdCodec(level=3, checksum=True),
    "zstd of anndata": ZstdCodec(level=0, checksum=False),
    "blosc with checksum": (BloscCodec(cname="zstd", shuffle="bitshuffle"), Crc32cCodec()),
    "none": None,
}


@pytest.fixture
def made(tmp_path):
    def make(values, codecs, shards=True):
        group = zarr.create_group(tmp_path / "s.zarr", zarr_format=3)
        array = group.create_array(
            "a",
            shape=values.shape,
            dtype=values.dtype,
            chunks=(8, *values.shape[1:]),
            shards=(32, *values.shape[1:]) if shards else None,
            compressors=codecs,
            config={"write_empty_chunks": True},
        )
        array[:] = values
        return group

    return make


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "i8"])
@pytest.mark.parametrize("codecs", CODECS)
def test_reads_as_zarr_does(tmp_path, made, codecs, dtype, shards):
    values = np.random.default_rng(0).integers(0, 100, (77, 2, 3)).astype(dtype)
    reader = RowReader(made(values, CODECS[codecs], shards), "a", tmp_path / "s.zarr")
    assert (len(reader), reader.chunk, reader.shard) == (77, 8, 32 if shards else 8)
    for start, stop in ((0, 77), (8, 32), (5, 6), (30, 70), (76, 77), (12, 12)):
        found = reader.read(start, stop)
        np.testing.assert_array_equal(found, values[start:stop])
        assert found.dtype == values.dtype
    room = np.full((40, 2, 3), 101).astype(dtype)
    reader.read(3, 33, room[5:35])
    np.testing.assert_array_equal(room[5:35], values[3:33])
    assert (room[:5] == 101).all()
    assert (room[35:] == 101).all()


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_what_is_written_can_be_read(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 100, (2100, 3)).astype(dtype)
    group = zarr.create_group(tmp_path / "s.zarr", zarr_format=3)
    writer = RowWriter(create_rows(group, "a", (0, 3), values.dtype, ("cell", "x")))
    for part in np.array_split(values, 5):
        writer.add(part)
    writer.flush()
    reader = RowReader(group, "a", tmp_path / "s.zarr")
    np.testing.assert_array_equal(reader.read(0, 2100), values)
    np.testing.assert_array_equal(reader.array[:], values)
    rows = np.random.default_rng(0).integers(0, 2100, 50)
    np.testing.assert_array_equal(reader.take(rows), values[rows])


def test_layouts_of_other_programs_are_refused(tmp_path, made):
    group = made(np.arange(40), GzipCodec())
    with pytest.raises(DataError, match=r"s\.zarr/a: .*'gzip'.*prepare it again"):
        RowReader(group, "a", tmp_path / "s.zarr")


@pytest.mark.parametrize("codecs", ["zstd", "blosc with checksum"])
@pytest.mark.parametrize("harm", ["bit", "cut"])
def test_one_broken_shard_costs_no_other(tmp_path, made, codecs, harm, cut_file):
    values = np.random.default_rng(0).integers(0, 100, (96, 50)).astype("u1")
    group = made(values, CODECS[codecs])
    file = tmp_path / "s.zarr" / "a" / "c" / "1" / "0"
    if harm == "cut":
        cut_file(file, 0.5)
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 0x10
        file.write_bytes(data)
    reader = RowReader(group, "a", tmp_path / "s.zarr")
    with pytest.raises(DataError, match=r"s\.zarr/a/c/1/0, rows 32 to 64: cannot.*copy it again"):
        reader.read(0, 96)
    for start in (0, 64):
        np.testing.assert_array_equal(reader.read(start, start + 32), values[start : start + 32])


def test_a_chunk_that_was_never_written(tmp_path):
    """Zarr reads zeros."""
    group = zarr.create_group(tmp_path / "s.zarr", zarr_format=3)
    array = group.create_array("a", shape=(32,), dtype="u1", chunks=(8,), shards=(32,))
    array[:8] = 1
    reader = RowReader(group, "a", tmp_path / "s.zarr")
    assert reader.read(0, 8).all()
    with pytest.raises(DataError, match="a chunk is missing"):
        reader.read(0, 9)
