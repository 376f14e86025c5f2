"""The truth and the predictions that are scored against it, read some rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.data.backed import Cells, Given, Matrix
from phenoseq.errors import DataError
from phenoseq.evaluation.report import MIN_COUNTS, normalised

Rows = NDArray[np.int64]

#: The baselines of every report: their names, by the layer of ``baselines.zarr``.
BASELINES = {
    "training_mean": "training mean",
    "ridge": "ridge on intensity statistics",
    "knn": "k nearest neighbours on encoder features",
    "mlp": "MLP on encoder features",
    "regressor": "end-to-end regressor",
    "regressor_nb": "end-to-end regressor + counting noise",
    "random": "random training cells",
}


@dataclass(frozen=True)
class Truth:
    """Measured cells that are scored.

    Attributes
    ----------
    obs, var
        Of the scored cells and of all genes.
    genes
        Which genes are scored, bool ``(g,)``.
    common
        Which of the scored genes are seen in more than 20% of the cells.
    group, groups
        Group of every cell as a number, and the groups' names.
    median
        Library size to which counts are scaled.
    """

    counts: Matrix
    rows: Rows
    obs: pd.DataFrame
    var: pd.DataFrame
    genes: NDArray[np.bool_]
    common: NDArray[np.bool_]
    total: NDArray[np.float64]
    group: Rows
    groups: NDArray[Any]
    median: float

    def __len__(self) -> int:
        """Return the number of scored cells."""
        return len(self.rows)

    def take(self, cells: Rows) -> NDArray[np.float32]:
        """Return the expression of some cells over the scored genes, ``(n, g)``."""
        return normalised(_sparse(self.counts.take(self.rows[cells])), self.median)[:, self.genes]


@dataclass(frozen=True)
class Prediction:
    """What one method predicts for the scored cells.

    Attributes
    ----------
    name
        Of the model or baseline.
    mean, draws
        Matrices of all cells and genes. A method without draws forecasts a point.
    rows
        Rows of the scored cells in them.
    genes
        Which genes are scored, bool ``(g,)``.
    """

    name: str
    mean: Matrix
    draws: tuple[Matrix, ...]
    rows: Rows
    genes: NDArray[np.bool_]

    def take_mean(self, cells: Rows) -> NDArray[np.float32]:
        """Return the expected expression of some cells over the scored genes, ``(n, g)``."""
        return self._taken(self.mean, cells)

    def take_draw(self, cells: Rows) -> NDArray[np.float32]:
        """Return one draw, or the point where there is none, ``(n, g)``."""
        return self._taken(self.draws[0] if self.draws else self.mean, cells)

    def take_draws(self, cells: Rows) -> NDArray[np.float32]:
        """Return all draws, or the point where there are none, ``(K, n, g)``."""
        return np.stack([self._taken(draw, cells) for draw in self.draws or (self.mean,)])

    def _taken(self, matrix: Matrix, cells: Rows) -> NDArray[np.float32]:
        values = _dense(matrix.take(self.rows[cells]))[:, self.genes]
        if not np.isfinite(values).all():
            bad = ~np.isfinite(values).all(axis=1)
            raise DataError(
                f"{self.name}: predicts NaN or infinite values, first for cell number "
                f"{self.rows[cells][bad][0]}; predict these cells again, or leave them out"
            )
        return values


def open_truth(given: Given, baselines: Given, group: str = "group") -> Truth:
    """Open the measured cells, and choose those and the genes that are scored.

    Parameters
    ----------
    given
        AnnData with raw counts in ``X`` and the group of every cell in ``obs[group]``.
    baselines
        As :func:`phenoseq.training.baselines.fit_baselines` makes them: they say which genes are
        seen in more than 2% of the training cells, and to what library size counts are scaled.
    group
        Column of groups that were held out together, such as blocks, plates or donors.

    Raises
    ------
    DataError
        Where ``X`` are not counts, the column is missing, or no cell or gene is left to score.
    """
    cells = Cells(given)
    var, known = _element(given, "var"), _element(baselines, "var")
    if "symbol" not in var:
        var = var.assign(symbol=var.index)
    facts = facts_of(baselines)
    if "scored" not in known or list(var.index) != list(known.index):
        raise DataError(f"{cells.name}: its genes are not those of the baselines, in their order")
    if group not in cells.obs:
        raise DataError(
            f"{cells.name}: no column {group!r} in obs, which says what was held out together; "
            f"name one of {[str(c) for c in cells.obs][:20]} with --group"
        )
    counts = cells.matrix()
    total, seen = np.zeros(len(cells)), np.zeros(len(var))
    for some in blocks(len(cells)):
        found = _sparse(counts.take(some))
        whole = np.isfinite(found.data) & (found.data >= 0) & (found.data == np.rint(found.data))
        if not whole.all():
            raise DataError(f"{cells.name}: X are not raw counts; give the table of counts")
        total[some] = np.asarray(found.sum(axis=1)).ravel()
        rich = found[total[some] >= MIN_COUNTS]
        seen += np.asarray((rich > 0).sum(axis=0)).ravel()
    rows = np.flatnonzero(total >= MIN_COUNTS)
    genes = known["scored"].to_numpy(dtype=bool)
    if not len(rows):
        raise DataError(f"{cells.name}: no cell has {MIN_COUNTS} counts or more; nothing to score")
    if not genes.any():
        raise DataError("no gene is seen in more than 2% of the training cells; nothing to score")
    obs = cells.obs.iloc[rows]
    groups, place = np.unique(obs[group].astype(str), return_inverse=True)
    return Truth(
        counts=counts,
        rows=rows,
        obs=obs,
        var=var,
        genes=genes,
        common=(seen / len(rows) > 0.2)[genes],
        total=total[rows],
        group=place,
        groups=groups,
        median=float(facts["median_library"]),
    )


def open_prediction(given: Given, truth: Truth, name: str) -> Prediction:
    """Open a model's prediction: ``X`` the mean, ``layers["draw_0"]`` and so on the draws.

    Raises
    ------
    DataError
        Where cells or genes of the truth are missing, or it is on another scale.
    """
    cells = Cells(given)
    rows = _aligned(cells, _element(given, "var"), truth)
    median = _element(given, "uns").get("phenoseq", {}).get("median_library", truth.median)
    if not np.isclose(float(median), truth.median, rtol=1e-6):
        raise DataError(
            f"{cells.name}: scaled to {median:g} counts, the baselines to {truth.median:g}; fit "
            "them for this model"
        )
    layers = _layers(given)
    kept = sum(layer.startswith("draw_") for layer in layers)
    names = [f"draw_{k}" for k in range(kept)] or [layer for layer in layers if layer == "draw"]
    draws = tuple(cells.matrix(f"layers/{layer}") for layer in names)
    return Prediction(name, cells.matrix(), draws, rows, truth.genes)


def open_baselines(given: Given, truth: Truth) -> list[Prediction]:
    """Open all baselines of a file.

    Raises
    ------
    DataError
        As :func:`open_prediction`, and where one of ``BASELINES`` is missing.
    """
    cells = Cells(given)
    rows = _aligned(cells, _element(given, "var"), truth)
    layers = _layers(given)
    if missing := [label for key, label in BASELINES.items() if key not in layers]:
        raise DataError(
            f"{cells.name}: lacks baselines, {missing}; 'phenoseq evaluate --model M --store S' "
            "writes all of them"
        )
    out = []
    for key, label in BASELINES.items():
        kept = sum(layer.startswith(f"{key}_draw_") for layer in layers)
        draws = tuple(cells.matrix(f"layers/{key}_draw_{k}") for k in range(kept))
        out.append(Prediction(label, cells.matrix(f"layers/{key}"), draws, rows, truth.genes))
    return out


def blocks(n: int, size: int = 1024) -> list[Rows]:
    """Return the numbers from 0 to ``n``, in blocks."""
    return np.split(np.arange(n), range(size, n, size))


def _aligned(cells: Cells, var: pd.DataFrame, truth: Truth) -> Rows:
    if list(var.index) != list(truth.var.index):
        raise DataError(f"{cells.name}: its genes are not those of the truth, in their order")
    rows = cells.obs.index.get_indexer(truth.obs.index)
    if (rows < 0).any():
        missing = truth.obs.index[rows < 0]
        raise DataError(
            f"{cells.name}: {len(missing)} cells of the truth are missing, e.g. "
            f"{[str(cell) for cell in missing[:3]]}; predict the same cells"
        )
    return np.asarray(rows, dtype=np.int64)


def facts_of(baselines: Given) -> dict[str, Any]:
    """Return how baselines were fitted; raises DataError where these are none."""
    facts: dict[str, Any] = _element(baselines, "uns").get("phenoseq", {})
    if "median_library" not in facts or "baselines" not in facts:
        name = "the AnnData given" if isinstance(baselines, ad.AnnData) else baselines
        raise DataError(
            f"{name}: holds no baselines; 'phenoseq evaluate --model M --store S' writes them"
        )
    return facts


def _element(given: Given, name: str) -> Any:
    """Read ``obs``, ``var`` or ``uns``, and no matrix."""
    if isinstance(given, ad.AnnData):
        return getattr(given, name)
    try:
        return ad.io.read_elem(_node(Path(given))[name])
    except KeyError as error:
        raise DataError(f"{given}: is no AnnData, it has no {name!r}") from error


def _layers(given: Given) -> list[str]:
    if isinstance(given, ad.AnnData):
        return list(given.layers)
    node = _node(Path(given))
    return list(node["layers"]) if "layers" in node else []


def _node(path: Path) -> Any:
    if not path.exists():
        raise DataError(f"{path}: no such file")
    try:
        return zarr.open_group(path, mode="r") if path.is_dir() else h5py.File(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is no AnnData, .h5ad or .zarr ({error})") from error


def _sparse(matrix: Any) -> sparse.csr_matrix:
    return sparse.csr_matrix(matrix)


def _dense(matrix: Any) -> NDArray[np.float32]:
    return np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix, dtype=np.float32)
