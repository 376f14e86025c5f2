"""`prepare` on the Xenium section: seconds and peak memory.

python tests/benchmarks/prepare.py FOLDER
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

from phenoseq.data.readers import open_source
from phenoseq.data.storewriter import write_store


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as where:
        start = time.perf_counter()
        store = write_store(open_source(folder), Path(where) / "section.zarr")
        whole = time.perf_counter() - start
        size = sum(f.stat().st_size for f in store.path.rglob("*") if f.is_file())
    raw = store.crops.nbytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print("| | measured | at most |\n|---|---|---|")
    print(f"| cells stored | {len(store):,} | |")
    print(f"| time | {whole:.0f} s | |")
    print(f"| peak memory | {peak:.2f} GB | 1.5 |")
    print(f"| store / raw crops | {size / raw:.2f} | |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
