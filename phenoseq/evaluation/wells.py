"""Wells of a screen: mean predicted expression of each, and plates brought onto one scale."""

from __future__ import annotations

from typing import Literal

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
        Where a column is missing or empty, or a well has two treatments.
    """
    cells = Cells(prediction)
    obs = cells.obs
    for column in (WELL, treatment):
        if column not in obs:
            raise DataError(
                f"{cells.name}: obs has no column {column!r}; it has {list(obs.columns)}"
            )
        if obs[column].isna().any() or (obs[column].astype(str) == "").any():
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
    return ad.AnnData(total / number[:, None], obs=table, var=cells.var.copy())


def normalise_plates(
    wells: ad.AnnData, treatment: str, control: str, how: Normalisation
) -> NDArray[np.float64]:
    """Bring each plate onto the scale of its own control wells, which alone are fitted on.

    Parameters
    ----------
    wells
        From :func:`well_profiles`.
    treatment, control
        Column of ``obs``, and the value that marks control wells.
    how
        ``"none"`` leaves the values; ``"standardise"`` subtracts the mean of the plate's controls
        and divides by their standard deviation, gene by gene; ``"sphere"`` gives them unit
        covariance too (ZCA, Kessy et al. 2018). Variances are shrunk by a tenth of their mean.

    Returns
    -------
    ``(n_wells, n_genes)``.

    Raises
    ------
    DataError
        Where a plate has fewer than three control wells.
    """
    values = np.asarray(wells.X, dtype=np.float64)
    if how == "none":
        return values
    out = np.empty_like(values)
    plates = wells.obs[PLATE].to_numpy()
    is_control = wells.obs[treatment].to_numpy() == control
    for plate in np.unique(plates):
        here = plates == plate
        known = values[here & is_control]
        if len(known) < 3:
            raise DataError(
                f"plate {plate}: {len(known)} wells of {control!r}; to {how} a plate takes three "
                "or more (or choose the normalisation 'none')"
            )
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
