"""The choice of codec, chunk and shard: size, and speed of writing and reading.

    python tests/benchmarks/layout.py STORE.zarr

Crops of the store are written in each layout and read back, on one thread, by what streams read
with; seconds are of processor time. Shuffled: batches of 128 cells from anywhere, which is the most
that chunks can cost.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import zarr
from zarr.codecs import BloscCodec, ZstdCodec

from phenoseq.data.arrays import RowReader, RowWriter
from phenoseq.data.store import Store

CELLS, BATCH, BATCHES, RUNS = 4096, 128, 4, 3
CODECS = {
    "zstd 3": ZstdCodec(level=3, checksum=True),
    "blosc zstd 3, bitshuffle": BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
    "blosc zstd 3": BloscCodec(cname="zstd", clevel=3, shuffle="noshuffle"),
    "blosc lz4 5, bitshuffle": BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
}
CHUNKS, SHARDS = (16, 64, 256), (1024, 4096)


def measure(crops: np.ndarray, codec: object, chunk: int, shard: int, where: Path) -> list[float]:
    """Return size over raw size, and megabytes a second written, read, and read in batches."""
    path = where / "layout.zarr"
    group = zarr.create_group(path, zarr_format=3)
    start = time.process_time()
    rest = crops.shape[1:]
    array = group.create_array(
        "crops", shape=crops.shape, dtype=crops.dtype, compressors=codec,
        chunks=(chunk, *rest), shards=(shard, *rest), config={"write_empty_chunks": True},
    )  # fmt: skip
    writer = RowWriter(array)
    writer.add(crops)
    writer.flush()
    wrote = time.process_time() - start
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    reader = RowReader(group, "crops", path)
    room = np.empty_like(crops[:shard])
    batches = np.random.default_rng(0).permutation(len(crops))[: BATCH * BATCHES]
    read, shuffled = [], []
    for _ in range(RUNS):
        start = time.process_time()
        for at in range(0, len(crops), shard):
            reader.read(at, at + shard, room)
        read.append(time.process_time() - start)
        start = time.process_time()
        for rows in batches.reshape(BATCHES, BATCH):
            reader.take(rows)
        shuffled.append(time.process_time() - start)
    shutil.rmtree(path)
    per_cell = crops.nbytes / len(crops)
    return [
        size / crops.nbytes,
        crops.nbytes / wrote / 1e6,
        crops.nbytes / median(read) / 1e6,
        per_cell * len(batches) / median(shuffled) / 1e6,
    ]


def main(path: str) -> None:
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})
    store = Store(path)
    middle = min(len(store) // 2, len(store) - CELLS) // store.shard * store.shard
    crops = store.read(middle, middle + CELLS)
    now = f"{store.images.chunk}, {store.shard}"
    print(f"{CELLS:,} {crops.dtype} crops {crops.shape[1:]}; this store has chunk, shard {now}\n")
    print("| codec | chunk | shard | size / raw | write | sequential read | shuffled read |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as where:
        for name, codec in CODECS.items():
            for chunk in CHUNKS:
                for shard in SHARDS:
                    size, *speeds = measure(crops, codec, chunk, shard, Path(where))
                    shown = " | ".join(f"{speed:,.0f} MB/s" for speed in speeds)
                    print(f"| {name} | {chunk} | {shard} | {size:.3f} | {shown} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
