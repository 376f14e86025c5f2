"""Coordinate transformations of SpatialData elements, as matrices on (x, y, 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phenoseq.data.readers.scale import micrometres
from phenoseq.errors import DataError

#: The coordinate system in which images and cells meet.
SYSTEM = "global"
Transformation = Mapping[str, Any]


def to_global(
    transformations: Sequence[Transformation], where: str
) -> tuple[NDArray[np.float64], float | None]:
    """Return the matrix ``(3, 3)`` to the system "global", and micrometres in its unit or None.

    Raises
    ------
    DataError
        Where there is none, it is of a kind that is not read, or cannot be inverted.
    """
    try:
        named = {str(t["output"]["name"]): t for t in transformations}
        if SYSTEM not in named:
            raise DataError(
                f"{where}: is in the coordinate systems {sorted(named)}, not in {SYSTEM!r}; add a "
                f"transformation to {SYSTEM!r}"
            )
        one = named[SYSTEM]
        matrix = _matrix(one, _names(one, "input"), where)
        units = {micrometres(axis.get("unit")) for axis in one["output"]["axes"] if _flat(axis)}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"{where}: its coordinate transformations are broken ({error!r}); write it again"
        ) from error
    determinant = float(np.linalg.det(matrix))
    if not np.isfinite(matrix).all() or abs(determinant) < 1e-12:
        raise DataError(f"{where}: its transformation to {SYSTEM!r} cannot be inverted")
    return matrix, units.pop() if len(units) == 1 else None


def _flat(axis: Mapping[str, Any]) -> bool:
    return axis["name"] in ("x", "y")


def _names(one: Transformation, side: str) -> list[str]:
    return [str(axis["name"]) for axis in one[side]["axes"]]


def _matrix(one: Transformation, axes: Sequence[str], where: str) -> NDArray[np.float64]:
    kind = one["type"]
    if "input" in one:
        axes = _names(one, "input")
    out = np.eye(3)
    x, y = axes.index("x"), axes.index("y")
    if kind == "scale":
        out[0, 0], out[1, 1] = one["scale"][x], one["scale"][y]
    elif kind == "translation":
        out[0, 2], out[1, 2] = one["translation"][x], one["translation"][y]
    elif kind == "affine":
        rows = np.asarray(one["affine"], dtype=np.float64)
        to = _names(one, "output") if "output" in one else axes
        for k, axis in enumerate(("x", "y")):
            out[k] = rows[to.index(axis)][[x, y, -1]]
    elif kind == "sequence":
        for part in one["transformations"]:
            out = _matrix(part, axes, where) @ out
    elif kind != "identity":
        raise DataError(
            f"{where}: a transformation of the kind {kind!r}; identity, scale, translation, affine "
            "and sequences of these are read: write it as one of them"
        )
    return out
