"""Small AnnData files of image features and RNA, whose cells are of the same samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

TREATMENTS = ("DMSO", "drugA", "drugB")
WIDTH, GENES, DIM = 12, 9, 5


def some_obs(n: int, prefix: str, replicates: str, seed: int) -> pd.DataFrame:
    """Make ``obs`` of cells whose samples, by Treatment and Replicate, are in no order."""
    rng = np.random.default_rng(seed)
    treatment, replicate = rng.choice(TREATMENTS, n), rng.choice(list(replicates), n)
    names = [f"{prefix}{i}" for i in range(n)]
    plates = {"batch": pd.Categorical([f"plate{r}" for r in replicate])}
    obs = {"Treatment": treatment, "Replicate": replicate, **plates, "quality": rng.random(n)}
    return pd.DataFrame(obs, index=names)


def some_features(n: int = 300, replicates: str = "345", seed: int = 0) -> ad.AnnData:
    """Make image features, float64; the first says which cell it is."""
    values = np.random.default_rng(seed).normal(size=(n, WIDTH))
    values[:, 0] = np.arange(n)
    return ad.AnnData(values, obs=some_obs(n, "image", replicates, seed + 1))


def some_rna(n: int = 200, replicates: str = "345", seed: int = 5) -> ad.AnnData:
    """Make raw counts, CSR, with an embedding; the first gene and dimension say which cell."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(4, (n, GENES)) * rng.integers(0, 2, (n, GENES))
    counts[:, 0] = np.arange(n) + 30
    embedding = rng.normal(size=(n, DIM)).astype(np.float32)
    embedding[:, 0] = np.arange(n)
    var = pd.DataFrame(
        {"gene_ids": [f"ENSG{i:011d}" for i in range(GENES)]},
        index=[f"S{i}" for i in range(GENES)],
    )
    return ad.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=some_obs(n, "rna", replicates, seed + 1),
        var=var,
        obsm={"scGPT": embedding},
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Give a function that writes an AnnData as NAME.h5ad."""

    def write(table: ad.AnnData, name: str, **options) -> Path:
        path = tmp_path / f"{name}.h5ad"
        path.parent.mkdir(exist_ok=True, parents=True)
        table.write_h5ad(path, **options)
        return path

    return write


@pytest.fixture(scope="session")
def features() -> Callable[..., ad.AnnData]:
    """Give a function that makes image features, see :func:`some_features`."""
    return some_features


@pytest.fixture(scope="session")
def rna() -> Callable[..., ad.AnnData]:
    """Give a function that makes RNA, see :func:`some_rna`."""
    return some_rna
