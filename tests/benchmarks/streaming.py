"""Streaming a store: throughput against the bare decode and against random reads; memory; layouts.

    python tests/benchmarks/streaming.py STORE.zarr

Every ratio is of two measurements in this run, repeated in turn; the median is shown.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import anndata as ad
import numpy as np
import zarr
from zarr.codecs import BloscCodec

from phenoseq.data.dataset import CellStream, StreamLoader
from phenoseq.data.store import Store

CELLS, BATCH, RUNS, SINGLE = 24_576, 128, 3, 512


def bare(store: Store) -> float:
    """Seconds to decode the crops of the first cells, shard by shard."""
    start = time.perf_counter()
    for at in range(0, CELLS, store.shard):
        store.crops[at : min(at + store.shard, CELLS)]
    return time.perf_counter() - start


def streamed(store: Store, cells: int) -> float:
    """Seconds for the first cells, shuffled, from one worker, its start included."""
    stream = CellStream(store.path, np.arange(cells), batch_size=BATCH, shuffle=True)
    loader = StreamLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    start = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start


def one_by_one(store: Store) -> float:
    """Seconds to read as many cells in random order, one read a cell, from a sample of them."""
    rows = np.random.default_rng(0).choice(CELLS, SINGLE, replace=False)
    start = time.perf_counter()
    for row in rows:
        store.crops[int(row)]
    return (time.perf_counter() - start) * CELLS / SINGLE


def throughput(store: Store) -> None:
    times: dict[str, list[float]] = {"bare": [], "streamed": [], "single": []}
    for _ in range(RUNS):
        times["bare"].append(bare(store))
        times["streamed"].append(streamed(store, CELLS) - streamed(store, BATCH))
        times["single"].append(one_by_one(store))
    middle = {name: median(values) for name, values in times.items()}
    print(f"{CELLS:,} cells, {store.crops.dtype} crops {store.crops.shape[1:]}\n")
    print("| | measured | at least |\n|---|---|---|")
    print(f"| bare decode | {CELLS / middle['bare']:,.0f} cells a second | |")
    print(f"| one worker / bare decode | {middle['bare'] / middle['streamed']:.2f} | 0.8 |")
    print(f"| one worker / one read a cell | {middle['single'] / middle['streamed']:.1f} | 5 |")


MEMORY = """
import resource, sys
from phenoseq.data.dataset import CellStream
from phenoseq.data.store import Store
import numpy as np
store = Store(sys.argv[1])
rows = np.arange(len(store))
for batch in CellStream(store.path, rows, batch_size=128, shuffle=True):
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def replicate(store: Store, path: Path, cells: int, times: int) -> None:
    """Write a store of the first cells, so many times over."""
    crops, rows = store.crops[:cells], np.arange(cells)
    table = store.table()[rows]
    many = ad.concat([table] * times, keys=[str(i) for i in range(times)], index_unique="-")
    many.var = table.var
    group = zarr.create_group(path, zarr_format=3)
    array = group.create_array(
        "crops",
        shape=(cells * times, *crops.shape[1:]),
        chunks=store.crops.chunks,
        shards=store.crops.shards,
        dtype=crops.dtype,
    )
    for k in range(times):
        array[k * cells : (k + 1) * cells] = crops
    with ad.settings.override(zarr_write_format=3):
        ad.io.write_elem(group, "table", many)
        ad.io.write_elem(group, "excluded", table.obs.iloc[:0])
    group.attrs.update(zarr.open_group(store.path, mode="r").attrs.asdict())


def memory(store: Store, where: Path) -> None:
    peaks = []
    for times in (1, 10):
        path = where / f"{times}.zarr"
        replicate(store, path, 10 * store.shard, times)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEMORY, str(path)],
            check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        peaks.append(int(done.stdout.split()[-1]) / 1e6)
        shutil.rmtree(path)
    print("\n| memory of an epoch | cells | peak |\n|---|---|---|")
    for times, peak in zip((1, 10), peaks, strict=True):
        print(f"| | {10 * store.shard * times:,} | {peak:.3f} GB |")
    print(f"| ratio (at most 1.1) | | {peaks[1] / peaks[0]:.3f} |")


def layouts(store: Store, where: Path) -> None:
    """Chunks, shards and codecs: size, and seconds to write and read."""
    cells = 8192
    crops = store.crops[:cells]
    codecs = {
        "zstd 3, bitshuffle": BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
        "zstd 3, no shuffle": BloscCodec(cname="zstd", clevel=3, shuffle="noshuffle"),
        "lz4 5, bitshuffle": BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
        "none": None,
    }
    print(f"\n{cells:,} cells; random: batches of {BATCH} cells anywhere\n")
    print("| codec | chunk | shard | size / raw | write | sequential read | shuffled read |")
    print("|---|---|---|---|---|---|---|")
    shuffled = np.random.default_rng(0).permutation(cells)[: 4 * BATCH].reshape(4, BATCH)
    for name, codec in codecs.items():
        for chunk, shard in ((64, 1024), (16, 1024), (64, 4096), (256, 1024)):
            path = where / "layout.zarr"
            start = time.perf_counter()
            array = zarr.create_array(
                path, shape=crops.shape, chunks=(chunk, *crops.shape[1:]),
                shards=(shard, *crops.shape[1:]), dtype=crops.dtype,
                compressors=codec, overwrite=True,
            )  # fmt: skip
            for at in range(0, cells, shard):
                array[at : at + shard] = crops[at : at + shard]
            wrote = time.perf_counter()
            for at in range(0, cells, shard):
                array[at : at + shard]
            read = time.perf_counter()
            for rows in shuffled:
                array.oindex[np.sort(rows)]
            done = time.perf_counter()
            size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / crops.nbytes
            again = (done - read) * cells / shuffled.size
            print(
                f"| {name} | {chunk} | {shard} | {size:.2f} | {wrote - start:.1f} s | "
                f"{read - wrote:.1f} s | {again:.1f} s |",
                flush=True,
            )
            shutil.rmtree(path)


def main(path: str) -> None:
    store = Store(path)
    with tempfile.TemporaryDirectory() as where:
        throughput(store)
        memory(store, Path(where))
        layouts(store, Path(where))


if __name__ == "__main__":
    main(sys.argv[1])
