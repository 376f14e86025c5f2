"""Files that a table names, found anywhere below a folder, and told apart by their folders."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from phenoseq.errors import DataError


def find_files(folder: Path, names: Collection[str]) -> dict[str, list[Path]]:
    """Find files by name anywhere below a folder.

    Links to folders are not followed, and links to files only where these lie below the folder.

    Returns
    -------
    For each name that is there its files, without links, in order.
    """
    root = folder.resolve()
    wanted = set(names)
    found: dict[str, set[Path]] = {}
    for here, _, files in os.walk(root):
        for name in wanted.intersection(files):
            path = (Path(here) / name).resolve()
            if path.is_relative_to(root) and path.is_file():
                found.setdefault(name, set()).add(path)
    return {name: sorted(paths) for name, paths in found.items()}


def choose_file(found: Mapping[str, Sequence[Path]], name: str, stated_folder: str) -> Path | None:
    r"""Choose the file of that name, or None where there is none.

    Parameters
    ----------
    found
        What :func:`find_files` found.
    name
        The file's name.
    stated_folder
        Where the file once was, with ``/`` or ``\``; of several files the one is chosen whose
        folder ends most like it.

    Raises
    ------
    DataError
        Where several files are as near.
    """
    paths = found.get(name, ())
    if len(paths) < 2:
        return paths[0] if paths else None
    stated = re.split(r"[\\/]+", stated_folder.rstrip("\\/"))
    nearness = [_same_at_the_end(path.parent.parts, stated) for path in paths]
    nearest = [p for p, n in zip(paths, nearness, strict=True) if n == max(nearness)]
    if len(nearest) > 1:
        raise DataError(
            f"{nearest[0]} and {nearest[1]}: two files of one name, and the table's folder "
            f"{stated_folder!r} does not tell which is meant; keep the folders' names as they "
            "were at the microscope, or one plate a folder"
        )
    return nearest[0]


def _same_at_the_end(here: Sequence[str], there: Sequence[str]) -> int:
    n = 0
    for a, b in zip(reversed(here), reversed(there), strict=False):
        if a != b:
            break
        n += 1
    return n
