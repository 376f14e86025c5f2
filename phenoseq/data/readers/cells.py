"""Tables of cells: ids as text, centroids in micrometres."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from phenoseq.data.readers.filenames import plain
from phenoseq.data.source import Lost, Problem, Source
from phenoseq.errors import DataError

CENTROID = ["x_centroid", "y_centroid"]


def read_cells(path: str | Path) -> pd.DataFrame:
    """Read a table of cells, CSV (also gzipped) or parquet.

    Parameters
    ----------
    path
        File with columns ``cell_id``, ``x_centroid``, ``y_centroid`` (micrometres), and any more.

    Returns
    -------
    One row a cell, indexed by ``cell_id`` (text, so that 64-bit ids stay apart).

    Raises
    ------
    DataError
        Where the file is missing or unreadable, has no rows, lacks one of these columns, has a
        cell without an id or a position that is not a number, or repeats a cell.
    """
    path = Path(path)
    table = read_table(path)
    return check_cells(table, str(path))


def no_cells() -> pd.DataFrame:
    """Return a table of cells without any, for images whose cells come from elsewhere."""
    index = pd.Index([], dtype=object, name="cell_id")
    return pd.DataFrame({"field": [], **{name: [] for name in CENTROID}}, index=index)


def read_table(path: Path) -> pd.DataFrame:
    """Read a table with a column ``cell_id``, and index it by that, as text.

    Raises
    ------
    DataError
        Where the file is missing or unreadable, lacks the column, or has a cell without an id.
    """
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            kinds = {"cell_id": str, "field": str}
            table = pd.read_csv(path, dtype=kinds, float_precision="round_trip")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); copy it again from the source"
        ) from error
    if "cell_id" not in table:
        raise DataError(f"{path}: no column 'cell_id'; it has {list(table.columns)[:12]}")
    nameless = int(table["cell_id"].isna().sum())
    if nameless:
        raise DataError(f"{path}: {nameless} cells have no id; give every cell one of its own")
    ids = [i.decode() if isinstance(i, bytes) else str(i) for i in table.pop("cell_id")]
    table.index = pd.Index(ids, dtype=object, name="cell_id")
    return table


def check_cells(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return a table of cells, indexed by their ids, with these as text and positions as numbers.

    Raises
    ------
    DataError
        Where it has no rows, lacks a position or repeats a cell; ``where`` says what table it is.
    """
    lacking = [name for name in CENTROID if name not in table]
    if lacking:
        raise DataError(f"{where}: no column {lacking}; it has {list(table.columns)[:12]}")
    if table.empty:
        raise DataError(f"{where}: no cells in it")
    table = table.set_axis(pd.Index(table.index.astype(str), dtype=object, name="cell_id"))
    if table.index.duplicated().any():
        twice = sorted(set(table.index[table.index.duplicated()]))
        raise DataError(f"{where}: {len(twice)} cell ids stand there twice, e.g. {twice[:3]}")
    for name in CENTROID:
        table[name] = pd.to_numeric(table[name], errors="coerce").astype(np.float64)
    bad = table.index[~np.isfinite(table[CENTROID]).all(axis=1)]
    if len(bad):
        raise DataError(
            f"{where}: {len(bad)} cells have no position (NaN or text in {CENTROID}), e.g. "
            f"{list(bad[:3])}; remove these rows"
        )
    return table


def place_cells(source: Source, obs: pd.DataFrame, where: str) -> tuple[Source, list[str]]:
    """Put cells from elsewhere in place of a source's own.

    Parameters
    ----------
    source
        Images, and what is known of them.
    obs
        The cells; a column ``field`` says which image each is in, where there are several.
    where
        What the table is called in an error.

    Returns
    -------
    The source with those cells, which have the ``Metadata_*`` of their field too, and without
    counts; and the ids of cells whose field cannot be read, which are left out, told in a
    warning, and counted in ``problems``.

    Raises
    ------
    DataError
        Where ``field`` is missing, or more than a fifth of the cells are in fields without image.
    """
    broken = {problem.where: problem for problem in source.problems}
    if "field" not in obs:
        if len(source.fields) + len(broken) > 1:
            raise DataError(
                f"{where}: {source.name} has several fields; 'cells' needs a column 'field', of "
                f"{list(source.fields)[:5]} and so on"
            )
        obs = obs.assign(field=next(iter(source.fields)))
    obs = obs.assign(field=obs["field"].map(lambda name: plain(str(name))))
    lost = Lost(source.name, len(obs))
    for field, rows in obs.groupby("field", sort=False).indices.items():
        name = str(field)
        if name in source.fields:
            continue
        well = name.rpartition("-s")[0]  # a plate may lack all of it
        known = broken.pop(name, None) or broken.get(well)
        reason = (
            known.reason
            if known
            else (
                f"{where} has cells there, but there is no image of it, only of "
                f"{list(source.fields)[:3]} and so on"
            )
        )
        lost.add(rows, Problem(name, reason, len(rows)))
    lost.tell()
    there = obs["field"].isin(list(source.fields)).to_numpy()
    left_out = [str(cell) for cell in obs.index[~there]]
    obs = obs[there].copy()
    about = pd.DataFrame.from_dict(dict(source.about), orient="index").reindex(obs["field"])
    for column in about.columns.difference(obs.columns, sort=False):
        obs[column] = about[column].fillna("").to_numpy()
    problems = (*broken.values(), *lost.problems)
    return replace(source, obs=obs, counts=None, var=None, problems=problems), left_out
