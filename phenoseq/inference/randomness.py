"""Random numbers of a cell: from (seed, cell id, sample index) alone.

So a cell's prediction does not depend on batch size, order, rank or device. Latent noise comes in
antithetic pairs: sample 2k + 1 uses the negative of the noise of sample 2k. Each draw is an exact
draw still, and most of the sampling error of the mean over draws cancels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def cell_normals(seed: int, cells: Sequence[str], n_samples: int, dim: int) -> NDArray[np.float32]:
    """Return standard normal noise ``(n_cells, n_samples, dim)``, in antithetic pairs."""
    out = np.empty((len(cells), n_samples, dim), dtype=np.float32)
    pairs = (n_samples + 1) // 2
    for place, cell in zip(out, cells, strict=True):
        half = _stream(seed, cell, "latent").standard_normal((pairs, dim), dtype=np.float32)
        place[0::2] = half
        place[1::2] = -half[: n_samples // 2]
    return out


def cell_uniforms(seed: int, cells: Sequence[str], n_samples: int, dim: int) -> NDArray[np.float32]:
    """Return uniform numbers on [0, 1), ``(n_cells, n_samples, dim)``, for counting noise."""
    out = np.empty((len(cells), n_samples, dim), dtype=np.float32)
    for place, cell in zip(out, cells, strict=True):
        place[:] = _stream(seed, cell, "counts").random((n_samples, dim), dtype=np.float32)
    return out


def bag_normals(seed: int, bags: Sequence[str], n_samples: int, dim: int) -> NDArray[np.float32]:
    """Return standard normal noise ``(n_bags, n_samples, dim)``, every draw with its own stream.

    Draws of a bag stand for cells of its sample, so they are not antithetic.
    """
    out = np.empty((len(bags), n_samples, dim), dtype=np.float32)
    for place, bag in zip(out, bags, strict=True):
        for k in range(n_samples):
            stream = _stream(seed, f"{bag}\0{k}", "bag")
            place[k] = stream.standard_normal(dim, dtype=np.float32)
    return out


def _stream(seed: int, cell: str, purpose: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{cell}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
