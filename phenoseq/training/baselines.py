"""Baselines, fitted on the training part and predicting the same cells as the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from phenoseq.data.splits import Split, SplitConfig
from phenoseq.data.store import Store
from phenoseq.errors import DataError
from phenoseq.evaluation.report import normalised, scored_genes
from phenoseq.evaluation.tables import BASELINES
from phenoseq.models.phenoseq import PhenoSeq, pool
from phenoseq.models.pretrained import Pretrained
from phenoseq.progress import bar
from phenoseq.training.regressor import (
    RegressorConfig,
    crops_of,
    fit_noise,
    predict_means,
    train_regressor,
)

_ALPHAS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
_NEIGHBOURS = (10, 30, 100)
#: Cells of the validation part, by which the number of neighbours and of epochs are chosen.
_VAL_CELLS = 4096
_HIDDEN, _EPOCHS, _PATIENCE, _BATCH = 256, 30, 3, 256

Matrix = NDArray[np.float32]
Rows = NDArray[np.int64]


def fit_baselines(
    model: PhenoSeq,
    store: Store,
    split: Split,
    how: SplitConfig,
    rows: Rows,
    *,
    regressor: RegressorConfig,
    folder: str | Path,
    start: Pretrained | None = None,
    n_draws: int = 32,
    seed: int = 0,
    device: str = "auto",
) -> ad.AnnData:
    """Fit every baseline on the training cells of a split and predict other cells.

    What has to be chosen (the number of neighbours, when to stop) is chosen on the validation part.

    Parameters
    ----------
    model
        Whose encoder's features some baselines read, and whose genes and scale all predict.
    store, split, how
        The store, its split, and how it was divided.
    rows
        Cells to predict.
    regressor, folder, start
        The regressor that is trained end to end, where it is kept, and from which weights; see
        :func:`~phenoseq.training.regressor.train_regressor`.
    n_draws
        Draws a cell of those that have a distribution.
    seed
        Of all that is fitted and drawn.
    device
        For the regressor's training.

    Returns
    -------
    ``layers[KEY]`` the mean of each of ``BASELINES`` (in ``phenoseq.evaluation.tables``);
    ``layers["KEY_draw_0"]`` and so on (CSR) draws of ``regressor_nb``, and of ``random``, real
    training cells that ignore the image;
    ``var["scored"]`` the genes seen in more than 2% of the training cells;
    ``uns["phenoseq"]`` the names, and what was chosen.

    Raises
    ------
    DataError
        Where the crops of the store are not those that the model reads.
    """
    image, manifest = model.config.image, store.manifest
    has = manifest.channels, manifest.crop_px, manifest.pixel_size
    if has != (image.channels, image.crop_px, image.pixel_size):
        raise DataError(
            f"{store.path}: crops of {list(has[0])}, {has[1]} pixels of {has[2]} um; baselines are "
            f"fitted on crops as the model reads them: {list(image.channels)}, {image.crop_px} "
            f"pixels of {image.pixel_size} um; prepare such a store"
        )
    median = model.config.expression.median_library
    table = store.table()
    train, val = split.rows("train"), _some(split.rows("val"), seed)
    known, held = normalised(table.X[train], median), normalised(table.X[val], median)
    layers: dict[str, Any] = {
        "training_mean": np.broadcast_to(known.mean(axis=0), (len(rows), known.shape[1])).copy()
    }
    statistics, contexts = _features(model, store, {"train": train, "val": val, "test": rows})
    facts: dict[str, Any] = {
        "baselines": list(BASELINES),
        "median_library": median,
        "seed": seed,
        "n_draws": n_draws,
    }
    layers["ridge"] = _ridge(statistics, known)
    layers["knn"], facts["neighbours"] = _neighbours(contexts, known, held)
    layers["mlp"], facts["mlp_epochs"] = _mlp(contexts, known, held, seed)
    network, facts["regressor"] = train_regressor(
        store, how, regressor, folder, median=median, start=start, device=device
    )
    mean, log_library = predict_means(network, store, rows)
    layers["regressor"] = layers["regressor_nb"] = mean
    noise = fit_noise(table.X[train], *predict_means(network, store, train))
    rng = np.random.default_rng(seed)
    for k in range(n_draws):
        layers[f"regressor_nb_draw_{k}"] = noise.draw(mean, log_library, median, rng)
    total = np.zeros_like(mean)
    for k in range(n_draws):
        drawn = normalised(table.X[rng.choice(train, len(rows))], median)
        layers[f"random_draw_{k}"] = sparse.csr_matrix(drawn)
        total += drawn / n_draws
    layers["random"] = total
    var = table.var.copy()
    var["scored"] = scored_genes(table.X[train])
    return ad.AnnData(
        obs=table.obs[[]].iloc[rows].copy(), var=var, layers=layers, uns={"phenoseq": facts}
    )


def intensity_statistics(crops: NDArray[Any]) -> NDArray[np.float32]:
    """Return the mean, deviation, median, 99th percentile and centre mean of each channel.

    Parameters
    ----------
    crops
        ``(n, C, H, W)``; the centre is the middle quarter of the width and height.

    Returns
    -------
    ``(n, 5 C)``.
    """
    n, _, height, width = crops.shape
    pixels = crops.reshape(n, crops.shape[1], -1).astype(np.float32)
    middle = crops[..., 3 * height // 8 : 5 * height // 8, 3 * width // 8 : 5 * width // 8]
    median, high = np.percentile(pixels, [50, 99], axis=2).astype(np.float32)
    centre = middle.mean(axis=(2, 3), dtype=np.float32)
    parts = [pixels.mean(axis=2), pixels.std(axis=2), median, high, centre]
    return np.concatenate(parts, axis=1)


@torch.inference_mode()
def _features(
    model: PhenoSeq, store: Store, parts: dict[str, Rows]
) -> tuple[dict[str, Matrix], dict[str, Matrix]]:
    """Read every crop once; return intensity statistics and pooled contexts, standardised."""
    total, done = sum(map(len, parts.values())), 0
    device = model.image_mean.device
    statistics: dict[str, Matrix] = {}
    contexts: dict[str, Matrix] = {}
    with bar("features of the baselines") as progress:
        for name, rows in parts.items():
            plain, deep = [], []
            for images in crops_of(store, rows):
                plain.append(intensity_statistics(images.numpy()))
                deep.append(pool(*model.encode(images.to(device))).float().cpu().numpy())
                done += len(images)
                progress(done, total)
            statistics[name], contexts[name] = np.concatenate(plain), np.concatenate(deep)
    for features in (statistics, contexts):
        scaler = StandardScaler().fit(features["train"])
        features.update({name: scaler.transform(some) for name, some in features.items()})
    return statistics, contexts


def _ridge(features: dict[str, Matrix], known: Matrix) -> Matrix:
    """Ridge regression, its penalty chosen by leave-one-out on training cells."""
    ridge = RidgeCV(alphas=_ALPHAS).fit(features["train"], known)
    return np.asarray(ridge.predict(features["test"]), dtype=np.float32)


def _neighbours(features: dict[str, Matrix], known: Matrix, held: Matrix) -> tuple[Matrix, int]:
    """Return the mean of the nearest training cells, as many as do best in validation."""
    nearest = NearestNeighbors(algorithm="brute").fit(features["train"])
    most = min(_NEIGHBOURS[-1], len(known))
    found = nearest.kneighbors(features["val"], most, return_distance=False)
    choices = [k for k in _NEIGHBOURS if k <= most] or [most]
    errors = [float(((_means(known, found[:, :k]) - held) ** 2).mean()) for k in choices]
    best = choices[int(np.argmin(errors))]
    found = nearest.kneighbors(features["test"], best, return_distance=False)
    return _means(known, found), best


def _means(known: Matrix, found: Rows) -> Matrix:
    return np.stack([known[rows].mean(axis=0) for rows in found])


def _mlp(features: dict[str, Matrix], known: Matrix, held: Matrix, seed: int) -> tuple[Matrix, int]:
    """Train a perceptron with two hidden layers, and stop where validation is best."""
    x, y, x_val, y_val = (
        torch.from_numpy(np.asarray(a, dtype=np.float32))
        for a in (features["train"], known, features["val"], held)
    )
    mean = y.mean(dim=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(x.shape[1], _HIDDEN), nn.GELU(),
            nn.Linear(_HIDDEN, _HIDDEN), nn.GELU(),
            nn.Linear(_HIDDEN, y.shape[1]),
        )  # fmt: skip
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    best, kept, chosen = float("inf"), copy.deepcopy(network), 0
    with bar("MLP on encoder features") as progress:
        for epoch in range(1, _EPOCHS + 1):
            for rows in torch.randperm(len(x), generator=generator).split(_BATCH):  # type: ignore[no-untyped-call]
                loss = (network(x[rows]) + mean - y[rows]).square().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            with torch.inference_mode():
                error = float((network(x_val) + mean - y_val).square().mean())
            if error < best:
                best, kept, chosen = error, copy.deepcopy(network), epoch
            progress(epoch, _EPOCHS)
            if epoch - chosen >= _PATIENCE:
                break
    with torch.inference_mode():
        out: Tensor = kept(torch.from_numpy(np.asarray(features["test"], np.float32))) + mean
    return out.numpy(), chosen


def _some(rows: Rows, seed: int) -> Rows:
    if len(rows) <= _VAL_CELLS:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, _VAL_CELLS, replace=False))
