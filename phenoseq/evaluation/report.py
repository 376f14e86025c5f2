"""Scores of a prediction and of the baselines beside it, as one table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

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
    mmd_rbf, mmd_rbf_se, coexpression_error
        Of one draw as well.
    crps, energy_score
        Of all draws; a method without draws forecasts a point.
    coverage
        Share of the randomised PIT inside the central interval of each level.
    intervals
        Block-bootstrap intervals over groups, 95%, by the name of the score.
    differences
        The same of the first prediction's score less this one's.
    """

    name: str
    pcc_gene_median: float
    pcc_gene_mean: float
    pcc_gene_top50: float
    mse: float
    variance_ratio: float
    e_distance: float
    e_distance_se: float
    mmd_rbf: float | None = None
    mmd_rbf_se: float | None = None
    coexpression_error: float | None = None
    crps: float | None = None
    energy_score: float | None = None
    coverage: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    differences: Mapping[str, tuple[float, float]] = field(default_factory=dict)


#: Columns of the table: score, heading, and decimals.
COLUMNS = (
    ("pcc_gene_median", "median `pcc_gene`", 3),
    ("pcc_gene_mean", "mean", 3),
    ("pcc_gene_top50", "top 50", 3),
    ("mse", "MSE", 4),
    ("variance_ratio", "`variance_ratio`", 2),
    ("e_distance", "`e_distance`", 3),
    ("coexpression_error", "`coexpression_error`", 3),
    ("crps", "`crps`", 4),
    ("energy_score", "`energy_score`", 3),
)


def markdown(scores: list[Scores]) -> str:
    """Lay the scores out as a Markdown table, without columns that no prediction has."""
    columns = [c for c in COLUMNS if any(getattr(s, c[0]) is not None for s in scores)]
    lines = [
        "| | " + " | ".join(heading for _, heading, _ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for s in scores:
        cells = []
        for name, _, digits in columns:
            value = getattr(s, name)
            text = "" if value is None else f"{value:.{digits}f}"
            cells.append(f"{text} ± {s.e_distance_se:.3f}" if name == "e_distance" else text)
        lines.append(f"| {s.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_json(scores: list[Scores], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores and the facts they rest on, as plain JSON; what is not a number is None."""
    raw: dict[str, Any] = plain({**facts, "scores": [asdict(s) for s in scores]})
    return raw


def plain(value: Any) -> Any:
    """Return a value with None for what is no number, at any depth, and lists for tuples."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def normalised(counts: sparse.spmatrix, median: float) -> NDArray[np.float32]:
    """Return log1p of counts scaled to the library size ``median``, dense ``(n, g)``."""
    total = np.asarray(counts.sum(axis=1)).ravel()
    scaled = sparse.diags(median / np.maximum(total, 1)) @ counts
    return np.log1p(np.asarray(scaled.todense(), dtype=np.float32))


def scored_genes(training_counts: sparse.spmatrix) -> NDArray[np.bool_]:
    """Tell which genes are seen in more than 2% of the training cells."""
    seen = np.asarray((training_counts > 0).mean(axis=0)).ravel()
    return seen > MIN_SEEN
