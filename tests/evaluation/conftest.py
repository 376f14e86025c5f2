"""Measured cells, a prediction of them, and baselines, as they stand on disk."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

N, G, K, MEDIAN = 300, 8, 5, 60.0


@pytest.fixture(scope="session")
def cells() -> dict[str, ad.AnnData]:
    """300 cells of 8 genes in 6 blocks: truth, prediction and baselines.

    Three cells have too few counts, and the last gene is hardly ever seen. The model knows each
    cell's rate, up to noise; one baseline is a point, the other has draws of random cells.
    """
    rng = np.random.default_rng(0)
    rate = (rng.gamma(2, 4, (N, G)) + 3) * np.array([1, 2, 1, 0.5, 3, 1, 1, 1e-4])
    counts = rng.poisson(rate).astype(np.float32)
    counts[:3] = 0
    counts[:3, 0] = 5
    obs = pd.DataFrame(
        {
            "group": [f"{i // 50}" for i in range(N)],
            "x_centroid": rng.uniform(0, 600, N),
            "y_centroid": rng.uniform(0, 300, N),
        },
        index=[f"cell {i}" for i in range(N)],
    )
    var = pd.DataFrame(
        {"symbol": [f"GENE{k}" for k in range(G)]}, index=[f"E{k}" for k in range(G)]
    )
    truth = ad.AnnData(
        sparse.csr_matrix(counts),
        obs=obs,
        var=var,
        obsm={"spatial": obs[["x_centroid", "y_centroid"]].to_numpy()},
    )

    def scaled(made):
        total = made.sum(axis=-1, keepdims=True)
        return np.log1p(made / np.maximum(total, 1) * MEDIAN).astype(np.float32)

    draws = scaled(rng.poisson(rate, (K, N, G)))
    model = ad.AnnData(scaled(rate), obs=obs[[]], var=var)
    for k, draw in enumerate(draws):
        model.layers[f"draw_{k}"] = sparse.csr_matrix(draw)
    model.layers["draw"] = model.layers["draw_0"]
    model.uns["phenoseq"] = {"median_library": MEDIAN, "model": "a model"}
    mean = np.broadcast_to(scaled(counts).mean(axis=0), (N, G)).copy()
    others = scaled(counts[rng.integers(3, N, (K, N))])
    layers = {"mean": mean, "random": others.mean(axis=0)}
    layers |= {f"random_draw_{k}": sparse.csr_matrix(one) for k, one in enumerate(others)}
    baselines = ad.AnnData(obs=obs[[]], var=var, layers=layers)
    baselines.var["scored"] = [True] * (G - 1) + [False]
    baselines.uns["phenoseq"] = {
        "baselines": ["mean", "random"],
        "baseline_names": ["training mean", "random training cells"],
        "median_library": MEDIAN,
    }
    return {"truth": truth, "model": model, "baselines": baselines}
