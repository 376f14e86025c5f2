"""A plain folder of images, with a table of cells, masks of cells, or neither."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pandas as pd

from phenoseq.data.readers.cells import CENTROID, check_cells, no_cells, read_table
from phenoseq.data.readers.filenames import plain
from phenoseq.data.readers.images import MASKS, Images, list_images, open_images
from phenoseq.data.readers.masks import cells_of, read_mask
from phenoseq.data.segment import find_nuclei
from phenoseq.data.source import Problem, Source, digest_of, tell_problems
from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.progress import bar

_CELLS = ("cells.parquet", "cells.csv.gz", "cells.csv")


def detect(folder: Path) -> str | None:
    """Return what makes ``folder`` look like a folder of images, or None."""
    first = next(list_images(folder), None) if folder.is_dir() else None
    return None if first is None else f"it has images such as '{first.relative_to(folder)}'"


def read_folder(folder: Path, *, pixel_size: float | None = None, cells: bool = True) -> Source:
    """Read a folder of TIFF images; each is checked once, and read when its pixels are needed.

    Cells come from ``cells.csv`` (or ``.parquet``), else from ``masks``, else nuclei are found in
    the stain DNA, and their number is told.

    Parameters
    ----------
    folder
        The folder; see :func:`~phenoseq.data.readers.images.open_images`.
    pixel_size
        Micrometres a pixel, where the files do not say.
    cells
        False to open the images alone, for cells from elsewhere.

    Raises
    ------
    DataError
        Where images or cells are missing, unreadable or do not belong together, no file states the
        pixel size, or more than a fifth of the fields cannot be used.
    """
    folder = Path(folder)
    images = open_images(folder, pixel_size)
    tables = [folder / name for name in _CELLS if (folder / name).exists()]
    if not cells:
        obs, problems = no_cells(), images.problems
    elif tables:
        obs, problems = _from_table(tables[0], images)
    elif (folder / MASKS).is_dir():
        obs, problems = _from_masks(folder, images)
    else:
        obs, problems = None, images.problems
    read = set(images.fields) - {problem.where for problem in problems}
    tell_problems(problems, len(read), str(folder))
    if obs is None:
        obs = _from_nuclei(folder, images)
    if cells:
        obs = check_cells(obs, str(folder))
    metadata = pd.DataFrame.from_dict(images.metadata, orient="index").reindex(obs["field"])
    for name in metadata:
        if name not in obs:
            obs[name] = metadata[name].fillna("").to_numpy()
    fields = set(obs["field"]) if cells else set(images.fields)
    return Source(
        kind="folder",
        name=str(folder),
        channels=images.channels,
        fields={field: image for field, image in images.fields.items() if field in fields},
        obs=obs,
        counts=None,
        var=None,
        identity=digest_of(images.pixel_size, obs, None, None),
        problems=problems,
        about=images.metadata,
    )


def _from_table(path: Path, images: Images) -> tuple[pd.DataFrame, tuple[Problem, ...]]:
    """Read the table of cells, without those of fields that are left out."""
    table = read_table(path)
    for axis in ("x", "y"):
        if (
            f"{axis}_centroid" not in table and axis in table
        ):  # pixels, from the middle of the first
            position = pd.to_numeric(table.pop(axis), errors="coerce")
            table[f"{axis}_centroid"] = (position + 0.5) * images.pixel_size
    obs = check_cells(table, str(path))
    if "field" not in obs:
        if len(images.fields) + len(images.problems) > 1:
            raise DataError(f"{path}: no column 'field', which tells the image of each cell")
        obs["field"] = next(iter(images.fields))
    obs["field"] = obs["field"].map(lambda field: plain(str(field)))
    obs.insert(0, "field", obs.pop("field"))
    cells = obs["field"].value_counts()
    problems = [replace(p, cells=int(cells.get(p.where, 0))) for p in images.problems]
    known = {*images.fields, *(problem.where for problem in problems)}
    absent = [
        Problem(f, f"no image of it, but {path.name} has its cells; copy it again", int(n))
        for f, n in cells.items()
        if f not in known
    ]
    if len(absent) == len(cells):
        raise DataError(
            f"{path}: its column 'field' names {[p.where for p in absent[:3]]}, images are of the "
            f"fields {list(images.fields)[:3]}; a field is folder and file name without the stain"
        )
    return obs[obs["field"].isin(images.fields)].copy(), (*problems, *absent)


def _from_masks(folder: Path, images: Images) -> tuple[pd.DataFrame, tuple[Problem, ...]]:
    """Take one cell from each label in ``masks/FIELD.tif`` or ``.png``."""
    suffixes = (".tif", ".tiff", ".png")
    there = {
        plain(path.relative_to(folder / MASKS).with_suffix("").as_posix()): path
        for path in sorted((folder / MASKS).rglob("*"))
        if path.suffix.lower() in suffixes
    }
    tables, problems = [], []
    with bar("reading masks") as progress:
        for done, (field, image) in enumerate(images.fields.items(), start=1):
            try:
                if field not in there:
                    raise DataError(f"{folder / MASKS / field}.tif: no mask of this field")
                labels = read_mask(there[field], image.levels[0].shape)
                tables.append(cells_of(labels, field, images.pixel_size))
            except DataError as error:
                problems.append(Problem(field, str(error)))
            progress(done, len(images.fields))
    obs = pd.concat(tables) if tables else pd.DataFrame(columns=["field", *CENTROID])
    return obs, (*images.problems, *problems)


def _from_nuclei(folder: Path, images: Images) -> pd.DataFrame:
    """Find nuclei in every field, and tell how many."""
    if "DNA" not in images.channels:
        raise DataError(
            f"{folder}: has neither a table of cells ({_CELLS[-1]}) nor {MASKS!r}, and no stain "
            f"DNA to find nuclei in (it has {list(images.channels)}); add one of these"
        )
    tables = []
    with bar("finding nuclei") as progress:
        for done, field in enumerate(images.fields, start=1):
            labels = find_nuclei(images.plane(field, "DNA"), images.pixel_size)
            tables.append(cells_of(labels, field, images.pixel_size))
            progress(done, len(images.fields))
    numbers = [len(table) for table in tables]
    obs = pd.concat(tables)
    if obs.empty:
        raise DataError(
            f"{folder}: no nuclei found in {len(tables)} fields at {images.pixel_size} um a pixel; "
            "look at what 'phenoseq segment' draws, or add masks or a table of cells"
        )
    warnings.warn(
        f"{folder}: no table of cells and no masks; {len(obs):,} nuclei were found in "
        f"{len(tables)} fields ({min(numbers)} to {max(numbers)} a field). 'phenoseq segment' "
        "draws them",
        PhenoseqWarning,
        stacklevel=3,
    )
    return obs
