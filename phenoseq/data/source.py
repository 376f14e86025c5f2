"""What a reader yields: stains by name, pixel size, images read by region, cells, and counts."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.errors import DataError, PhenoseqWarning

#: Largest share of fields that may be left out because of problems.
MAX_PROBLEMS = 0.2

Region = Callable[[int, int, int, int], NDArray[Any]]


@dataclass(frozen=True)
class Level:
    """One resolution of an image, read by region.

    Attributes
    ----------
    pixel_size
        Micrometres a pixel.
    shape
        ``(height, width)`` in pixels.
    read
        ``read(y0, y1, x0, x1)`` returns the ``(C, y1 - y0, x1 - x0)`` pixels of that region,
        which lies inside ``shape``. Raises :class:`~phenoseq.errors.DataError` on a bad file.
    """

    pixel_size: float
    shape: tuple[int, int]
    read: Region


@dataclass(frozen=True)
class FieldImage:
    """One field of view or section: a pyramid of levels, finest first, all of one dtype."""

    levels: tuple[Level, ...]
    dtype: np.dtype[Any]

    def level_for(self, pixel_size: float) -> Level:
        """Return the coarsest level that is at least as fine as ``pixel_size`` (micrometres).

        The finest level is returned where every level is coarser.
        """
        fine = [level for level in self.levels if level.pixel_size <= pixel_size * 1.001]
        return max(fine, key=lambda level: level.pixel_size) if fine else self.levels[0]


@dataclass(frozen=True)
class Problem:
    """Something in a source that could not be read and is left out.

    Attributes
    ----------
    where
        The field or file.
    reason
        What was wrong with it, and what to do.
    cells
        Number of cells that are left out with it, where there is a table of them.
    """

    where: str
    reason: str
    cells: int = 0

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Source:
    """Images and cells of one experiment, as every reader yields them.

    Attributes
    ----------
    kind
        Name of the layout, e.g. ``"xenium"``.
    name
        What to call it in messages: the folder, or the simulation.
    channels
        Canonical stain names (see :mod:`phenoseq.channels`), in the order of the image channels.
    fields
        Field images by name.
    obs
        One row a cell, indexed by the source's own cell ids (unique strings), with columns
        ``field`` (a key of ``fields``), ``x_centroid`` and ``y_centroid`` (micrometres from the
        field's upper left corner) and any ``Metadata_*``.
    counts
        Raw counts, ``(n_obs, n_vars)`` float32 CSR, or None for images without expression.
    var
        One row a gene, indexed by Ensembl id (the symbol where there is none), with a column
        ``symbol``; None exactly where ``counts`` is.
    identity
        Hex digest that changes when cells, counts or pixel size change.
    problems
        What is left out because it could not be read; neither ``fields`` nor ``obs`` has it.
    about
        ``Metadata_*`` of each field, where the images tell them.
    """

    kind: str
    name: str
    channels: tuple[str, ...]
    fields: Mapping[str, FieldImage]
    obs: pd.DataFrame
    counts: sparse.csr_matrix | None
    var: pd.DataFrame | None
    identity: str
    problems: tuple[Problem, ...] = ()
    about: Mapping[str, Mapping[str, str]] = dataclass_field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Pixel type of the images."""
        return next(iter(self.fields.values())).dtype

    @property
    def pixel_size(self) -> float:
        """Micrometres a pixel at full resolution."""
        return next(iter(self.fields.values())).levels[0].pixel_size


def digest_of(
    pixel_size: float,
    obs: pd.DataFrame,
    counts: sparse.csr_matrix | None = None,
    var: pd.DataFrame | None = None,
) -> str:
    """Return the ``identity`` of a source: a digest of pixel size, cells, genes and counts."""
    digest = hashlib.sha256(f"{pixel_size:.6f}".encode())
    digest.update("\n".join(obs.index).encode())
    if len(set(obs["field"])) > 1:
        digest.update("\n".join(obs["field"].astype(str)).encode())
    digest.update(obs[["x_centroid", "y_centroid"]].to_numpy("<f8").tobytes())
    if counts is not None and var is not None:
        digest.update("\n".join(var.index).encode())
        digest.update(counts.indptr.astype("<i8").tobytes())
        digest.update(counts.indices.astype("<i8").tobytes())
        digest.update(counts.data.astype("<f4").tobytes())
    return digest.hexdigest()


class Lost:
    """Cells whose pixels turn out to be unreadable; stops where they are too many.

    Attributes
    ----------
    problems
        What cannot be read.
    cells
        Cells that are lost with it.
    """

    def __init__(self, name: str, n: int) -> None:
        self.problems: list[Problem] = []
        self.cells = 0
        self._name, self._n = name, n

    def add(self, rows: NDArray[np.int64], problem: Problem) -> None:
        """Record what cannot be read, and the cells that are lost with it.

        Raises
        ------
        DataError
            Where that makes it more than a fifth of all cells (:data:`MAX_PROBLEMS`).
        """
        self.problems.append(problem)
        self.cells += len(rows)
        if self.cells > MAX_PROBLEMS * self._n:
            raise DataError(
                f"{self._name}: the images of {self.cells} of {self._n} cells so far cannot be "
                f"read, more than {MAX_PROBLEMS:.0%}: mend or remove them{_shown(self.problems)}"
            )

    def tell(self) -> None:
        """Warn of what was lost, if anything."""
        if self.problems:
            warnings.warn(
                f"{self._name}: {len(self.problems)} images cannot be read; {self.cells} of "
                f"{self._n} cells are left out (recorded in what is written)"
                f"{_shown(self.problems)}",
                PhenoseqWarning,
                stacklevel=3,
            )


def _shown(problems: Sequence[Problem]) -> str:
    more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "".join(f"\n  {p}" for p in problems[:5]) + more


def tell_problems(
    problems: Sequence[Problem], n_read: int, name: str, what: str = "fields"
) -> None:
    """Warn of the fields (or wells) that are left out; stop where they are too many.

    Parameters
    ----------
    problems
        One a field that is left out.
    n_read
        Fields that are there.
    name
        What the source is called.
    what
        What the problems are of.

    Raises
    ------
    DataError
        Where they are more than a fifth of all fields (:data:`MAX_PROBLEMS`).
    """
    if not problems:
        return
    n, cells = len(problems), sum(p.cells for p in problems)
    shown = _shown(problems)
    if n == 1 and not n_read:
        raise DataError(problems[0].reason)
    if n > MAX_PROBLEMS * (n + n_read):
        raise DataError(
            f"{name}: {n} of {n + n_read} {what} cannot be used, more than {MAX_PROBLEMS:.0%}: "
            f"mend or remove them{shown}"
        )
    warnings.warn(
        f"{name}: {n} of {n + n_read} {what} cannot be used and are left out"
        + (f", with {cells} cells" if cells else "")
        + f" (recorded in what is written){shown}",
        PhenoseqWarning,
        stacklevel=3,
    )
