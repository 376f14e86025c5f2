"""Names of wells."""

from __future__ import annotations

import re

_WELL = re.compile(r"([A-Za-z]{1,2})[\s/_-]?0*(\d{1,2})")


def well_name(text: str) -> str:
    """Return a well as letter and two digits; a name of another form is kept as it is.

    Examples
    --------
    >>> well_name("a1"), well_name("A/01"), well_name("P-24"), well_name("AF48"), well_name("r1c2")
    ('A01', 'A01', 'P24', 'AF48', 'r1c2')
    """
    match = _WELL.fullmatch(str(text).strip())
    if match is None:
        return str(text).strip()
    return f"{match[1].upper()}{int(match[2]):02d}"
