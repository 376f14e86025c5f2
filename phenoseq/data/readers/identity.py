"""A digest that changes when cells, counts or pixel size do."""

from __future__ import annotations

import hashlib

import pandas as pd
from scipy import sparse


def identity_of(
    pixel_size: float,
    obs: pd.DataFrame,
    counts: sparse.csr_matrix | None = None,
    var: pd.DataFrame | None = None,
) -> str:
    """Return the hex digest of a source, see :class:`~phenoseq.data.source.Source`."""
    digest = hashlib.sha256(f"{pixel_size:.6f}".encode())
    for text in (obs.index, obs["field"]):
        digest.update("\n".join(text).encode())
    digest.update(obs[["x_centroid", "y_centroid"]].to_numpy("<f8").tobytes())
    if counts is not None and var is not None:
        digest.update("\n".join(var.index).encode())
        for part, dtype in (
            (counts.indptr, "<i8"),
            (counts.indices, "<i8"),
            (counts.data, "<f4"),
        ):
            digest.update(part.astype(dtype).tobytes())
    return digest.hexdigest()
