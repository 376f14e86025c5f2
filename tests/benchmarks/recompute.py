"""Gradient checkpointing of the encoder: peak memory and time of a training step, with and without.

python tests/benchmarks/recompute.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch

from phenoseq.models.encoder import Encoder, EncoderConfig

BACKBONES, BATCH, CHANNELS, CROP_PX, STEPS = ("regnetx_002", "vit_small_patch16_224"), 256, 4, 64, 4


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(backbone: str, recompute: bool) -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(backbone), CHANNELS, CROP_PX, 128)
    if recompute:
        encoder.recompute()
    present = torch.ones(BATCH, CHANNELS, dtype=torch.bool)
    images = torch.randn(BATCH, CHANNELS, CROP_PX, CROP_PX)

    def step(n: int) -> None:
        tokens, _ = encoder(images[:n], present[:n])
        tokens.square().mean().backward()
        encoder.zero_grad()

    step(2)
    before = peak_mb()
    step(BATCH)
    start = time.perf_counter()
    for _ in range(STEPS):
        step(BATCH)
    print(f"{peak_mb() - before:.0f} {(time.perf_counter() - start) / STEPS:.3f}")


def main() -> None:
    print("| backbone | checkpointing | memory of a step, MB | time, s |\n|---|---|---|---|")
    for backbone in BACKBONES:
        for recompute in (False, True):
            command = [sys.executable, __file__, backbone, str(int(recompute))]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            memory, seconds = out.split()[-2:]
            print(f"| {backbone} | {'yes' if recompute else 'no'} | {memory} | {seconds} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], sys.argv[2] == "1")
    else:
        main()
