"""Micrometres a pixel: units, and which of several statements holds."""

from __future__ import annotations

import math

from phenoseq.errors import DataError

#: Micrometres in one unit.
UNITS = {
    "angstrom": 1e-4,
    "å": 1e-4,
    "picometer": 1e-6,
    "pm": 1e-6,
    "nanometer": 1e-3,
    "nm": 1e-3,
    "micrometer": 1.0,
    "micron": 1.0,
    "um": 1.0,
    "µm": 1.0,
    "μm": 1.0,
    "millimeter": 1e3,
    "mm": 1e3,
    "centimeter": 1e4,
    "cm": 1e4,
    "meter": 1e6,
    "m": 1e6,
}


def micrometres(unit: object) -> float | None:
    """Return the micrometres in one ``unit``, or None where it is no length that is known.

    Examples
    --------
    >>> micrometres("nanometer"), micrometres("micrometre"), micrometres("second")
    (0.001, 1.0, None)
    """
    name = str(unit or "").strip().lower()
    return UNITS.get(name, UNITS.get(name.replace("metre", "meter").rstrip("s")))


def pixel_size_of(given: float | None, stated: float | None, where: str) -> float:
    """Return the pixel size in micrometres: the one given, else the one stated.

    Raises
    ------
    DataError
        Where there is neither, or it cannot be right; ``where`` says what should state it.
    """
    size = given if given is not None else stated
    if size is None:
        raise DataError(
            f"{where}: states no pixel size in micrometres (a scale without a unit of length is "
            "none); give it with --pixel-size"
        )
    if not (math.isfinite(size) and 0.01 < size < 100):
        raise DataError(
            f"{where}: a pixel size of {size} micrometres cannot be right; give the right one with "
            "--pixel-size"
        )
    return float(size)
