"""Arrays of a store, chunked by rows: written shard by shard, decoded into memory that is there.

Reading does not go through Zarr, which decodes into new memory on threads of its own: on one thread
that takes half as long again (``tests/benchmarks/streaming.py``). Read here is what phenoseq and
anndata write, a small part of Zarr v3: files on a disk, rows in chunks or in shards of chunks,
compressed by zstd or blosc.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc, zstd
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from phenoseq.errors import DataError

#: Most cells in a chunk (the least that is decoded) and in a shard (one file), and most bytes of a
#: chunk, by which there are fewer cells where each is large.
CHUNK, SHARD, CHUNK_BYTES = 64, 1024, 1 << 20
#: What an error says of a store whose files do not belong together.
DAMAGED = "the store is damaged: copy it again, or prepare it again"
# Where a shard's index says that a chunk is not there.
_NOWHERE = 2**64 - 1


@contextmanager
def reading(what: Path | str) -> Iterator[None]:
    """Turn what a library raises for a broken file into an error that says which."""
    try:
        yield
    except Exception as error:  # each codec has errors of its own
        raise DataError(f"{what}: cannot be read ({error}); {DAMAGED}") from error


class RowReader:
    """An array of a store, read by rows.

    Parameters
    ----------
    group
        The store's root, or a group in it.
    name
        Of the array.
    path
        Where the group is.

    Attributes
    ----------
    array
        The Zarr array, ``(n, ...)``.

    Raises
    ------
    DataError
        Where the array or one of its files is missing, or it is laid out in a way that phenoseq
        does not write.
    """

    def __init__(self, group: zarr.Group, name: str, path: Path) -> None:
        self.path = path / name
        array = group.get(name)
        if not isinstance(array, zarr.Array):
            raise DataError(f"{self.path}: missing; {DAMAGED}")
        self.array = array
        self._files = [self.path / "c" / place for place in _places(array)]
        for file in self._files:
            if not file.exists():
                raise DataError(f"{file}: missing; {DAMAGED}")
        codecs: Any = array.metadata.to_dict()["codecs"]
        self._sharded = codecs[0]["name"] == "sharding_indexed"
        if self._sharded:
            codecs = codecs[0]["configuration"]["codecs"]
        self._codecs = [codec["name"] for codec in codecs]
        if array.chunks[1:] != array.shape[1:] or not set(self._codecs) <= _CODECS:
            raise DataError(
                f"{self.path}: chunks of {array.chunks}, codecs {self._codecs}: not written by "
                "phenoseq; prepare it again"
            )

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.array.shape[0])

    @property
    def chunk(self) -> int:
        """Rows that are decoded together."""
        return int(self.array.chunks[0])

    @property
    def shard(self) -> int:
        """Rows in a shard, which is one file."""
        return int((self.array.shards or self.array.chunks)[0])

    def read(self, start: int, stop: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return rows ``start`` to ``stop``, in ``out`` if it is given.

        Raises
        ------
        DataError
            Where a chunk is corrupt; it names the file.
        """
        if out is None:
            out = np.empty((stop - start, *self.array.shape[1:]), dtype=self.array.dtype)
        for number in range(start // self.shard, -(-stop // self.shard)):
            low, high = max(start, number * self.shard), min(stop, (number + 1) * self.shard)
            with reading(f"{self._files[number]}, rows {low} to {high}"):
                self._read_file(number, low, high, out[low - start : high - start])
        return out

    def _read_file(self, number: int, start: int, stop: int, out: NDArray[Any]) -> None:
        """Read rows that are all in one file; whole chunks are decoded where they are wanted."""
        first, last = start // self.chunk, -(-stop // self.chunk)
        chunks = self._chunks(number, first, last)
        for k, raw in zip(range(first, last), chunks, strict=True):
            low, high = max(start, k * self.chunk), min(stop, (k + 1) * self.chunk)
            wanted = out[low - start : high - start]
            if len(wanted) == self.chunk:
                _decode(raw, self._codecs, wanted)
            else:
                whole = np.empty(self.array.chunks, dtype=out.dtype)
                _decode(raw, self._codecs, whole)
                wanted[:] = whole[low - k * self.chunk : high - k * self.chunk]

    def _chunks(self, number: int, first: int, last: int) -> Iterator[bytes]:
        """Yield the bytes of chunks ``first`` to ``last``, which are in one file."""
        with self._files[number].open("rb", buffering=0) as file:
            if not self._sharded:
                yield file.read()
                return
            in_file = self.shard // self.chunk
            file.seek(-16 * in_file - 4, os.SEEK_END)
            index = np.frombuffer(_checked(file.read()), "<u8").reshape(-1, 2)
            for at, size in index[first - number * in_file :][: last - first].tolist():
                if at == _NOWHERE:
                    raise ValueError("a chunk is missing")
                file.seek(at)
                raw = file.read(size)
                if len(raw) < size:
                    raise ValueError("it is cut short")
                yield raw

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return ``rows`` in that order; chunks side by side are read at once."""
        out = np.empty((len(rows), *self.array.shape[1:]), dtype=self.array.dtype)
        for run, start, stop in self.runs(rows):
            out[run] = self.read(start, stop)[rows[run] - start]
        return out

    def runs(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int, int]]:
        """Yield positions in ``rows`` that are read at once, and from which row to which.

        These are whole chunks side by side, within one shard.
        """
        size = self.chunk
        order = np.argsort(rows, kind="stable")
        chunk = rows[order] // size
        new = (np.diff(chunk) > 1) | (np.diff(chunk * size // self.shard) > 0)
        for run in np.split(order, np.flatnonzero(new) + 1):
            if len(run):
                start, stop = int(rows[run[0]] // size), int(rows[run[-1]] // size + 1)
                yield run, start * size, min(stop * size, len(self))


def _places(array: zarr.Array[Any]) -> list[str]:
    """Return the names of an array's files, in the order of the rows."""
    files = [-(-n // s) for n, s in zip(array.shape, array.shards or array.chunks, strict=True)]
    return ["/".join(map(str, place)) for place in itertools.product(*map(range, files))]


_CODECS = {"bytes", "blosc", "zstd", "crc32c"}


def _decode(raw: bytes, codecs: Sequence[str], out: NDArray[Any]) -> None:
    """Decode a chunk into ``out``, as the codecs' names say, the last first."""
    if codecs[-1] == "crc32c":
        raw, codecs = _checked(raw), codecs[:-1]
    if codecs[-1] == "blosc":
        blosc.decompress(raw, out)
    elif codecs[-1] == "zstd":
        zstd.decompress(raw, out)
    else:
        out[:] = np.frombuffer(raw, out.dtype).reshape(out.shape)


def _checked(raw: bytes) -> bytes:
    """Return what stands before a checksum, if it is right."""
    body = raw[:-4]
    if google_crc32c.value(body) != int.from_bytes(raw[-4:], "little"):
        raise ValueError("its checksum is wrong")
    return body


def create_rows(
    group: zarr.Group, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], axes: Sequence[str]
) -> zarr.Array[Any]:
    """Create an array with a row a cell, ``shape``, in chunks of about a megabyte inside shards."""
    chunk = min(CHUNK, max(CHUNK_BYTES // (math.prod(shape[1:]) * dtype.itemsize), 1))
    return create_sharded(
        group, name, shape, dtype, chunk=chunk, shard=SHARD // CHUNK * chunk, axes=axes
    )


def create_sharded(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    chunk: int,
    shard: int,
    axes: Sequence[str] | None = None,
) -> zarr.Array[Any]:
    """Create an array in chunks and shards of so many rows.

    Bytes are compressed by zstd alone, and wider numbers by blosc, which sorts their bits first:
    each is both the smaller and the faster on its kind of pixels. Chunks have checksums.
    """
    wide = (BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec())
    return group.create_array(
        name,
        shape=shape,
        chunks=(chunk, *shape[1:]),
        shards=(shard, *shape[1:]),
        dtype=dtype,
        compressors=wide if dtype.itemsize > 1 else ZstdCodec(level=3, checksum=True),
        dimension_names=axes,
        config={"write_empty_chunks": True},
    )


class RowWriter:
    """Appends rows to an empty array of a store, in whole shards."""

    def __init__(self, array: zarr.Array[Any]) -> None:
        self._array = array
        shard = (array.shards or array.chunks)[0]
        self._buffer = np.empty((shard, *array.shape[1:]), dtype=array.dtype)
        self._filled = self.written = 0

    def add(self, rows: NDArray[Any]) -> None:
        """Append rows ``(n, ...)``."""
        at = 0
        while at < len(rows):
            n = min(len(self._buffer) - self._filled, len(rows) - at)
            self._buffer[self._filled : self._filled + n] = rows[at : at + n]
            self._filled, at = self._filled + n, at + n
            if self._filled == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        """Write what is waiting; after less than a shard, nothing may be added."""
        if self._filled:
            end = self.written + self._filled
            if end > self._array.shape[0]:
                self._array.resize((end, *self._array.shape[1:]))
            self._array[self.written : end] = self._buffer[: self._filled]
            self.written, self._filled = end, 0
