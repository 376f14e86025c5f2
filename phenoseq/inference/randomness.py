"""Random numbers of a cell: from (seed, cell id, sample index) alone.

So a cell's prediction does not depend on batch size, order, rank or device. All are independent:
scores of a distribution, its spread and its quantiles take draws to be so. (Antithetic pairs would
steady the mean over draws, and flatter the fair estimators of energy score and CRPS.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def cell_normals(seed: int, cells: Sequence[str], n_samples: int, dim: int) -> NDArray[np.float32]:
    """Return standard normal noise ``(n_cells, n_samples, dim)``."""
    out = np.empty((len(cells), n_samples, dim), dtype=np.float32)
    for place, cell in zip(out, cells, strict=True):
        place[:] = _stream(seed, cell, "latent").standard_normal((n_samples, dim), dtype=np.float32)
    return out


def cell_uniforms(seed: int, cells: Sequence[str], n_samples: int, dim: int) -> NDArray[np.float32]:
    """Return uniform numbers on [0, 1), ``(n_cells, n_samples, dim)``, for counting noise."""
    out = np.empty((len(cells), n_samples, dim), dtype=np.float32)
    for place, cell in zip(out, cells, strict=True):
        place[:] = _stream(seed, cell, "counts").random((n_samples, dim), dtype=np.float32)
    return out


def bag_normals(seed: int, bags: Sequence[str], n_samples: int, dim: int) -> NDArray[np.float32]:
    """Return standard normal noise ``(n_bags, n_samples, dim)``, every draw with its own stream."""
    out = np.empty((len(bags), n_samples, dim), dtype=np.float32)
    for place, bag in zip(out, bags, strict=True):
        for k in range(n_samples):
            stream = _stream(seed, f"{bag}\0{k}", "bag")
            place[k] = stream.standard_normal(dim, dtype=np.float32)
    return out


def _stream(seed: int, cell: str, purpose: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{cell}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
