"""The Xenium section from folder to .h5ad: seconds, what is not network passes, peak memory.

python tests/benchmarks/section.py FOLDER [MODEL]
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

import phenoseq
from phenoseq.models.phenoseq import PhenoSeq


class Clock:
    """Adds up the time of the calls of a method."""

    def __init__(self, model: PhenoSeq, name: str) -> None:
        self.seconds, self._method = 0.0, getattr(model, name)
        setattr(model, name, self)

    def __call__(self, *args, **kwargs):
        start = time.perf_counter()
        out = self._method(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        return out


def main(folder: Path, name: str) -> None:
    model = phenoseq.load_model(name)
    encoder, sampler = Clock(model, "encode"), Clock(model, "generate")
    with tempfile.TemporaryDirectory() as where:
        start = time.perf_counter()
        result = phenoseq.predict(folder, model=model, out=Path(where) / "section.h5ad")
        whole = time.perf_counter() - start
    network = encoder.seconds + sampler.seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    steps = model.config.diffusion.steps
    print(f"{result.n_obs:,} cells, 16 draws of {steps} steps, {torch.get_num_threads()} threads")
    print("| | measured | at most |\n|---|---|---|")
    print(f"| whole time, folder to .h5ad | {whole:.0f} s | |")
    print(f"| encoder passes | {encoder.seconds:.0f} s | |")
    print(f"| 16 draws / encoder passes | {sampler.seconds / encoder.seconds:.2f} | 5 |")
    print(f"| all else / network passes | {(whole - network) / network:.3f} | 0.2 |")
    print(f"| peak memory | {peak:.2f} GB | 3 |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "xenium-pancreas")
