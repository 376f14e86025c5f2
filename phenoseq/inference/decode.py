"""Turns predicted embeddings into expression: that of the nearest real cells of a reference."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import anndata as ad
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from phenoseq._version import __version__
from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.inference.neighbours import Backend, Neighbours, Search, make_search, nearest
from phenoseq.inference.reference import Reference, open_reference
from phenoseq.inference.writer import check_out, write_whole
from phenoseq.progress import bar

Weighting = Literal["distance", "uniform"]

#: Reference cells whose distance to their own neighbours says what is near, and how they are drawn.
SAMPLE, SEED = 1000, 0
#: Numbers of the expression read, and averaged, at once.
BLOCK = 2**23


def decode(
    adata: str | Path | ad.AnnData,
    reference: str | Path | ad.AnnData,
    *,
    key: str = "scGPT",
    k: int = 10,
    weighting: Weighting = "distance",
    backend: Backend = "exact",
    out: str | Path | None = None,
) -> ad.AnnData:
    """Give predicted embeddings the expression of the nearest real cells of a reference.

    Each draw is decoded by itself: its k nearest reference cells by Euclidean distance (the
    geometry of the squared error that embedding models are trained with; for embeddings of unit
    length the order is that of the cosine), and the average of their expression.

    Parameters
    ----------
    adata
        Predicted embeddings, an AnnData or its path, rows = bags of cells. Draws are
        ``layers["draw_0"]``, ``["draw_1"]``, ... ``(n, D)``; without such layers, ``X`` is the one
        draw.
    reference
        Real cells with their expression in ``X`` and, in ``obsm[key]``, embeddings of the same
        embedding model and scale: an AnnData or the path of one, ``.h5ad`` or ``.zarr``, of any
        size. Embeddings are read in blocks, and of ``X`` only the neighbours' rows.
    key
        Of the reference's embedding.
    k
        Neighbours, fewer than the reference has cells. More give a smoother estimate of the mean,
        and a draw that varies less; with 1 each draw has the measured profile of one real cell.
    weighting
        ``"distance"``: each neighbour counts by 1 / distance, and where some are at distance 0 only
        those count, alike (as in scikit-learn's ``KNeighborsRegressor``). ``"uniform"``: all alike.
    backend
        ``"exact"``, or ``"faiss"`` (the extra ``phenoseq[faiss]``); both compare with every cell.
    out
        ``.h5ad`` or ``.zarr`` to write as well, whole or not at all.

    Returns
    -------
    AnnData ``(n, genes of the reference)``, float32. Its values are on the reference's own scale,
    counts or log1p, whatever its ``X`` holds, and the averages are taken on that scale:

    - ``X`` mean over the draws of their decoded expression;
    - ``layers["draw_0"]`` and so on, each draw decoded, where the prediction has such layers;
    - ``obs`` and ``obsm`` of the prediction, and in ``obs``: ``reference_distance``, the mean over
      draws and neighbours of the distance; ``reference_distance_ratio``, the same over the median
      distance of 1000 random reference cells to the k nearest others, so about 1 where predicted
      embeddings lie as real ones do, and more where they lie away from the reference;
      ``reference_nearest``, the id of the cell that is nearest to any draw;
    - ``var`` of the reference;
    - ``uns["phenoseq"]`` of the prediction, with how it was decoded in ``"decode"``.

    Raises
    ------
    DataError
        Where the prediction or the reference cannot be used as it is, or an option is unknown.

    Examples
    --------
    >>> import anndata as ad
    >>> import numpy as np
    >>> import phenoseq
    >>> real = ad.AnnData(np.array([[0.0, 4.0], [2.0, 4.0], [9.0, 0.0]]))
    >>> real.obsm["pca"] = np.array([[0.0, 0.0], [1.0, 0.0], [9.0, 9.0]])
    >>> predicted = ad.AnnData(np.array([[0.5, 0.0]]))
    >>> phenoseq.decode(predicted, real, key="pca", k=2).X.tolist()
    [[1.0, 4.0]]
    """
    for what, value, choices in (
        ("weighting", weighting, get_args(Weighting)),
        ("backend", backend, get_args(Backend)),
    ):
        if value not in choices:
            raise DataError(
                f"unknown {what} {value!r}; choose from {', '.join(map(repr, choices))}"
            )
    if k < 1:
        raise DataError(f"k is {k}; decode by at least one neighbour")
    path = _check_paths(adata, reference, out) if out is not None else None
    search = make_search(backend)
    predicted = _read(adata)
    names, queries = _draws(predicted)
    cells = open_reference(reference, key)
    _check_fit(queries, cells, key, k)
    near, median = _find(queries, cells, k, search)
    with bar("averaging their expression") as progress:
        values = _average(near, weighting, cells, progress)
    distance = near.distance.mean(axis=(0, 2))
    draw, bag = near.distance[..., 0].argmin(axis=0), np.arange(predicted.n_obs)
    obs = predicted.obs.copy()
    obs["reference_distance"] = distance
    obs["reference_distance_ratio"] = _ratio(distance, median, cells)
    obs["reference_nearest"] = cells.ids[near.rows[draw, bag, 0]]
    result = ad.AnnData(
        values.mean(axis=0) if names else values[0],
        obs=obs,
        var=cells.var.copy(),
        obsm=dict(predicted.obsm),
        layers={name: values[i] for i, name in enumerate(names)},
    )
    record = {
        "phenoseq_version": __version__,
        "reference": cells.name,
        "reference_n_obs": len(cells.ids),
        "key": key,
        "k": k,
        "weighting": weighting,
        "metric": "euclidean",
        "backend": backend,
        "reference_sample": min(SAMPLE, len(cells.ids)),
        "reference_sample_seed": SEED,
        "reference_sample_distance": median,
    }
    result.uns["phenoseq"] = {**predicted.uns.get("phenoseq", {}), "decode": record}
    if path is not None:
        write_whole(result, path)
    return result


def _find(
    queries: NDArray[np.float32], cells: Reference, k: int, search: Search
) -> tuple[Neighbours, float]:
    """Return the neighbours of draws, ``(K, n, k)``, and how far apart reference cells lie.

    That is the median, over a sample of them, of the mean distance to the k nearest others.
    """
    n_cells = len(cells.ids)
    rng = np.random.default_rng(SEED)
    sample = np.sort(rng.choice(n_cells, min(SAMPLE, n_cells), replace=False))
    own = cells.embedding.take(sample)
    points = np.concatenate([*queries, own])
    n = len(points) - len(own)
    without = np.concatenate([np.full(n, -1), sample])
    with bar("finding the nearest cells") as progress:
        rows, distance = nearest(
            points, cells.embedding, k, search=search, without=without, progress=progress
        )
    shape = (*queries.shape[:2], k)
    near = Neighbours(rows[:n].reshape(shape), distance[:n].reshape(shape))
    return near, float(np.median(distance[n:].mean(axis=1)))


def _check_paths(
    adata: str | Path | ad.AnnData, reference: str | Path | ad.AnnData, out: str | Path
) -> Path:
    """Check ``out``, and that it would not take the place of what is read."""
    path = check_out(out)
    for what in (adata, reference):
        source = what.filename if isinstance(what, ad.AnnData) else what
        if source is not None and Path(source).resolve() == path.resolve():
            raise DataError(f"{path}: is read here, and would be replaced; choose another output")
    return path


def _read(adata: str | Path | ad.AnnData) -> ad.AnnData:
    if isinstance(adata, ad.AnnData):
        return adata.to_memory() if adata.isbacked else adata
    path = Path(adata)
    if path.suffix not in (".h5ad", ".zarr"):
        raise DataError(f"{path}: name a prediction that ends in .h5ad or .zarr")
    if not path.exists():
        raise DataError(f"{path}: there is no such prediction")
    try:
        return ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: holds no AnnData that can be read ({error})") from error


def _draws(predicted: ad.AnnData) -> tuple[Sequence[str], NDArray[np.float32]]:
    """Return the names of the layers of draws and the draws, ``(K, n, D)``; no names for X."""
    if not predicted.n_obs:
        raise DataError("the prediction has no rows; there is nothing to decode")
    names = [name for name in predicted.layers if re.fullmatch(r"draw_\d+", name)]
    names.sort(key=lambda name: int(name.removeprefix("draw_")))
    matrices = [predicted.layers[name] for name in names] or [predicted.X]
    if matrices[0] is None:
        raise DataError("the prediction has neither X nor layers['draw_0']; it has no embeddings")
    dense = [m.toarray() if sparse.issparse(m) else np.asarray(m) for m in matrices]
    draws = np.stack(dense).astype(np.float32)
    bad = ~np.isfinite(draws).all(axis=(0, 2))
    if bad.any():
        raise DataError(
            f"the predicted embeddings have values that are not finite in {bad.sum():,} rows, e.g. "
            f"{predicted.obs_names[bad][:3].tolist()}; leave these rows out"
        )
    return names, draws


def _check_fit(queries: NDArray[np.float32], cells: Reference, key: str, k: int) -> None:
    n, width = cells.embedding.shape
    if width != queries.shape[2]:
        raise DataError(
            f"{cells.name}: obsm[{key!r}] has {width} numbers a cell, the predicted embeddings "
            f"{queries.shape[2]}; take a reference embedded by the model that was predicted"
        )
    if n <= k:
        raise DataError(f"{cells.name}: has {n} cells; k = {k} needs more than {k}")


def _weights(distance: NDArray[np.float64], weighting: Weighting) -> NDArray[np.float64]:
    """Return weights ``(..., k)`` that sum to 1 over the k neighbours."""
    if weighting == "uniform":
        return np.full(distance.shape, 1 / distance.shape[-1])
    with np.errstate(divide="ignore"):
        weights = 1 / distance
    hit = np.isinf(weights)
    weights = np.where(hit.any(axis=-1, keepdims=True), hit, weights)
    return weights / weights.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]


def _average(
    near: Neighbours,
    weighting: Weighting,
    cells: Reference,
    progress: Callable[[int, int], None],
) -> NDArray[np.float32]:
    """Average the neighbours' expression, ``(K, n, g)``, reading each of their rows once, in order.

    Blocks are of the reference's rows, so that a result does not depend on what else is asked.
    """
    n, g = cells.expression.shape
    k = near.rows.shape[-1]
    q = near.rows.size // k
    weights = sparse.csc_matrix(
        (
            _weights(near.distance, weighting).ravel(),
            (np.repeat(np.arange(q), k), near.rows.ravel()),
        ),
        shape=(q, n),
    )
    out = np.zeros((q, g), dtype=np.float32)
    step = max(1, BLOCK // g)
    for start in range(0, n, step):
        part = weights[:, start : start + step].tocsr()
        used = np.unique(part.indices)
        if len(used):
            values = cells.expression_rows(start + used.astype(np.int64))
            part = part[:, used]
            touched = np.flatnonzero(np.diff(part.indptr))
            for low in range(0, len(touched), step):
                some = touched[low : low + step]
                out[some] += part[some] @ values
        progress(min(start + step, n), n)
    return out.reshape(*near.rows.shape[:-1], g)


def _ratio(distance: NDArray[np.float64], median: float, cells: Reference) -> NDArray[np.float64]:
    if median > 0:
        return distance / median
    warnings.warn(
        f"{cells.name}: most cells have k exact copies, so there is no distance to compare with; "
        "obs['reference_distance_ratio'] is left empty",
        PhenoseqWarning,
        stacklevel=3,
    )
    return np.full(len(distance), np.nan)
