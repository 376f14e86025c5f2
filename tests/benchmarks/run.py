"""Every benchmark, one after the other: `make bench`.

Those on the Xenium section need its folder, PHENOSEQ_XENIUM, by default xenium_pancreas in
PHENOSEQ_DATA, by default ../shared/data. Folders of other data are looked for beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("PHENOSEQ_DATA", HERE.parents[1].parent / "shared/data"))
SECTION = Path(os.environ.get("PHENOSEQ_XENIUM", DATA / "xenium_pancreas"))


def bench(title: str, *arguments: str) -> None:
    print(f"\n## {title}\n", flush=True)
    subprocess.run([sys.executable, "-W", "ignore", *arguments], check=True)


def main() -> None:
    bench("Start-up", str(HERE / "startup.py"))
    bench("Accuracy of the samplers", str(HERE / "diffusion_accuracy.py"))
    bench("The published network, ours against the plain way", str(HERE / "published.py"))
    bench("Two processes against one", str(HERE / "ddp.py"))
    bench("Gradient checkpointing of the encoder", str(HERE / "recompute.py"))
    bench("predict to a file: memory", str(HERE / "memory.py"))
    with tempfile.TemporaryDirectory() as where:
        store = str(Path(where) / "simulated.zarr")
        simulate = str(HERE.parents[1] / "examples" / "simulate_plate.py")
        subprocess.run([sys.executable, simulate, store], check=True, stdout=subprocess.DEVNULL)
        bench("Codec, chunk and shard of 16-bit pixels", str(HERE / "layout.py"), store)
    if not SECTION.is_dir():
        print(f"\nno Xenium section at {SECTION}: the benchmarks on it are left out")
        return
    bench("prepare, on the section", str(HERE / "prepare.py"), str(SECTION))
    with tempfile.TemporaryDirectory() as where:
        store = str(Path(where) / "section.zarr")
        command = ["-m", "phenoseq.cli", "prepare", str(SECTION), store]
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        bench("Streaming a store", str(HERE / "streaming.py"), store)
        bench("Codec, chunk and shard of a store", str(HERE / "layout.py"), store)
        bench("Fine-tuning on cached tokens", str(HERE / "caching.py"), store)
        bench("decode: how many neighbours", str(HERE / "neighbours.py"), store)
        bench("Steps: quality against cost", str(HERE / "steps.py"), store)
        bench("Draws: quality of the mean", str(HERE / "draws.py"), store)
        command = [store, "xenium-pancreas", str(SECTION.parent)]
        bench("Out-of-distribution score", str(HERE / "ood.py"), *command)
        bench("Coverage, as predicted and recalibrated", str(HERE / "calibration.py"), store)
    bench("predict, on the whole section", str(HERE / "section.py"), str(SECTION))


if __name__ == "__main__":
    main()
