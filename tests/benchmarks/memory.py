"""Memory of `predict` from a file of features to a file: 100,000 rows against 1,000,000.

    python tests/benchmarks/memory.py

A small network of the published kind; both files hold more features than are held at once. Each
run is a process of its own, `phenoseq predict` as a user calls it, whose peak is measured.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import torch

from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.models.published_config import (
    Origin,
    PublishedConfig,
    PublishedNoise,
    PublishedSizes,
)

ROWS, WIDTH, A_SAMPLE, AT_ONCE = (100_000, 1_000_000), 1536, 1000, 10_000

RUN = """
import resource, sys, time
from phenoseq.cli import main
start = time.perf_counter()
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter() - start)
sys.exit(code)
"""


def write_features(path: Path, n: int) -> None:
    """Write a table of noise, of which rows of a sample stand side by side."""
    obs = pd.DataFrame(
        {"Metadata_Well": pd.Categorical.from_codes(
            np.arange(n) // A_SAMPLE, [f"well{i:05d}" for i in range(n // A_SAMPLE)]
        )},
        index=[f"plate1_{i:07d}" for i in range(n)],
    )  # fmt: skip
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        ad.io.write_elem(file, "/", ad.AnnData(obs=obs, shape=(n, WIDTH)))
        x = file.create_dataset(
            "X", (n, WIDTH), "float32", chunks=(64, WIDTH), compression="lzf", shuffle=True
        )
        x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        block = np.zeros((AT_ONCE, WIDTH), dtype=np.float32)
        for start in range(0, n, AT_ONCE):
            block[:, :64] = rng.standard_normal((AT_ONCE, 64))  # the rest is easily packed
            x[start : start + AT_ONCE] = block


def save_network(folder: Path) -> Path:
    sizes = PublishedSizes(WIDTH, 32, 16, 4, 2, 1, 8, 2, 0.0)
    torch.manual_seed(0)
    config = PublishedConfig(Origin("", "", "raw"), sizes, PublishedNoise(steps=2))
    return PublishedPhenoSeq(config).save(folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as where:
        model = save_network(Path(where) / "model")
        print("| rows of features | output | peak memory | seconds |\n|---|---|---|---|")
        peaks: dict[str, list[float]] = {".h5ad": [], ".zarr": []}
        for n in ROWS:
            features = Path(where) / f"{n}.h5ad"
            write_features(features, n)
            for suffix, found in peaks.items():
                command = ["predict", str(features), "--model", str(model), "--device", "cpu"]
                command += ["--sample", "Metadata_Well", "--n-samples", "2"]
                command += ["-o", str(Path(where) / f"{n}-out{suffix}")]
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", RUN, *command],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                peak, seconds = done.stdout.split()[-2:]
                found.append(int(peak) / 1e6)
                print(
                    f"| {n:,} | {suffix} | {found[-1]:.3f} GB | {float(seconds):.0f} |", flush=True
                )
            features.unlink()
        for suffix, (small, large) in peaks.items():
            print(f"| ratio (at most 1.1) | {suffix} | {large / small:.3f} | |")


if __name__ == "__main__":
    main()
