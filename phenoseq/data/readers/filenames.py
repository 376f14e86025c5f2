"""What names of image files say: field, stain or channel number, plate, well and site."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from phenoseq.channels import STAINS, canonical
from phenoseq.errors import DataError

_PHENIX = re.compile(
    r"(?P<field>r(?P<row>\d{2})c(?P<column>\d{2})f(?P<site>\d+))p\d+-ch(?P<channel>\d+)"
    r"(sk\d+fk\d+fl\d+)?"
)
_WELL = r"((?P<plate>.+)_)?(?P<well>([A-Pa-p]|[Aa][A-Fa-f])\d{1,2})(_s(?P<site>\d+))?"
_IMAGEXPRESS = re.compile(
    rf"(?P<field>{_WELL})_w(?P<channel>\d{{1,2}})([0-9A-Fa-f]{{8}}(-[0-9A-Fa-f]{{4,12}}){{4}})?"
)
_HARMONY = re.compile(r"(?P<plate>.+?)__\d{4}-\d\d-\d\dT.*")


@dataclass(frozen=True)
class ImageName:
    """What the name of an image file says.

    Attributes
    ----------
    field
        Its field of view: folder and name without the stain.
    token
        What stands for the stain: a channel number (without leading zeros), the name of a stain,
        or None where the file must say itself.
    metadata
        ``Metadata_Plate``, ``Metadata_Well`` (``"A01"``) and ``Metadata_Site`` where they are told.
    """

    field: str
    token: str | None
    metadata: dict[str, str]


def parse_name(path: Path, known: Iterable[str]) -> ImageName:
    """Read the name of an image file, relative to the folder of images.

    Understood are Opera Phenix (``r03c03f03p01-ch1sk1fk1fl1.tiff``), ImageXpress
    (``PLATE_A01_s1_w1.tif``) and ``FIELD_STAIN.tif``. Anything else is the name of a field.

    Parameters
    ----------
    path
        Relative path of the file.
    known
        Names that stand for a stain, in addition to those of :mod:`phenoseq.channels`.
    """
    stem = plain(re.sub(r"(\.ome)?\.tiff?$", "", path.name, flags=re.IGNORECASE))
    folder = "" if path.parent == Path() else plain(path.parent.as_posix()) + "/"
    for pattern in (_PHENIX, _IMAGEXPRESS):
        match = pattern.fullmatch(stem)
        if match:
            metadata = _metadata(match.groupdict(), path)
            return ImageName(folder + match["field"], str(int(match["channel"])), metadata)
    field, _, token = stem.rpartition("_")
    if not field or (token not in set(known) and canonical(token) not in STAINS):
        field, token = stem, ""
    match = re.fullmatch(_WELL, field)
    metadata = _metadata(match.groupdict() if match else {}, path)
    return ImageName(folder + field, token or None, metadata)


def plain(name: str) -> str:
    """Return a name with its accents composed, as they are not on every file system."""
    return unicodedata.normalize("NFC", name)


def _metadata(found: Mapping[str, str | None], path: Path) -> dict[str, str]:
    out = {}
    folders = (_HARMONY.fullmatch(plain(part)) for part in reversed(path.absolute().parts[:-1]))
    plate = found.get("plate") or next((match["plate"] for match in folders if match), None)
    if plate:
        out["Metadata_Plate"] = plate
    row, column = found.get("row"), found.get("column")
    if row and column:
        out["Metadata_Well"] = f"{_letters(int(row))}{int(column):02d}"
    well = found.get("well")
    if well:
        letters = well.rstrip("0123456789")
        out["Metadata_Well"] = f"{letters.upper()}{int(well[len(letters) :]):02d}"
    site = found.get("site")
    if site:
        out["Metadata_Site"] = str(int(site))
    return out


def _letters(row: int) -> str:
    """Name a row of a plate: A to Z, then AA to AF of 1,536 wells."""
    return chr(64 + row) if row <= 26 else f"A{chr(64 + row - 26)}"


def read_channel_map(folder: Path) -> dict[str, str]:
    """Read which number (or name) in file names is which stain; empty without a map.

    ``channels.csv`` has columns ``channel`` and ``stain``, ``channels.json`` is an object. An empty
    stain leaves the channel out.

    Raises
    ------
    DataError
        Where the file cannot be read, names a channel twice, or both files are there.
    """
    paths = [p for p in (folder / "channels.csv", folder / "channels.json") if p.exists()]
    if not paths:
        return {}
    if len(paths) > 1:
        raise DataError(f"{folder}: has both channels.csv and channels.json; keep one of them")
    path = paths[0]
    try:
        if path.suffix == ".json":
            raw = json.loads(path.read_text(encoding="utf-8"))
            pairs = [(str(k), "" if v is None else str(v)) for k, v in raw.items()]
        else:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
            pairs = list(zip(table["channel"], table["stain"], strict=True))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error!r}); it is like {example_map(['1', '2'])}"
        ) from error
    keys = [str(int(k)) if k.strip().isdigit() else plain(k.strip()) for k, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise DataError(f"{path}: says {twice} more than once; keep one of each")
    return {key: stain.strip() for key, (_, stain) in zip(keys, pairs, strict=True)}


def example_map(numbers: Iterable[str]) -> str:
    """Return a channels.csv to start from."""
    stains = ("DNA", "ER", "RNA", "AGP", "Mito", *("",) * 99)
    rows = [f"{number},{stain}" for number, stain in zip(numbers, stains, strict=False)]
    return "\n".join(["", "channel,stain", *rows])
