"""Cell Painting Gallery and JUMP: a ``load_data.csv`` that lists the images of a plate."""

from __future__ import annotations

import re
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from phenoseq.channels import canonical_channels
from phenoseq.data.readers.cells import check_cells, no_cells
from phenoseq.data.readers.illumination import corrected, open_illumination
from phenoseq.data.readers.nuclei import KEYS, read_nuclei
from phenoseq.data.readers.planes import Planes, Probe, probe_fields
from phenoseq.data.readers.plate import well_name
from phenoseq.data.readers.scale import pixel_size_of
from phenoseq.data.readers.storage import Place, inside, is_url, place_of
from phenoseq.data.source import (
    FieldImage,
    Level,
    Problem,
    Region,
    Source,
    digest_of,
    tell_problems,
)
from phenoseq.errors import DataError, PhenoseqWarning

#: Names of the list of images, the first that is there counts.
LISTS = tuple(
    f"load_data{part}.{ending}"
    for part in ("_with_illum", "")
    for ending in ("csv", "csv.gz", "parquet")
)
#: Remote fields that are tried before it is said that none can be read.
TRIES = 20


def detect(path: Path) -> str | None:
    """Return what makes ``path`` look like a list of images of the gallery, or None."""
    if path.is_file():
        return f"it is called {path.name!r}" if path.name in LISTS else None
    name = next((name for name in LISTS if (path / name).is_file()), None)
    return name and f"it has {name!r}"


def read_jump(path: Path, *, pixel_size: float | None = None, cells: bool = True) -> Source:
    """Read a ``load_data.csv`` and the images that it lists, which may be remote.

    A field that misses an image on the disk, or has a broken one, is left out with its cells; local
    images are checked once, remote ones are not looked at before they are read.

    Each image is divided by the illumination function of its plate and stain, where there are
    such; the quotient is rounded and clipped to the pixel type of the images.

    Parameters
    ----------
    path
        The list, or the folder that holds it. The table of nuclei stands beside it, see
        :func:`~phenoseq.data.readers.nuclei.read_nuclei`.
    pixel_size
        Micrometres a pixel; needed, since no file states it.
    cells
        False to open the images alone, for cells from elsewhere.

    Raises
    ------
    DataError
        Where the list or the table of nuclei is missing or broken, images lie outside what the
        list may name, more than a fifth of the fields cannot be used, or no pixel size is given.
    """
    path = Path(path)
    file = path if path.is_file() else next((path / n for n in LISTS if (path / n).exists()), None)
    if file is None:
        raise DataError(f"{path}: no list of images; expected one of {list(LISTS)}")
    table = _read_list(file)
    size = pixel_size_of(pixel_size, None, str(file))
    stains = _stains(table, "Orig", file)
    channels = canonical_channels(stains, str(file))
    places = _locations(table, "Orig", stains, file)
    files, lacking = _present(places, channels, file)
    found, broken = _probe(files)
    shape = next(iter(found.values())).levels[0][1] if found else (0, 0)
    functions = _functions(table, stains, file, shape) if found else {}
    fields = {}
    for field, one in found.items():
        plate = str(table.loc[field, "Metadata_Plate"])
        image = one.field(files[field], channels, size)
        read = _Corrected(image.levels[0].read, [functions.get((plate, s)) for s in stains])
        fields[field] = FieldImage((Level(size, shape, read),), image.dtype)
    obs, idle = _cells(table, file, size) if cells else (no_cells(), [])
    number = obs["field"].value_counts()
    problems = tuple(replace(p, cells=int(number.get(p.where, 0))) for p in (*lacking, *broken))
    tell_problems(problems, len(fields), str(file))
    if cells:
        obs = check_cells(obs[obs["field"].isin(fields)].copy(), str(file))
    return Source(
        kind="jump",
        name=str(path),
        channels=channels,
        fields=fields,
        obs=obs,
        counts=None,
        var=None,
        identity=digest_of(size, obs),
        problems=(*problems, *idle),
        about=table[_about(table)].to_dict("index"),
    )


def _read_list(file: Path) -> pd.DataFrame:
    """Return the list, all text, indexed by the name of the field."""
    try:
        if file.suffix == ".parquet":
            table = pd.read_parquet(file).astype(str)
        else:
            table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}); copy it again") from error
    lacking = [key for key in KEYS if key not in table]
    if lacking or table.empty:
        raise DataError(f"{file}: no rows, or no column {lacking or KEYS}; a row an image needs it")
    for key in KEYS:
        bad = np.flatnonzero(table[key].str.strip().isin(["", "nan", "None"]))
        if len(bad):
            raise DataError(f"{file}: row {bad[0] + 2} has no {key}; fill it in or remove the row")
    for plate in table["Metadata_Plate"].unique():
        inside(plate, str(file))
    table["Metadata_Well"] = table["Metadata_Well"].map(well_name)
    site = table["Metadata_Site"].str.replace(r"^0*(\d+)(\.0+)?$", r"\1", regex=True)
    table["Metadata_Site"] = site
    table.index = pd.Index(table["Metadata_Plate"] + "-" + table["Metadata_Well"] + "-s" + site)
    if table.index.duplicated().any():
        twice = sorted(set(table.index[table.index.duplicated()]))
        raise DataError(f"{file}: lists fields twice: {twice[:3]}; keep one row of each")
    return table


def _stains(table: pd.DataFrame, kind: str, file: Path) -> list[str]:
    pattern = re.compile(rf"(?:FileName|URL)_{kind}(.+)")
    found = [match[1] for column in table for match in [pattern.fullmatch(column)] if match]
    if not found:
        raise DataError(f"{file}: no column 'FileName_OrigDNA' or 'URL_OrigDNA', one a stain")
    return list(dict.fromkeys(found))


def _locations(
    table: pd.DataFrame, kind: str, stains: Sequence[str], file: Path
) -> dict[str, list[Place | None]]:
    """Return for each field where the file of each stain is, None where it is not stated."""
    columns = []
    for stain in stains:
        url, name, folder = (
            table.get(f"{what}_{kind}{stain}", pd.Series("", index=table.index))
            for what in ("URL", "FileName", "PathName")
        )
        columns.append(
            [_location(u, n, f, file) for u, n, f in zip(url, name, folder, strict=True)]
        )
    return dict(zip(table.index, map(list, zip(*columns, strict=True)), strict=True))


def _location(url: str, name: str, folder: str, file: Path) -> Place | None:
    """Return where an image is: as stated, or beside the list, if the folder is not there."""
    stated = url or (f"{folder.rstrip('/')}/{name}" if folder and name else name)
    if not stated:
        return None
    place = place_of(stated)
    parts = place.split("/") if isinstance(place, str) else place.parts
    if ".." in parts or "\\" in stated:
        raise DataError(
            f"{file}: states the path {stated!r}, which climbs out of its folder; write the "
            "folder itself"
        )
    if isinstance(place, str):
        return place
    place = file.parent / place
    beside = (place, file.parent / place.name, file.parent / "images" / place.name)
    return next((p for p in beside if p.is_file()), place)


def _present(
    places: Mapping[str, Sequence[Place | None]], channels: Sequence[str], file: Path
) -> tuple[dict[str, Planes], list[Problem]]:
    """Return the files of each field, and the fields of which a local one is missing."""
    kept: dict[str, Planes] = {}
    seen: dict[Place, str] = {}
    problems = []
    for field, these in places.items():
        there = {stain: p for stain, p in zip(channels, these, strict=True) if p is not None}
        absent = [str(p) for p in there.values() if isinstance(p, Path) and not p.is_file()]
        if absent or len(there) < len(these):
            what = absent[:1] or [f"file stated for {[s for s in channels if s not in there]}"]
            problems.append(Problem(field, f"no image {what[0]}; copy it"))
            continue
        kept[field] = Planes(there)
        for place in there.values():
            if seen.setdefault(place, field) != field:
                raise DataError(
                    f"{file}: {place} stands for two fields, {seen[place]} and {field}; correct "
                    "the paths, or put each plate into a folder of its own"
                )
    return kept, problems


def _probe(files: Mapping[str, Planes]) -> tuple[dict[str, Probe], list[Problem]]:
    """Check local images once; of remote ones the first alone, for all others."""
    remote = [f for f, one in files.items() if any(map(is_url, one.stains.values()))]
    found, _, broken = probe_fields({f: one for f, one in files.items() if f not in set(remote)})
    problems, first = list(broken), next(iter(found.values()), None)
    for tried, field in enumerate(remote):
        if first is not None:
            found |= dict.fromkeys(remote[tried:], first)
            break
        if tried == TRIES:
            break
        try:
            found[field] = first = files[field].probe(decode=False)
        except DataError as error:
            problems.append(Problem(field, str(error)))
    shapes = Counter(one.levels[0][1] for one in found.values())
    shape = max(shapes, key=lambda s: shapes[s], default=None)
    for field, one in found.items():
        if one.levels[0][1] != shape:
            problems.append(Problem(field, f"is of {one.levels[0][1]} pixels, others of {shape}"))
    good = {field: found[field] for field in files if field in found}
    return {f: one for f, one in good.items() if one.levels[0][1] == shape}, problems


class _Corrected:
    """Reads a region and divides each stain by its illumination function, where there is one."""

    def __init__(self, read: Region, functions: Sequence[NDArray[Any] | None]) -> None:
        self._read, self._functions = read, functions

    def __call__(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        pixels = self._read(y0, y1, x0, x1)
        for plane, function in zip(pixels, self._functions, strict=True):
            if function is not None:
                plane[:] = corrected(plane, function[y0:y1, x0:x1])
        return pixels


def _functions(
    table: pd.DataFrame, stains: Sequence[str], file: Path, shape: tuple[int, int]
) -> dict[tuple[str, str], NDArray[Any]]:
    """Return the illumination functions by plate and stain: of all, or of none."""
    plates = table.drop_duplicates("Metadata_Plate").set_index("Metadata_Plate", drop=False)
    stated = _locations(plates, "Illum", stains, file)
    found: dict[tuple[str, str], Place] = {}
    absent: list[str] = []
    for plate, places in stated.items():
        for stain, place in zip(stains, places, strict=True):
            folder, name = file.parent / "illum", f"{plate}_Illum{stain}.npy"
            usual = [file.parent / name, folder / name, folder / plate / name]
            known = next((p for p in [place, *usual] if p is not None and _there(p)), None)
            if known is not None:
                found[plate, stain] = known
            else:
                absent.append(str(place or usual[0]))
    if found and absent:
        raise DataError(
            f"{absent[0]}: missing, but other illumination functions are there; copy it too, or "
            "take all of them away"
        )
    if not found and any(place is not None for places in stated.values() for place in places):
        warnings.warn(
            f"{file}: lists illumination functions, but none is there; images are read as they are",
            PhenoseqWarning,
            stacklevel=3,
        )
    return {key: open_illumination(place, shape) for key, place in found.items()}


def _there(place: Place) -> bool:
    return is_url(place) or Path(place).is_file()


def _about(table: pd.DataFrame) -> list[str]:
    return [column for column in table if column.startswith("Metadata_")]


def _cells(table: pd.DataFrame, file: Path, size: float) -> tuple[pd.DataFrame, list[Problem]]:
    """Return the nuclei of the fields that are listed, and the fields that are not."""
    nuclei, where = read_nuclei(file.parent)
    if "Metadata_Plate" not in nuclei:
        plates = table["Metadata_Plate"].unique()
        if len(plates) > 1:
            raise DataError(f"{where}: no 'Metadata_Plate', but {file} lists {len(plates)} plates")
        nuclei["Metadata_Plate"] = plates[0]
    names = nuclei["Metadata_Plate"] + "-" + nuclei["Metadata_Well"]
    names = (names + "-s" + nuclei["Metadata_Site"]).fillna("")
    listed = names.isin(table.index).to_numpy()
    if not listed.any():
        raise DataError(
            f"{where}: no nucleus is of a field of {file.name} (nuclei are of such as "
            f"{sorted(set(names))[:2]}, fields are {list(table.index[:2])}); are both of one plate?"
        )
    if not listed.all():
        warnings.warn(
            f"{where}: {(~listed).sum()} of {len(listed)} nuclei are of fields that {file.name} "
            f"does not list, such as {sorted(set(names[~listed]))[:2]}, and are left out",
            PhenoseqWarning,
            stacklevel=3,
        )
    idle = [
        Problem(str(name) or "nuclei without a field", f"{file.name} does not list it", int(n))
        for name, n in names[~listed].value_counts(sort=False).items()
    ]
    nuclei, names = nuclei[listed], names[listed]
    obs = pd.DataFrame({"field": names.to_numpy()})
    for axis in ("x", "y"):
        pixels = pd.to_numeric(nuclei[axis], errors="coerce").to_numpy(np.float64)
        obs[f"{axis}_centroid"] = (pixels + 0.5) * size
    for column in _about(table):
        obs[column] = table[column].reindex(names).to_numpy()
    obs.index = pd.Index((names + "-" + nuclei["object"]).to_numpy(), dtype=object)
    return check_cells(obs, where), idle
