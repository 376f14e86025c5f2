"""Stains: canonical names and the aliases under which instruments and labs write them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence

from phenoseq.errors import DataError, PhenoseqWarning

#: Canonical name -> aliases, compared without case, spaces and punctuation.
STAINS: dict[str, tuple[str, ...]] = {
    "DNA": ("DAPI", "Hoechst", "Hoechst33342", "OrigDNA", "Nuclei"),
    "ER": ("ConA", "ConcanavalinA", "OrigER"),
    "RNA": ("SYTO14", "SYTORNA", "OrigRNA"),
    "AGP": ("ActinGolgiPlasma", "WGAPhalloidin", "PhalloidinWGA", "OrigAGP"),
    "Mito": ("Mitochondria", "MitoTracker", "OrigMito"),
    "Brightfield": ("BF", "OrigBrightfield"),
    "Boundary": ("ATP1A1CD45ECadherin", "CellBoundary"),
    "18S": ("InteriorRNA", "18SrRNA"),
    "InteriorProtein": ("AlphaSMAVimentin", "aSMAVimentin"),
    "PolyT": ("PolyA",),
    "Cellbound1": (),
    "Cellbound2": (),
    "Cellbound3": (),
}


def _fold(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("\N{GREEK SMALL LETTER ALPHA}", "alpha"))


_BY_ALIAS = {_fold(a): name for name, aliases in STAINS.items() for a in (name, *aliases)}


def canonical(name: str) -> str:
    """Return the canonical stain name for ``name``; an unknown stain keeps its own name.

    Examples
    --------
    >>> canonical("Hoechst 33342"), canonical("ATP1A1/CD45/E-Cadherin"), canonical("CD8")
    ('DNA', 'Boundary', 'CD8')
    """
    return _BY_ALIAS.get(_fold(name), name)


def canonical_channels(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Canonicalise a list of stain names, which must come out different from each other.

    Raises
    ------
    DataError
        Where two names mean the same stain, or a name is empty; ``where`` says of what.
    """
    raw = [str(name) for name in names]
    out = tuple(canonical(name) for name in raw)
    if any(not name.strip() for name in raw):
        raise DataError(f"{where}: a stain has no name; give every channel a name (have {raw})")
    for name in out:
        if out.count(name) > 1:
            twice = [r for r, o in zip(raw, out, strict=True) if o == name]
            raise DataError(f"{where}: {twice} all mean the stain {name!r}; keep one of them")
    return out


def match_channels(have: Sequence[str], want: Sequence[str], where: str) -> list[int | None]:
    """Place the channels of some images into those of a model.

    Parameters
    ----------
    have
        Canonical stain names of the images.
    want
        Canonical stain names of the model.
    where
        What the images are called in an error.

    Returns
    -------
    For each channel of the model the index of it in ``have``, or None where it is missing. Where
    none is missing, others that the images have are not used, with a warning.

    Raises
    ------
    DataError
        Where the images lack a stain of the model and have one that it does not know, which may be
        that one by another name; or have none that it knows.

    Examples
    --------
    >>> match_channels(["Mito", "DNA"], ["DNA", "RNA", "Mito"], "images")
    [1, None, 0]
    """
    unknown = [name for name in have if name not in want]
    placed = [have.index(name) if name in have else None for name in want]
    if unknown and None in placed:
        raise DataError(
            f"{where}: the model does not know the stain(s) {unknown}; it knows {list(want)}. "
            "Drop these channels or, if they go by another name there, rename them"
        )
    if unknown:
        warnings.warn(
            f"{where}: the model does not know the stain(s) {unknown}; they are not used",
            PhenoseqWarning,
            stacklevel=4,
        )
    if all(place is None for place in placed):
        raise DataError(f"{where}: none of the model's stains {list(want)} are among {list(have)}")
    return placed
