"""Splits by declared groups: no group stands on two sides."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from phenoseq.errors import DataError

Part = Literal["train", "val", "cal", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
#: Cells left out because their crop reaches into a block of another part.
LEFT_OUT = "margin"
#: Cells left out because their group is in no declared part.
UNASSIGNED = "unassigned"


@dataclass(frozen=True)
class SplitConfig:
    """How cells are divided into training, validation, calibration and test.

    Groups are ordered by the sha256 of their name; the lowest share is the test part, the next
    validation, the next calibration, the rest training. Or the groups of each part are declared,
    and those of no part are left out. Nothing is drawn, so the same groups always fall into the
    same parts.

    Attributes
    ----------
    by
        ``"block"`` for squares of tissue, or an ``obs`` column such as ``Metadata_Well``.
    block
        Side of a block in micrometres; only for blocks. Cells closer than half a crop to a block
        of another part are left out.
    test, val, cal
        Shares of the groups, where none are declared.
    declared
        Groups of each part, e.g. ``{"train": ["3"], "val": ["5"], "test": ["4"]}``. Parts are
        ``train``, ``val``, ``cal``, ``test``, and further tests ``test_NAME``.
    """

    by: str = "block"
    block: float | None = 318.75
    test: float = 0.2
    val: float = 0.1
    cal: float = 0.1
    declared: Mapping[str, Sequence[str]] | None = None

    def __post_init__(self) -> None:
        shares = (self.test, self.val, self.cal)
        if min(shares) < 0 or sum(shares) >= 1:
            raise DataError(f"split shares {shares} must be at least 0 and leave some training")
        if (self.by == "block") != (self.block is not None):
            raise DataError("a split by block needs 'block' in um, and only such a split has one")
        if self.block is not None and self.block <= 0:
            raise DataError(f"a block of {self.block} um is no block")
        if self.declared is not None:
            self._check_declared(self.declared)

    def _check_declared(self, declared: Mapping[str, Sequence[str]]) -> None:
        if self.block is not None:
            raise DataError("parts are declared by a column; set 'by' to it, and 'block' to null")
        bad = [part for part in declared if not _is_part(part)]
        if bad:
            raise DataError(f"no parts {bad}; choose from {list(PARTS)}, and 'test_NAME' for more")
        for part, groups in declared.items():
            if isinstance(groups, str) or not all(isinstance(group, str) for group in groups):
                raise DataError(
                    f"the groups of {part} must be a list of text, as in ['3'], not {groups!r}"
                )
        names = [group for groups in declared.values() for group in groups]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"groups {twice} are declared more than once; each is in one part")


@dataclass(frozen=True)
class Split:
    """The part of every cell.

    Attributes
    ----------
    part
        ``"train"``, ``"val"``, ``"cal"``, ``"test"`` or ``"test_NAME"``; ``"margin"`` and
        ``"unassigned"`` are left out. ``(n_obs,)``.
    group
        Group of every cell, ``(n_obs,)``.
    digest
        Hex digest of the configuration and of the part of every group.
    """

    part: NDArray[np.str_]
    group: NDArray[np.str_]
    digest: str

    def rows(self, part: str) -> NDArray[np.int64]:
        """Return the positions of the cells of one part.

        Raises
        ------
        DataError
            Where the part is unknown or has no cells.
        """
        if not _is_part(part):
            raise DataError(f"no part {part!r}; choose from {list(PARTS)}")
        rows = np.flatnonzero(self.part == part)
        if not len(rows):
            raise DataError(
                f"the {part} part has no cells: {len(np.unique(self.group))} groups are too few "
                "for these shares, none of them is declared for it, or every cell is within half "
                "a crop of another part"
            )
        return rows

    def sizes(self) -> dict[str, int]:
        """Return the number of cells of every part, and of those left out."""
        names, n = np.unique(self.part, return_counts=True)
        return dict(zip(names.tolist(), n.tolist(), strict=True))


def make_split(
    config: SplitConfig, obs: pd.DataFrame, *, crop_width: float, occupied: pd.DataFrame
) -> Split:
    """Divide cells into parts.

    Parameters
    ----------
    config
        How.
    obs
        Cells to divide, with the columns that the split needs.
    crop_width
        Width of a crop in micrometres; half of it is the margin of a block split.
    occupied
        All cells of the source, with the same columns: they say which groups there are.

    Raises
    ------
    DataError
        Where ``obs`` lacks the column, a cell has nothing there, or a declared part is there only
        in part.

    Examples
    --------
    >>> obs = pd.DataFrame({"Replicate": ["1", "1", "2", "3"]})
    >>> declared = {"train": ["1"], "val": ["2"], "test": ["3"]}
    >>> config = SplitConfig(by="Replicate", block=None, declared=declared)
    >>> make_split(config, obs, crop_width=0, occupied=obs).sizes()
    {'test': 1, 'train': 2, 'val': 1}
    """
    if config.block is None:
        names = _column(obs, config.by)
        part_of = _assign(config, _column(occupied, config.by))
        part = np.array([part_of[name] for name in names], dtype=str)
        return Split(part, names, _digest(config, part_of))
    named = "field" in occupied and len(occupied["field"].unique()) > 1
    names = _blocks(obs, config.block, named=named)
    part_of = _assign(config, _blocks(occupied, config.block, named=named))
    part = np.array([part_of[name] for name in names], dtype="<U8")
    crossing = np.zeros(len(part), dtype=bool)
    half = crop_width / 2
    steps = np.linspace(-half, half, 2 * max(math.ceil(half / config.block), 1) + 1)
    for dx in steps:  # closer than a block, so that no block under the crop is passed over
        for dy in steps:
            near = _blocks(obs, config.block, (dx, dy), named=named)
            there = [part_of.get(n, p) for n, p in zip(near, part, strict=True)]
            crossing |= np.array(there, dtype="<U8") != part
    return Split(np.where(crossing, LEFT_OUT, part), names, _digest(config, part_of))


def _column(obs: pd.DataFrame, name: str) -> NDArray[np.str_]:
    if name not in obs:
        raise DataError(f"split by {name!r}: cells have no such column, only {list(obs.columns)}")
    holes = int(obs[name].isna().sum())
    if holes:
        raise DataError(f"split by {name!r}: {holes} cells have none; give every cell a group")
    return np.array(obs[name].astype(str), dtype=str)


def _blocks(
    obs: pd.DataFrame, block: float, shift: Sequence[float] = (0.0, 0.0), *, named: bool
) -> NDArray[np.str_]:
    x = np.floor((obs["x_centroid"].to_numpy() + shift[0]) / block).astype(int)
    y = np.floor((obs["y_centroid"].to_numpy() + shift[1]) / block).astype(int)
    names = [f"{i},{j}" for i, j in zip(x, y, strict=True)]
    if named:
        names = [f"{f}:{name}" for f, name in zip(obs["field"], names, strict=True)]
    return np.array(names, dtype=str)


def _is_part(name: str) -> bool:
    return name in PARTS or (name.startswith("test_") and len(name) > len("test_"))


def _assign(config: SplitConfig, groups: NDArray[np.str_]) -> dict[str, str]:
    if config.declared is not None:
        return _declare(config, np.unique(groups).tolist())
    names = sorted(np.unique(groups).tolist(), key=lambda n: hashlib.sha256(n.encode()).digest())
    n_test, n_val, n_cal = (int(len(names) * s) for s in (config.test, config.val, config.cal))
    parts = ["test"] * n_test + ["val"] * n_val + ["cal"] * n_cal
    parts += ["train"] * (len(names) - len(parts))
    return dict(zip(names, parts, strict=True))


def _declare(config: SplitConfig, there: list[str]) -> dict[str, str]:
    assert config.declared is not None
    part_of = dict.fromkeys(there, UNASSIGNED)
    for part, groups in config.declared.items():
        missing = sorted(set(groups) - set(there))
        if missing and len(missing) < len(groups):  # a part that is not there at all may be so
            raise DataError(
                f"split by {config.by!r}: no cell is of {missing}, declared for {part}; there are "
                f"{there[:20]}"
            )
        part_of.update(dict.fromkeys(set(groups) - set(missing), part))
    return part_of


def _digest(config: SplitConfig, part_of: dict[str, str]) -> str:
    fields: dict[str, object] = {"by": config.by}
    if config.declared is None:  # as models on disk record it
        values = {name: getattr(config, name) for name in ("block", "test", "val", "cal")}
        fields.update((k, float(v) if isinstance(v, int) else v) for k, v in values.items())
    else:
        fields["declared"] = sorted((k, sorted(v)) for k, v in config.declared.items())
    text = repr((sorted(fields.items()), sorted(part_of.items())))
    return hashlib.sha256(text.encode()).hexdigest()
