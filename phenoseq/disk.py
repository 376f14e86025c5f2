"""A full disk, told as what it is."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phenoseq.errors import DataError


@contextmanager
def room_for(path: Path, left: str) -> Iterator[None]:
    """Turn the error of a full disk, or what a library made of it, into one that says what to do.

    Parameters
    ----------
    path
        What is being written.
    left
        What is there after that: "nothing was written", say.

    Raises
    ------
    DataError
        Where the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        free = shutil.disk_usage(path.parent).free
        raise DataError(
            f"{path}: the disk is full ({free / 1e9:.1f} GB free); {left}. Free some space or name "
            "another place, and run it again"
        ) from error


def is_full(error: BaseException | None) -> bool:
    """Tell whether an error, or what lies behind it, is that of a full disk."""
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
