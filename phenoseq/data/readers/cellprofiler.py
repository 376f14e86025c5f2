"""Cell Painting fields with CellProfiler's single-cell table, also as CytoTable writes it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from phenoseq.channels import canonical_channels
from phenoseq.data.readers.cells import check_cells
from phenoseq.data.readers.lookup import choose_file, find_files
from phenoseq.data.readers.planes import Planes, probe_fields
from phenoseq.data.readers.plate import well_name
from phenoseq.data.source import Problem, Source, digest_of, tell_problems
from phenoseq.errors import DataError, PhenoseqWarning

_IMAGE = re.compile(r"Image_FileName_Orig(.+)")
#: What tells fields apart, in the names of the field, and the columns that may hold it.
_KEYS = {
    key: (f"Metadata_{key}", f"Image_Metadata_{key}", *others)
    for key, others in {
        "Plate": (),
        "Well": (),
        "Site": ("Metadata_ImageNumber", "Image_ImageNumber", "ImageNumber"),
    }.items()
}
_OBJECT = (
    "Nuclei_Number_Object_Number",
    "Metadata_Nuclei_Number_Object_Number",
    "Nuclei_ObjectNumber",
    "Cells_Number_Object_Number",
    "Metadata_Cells_Number_Object_Number",
    "Cells_ObjectNumber",
    "Metadata_ObjectNumber",
    "ObjectNumber",
)
_CENTRE = tuple(
    f"{prefix}{what}_Center"
    for what in ("Nuclei_Location", "Nuclei_AreaShape", "Cells_Location", "Cells_AreaShape")
    for prefix in ("", "Metadata_")
)
#: Metres a pixel, as Harmony exports it.
_RESOLUTION = ("Image_Metadata_ImageResolutionX", "Metadata_ImageResolutionX")
#: A stain that less than this share of the fields has is left out, and not the other fields.
MIN_SHARE = 0.5


def detect(folder: Path) -> str | None:
    """Return what makes ``folder`` look like one with a table of CellProfiler, or None.

    Raises
    ------
    DataError
        Where a table is there that cannot be read, and no other.
    """
    names = [table.name for table in _tables(folder)] if folder.is_dir() else []
    return f"its table {names[0]!r} names the images of cells" if names else None


def read_cellprofiler(folder: Path, *, pixel_size: float | None = None) -> Source:
    """Read a folder with a single-cell table and, anywhere below it, the TIFF images it names.

    Stains go by the names in ``Image_FileName_Orig<Stain>``, fields by plate, well and site, and
    cells by ``plate_well_site_object``. Images are looked up by name below the folder, wherever
    they were when the table was made. Stains that few fields have are left out; then a field
    that lacks an image, or has a broken one, is left out with its cells. Both are told in a
    warning, the latter recorded in ``problems``. There are no counts.

    Parameters
    ----------
    folder
        The folder; the table, parquet or CSV, stands directly in it.
    pixel_size
        Micrometres a pixel, where neither table nor images say.

    Raises
    ------
    DataError
        Where the table is unreadable, lacks a column or contradicts itself, no image is there or
        too many fields have a broken one, a file's name is ambiguous, or the pixel size unknown.
    """
    folder = Path(folder)
    tables = _tables(folder)
    if len(tables) != 1:
        names = [path.name for path in tables]
        raise DataError(f"{folder}: {names} are tables that name images; keep one")
    ((path, columns),) = tables.items()
    table = _read(path, columns)
    stated = _stated_size(path, table)
    obs, sites = _cells(path, table)
    files, channels, lacking = _images(folder, path, sites)
    found, _, broken = probe_fields(files)
    cells = obs["field"].value_counts()
    problems = tuple(replace(p, cells=int(cells[p.where])) for p in (*lacking, *broken))
    tell_problems(problems, len(found), str(folder))
    sizes = {one.pixel_size for one in found.values() if one.pixel_size} | stated
    size = _pixel_size(path, sizes, pixel_size)
    obs = obs[obs["field"].isin(list(found))].copy()
    obs[["x_centroid", "y_centroid"]] = (obs[["x_centroid", "y_centroid"]] + 0.5) * size
    known = [f"Metadata_{key}" for key in _KEYS if f"Metadata_{key}" in obs]
    return Source(
        kind="cellprofiler",
        name=str(folder),
        channels=channels,
        fields={name: one.field(files[name], channels, size) for name, one in found.items()},
        obs=obs,
        counts=None,
        var=None,
        identity=digest_of(size, obs),
        problems=problems,
        about=obs.drop_duplicates("field").set_index("field")[known].to_dict("index"),
    )


# ------------------------------------------------------------------------------------- the table


def _tables(folder: Path) -> dict[Path, list[str]]:
    """Return the single-cell tables directly in a folder, with the columns of use."""
    out, broken = {}, None
    for path in sorted(folder.iterdir()):
        if not path.is_file() or not path.name.endswith((".parquet", ".csv", ".csv.gz")):
            continue
        try:
            if path.suffix == ".parquet":
                columns = list(pq.read_schema(path).names)
            else:
                columns = list(pd.read_csv(path, nrows=0).columns)
        except (OSError, ValueError, EOFError) as error:
            broken = DataError(f"{path}: cannot be read ({error}); copy it again from the source")
            continue
        if any(_IMAGE.fullmatch(name) for name in columns):
            out[path] = [name for name in columns if _is_of_use(name)]
    if broken is not None and not out:
        raise broken
    return out


def _is_of_use(column: str) -> bool:
    known = (*_KEYS["Site"], *_OBJECT, *(f"{c}_{axis}" for c in _CENTRE for axis in "XY"))
    return column.startswith(
        ("Image_FileName_Orig", "Image_PathName_Orig", "Metadata_")
    ) or column in (*known, *_KEYS["Plate"], *_KEYS["Well"], *_RESOLUTION)


def _read(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read some columns as text, so that ids of 64 bits and leading zeros are kept."""
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path, columns=list(columns), dtype_backend="numpy_nullable")
            table = table.reset_index(drop=True)
        else:
            table = pd.read_csv(
                path, usecols=list(columns), dtype=str, keep_default_na=False, na_filter=False
            )
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); copy it again from the source"
        ) from error
    if table.empty:
        raise DataError(f"{path}: no cells in it")
    return pd.DataFrame({name: [_text(value) for value in table[name]] for name in table})


def _text(value: Any) -> str:
    if value is None or value is pd.NA or value is pd.NaT:
        return ""
    if isinstance(value, bytes):
        return value.decode(errors="replace").strip()
    if isinstance(value, float):
        if np.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() else repr(float(value))
    return str(value).strip()


def _cells(path: Path, table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the cells, positions still in pixels, and one row a field with its images."""
    found = {key: next((c for c in names if c in table), None) for key, names in _KEYS.items()}
    number = _first(path, table, _OBJECT, "number of the object")
    centre = _first(path, table, [f"{name}_X" for name in _CENTRE], "centre of the nucleus")
    if found["Site"] is None:
        raise DataError(
            f"{path}: nothing tells the fields of a well apart; it needs one of the columns "
            f"{list(_KEYS['Site'])}"
        )
    keys = {key: table[name] for key, name in found.items() if name is not None}
    if "Well" in keys:
        keys["Well"] = keys["Well"].map(well_name)
    for key, values in {**keys, "object": table[number]}.items():
        lacking = int((values == "").sum())
        if lacking:
            raise DataError(f"{path}: {lacking} cells have no {key} in {found.get(key, number)!r}")
    field = pd.Series("_".join(parts) for parts in zip(*keys.values(), strict=True))
    others = [c for c in table if c.startswith("Metadata_") and c not in found.values()]
    obs = pd.DataFrame(
        {
            "field": field,
            "x_centroid": table[centre],
            "y_centroid": table.get(f"{centre[:-2]}_Y", ""),
            **{f"Metadata_{key}": values for key, values in keys.items()},
            **{name: table[name] for name in others},
        }
    ).set_axis(field + "_" + table[number])
    images = [c for c in table if c.startswith(("Image_FileName_", "Image_PathName_"))]
    sites = table[images].assign(field=field).drop_duplicates()
    twice = sites["field"][sites["field"].duplicated()]
    if len(twice):
        raise DataError(
            f"{path}: the cells of field {twice.iloc[0]!r} name different images; are a plate's, "
            f"well's or site's columns missing? It has {[c for c in found.values() if c]}"
        )
    return check_cells(obs, str(path)), sites.set_index("field")


def _first(path: Path, table: pd.DataFrame, names: Sequence[str], what: str) -> str:
    for name in names:
        if name in table:
            return name
    raise DataError(f"{path}: no column for the {what}; it needs one of {list(names)}")


def _stated_size(path: Path, table: pd.DataFrame) -> set[float]:
    """Return the pixel sizes in micrometres that the table states."""
    name = next((name for name in _RESOLUTION if name in table), None)
    metres = {value for value in table[name] if value} if name is not None else set()
    try:
        return {round(float(value) * 1e6, 6) for value in metres}
    except ValueError as error:
        raise DataError(f"{path}: {name!r} is not a number of metres ({error})") from error


def _pixel_size(path: Path, stated: set[float], given: float | None) -> float:
    if given is None and not stated:
        raise DataError(
            f"{path}: neither the table nor the images' OME-XML states a pixel size; look it up "
            "and give it in micrometres, e.g. pixel_size=0.598, or --pixel-size 0.598"
        )
    if given is None and max(stated) / min(stated) > 1.01:
        raise DataError(
            f"{path}: table and images state pixel sizes of {sorted(stated)} micrometres; tell "
            "which is right with pixel_size= or --pixel-size"
        )
    size = min(stated) if given is None else float(given)
    if not 0.01 < size < 100:
        raise DataError(f"{path}: a pixel size of {size} micrometres cannot be right")
    return size


# ------------------------------------------------------------------------------------ the images


def _images(
    folder: Path, path: Path, sites: pd.DataFrame
) -> tuple[dict[str, Planes], tuple[str, ...], list[Problem]]:
    """Return the files of each field, their stains, and the fields of which one is missing."""
    columns = [name for name in sites if _IMAGE.fullmatch(name)]
    named = {name: [re.split(r"[\\/]", file)[-1] for file in sites[name]] for name in columns}
    found = find_files(folder, {file for files in named.values() for file in files if file})
    files = {}
    for name in columns:
        folders = sites.get(name.replace("FileName", "PathName"), pd.Series("", sites.index))
        files[name] = [choose_file(found, *both) for both in zip(named[name], folders, strict=True)]
    _check_apart(path, files, list(sites.index))
    share = {name: np.mean([p is not None for p in files[name]]) for name in columns}
    kept = [name for name in columns if share[name] >= MIN_SHARE]
    if not kept:
        raise DataError(
            f"{folder}: images that {path.name} names are not below it, e.g. "
            f"{named[columns[0]][0]!r} (links out of the folder are not followed); put the images "
            "into this folder, or into folders of it"
        )
    channels = canonical_channels([_stain(name) for name in kept], str(path))
    absent = {_stain(name): named[name][0] for name in columns if name not in kept}
    if absent:
        _warn(f"{folder}: no images, or few, of the stains {absent}: they are left out")
    fields, problems = {}, []
    for k, field in enumerate(sites.index):
        there = {stain: files[name][k] for stain, name in zip(channels, kept, strict=True)}
        missing = [named[name][k] or f"{name} is empty" for name in kept if files[name][k] is None]
        if missing:
            problems.append(Problem(field, f"no image {missing} below {folder}"))
        else:
            fields[field] = Planes({stain: p for stain, p in there.items() if p is not None})
    return fields, channels, problems


def _check_apart(
    path: Path, files: Mapping[str, Sequence[Path | None]], fields: Sequence[str]
) -> None:
    """Check that no two fields or stains are read from one file."""
    owner: dict[Path, tuple[str, str]] = {}
    for name, paths in files.items():
        for field, file in zip(fields, paths, strict=True):
            if file is None:
                continue
            if file in owner:
                raise DataError(
                    f"{path}: {file} is the image of {_stain(name)} of field {field}, but also of "
                    f"{owner[file][1]} of field {owner[file][0]}; keep plates in folders named as "
                    "at the microscope, and check the table"
                )
            owner[file] = (field, _stain(name))


def _stain(column: str) -> str:
    match = _IMAGE.fullmatch(column)
    assert match is not None
    return match[1]


def _warn(message: str) -> None:
    warnings.warn(message, PhenoseqWarning, stacklevel=4)
