"""Places on the disk: that they are on it, and a full one told as what it is."""

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


def on_disk(path: str | Path) -> Path:
    """Return a path to write to, or of a store to read, which cannot be a URL.

    Raises
    ------
    DataError
        Where it is one.
    """
    if "://" in str(path):
        raise DataError(
            f"{path}: a URL; stores and predictions are files and folders of this machine. Write "
            "there and copy them, or mount the bucket"
        )
    return Path(path)


def is_full(error: BaseException | None) -> bool:
    """Tell whether an error, or what lies behind it, is that of a full disk."""
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
