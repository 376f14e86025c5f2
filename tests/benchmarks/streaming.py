"""Streaming a store: throughput against the bare decode and against random reads; memory.

    python tests/benchmarks/streaming.py STORE.zarr

Every ratio is of two measurements in this run, repeated in turn; the median is shown. The bare
decode is what the codecs need by themselves: on one thread, each chunk of crops and counts once, in
the order of the files, into an array that is there already. Zarr's own reading of the same, also on
one thread, is shown beside it.
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

from phenoseq.data.arrays import RowReader, RowWriter, create_rows
from phenoseq.data.csr import CsrWriter
from phenoseq.data.dataset import CellStream, StreamLoader
from phenoseq.data.store import Store

BATCH, RUNS, SINGLE = 128, 5, 512


def decode(array: RowReader) -> None:
    """Decode each chunk of an array once, a shard at a time, into one piece of memory."""
    room = np.empty((min(array.shard, len(array)), *array.array.shape[1:]), array.array.dtype)
    for at in range(0, len(array), array.shard):
        stop = min(at + array.shard, len(array))
        array.read(at, stop, room[: stop - at])


def bare(store: Store) -> float:
    """Cells a second, decoded only."""
    start = time.perf_counter()
    for array in (store.images, store.rna.values, store.rna.columns):
        decode(array)
    return len(store) / (time.perf_counter() - start)


def by_zarr(store: Store) -> float:
    """Cells a second, read by Zarr."""
    start = time.perf_counter()
    for array in (store.images, store.rna.values, store.rna.columns):
        for at in range(0, len(array), array.shard):
            array.array[at : at + array.shard]
    return len(store) / (time.perf_counter() - start)


def streamed(store: Store) -> float:
    """Cells a second, shuffled, from one worker while it runs.

    Timed from the first batch of the second window to the first batch of the last one, so that as
    many cells are decoded as are given. The start of the worker and its end, some seconds,
    are not in it.
    """
    stream = CellStream(store.path, np.arange(len(store)), batch_size=BATCH, shuffle=True)
    size = stream.window * store.shard
    first, last = size // BATCH, (len(store) - 1) // size * size // BATCH
    times = [time.perf_counter() for _ in StreamLoader(stream, num_workers=1)]
    return (last - first) * BATCH / (times[last] - times[first])


def one_by_one(store: Store) -> float:
    """Cells a second in random order, one read a cell."""
    rows = np.random.default_rng(0).choice(len(store), SINGLE, replace=False)
    start = time.perf_counter()
    for row in rows.tolist():
        store.read(row, row + 1)
        store.rna.read(row, row + 1)
    return SINGLE / (time.perf_counter() - start)


def throughput(store: Store) -> None:
    ways = {"bare": bare, "zarr": by_zarr, "streamed": streamed, "single": one_by_one}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, way in ways.items():
            rates[name].append(way(store))
    rate = {name: median(values) for name, values in rates.items()}
    print(f"{len(store):,} cells, {store.crops.dtype} crops {store.crops.shape[1:]}\n")
    print("| | measured | at least |\n|---|---|---|")
    for name, what in (("bare", "bare decode"), ("zarr", "read by Zarr"), ("streamed", "a worker")):
        print(f"| {what}, one thread | {rate[name]:,.0f} cells a second | |")
    print(f"| one worker / bare decode | {rate['streamed'] / rate['bare']:.2f} | 0.8 |")
    print(f"| one worker / read by Zarr | {rate['streamed'] / rate['zarr']:.2f} | |")
    print(f"| one worker / one read a cell | {rate['streamed'] / rate['single']:.1f} | 5 |")


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
    table = store.table()[:cells]
    many = ad.concat([table] * times, keys=[str(i) for i in range(times)], index_unique="-")
    group = zarr.create_group(path, zarr_format=3)
    shape = (cells * times, *store.crops.shape[1:])
    axes = ("cell", "channel", "y", "x")
    writer = RowWriter(create_rows(group, "crops", shape, store.crops.dtype, axes))
    for _ in range(times):
        for at in range(0, cells, store.shard):
            writer.add(store.read(at, at + store.shard))
    writer.flush()
    with ad.settings.override(zarr_write_format=3):
        ad.io.write_elem(group, "table", ad.AnnData(obs=many.obs, var=table.var))
        ad.io.write_elem(group, "excluded", many.obs.iloc[:0])
    matrix = CsrWriter(group.create_group("table/X"), many.shape[1])
    matrix.add(many.X)
    matrix.finish()
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


def main(path: str) -> None:
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})
    store = Store(path)
    with tempfile.TemporaryDirectory() as where:
        throughput(store)
        memory(store, Path(where))


if __name__ == "__main__":
    main(sys.argv[1])
