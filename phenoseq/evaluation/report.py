"""Scores a prediction and its baselines on the same cells, and lays them out as one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import anndata as ad
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.errors import DataError
from phenoseq.evaluation.metrics import e_distance, mse, pcc_gene, variance_ratio

#: Not scored are cells below this many counts, and genes seen in no more than this share.
MIN_COUNTS, MIN_SEEN = 20, 0.02


@dataclass(frozen=True)
class Scores:
    """Scores of one prediction.

    Attributes
    ----------
    name
        Of the model or baseline.
    pcc_gene_median, pcc_gene_mean, pcc_gene_top50
        Correlation over cells, over the scored genes and over their best fifty, of the mean.
    mse
        Mean squared error of the mean.
    variance_ratio, e_distance, e_distance_se
        Of one draw (for a method without draws, of its mean).
    """

    name: str
    pcc_gene_median: float
    pcc_gene_mean: float
    pcc_gene_top50: float
    mse: float
    variance_ratio: float
    e_distance: float
    e_distance_se: float


def normalised(counts: sparse.spmatrix, median: float) -> NDArray[np.float32]:
    """Return log1p of counts scaled to the library size ``median``, dense ``(n, g)``."""
    total = np.asarray(counts.sum(axis=1)).ravel()
    scaled = sparse.diags(median / np.maximum(total, 1)) @ counts
    return np.log1p(np.asarray(scaled.todense(), dtype=np.float32))


def scored_genes(training_counts: sparse.spmatrix) -> NDArray[np.bool_]:
    """Tell which genes are seen in more than 2% of the training cells."""
    seen = np.asarray((training_counts > 0).mean(axis=0)).ravel()
    return seen > MIN_SEEN


def score(
    name: str, truth: NDArray[np.float32], prediction: ad.AnnData, genes: NDArray[np.bool_]
) -> tuple[Scores, NDArray[np.float64]]:
    """Score one prediction.

    Parameters
    ----------
    name
        Of the model or baseline.
    truth
        True expression of the same cells and genes, ``(n, g)``.
    prediction
        ``X`` the mean; ``layers["draw"]`` one draw, where the method has any.
    genes
        Which genes are scored, ``(g,)``.

    Returns
    -------
    The scores, and ``pcc_gene`` of every gene, NaN where it is not scored.

    Raises
    ------
    DataError
        Where cells or genes do not match, or no gene is scored.
    """
    if prediction.shape != truth.shape:
        raise DataError(f"{name}: predicts {prediction.shape}, the truth is {truth.shape}")
    if not genes.any():
        raise DataError("no gene is seen in more than 2% of the training cells; nothing to score")
    mean = _dense(prediction.X)
    draw = _dense(prediction.layers["draw"]) if "draw" in prediction.layers else mean
    each = np.full(truth.shape[1], np.nan)
    each[genes] = pcc_gene(truth[:, genes], mean[:, genes])
    ranked = np.sort(each[genes])[::-1]
    distance, error = e_distance(truth[:, genes], draw[:, genes])
    scores = Scores(
        name=name,
        pcc_gene_median=float(np.median(ranked)),
        pcc_gene_mean=float(ranked.mean()),
        pcc_gene_top50=float(ranked[:50].mean()),
        mse=mse(truth[:, genes], mean[:, genes]),
        variance_ratio=variance_ratio(truth[:, genes], draw[:, genes]),
        e_distance=distance,
        e_distance_se=error,
    )
    return scores, each


def score_all(
    truth: NDArray[np.float32], predictions: Mapping[str, ad.AnnData], genes: NDArray[np.bool_]
) -> tuple[list[Scores], dict[str, NDArray[np.float64]]]:
    """Score the model and every baseline on the same cells; see :func:`score`."""
    both = {name: score(name, truth, p, genes) for name, p in predictions.items()}
    return [s for s, _ in both.values()], {name: each for name, (_, each) in both.items()}


def markdown(scores: list[Scores]) -> str:
    """Lay the scores out as a Markdown table."""
    lines = [
        "| | median `pcc_gene` | mean | top 50 | MSE | `variance_ratio` | `e_distance` |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in scores:
        lines.append(
            f"| {s.name} | {s.pcc_gene_median:.3f} | {s.pcc_gene_mean:.3f} | "
            f"{s.pcc_gene_top50:.3f} | {s.mse:.4f} | {s.variance_ratio:.2f} | "
            f"{s.e_distance:.3f} ± {s.e_distance_se:.3f} |"
        )
    return "\n".join(lines)


def as_json(scores: list[Scores], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores and the facts they rest on, as plain JSON."""
    return {**facts, "scores": [asdict(s) for s in scores]}


def _dense(matrix: Any) -> NDArray[np.float32]:
    return np.asarray(matrix.todense() if sparse.issparse(matrix) else matrix, dtype=np.float32)
