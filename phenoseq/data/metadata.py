"""What another table says of the cells of a source: of each cell, or of each well."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from phenoseq.data.backed import Cells, is_anndata
from phenoseq.data.readers.plate import well_name
from phenoseq.data.source import Problem, Source, tell_problems
from phenoseq.errors import DataError, PhenoseqWarning

WELL, PLATE = "Metadata_Well", "Metadata_Plate"


def read_metadata(path: str | Path) -> pd.DataFrame:
    """Read a table of cells or of wells: AnnData (its ``obs``), CSV or parquet; all as text.

    Returns
    -------
    Indexed by ``cell_id`` where there is such a column, or it is AnnData; else a row a well.

    Raises
    ------
    DataError
        Where it cannot be read, or has neither ``cell_id`` nor ``Metadata_Well``.
    """
    path = Path(path)
    if is_anndata(path):
        return Cells(path).obs.rename_axis("cell_id")
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
            table = table.astype(object).map(str, na_action="ignore")
        else:
            table = pd.read_csv(path, dtype=str)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable table ({error})") from error
    if "cell_id" in table:
        table = table.set_index("cell_id")
    elif WELL not in table:
        raise DataError(
            f"{path}: has neither 'cell_id' nor {WELL!r}, so nothing says of which cells it tells; "
            f"it has {list(table.columns)[:12]}"
        )
    return table


def add_metadata(source: Source, table: pd.DataFrame, where: str) -> Source:
    """Add what a table says of cells, and keep those alone of which it tells.

    Columns of the table come in place of those of one name, but for fields and positions. Cells of
    which it does not tell are left out, and stand among the source's problems.

    Parameters
    ----------
    source
        Images and cells.
    table
        A row a cell, indexed by ``cell_id``; or a row a well, with columns ``Metadata_Well`` and,
        where the source has several plates, ``Metadata_Plate``. Wells may be written ``A01`` or
        ``a1``.
    where
        What the table is called in messages.

    Raises
    ------
    DataError
        Where the table tells of a cell or well twice or of none that is there, or lacks more than a
        fifth of the wells.
    """
    of_wells = table.index.name != "cell_id"
    ours, theirs = _wells(source, table, where) if of_wells else (source.obs.index, table.index)
    what = "wells" if of_wells else "cells"
    if not theirs.is_unique:
        twice = list(theirs[theirs.duplicated()][:3])
        raise DataError(f"{where}: tells of {what} twice, e.g. {twice}; keep one row of each")
    place = theirs.get_indexer(ours)
    rows = np.flatnonzero(place >= 0)
    if not len(rows):
        raise DataError(
            f"{where}: tells of none of the {what} of {source.name} (of such as {list(theirs[:3])},"
            f" there are such as {list(ours[:3])})"
        )
    problems = _problems(ours[place < 0], of_wells, where)
    if of_wells:
        tell_problems(problems, len(ours[rows].unique()), f"{source.name} and {where}", what)
    elif problems:
        warnings.warn(f"{where}: {problems[0].reason}", PhenoseqWarning, stacklevel=2)
    idle = len(theirs.difference(ours))
    if idle:
        warnings.warn(
            f"{where}: {idle:,} of {len(theirs):,} {what} are not in {source.name}",
            PhenoseqWarning,
            stacklevel=2,
        )
    obs = source.obs.iloc[rows].copy()
    kept = ["field", "x_centroid", "y_centroid", *([WELL, PLATE] if of_wells else [])]
    for name in table.columns.difference(kept, sort=False):
        obs[name] = table[name].to_numpy()[place[rows]]
    digest = hashlib.sha256(source.identity.encode())
    digest.update("\n".join(obs.index).encode())
    return replace(
        source,
        obs=obs,
        counts=None if source.counts is None else source.counts[rows],
        identity=digest.hexdigest() if len(rows) < len(source.obs) else source.identity,
        problems=(*source.problems, *problems),
    )


def _wells(source: Source, table: pd.DataFrame, where: str) -> tuple[pd.Index, pd.Index]:
    """Return the well of each cell, and of each row of the table, with the plate if both tell."""
    if WELL not in source.obs:
        raise DataError(
            f"{where}: tells of wells, but the cells of {source.name} have no {WELL!r}; give a "
            "table with 'cell_id'"
        )
    keys = [PLATE, WELL] if PLATE in source.obs and PLATE in table else [WELL]
    plates = source.obs[PLATE].unique() if PLATE in source.obs else []
    if len(keys) == 1 and len(plates) > 1:
        raise DataError(
            f"{where}: has no {PLATE!r}, but {source.name} is of {len(plates)} plates; add the "
            "column"
        )
    found = []
    for frame in (source.obs, table):
        wells = frame[WELL].astype(str).map(well_name)
        named = frame[PLATE].astype(str) + " " + wells if len(keys) > 1 else wells
        found.append(pd.Index(named.to_numpy(object)))
    return found[0], found[1]


def _problems(lost: pd.Index, of_wells: bool, where: str) -> tuple[Problem, ...]:
    if of_wells:
        cells = lost.value_counts(sort=False)
        return tuple(
            Problem(str(well), f"no well of that name in {where}", int(n))
            for well, n in cells.items()
        )
    if not len(lost):
        return ()
    reason = f"does not tell of {len(lost):,} cells, such as {list(lost[:3])}: left out"
    return (Problem(where, reason, len(lost)),)
