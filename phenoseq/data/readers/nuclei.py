"""Positions of nuclei from tables of CellProfiler: CSV, SQLite, or the parquet of CytoTable."""

from __future__ import annotations

import re
import sqlite3
import zlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from phenoseq.data.readers.plate import well_name
from phenoseq.errors import DataError

KEYS = ["Metadata_Plate", "Metadata_Well", "Metadata_Site"]
#: Names of the columns in tables of nuclei, the first that is there counts.
_COLUMNS = {
    "x": ("Nuclei_Location_Center_X", "Location_Center_X"),
    "y": ("Nuclei_Location_Center_Y", "Location_Center_Y"),
    "object": (
        "Nuclei_Number_Object_Number",
        "Metadata_Nuclei_Number_Object_Number",
        "Number_Object_Number",
        "Metadata_Nuclei_ObjectNumber",
        "ObjectNumber",
        "Metadata_ObjectNumber",
    ),
}
_IMAGE = {
    **{key: (key, f"Image_{key}") for key in KEYS},
    "TableNumber": ("TableNumber", "Metadata_TableNumber"),
    "ImageNumber": ("ImageNumber", "Metadata_ImageNumber"),
}


def read_nuclei(folder: Path) -> tuple[pd.DataFrame, str]:
    """Read the table of nuclei that stands in ``folder``.

    ``Nuclei.csv`` is taken, else every ``*.sqlite``, else every ``*.parquet`` that has positions.
    Where the table does not say of which well and site a nucleus is, the table of images beside
    it does (``Image.csv``, or ``Image`` in the same SQLite file), by ``ImageNumber``.

    Returns
    -------
    One row a nucleus, all text: ``x`` and ``y`` (pixels from the centre of the first pixel),
    ``object`` (number in its image), and those of ``Metadata_Plate``, ``_Well``, ``_Site`` that
    are stated; and the name of the file, for messages.

    Raises
    ------
    DataError
        Where there is no such table, or it is broken or lacks columns.
    """
    csv = next((p for p in (folder / "Nuclei.csv", folder / "Nuclei.csv.gz") if p.exists()), None)
    if csv is not None:
        image = csv.with_name(csv.name.replace("Nuclei", "Image"))
        return _tidy(_csv(csv), _csv(image) if image.exists() else None, csv), str(csv)
    files = sorted(folder.glob("*.sqlite"))
    if files:
        tables = [_tidy(*_sqlite(file), file) for file in files]
        return pd.concat(tables, ignore_index=True), ", ".join(str(file) for file in files)
    files = [f for f in sorted(folder.glob("*.parquet")) if not f.name.startswith("load_data")]
    tables = [_tidy(_parquet(file), None, file) for file in files]
    if not tables:
        raise DataError(
            f"{folder}: nothing says where cells are; put beside the list of images the table of "
            "nuclei of CellProfiler: 'Nuclei.csv' with 'Image.csv', '*.sqlite', or '*.parquet' as "
            "CytoTable writes it"
        )
    return pd.concat(tables, ignore_index=True), ", ".join(str(file) for file in files)


def _wanted(columns: Sequence[str]) -> dict[str, str]:
    """Return which columns to read, and what each is called here."""
    wanted = {}
    for name, choices in {**_COLUMNS, **_IMAGE}.items():
        found = next((choice for choice in choices if choice in columns), None)
        if found is not None:
            wanted[found] = name
    return wanted


def _csv(path: Path) -> pd.DataFrame:
    try:
        wanted = _wanted(list(pd.read_csv(path, nrows=0).columns))
        table = pd.read_csv(path, usecols=list(wanted), dtype=str)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy it again") from error
    return table.rename(columns=wanted)


def _parquet(path: Path) -> pd.DataFrame:
    try:
        wanted = _wanted(pq.read_schema(path).names)
        table = pq.read_table(path, columns=list(wanted)).to_pandas(integer_object_nulls=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy it again") from error
    return table.rename(columns=wanted).astype(str)


def _sqlite(path: Path) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Read the nuclei and, where there is one, the table of images."""
    found: dict[str, pd.DataFrame] = {}
    try:
        base = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            names = [n for (n,) in base.execute("SELECT name FROM sqlite_master ORDER BY name")]
            for kind in ("Nuclei", "Image"):
                fits = [n for n in names if re.fullmatch(rf"(.*Per_)?{kind}", n)]
                if fits:
                    table = fits[0].replace('"', '""')
                    columns = [row[1] for row in base.execute(f'PRAGMA table_info("{table}")')]
                    wanted = _wanted(columns)
                    casts = ", ".join(f'CAST("{c}" AS TEXT) AS "{n}"' for c, n in wanted.items())
                    found[kind] = pd.read_sql_query(f'SELECT {casts or 1} FROM "{table}"', base)
        finally:
            base.close()
    except (sqlite3.Error, pd.errors.DatabaseError) as error:
        raise DataError(
            f"{path}: not a readable SQLite file ({error}); copy it again from the source"
        ) from error
    if "Nuclei" not in found:
        raise DataError(f"{path}: no table 'Nuclei'; it has {names[:8]}")
    return found["Nuclei"], found.get("Image")


def _tidy(nuclei: pd.DataFrame, images: pd.DataFrame | None, path: Path) -> pd.DataFrame:
    """Return the nuclei with positions and, joined from ``images``, their well and site."""
    lacking = [_COLUMNS[name] for name in _COLUMNS if name not in nuclei]
    if lacking:
        raise DataError(f"{path}: no column {' or '.join(lacking[0])}; export it from CellProfiler")
    for table in (nuclei, images):
        for key in {"Metadata_Site", "object", "ImageNumber"} & set(() if table is None else table):
            assert table is not None
            table[key] = table[key].astype(str).str.replace(r"^0*(\d+)(\.0+)?$", r"\1", regex=True)
    if not {"Metadata_Well", "Metadata_Site"} <= set(nuclei):
        by = [key for key in ("TableNumber", "ImageNumber") if key in nuclei]
        if "ImageNumber" not in by or images is None or not set(by) <= set(images):
            raise DataError(
                f"{path}: does not say which image a nucleus is of; it needs 'Metadata_Well' and "
                "'Metadata_Site', or 'ImageNumber' and a table of images with both beside it"
            )
        stated = [key for key in KEYS if key in images]
        if images.duplicated(by).any():
            twice = images.loc[images.duplicated(by), "ImageNumber"].iloc[0]
            raise DataError(f"{path}: its table of images lists the number {twice} twice")
        nuclei = nuclei.drop(columns=[key for key in KEYS if key in nuclei])
        nuclei = nuclei.merge(images[by + stated], on=by, how="left", validate="many_to_one")
        if not {"Metadata_Well", "Metadata_Site"} <= set(nuclei):
            raise DataError(
                f"{path}: its table of images has no 'Metadata_Well' and 'Metadata_Site'"
            )
    nuclei["Metadata_Well"] = nuclei["Metadata_Well"].map(well_name)
    kept = ["x", "y", "object", *(key for key in KEYS if key in nuclei)]
    return nuclei[kept]
