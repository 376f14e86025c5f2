"""Stains of one field from TIFF: one file, one file a stain, or a multi-file OME set."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray

from phenoseq.channels import canonical_channels
from phenoseq.data.readers.storage import Place, open_url
from phenoseq.data.source import FieldImage, Level
from phenoseq.errors import DataError


@dataclass(frozen=True)
class OmeTiff:
    """Stains of one field, read by region.

    Attributes
    ----------
    channels
        Canonical stain names.
    pixel_size
        Micrometres a pixel as the files state it, or None.
    series
        For each channel its file, series and index along the channel axis (None without one).
    """

    channels: tuple[str, ...]
    pixel_size: float | None
    series: tuple[tuple[Place, Any, int | None], ...]

    def field(self, pixel_size: float) -> FieldImage:
        """Return the pyramid at ``pixel_size`` micrometres a full-resolution pixel."""
        height, width = self.series[0][1].shape[-2:]
        shapes = [level.shape[-2:] for level in self.series[0][1].levels]
        levels = tuple(
            Level(
                pixel_size=pixel_size * round(max(height / h, width / w)),
                shape=(h, w),
                read=_Reader([(p, _lazy(p, s, k), c) for p, s, c in self.series]),
            )
            for k, (h, w) in enumerate(shapes)
        )
        return FieldImage(levels, np.dtype(self.series[0][1].dtype))

    def check(self) -> None:
        """Decode every pixel of full resolution once, block by block, and drop it.

        Raises
        ------
        DataError
            Where compressed pixels are damaged.
        """
        for path, series in {path: series for path, series, _ in self.series}.items():
            for page in series.pages:
                if page.keyframe.compression == 1:
                    continue  # damage to plain numbers cannot be told
                try:
                    for _ in page.segments(maxworkers=1):
                        pass
                except Exception as error:  # each codec has errors of its own
                    raise DataError(
                        f"{path}: its pixels cannot be decoded ({error}); copy it again"
                    ) from error

    def close(self) -> None:
        """Close the files; what was read stays."""
        for _, series, _ in self.series:
            series.parent.close()


class _Reader:
    """Reads a region of every channel of one pyramid level; chunks are decoded as needed."""

    def __init__(self, planes: Sequence[tuple[Place, Callable[[], Any], int | None]]) -> None:
        self._planes = planes

    def __call__(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        planes = []
        for path, array, channel in self._planes:
            region = (slice(y0, y1), slice(x0, x1))
            try:
                plane = array()[region if channel is None else (channel, *region)]
            except Exception as error:  # each codec has errors of its own
                raise DataError(
                    f"{path}: pixels at rows {y0}-{y1}, columns {x0}-{x1} cannot be decoded "
                    f"({error}); the file may be truncated: copy it again from the source"
                ) from error
            planes.append(np.asarray(plane, dtype=plane.dtype.newbyteorder("=")))
        return np.stack(planes)


def _lazy(path: Place, series: Any, k: int) -> Callable[[], Any]:
    """Return a function that gives the pixels of a level as something that is read when sliced.

    Pixels that lie in the file as they are get mapped: read as chunks they could be one chunk of
    many gigabytes. The map is made anew for each region, so that what was read does not pile up.
    """
    level = series.levels[k]
    offset = level.dataoffset
    if isinstance(path, Path) and offset is not None and level.keyframe.is_memmappable:
        dtype = np.dtype(level.dtype).newbyteorder(level.parent.byteorder)
        return lambda: np.memmap(path, dtype, mode="r", offset=offset, shape=level.shape)
    array = zarr.open_array(series.aszarr(level=k), mode="r")
    return lambda: array


def open_ometiff(files: Sequence[Path], default_names: Sequence[str] = ()) -> OmeTiff:
    """Open the OME-TIFF files of one field.

    Files that form one multi-file set yield every stain of the set when any of them is opened;
    such a set is taken once.

    Parameters
    ----------
    files
        The files, in the order of their stains.
    default_names
        Names of the stains where the files state none.

    Raises
    ------
    DataError
        Where a file is missing, truncated or no TIFF, a file of the set is absent, the stains
        have no names, or files differ in size or pixel type.
    """
    series: list[tuple[Place, Any, int | None]] = []
    names: list[str] = []
    sizes: list[float] = []
    seen: set[str] = set()
    for path in files:
        if path.name in seen:
            continue
        tif = open_tiff(path)
        members, stated, size = stated_in_ome(path, tif.ome_metadata)
        away = sorted(name for name in members if Path(name).name != name)
        if away:
            raise DataError(
                f"{path}: says that {away[:3]}, outside its folder, belong to its set; put all "
                "files of the set in one folder and mend the names"
            )
        for name in sorted(members - {path.name}):
            if not (path.parent / name).exists():
                raise DataError(
                    f"{path.parent / name}: missing, but {path.name} says it is of its set"
                )
            open_tiff(path.parent / name).close()
        seen |= members | {path.name}
        one = tif.series[0]
        axes = one.axes
        if axes not in ("YX", "CYX"):
            raise DataError(f"{path}: axes {axes} are not (stain,) height, width")
        indices: list[int | None] = list(range(one.shape[0])) if axes == "CYX" else [None]
        series += [(path, one, c) for c in indices]
        names += [n or "" for n in stated] if len(stated) == len(indices) else [""] * len(indices)
        sizes += [size] if size else []
    if not any(names) and len(names) == len(default_names):
        names = list(default_names)
    _check_alike(series)
    channels = canonical_channels(names, str(files[0].parent))
    return OmeTiff(channels, sizes[0] if sizes else None, tuple(series))


def open_stains(files: Mapping[str, Place]) -> OmeTiff:
    """Open the TIFF files of one field, one a stain, under the names given for them.

    What the files say of names and of a set is not asked; a pixel size in OME-XML is.

    Parameters
    ----------
    files
        File of each stain; a URL is read piece by piece.

    Raises
    ------
    DataError
        Where a file is missing, truncated, no TIFF or of more than one plane, two names mean one
        stain, or files differ in size or pixel type.
    """
    series: list[tuple[Place, Any, int | None]] = []
    sizes: list[float] = []
    for path in files.values():
        tif = open_tiff(path, is_ome=False)
        one = tif.series[0]
        if one.axes != "YX" or len(tif.series) > 1:
            shape = one.shape if len(tif.series) == 1 else f"{len(tif.series)} images"
            tif.close()
            raise DataError(
                f"{path}: {one.axes} {shape}, where one plane of one stain is expected; write each "
                "stain to a file of its own, or all with their names to one OME-TIFF"
            )
        description = str(tif.pages.first.description)
        xml = description if "<OME" in description[:2000] else None
        size = stated_in_ome(path, xml)[2]
        sizes += [size] if size else []
        series.append((path, one, None))
    _check_alike(series)
    channels = canonical_channels(list(files), str(next(iter(files.values()))))
    return OmeTiff(channels, sizes[0] if sizes else None, tuple(series))


def _check_alike(series: Sequence[tuple[Place, Any, int | None]]) -> None:
    first_path, first, _ = series[0]
    for path, other, _ in series:
        if other.shape[-2:] != first.shape[-2:] or other.dtype != first.dtype:
            raise DataError(
                f"{path}: {other.shape[-2:]} {other.dtype} differs from {first_path}: "
                f"{first.shape[-2:]} {first.dtype}; stains of one field must match"
            )
        if [lv.shape[-2:] for lv in other.levels] != [lv.shape[-2:] for lv in first.levels]:
            raise DataError(f"{path}: its pyramid differs from that of {first_path}")


def open_tiff(path: Place, *, is_ome: bool | None = None) -> tifffile.TiffFile:
    """Open one file, which must be there to its end; ``is_ome=False`` ignores its OME-XML."""
    try:
        file = path if isinstance(path, Path) else open_url(path)
        tif = tifffile.TiffFile(file, is_ome=is_ome)
        whole = _is_whole(tif)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image") from error
    except DataError:
        raise
    except Exception as error:  # tifffile raises many kinds on a broken file
        raise DataError(
            f"{path}: not a readable TIFF ({error}); the file may be truncated: copy it again"
        ) from error
    if not whole:
        raise DataError(
            f"{path}: truncated: its pages or their tags reach beyond its end at "
            f"{tif.filehandle.size:,} bytes; copy it again from the source"
        )
    return tif


def _is_whole(tif: tifffile.TiffFile) -> bool:
    """Tell whether tags and pixels of every page, pyramids included, lie inside the file."""
    size = tif.filehandle.size
    for page in tif.pages:
        if any(offset >= size for offset in page.subifds or ()):
            return False
        for level in (page, *(page.pages or ())):
            tif.filehandle.seek(level.offset)
            stated = tif.filehandle.read(tif.tiff.tagnosize)
            if struct.unpack(tif.tiff.tagnoformat, stated)[0] != len(level.tags):
                return False  # tifffile drops tags whose value it cannot reach
            extents = zip(level.dataoffsets, level.databytecounts, strict=True)
            if any(start + length > size for start, length in extents):
                return False
    return True


def stated_in_ome(path: Place, xml: str | None) -> tuple[set[str], list[str | None], float | None]:
    """Return the files of the set, the channel names and the pixel size that OME-XML states."""
    if xml is None:
        return set(), [], None
    try:
        root = ET.fromstring(xml)
    except ET.ParseError as error:
        raise DataError(f"{path}: its OME-XML is broken ({error}); copy it again") from error
    pixels = root.find(".//{*}Pixels")
    if pixels is None:
        return set(), [], None
    members = {str(u.get("FileName")) for u in pixels.iter() if u.get("FileName")}
    names = [c.get("Name") for c in pixels.findall("{*}Channel")]
    size = pixels.get("PhysicalSizeX")
    micrometres = pixels.get("PhysicalSizeXUnit", "µm") in ("µm", "μm", "um")
    return members, names, float(size) if size and micrometres else None
