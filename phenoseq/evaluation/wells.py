"""Wells of a screen: mean predicted expression, which are set apart, plates on one scale."""

from __future__ import annotations

from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from phenoseq.data.backed import Cells, Given
from phenoseq.errors import DataError

Normalisation = Literal["none", "standardise", "sphere"]
PLATE, WELL = "Metadata_Plate", "Metadata_Well"
#: Share of the mean variance that is added to each variance before it is divided by, so that a
#: direction in which the controls happen not to differ is not blown up.
_SHRINK = 0.1
_BLOCK = 4096
#: Fewest control wells of a plate that is normalised.
_CONTROLS = 6

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]


def well_profiles(prediction: Given, treatment: str) -> ad.AnnData:
    """Average the predicted expression of the cells of each well, in one pass over the file.

    Parameters
    ----------
    prediction
        What :func:`phenoseq.predict` returned or wrote: ``.h5ad`` or ``.zarr`` of any size.
    treatment
        Column of ``obs`` that names the treatment of a cell, the same within a well.

    Returns
    -------
    Wells by genes, ``X`` float64; ``obs`` with ``Metadata_Plate`` (``"plate"`` where the
    prediction has none), ``Metadata_Well``, the treatment, ``n_cells``, and ``ood_score``, the mean
    over its cells, where there is one.

    Raises
    ------
    DataError
        Where a column is missing or empty, a well has two treatments, or values are no numbers.
    """
    cells = Cells(prediction)
    obs = cells.obs
    for column in (WELL, treatment):
        if column not in obs:
            raise DataError(
                f"{cells.name}: obs has no column {column!r}; it has {list(obs.columns)}"
            )
    for column in (WELL, PLATE, treatment):
        if column in obs and (obs[column].isna() | (obs[column].astype(str) == "")).any():
            raise DataError(f"{cells.name}: some cells have no {column}")
    plate = obs[PLATE].astype(str) if PLATE in obs else pd.Series("plate", index=obs.index)
    keys = pd.MultiIndex.from_arrays([plate, obs[WELL].astype(str)], names=[PLATE, WELL])
    code, wells = keys.factorize(sort=True)
    names = obs[treatment].astype(str).groupby(code).unique()
    mixed = [wells[i] for i in names.index[names.str.len() > 1]]
    if mixed:
        raise DataError(
            f"{cells.name}: wells with more than one {treatment}, e.g. {mixed[0]}: "
            f"{list(names[wells.get_loc(mixed[0])])}"
        )
    number = np.bincount(code, minlength=len(wells))
    values = cells.matrix("X")
    total = np.zeros((len(wells), values.shape[1]))
    for start in range(0, len(obs), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(obs)))
        block = values.take(rows)
        dense = block if isinstance(block, np.ndarray) else block.toarray()
        np.add.at(total, code[rows], dense)
    table = wells.to_frame(index=False, name=[PLATE, WELL])
    table[treatment] = [str(names[i][0]) for i in range(len(wells))]
    table["n_cells"] = number
    if "ood_score" in obs:
        score = obs["ood_score"].to_numpy(dtype=np.float64)
        table["ood_score"] = np.bincount(code, score, minlength=len(wells)) / number
    table.index = pd.Index([f"{p}/{w}" for p, w in wells], name="well")
    _finite(total, "X", table.index, cells.name)
    if "ood_score" in table:
        _finite(table[["ood_score"]].to_numpy(), "obs['ood_score']", table.index, cells.name)
    return ad.AnnData(total / number[:, None], obs=table, var=cells.var.copy())


def _finite(values: Float, what: str, wells: pd.Index, name: str) -> None:
    bad = wells[~np.isfinite(values).all(axis=1)]
    if len(bad):
        raise DataError(
            f"{name}: {what} has values that are no finite numbers, in {len(bad)} of {len(wells)} "
            f"wells, e.g. {bad[0]}; leave these cells out, or predict them again"
        )


def usual_limit(scores: Float) -> float:
    """Return the mean ``ood_score`` above which wells are set apart, from that of the controls.

    Half more than the median of the control wells, or six standard deviations of theirs (by the
    median absolute deviation) where that is more, and 2 at most: 1 is usual in training images.

    Parameters
    ----------
    scores
        Of the control wells, ``(n,)``.
    """
    usual = float(np.median(scores))
    spread = 1.4826 * float(np.median(np.abs(scores - usual)))
    return round(min(usual + max(usual / 2, 6 * spread), 2.0), 3)


def hold_out(plate: NDArray[Any], control: Mask, rng: np.random.Generator) -> Mask:
    """Draw the half of each plate's control wells that a normalisation is fitted on.

    What is fitted on a well flatters it: controls that fitted a sphere spread less in it than any
    other well. So those that fit are not those that treatments are compared with, which are then
    normalised as treated wells are, and comparisons are as valid as without a normalisation.

    Parameters
    ----------
    plate, control
        Plate of each well, and whether it is a control, ``(n_wells,)``.
    rng
        What they are drawn by.

    Returns
    -------
    ``(n_wells,)``.

    Raises
    ------
    DataError
        Where a plate has fewer than six control wells.
    """
    fitted = np.zeros(len(plate), dtype=bool)
    for one in np.unique(plate):
        known = np.flatnonzero((plate == one) & control)
        if len(known) < _CONTROLS:
            raise DataError(
                f"plate {one}: {len(known)} control wells that are not set apart; to normalise a "
                f"plate takes {_CONTROLS} or more, half to fit on and half to compare with (leave "
                "the plate out, or choose the normalisation 'none')"
            )
        fitted[rng.choice(known, len(known) // 2, replace=False)] = True
    return fitted


def normalise_plates(values: Float, plate: NDArray[Any], fitted: Mask, how: Normalisation) -> Float:
    """Bring each plate onto the scale of some of its wells.

    Parameters
    ----------
    values
        Profiles of wells, ``(n_wells, n_genes)``.
    plate, fitted
        Plate of each well, and whether it is fitted on, ``(n_wells,)``; see :func:`hold_out`.
    how
        ``"none"`` leaves the values; ``"standardise"`` subtracts the mean of the plate's fitted
        wells and divides by their standard deviation, gene by gene; ``"sphere"`` gives them unit
        covariance too (ZCA, Kessy et al. 2018). Variances are shrunk by a tenth of their mean.

    Returns
    -------
    ``(n_wells, n_genes)``; NaN on plates without a fitted well.
    """
    if how == "none":
        return values
    out = np.full_like(values, np.nan)
    for one in np.unique(plate[fitted]):
        here = plate == one
        known = values[here & fitted]
        centred = values[here] - known.mean(axis=0)
        spread = known - known.mean(axis=0)
        if how == "standardise":
            variance = spread.var(axis=0, ddof=1)
            out[here] = centred / np.sqrt(variance + _SHRINK * variance.mean() + 1e-12)
            continue
        _, singular, axes = np.linalg.svd(spread, full_matrices=False)
        variance = singular**2 / (len(known) - 1)
        floor = _SHRINK * variance.sum() / spread.shape[1] + 1e-12
        inside = centred @ axes.T
        out[here] = centred / np.sqrt(floor)
        out[here] += (inside * (1 / np.sqrt(variance + floor) - 1 / np.sqrt(floor))) @ axes
    return out
