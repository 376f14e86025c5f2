"""Scores of predicted changes of groups, such as treatments, against a control."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from phenoseq.errors import DataError
from phenoseq.evaluation.metrics import pcc_gene

Matrix = NDArray[np.floating]
Vector = NDArray[np.float64]


def group_means(profiles: Matrix, groups: NDArray[Any]) -> tuple[NDArray[Any], Vector]:
    """Return the names of the groups, sorted, and their mean profiles ``(n_groups, g)``."""
    names, place = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), profiles.shape[1]))
    np.add.at(sums, place, profiles)
    return names, sums / np.bincount(place)[:, None]


def changes(profiles: Matrix, groups: NDArray[Any], control: Any) -> tuple[NDArray[Any], Vector]:
    """Return the groups other than the control, and their mean less that of the control.

    True changes are taken against the true control, predicted ones against the predicted control.

    Parameters
    ----------
    profiles
        Of cells or samples, ``(n, g)``.
    groups
        Group of each, ``(n,)``.
    control
        Name of the control group.

    Raises
    ------
    DataError
        Where there is no such group.
    """
    names, means = group_means(profiles, groups)
    if control not in names:
        raise DataError(f"no control {control!r}; there are {names[:20].tolist()}")
    rest = names != control
    return names[rest], means[rest] - means[~rest]


def pcc_delta(true: Matrix, predicted: Matrix) -> Vector:
    """Return for each group the Pearson correlation over genes of its changes, ``(n_groups, g)``.

    0 where either is constant.
    """
    return pcc_gene(np.asarray(true).T, np.asarray(predicted).T)


def t_weights(group: Matrix, control: Matrix) -> Vector:
    """Return weights ``(g,)`` of genes: the absolute Welch t statistic, scaled to sum to one.

    Parameters
    ----------
    group, control
        True profiles, ``(n, g)`` and ``(m, g)``, two or more each.

    Returns
    -------
    0 for genes that are constant in both; equal weights where all are.
    """
    away = group.mean(axis=0, dtype=np.float64) - control.mean(axis=0, dtype=np.float64)
    variance = sum(x.var(axis=0, ddof=1, dtype=np.float64) / len(x) for x in (group, control))
    t = np.zeros(len(away))
    np.divide(np.abs(away), np.sqrt(variance), out=t, where=variance > 0)
    return t / t.sum() if t.any() else np.full(len(t), 1 / len(t))


def wmse(true: Matrix, predicted: Matrix, weights: Vector) -> float:
    """Return the mean squared error with weights ``(g,)`` of genes that sum to one."""
    each = ((true.astype(np.float64) - predicted) ** 2).mean(axis=0)
    return float(each @ weights)


def r2_weighted_delta(true: Matrix, predicted: Matrix, weights: Matrix) -> Vector:
    """Return the weighted R2 of each group's change against the mean of all groups.

    Parameters
    ----------
    true, predicted
        Mean profiles of all groups, ``(n_groups, g)``. Both are compared with the mean of the true
        ones, so that predicting this mean for all explains nothing.
    weights
        Of genes, for each group, ``(n_groups, g)``; see :func:`t_weights`.

    Returns
    -------
    ``(n_groups,)``: 1 at best; NaN where the true change is the same in all genes.
    """
    reference = true.mean(axis=0)
    change, guess = true - reference, predicted - reference
    weights = weights / weights.sum(axis=1, keepdims=True)
    centre = (weights * change).sum(axis=1, keepdims=True)
    left = (weights * (change - guess) ** 2).sum(axis=1)
    total = (weights * (change - centre) ** 2).sum(axis=1)
    out = np.full(len(total), np.nan)
    np.divide(left, total, out=out, where=total > 0)
    return 1 - out


def discrimination(true: Matrix, predicted: Matrix) -> float:
    """Return how well predicted changes tell groups apart: 1 at best, 0.5 at random.

    The mean over groups of ``1 - rank / (n_groups - 1)``: the rank, from 0, of the true group among
    all true changes by Euclidean distance from the predicted change. Of equal distances the middle
    rank is taken.

    Parameters
    ----------
    true, predicted
        Changes, ``(n_groups, g)``, of two groups or more.
    """
    n = len(true)
    if n < 2:
        return float("nan")
    distance = np.stack([np.linalg.norm(true - p, axis=1) for p in predicted])
    own = np.diagonal(distance)[:, None]
    nearer = (distance < own).sum(axis=1)
    level = (distance == own).sum(axis=1) - 1
    return float(np.mean(1 - (nearer + level / 2) / (n - 1)))


def de_overlap_k(true: Vector, predicted: Vector, k: int) -> tuple[float, float]:
    """Return how far the most changed genes of one group agree.

    Parameters
    ----------
    true, predicted
        Changes of a group, ``(g,)``.
    k
        How many genes, by absolute change.

    Returns
    -------
    The share of the k in common, and the share of the k truly most changed that are predicted to
    change with the same sign.
    """
    top, guessed = (np.argsort(-np.abs(x), kind="stable")[:k] for x in (true, predicted))
    common = len(np.intersect1d(top, guessed))
    same = np.sign(true[top]) == np.sign(predicted[top])
    return common / len(top), float(same.mean())


def map_replicate(
    profiles: Matrix,
    obs: pd.DataFrame,
    treatment: str,
    *,
    control: Any = None,
    null_size: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the mean average precision with which replicates of a treatment find each other.

    By cosine similarity, with permutation p-values corrected by Benjamini and Hochberg (Kalinin et
    al. 2025). Needs copairs: ``pip install "phenoseq[evaluation]"``.

    Parameters
    ----------
    profiles
        One a replicate (well, say), ``(n, g)``.
    obs
        Of the same replicates.
    treatment
        Column that replicates share.
    control
        Treatment of the controls, which are then what replicates must be nearer than; by default
        all other treatments.
    null_size, seed
        Permutations and their seed.

    Returns
    -------
    By treatment: ``map``, ``p_value``, ``corrected_p_value``.

    Raises
    ------
    DataError
        Where copairs is missing, or no treatment has two replicates.
    """
    try:
        from copairs.map import average_precision, mean_average_precision
    except ImportError as error:
        raise DataError(
            'replicate retrieval needs copairs: pip install "phenoseq[evaluation]"'
        ) from error
    meta = pd.DataFrame({treatment: obs[treatment].astype(str).to_numpy()})
    replicated = meta[treatment].value_counts()
    if not (replicated[replicated.index != str(control)] > 1).any():
        raise DataError(f"no {treatment} has two replicates; there is nothing to retrieve")
    rivals: tuple[list[str], list[str]] = ([], [treatment])
    if control is not None:
        meta["is_control"] = meta[treatment] == str(control)
        rivals = ([], ["is_control"])
        # a control is a rival of treatments, and nothing to be found itself
        meta["pair"] = np.where(
            meta["is_control"], [f"control {i}" for i in meta.index], meta[treatment]
        )
    same = "pair" if control is not None else treatment
    quiet = {"progress_bar": False}
    ap = average_precision(meta, np.asarray(profiles, np.float32), [same], [], *rivals, **quiet)
    if control is not None:
        ap = ap[~ap["is_control"]]
    found = mean_average_precision(ap, [treatment], null_size, 0.05, seed, **quiet)
    table: pd.DataFrame = found.set_index(treatment)
    return table.rename(columns={"mean_average_precision": "map"})[
        ["map", "p_value", "corrected_p_value"]
    ]
