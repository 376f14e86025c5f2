"""Where a source lies: a local path, or a URL that fsspec knows; and Zarr hierarchies in either."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal

import fsspec
import zarr
from zarr.storage import FsspecStore, LocalStore

from phenoseq.errors import DataError

Place = Path | str
#: Requests under way at once, where metadata of many groups is fetched.
_REQUESTS = 16


class _ForbiddenError(DataError):
    """What many public buckets answer for a file that is not there."""


def place_of(source: str | Path) -> Place:
    """Return a URL as text without a slash at its end, and anything else as a path."""
    text = str(source)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text.rstrip("/") if isinstance(source, str) and is_url(text) else Path(source)


def is_url(place: str | Path) -> bool:
    """Tell whether ``place`` is a URL, such as ``s3://bucket/plate.zarr``."""
    return isinstance(place, str) and "://" in place


def inside(relative: object, where: str) -> str:
    """Return a path that metadata states, which must lie below the place that states it.

    Raises
    ------
    DataError
        Where it is empty, absolute, a URL, or climbs with ``..``; ``where`` says what states it.
    """
    text = str(relative)
    parts = text.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in text or ":" in parts[0]:
        raise DataError(
            f"{where}: states the path {text!r}, which does not lie below it; phenoseq reads no "
            "file from elsewhere: correct the path"
        )
    return text


def read_bytes(place: Place) -> bytes | None:
    """Return the content of a file, or None where there is none.

    Raises
    ------
    DataError
        Where it cannot be read or reached.
    """
    try:
        if isinstance(place, Path):
            return place.read_bytes()
        return bytes(_filesystem(place)[0].cat_file(place))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except DataError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise _unreachable(place, error) from error


def open_url(url: str) -> IO[bytes]:
    """Open a file behind a URL for reading, its bytes fetched as they are needed.

    Raises
    ------
    DataError
        Where it is missing, or cannot be read or reached.
    """
    try:
        system, path = _filesystem(url)
        file: IO[bytes] = system.open(path, "rb")
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file") from error
    except DataError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise _unreachable(url, error) from error
    return file


class Tree:
    """A Zarr hierarchy, v2 or v3, opened for reading.

    Attributes
    ----------
    root
        Where it lies.
    format
        2 or 3.
    """

    def __init__(self, root: Place) -> None:
        """Open the hierarchy.

        Raises
        ------
        DataError
            Where there is none, or it cannot be read or reached.
        """
        self.root = root
        self.format: Literal[2, 3]
        forbidden: _ForbiddenError | None = None
        for name in ("zarr.json", ".zattrs", ".zgroup"):
            try:
                if read_bytes(_join(root, name)) is not None:
                    self.format = 3 if name == "zarr.json" else 2
                    return
            except _ForbiddenError as error:
                forbidden = error
        raise forbidden or DataError(
            f"{root}: no Zarr hierarchy (neither 'zarr.json' nor '.zattrs' is there)"
        )

    def where(self, path: str) -> str:
        """Return how to call the node at ``path`` in a message."""
        return str(_join(self.root, path))

    def attributes(self, paths: Sequence[str]) -> list[dict[str, Any] | None]:
        """Return the attributes of each group, None where there is no such group."""
        if self.format == 2:
            return self._documents([_below(path, ".zattrs") for path in paths])
        nodes = self._documents([_below(path, "zarr.json") for path in paths])
        return [None if node is None else dict(node.get("attributes") or {}) for node in nodes]

    def arrays(self, paths: Sequence[str]) -> list[dict[str, Any] | None]:
        """Return the metadata document of each array, None where there is no such array."""
        name = ".zarray" if self.format == 2 else "zarr.json"
        return self._documents([_below(path, name) for path in paths])

    def array(self, path: str) -> zarr.Array[Any]:
        """Open an array.

        Raises
        ------
        DataError
            Where it cannot be opened.
        """
        try:
            node = zarr.open_array(self._store, path=path, mode="r", zarr_format=self.format)
        except Exception as error:  # a store, a codec and a broken document have errors each
            raise DataError(
                f"{self.where(path)}: not a Zarr array that can be opened ({error}); copy it again "
                "from the source"
            ) from error
        return node

    def group(self, path: str) -> zarr.Group:
        """Open a group.

        Raises
        ------
        DataError
            Where it cannot be opened.
        """
        try:
            return zarr.open_group(
                self._store,
                path=path,
                mode="r",
                zarr_format=self.format,
                use_consolidated=False,
            )
        except Exception as error:
            raise DataError(
                f"{self.where(path)}: not a Zarr group that can be opened ({error}); copy it again "
                "from the source"
            ) from error

    @functools.cached_property
    def _store(self) -> LocalStore | FsspecStore:
        if isinstance(self.root, Path):
            return LocalStore(self.root, read_only=True)
        return FsspecStore.from_url(self.root, read_only=True)

    def _documents(self, files: Sequence[str]) -> list[dict[str, Any] | None]:
        if isinstance(self.root, Path):
            return [self._document(file) for file in files]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            return list(pool.map(self._document, files))

    def _document(self, file: str) -> dict[str, Any] | None:
        place = _join(self.root, file)
        try:
            raw = read_bytes(place)
            document = None if raw is None else json.loads(raw)
        except _ForbiddenError:
            return None
        except ValueError as error:
            raise DataError(
                f"{place}: not JSON ({error}); the file may be truncated: copy it again"
            ) from error
        if not isinstance(document, dict | None):
            raise DataError(f"{place}: holds no JSON object; copy it again from the source")
        return document


def _below(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _join(root: Place, path: str) -> Place:
    if not path:
        return root
    return root / path if isinstance(root, Path) else f"{root}/{path}"


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        system, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{url}: cannot be opened ({error}); for s3:// and https:// install "
            "'phenoseq[remote]', for others the fsspec package of that scheme"
        ) from error
    return system, str(path)


def _unreachable(place: Place, error: Exception) -> DataError:
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    if getattr(error, "status", None) in (401, 403) or isinstance(error, PermissionError):
        return _ForbiddenError(f"{place}: may not be read ({said}); is the path right?")
    if "credentials" in said.lower():
        return DataError(
            f"{place}: {said}; log in, or for a public bucket set the environment variable "
            'FSSPEC_S3={"anon":true}'
        )
    return DataError(f"{place}: cannot be read ({said}); is it whole and within reach?")
