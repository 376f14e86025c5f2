"""Scores a model and all baselines on the same cells, with intervals over the same resamples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from phenoseq.evaluation.grouped import Array, interval, resamples
from phenoseq.evaluation.report import Scores
from phenoseq.evaluation.scoring import Result, score
from phenoseq.evaluation.tables import Prediction, Truth

#: Scores whose intervals, and those of whose differences, are told.
INTERVALS = (
    "pcc_gene_median",
    "mse",
    "variance_ratio",
    "e_distance",
    "coexpression_error",
    "crps",
    "energy_score",
)


def compare(
    truth: Truth,
    predictions: Sequence[Prediction],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Scores], list[Result]]:
    """Score predictions of the same cells, the first against each of the others.

    Parameters
    ----------
    truth, predictions
        Of the same cells; the model first, then the baselines.
    n_resamples
        Resamples of the groups, with replacement.
    seed
        Of the resamples, of the subsample of pairs and of the randomised PIT.
    progress
        Called with (cells done, cells in all), over all predictions.

    Returns
    -------
    The scores, and what the report draws beside them. With a single group there are no intervals.
    """
    n, weights = len(truth), resamples(len(truth.groups), n_resamples, seed)
    scores, results = [], []
    first: dict[str, Array] = {}
    for k, prediction in enumerate(predictions):

        def told(done: int, total: int, k: int = k) -> None:
            if progress is not None:
                progress(k * n + done, n * len(predictions))

        result = score(truth, prediction, seed=seed, progress=told)
        results.append(result)
        drawn: dict[str, Array] = {}
        if len(truth.groups) > 1:
            some = result.statistics
            drawn = {name: some[name](weights) for name in INTERVALS if name in some}
        first = drawn if k == 0 else first
        intervals = {name: interval(values) for name, values in drawn.items()}
        differences = {
            name: interval(first[name] - values)
            for name, values in drawn.items()
            if k and name in first
        }
        scores.append(
            Scores(
                name=result.name,
                coverage=result.calibration.coverage if result.calibration else {},
                intervals=intervals,
                differences=differences,
                **result.values,
            )
        )
    return scores, results
