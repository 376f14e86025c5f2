"""What is predicted: the fields of a table, its rows, and how they are computed."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from phenoseq.data.source import MAX_PROBLEMS
from phenoseq.errors import DataError, PhenoseqWarning

Rows = NDArray[np.int64]
Values = Mapping[str, NDArray[Any]]
#: Rows with their values, or with the reason why they have none.
Part: TypeAlias = tuple[Rows, Values | str]
#: Rows of a table digested at once.
_DIGESTED = 1 << 16


@dataclass(frozen=True)
class Field:
    """One array of a prediction.

    Attributes
    ----------
    name
        Where it goes: ``"X"``, ``"layers/std"``, ``"obsm/X_phenoseq"``, ``"obs/ood_score"``.
    width
        Numbers a row; 0 for a column of ``obs``.
    dtype
        Of the numbers.
    sparse
        Whether it becomes CSR.
    """

    name: str
    width: int
    dtype: str = "float32"
    sparse: bool = False

    def empty(self, n: int) -> NDArray[Any]:
        """Return an array for ``n`` rows."""
        return np.empty((n, self.width) if self.width else n, dtype=self.dtype)


@dataclass(frozen=True)
class Job:
    """A prediction to be made.

    Attributes
    ----------
    fields
        What is predicted of a row.
    order
        All rows, in the order in which they are best predicted.
    block
        Rows in a block of a file.
    compute
        Yields all rows of a part of ``order``, some at a time and about in this order: with their
        values, or with the reason why they have none, such as an image that cannot be decoded.
    obs, var, uns
        The rest of the table; of ``uns["phenoseq"]`` the lists ``problems`` and ``skipped_cells``
        tell what is left out.
    plan
        All that the values follow from, plain JSON.
    """

    fields: tuple[Field, ...]
    order: Rows
    block: int
    compute: Callable[[Rows], Iterator[Part]]
    obs: pd.DataFrame
    var: pd.DataFrame
    uns: dict[str, Any]
    plan: Mapping[str, Any]


def digest_of_table(table: pd.DataFrame) -> str:
    """Return a digest of a table's index, columns and values."""
    digest = hashlib.sha256("\n".join(map(str, table.columns)).encode())
    for start in range(0, len(table), _DIGESTED):
        rows = pd.util.hash_pandas_object(table.iloc[start : start + _DIGESTED])
        digest.update(rows.to_numpy().tobytes())
    return digest.hexdigest()


class Left:
    """Rows that have no values, by the reason."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rows: dict[str, list[int]] = {}

    def add(self, rows: Sequence[int], why: str) -> None:
        """Add rows; :class:`DataError` where they are too many."""
        self.rows.setdefault(why, []).extend(rows)
        n, total = sum(map(len, self.rows.values())), len(self.job.order)
        if n > MAX_PROBLEMS * total or n == total:
            raise DataError(
                f"{n:,} of {total:,} rows cannot be predicted, and at most {MAX_PROBLEMS:.0%} may "
                f"be left out: {next(iter(self.rows))}"
            )

    def obs_and_uns(self) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Return those parts of the table, without the rows but with why they are missing."""
        obs, uns = self.job.obs, self.job.uns
        if not self.rows:
            return obs.copy(), uns
        left = np.sort(np.concatenate(list(self.rows.values())))
        warnings.warn(
            f"{len(left):,} rows are left out (recorded in uns): {next(iter(self.rows))}",
            PhenoseqWarning,
            stacklevel=5,
        )
        record = dict(uns["phenoseq"])
        record["problems"] = [*record.get("problems", []), *self.rows]
        record["skipped_cells"] = [*record.get("skipped_cells", []), *obs.index[left]]
        return obs.drop(index=obs.index[left]), {**uns, "phenoseq": record}


def assemble(job: Job, values: Mapping[str, Any], left: Left) -> ad.AnnData:
    """Put together the table of those fields that there are values of."""
    obs, uns = left.obs_and_uns()
    parts: dict[str, dict[str, Any]] = {"layers": {}, "obsm": {}}
    for name, value in values.items():
        kind, _, last = name.rpartition("/")
        if kind == "obs":
            obs[last] = value
        elif kind:
            parts[kind][last] = value
    if {"x_centroid", "y_centroid"} <= set(obs):
        parts["obsm"]["spatial"] = obs[["x_centroid", "y_centroid"]].to_numpy(np.float64)
    return ad.AnnData(values.get("X"), obs=obs, var=job.var, uns=uns, **parts)
