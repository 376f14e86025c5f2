"""One multiscale image of an OME-Zarr hierarchy (NGFF 0.4 and 0.5), read by region."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phenoseq.channels import canonical_channels
from phenoseq.data.readers.scale import micrometres
from phenoseq.data.readers.storage import Tree, inside
from phenoseq.data.source import FieldImage, Level
from phenoseq.errors import DataError

Attributes = Mapping[str, Any]
Grid = tuple[float, float]


@dataclass(frozen=True)
class Multiscale:
    """An image or label image, not yet read.

    Attributes
    ----------
    tree, path
        The hierarchy, and the group of the image in it.
    axes
        Names of the axes, of ``t``, ``c``, ``z``, ``y``, ``x`` in this order.
    pixel_size
        Micrometres a pixel at full resolution as the metadata states it, or None.
    names
        Channel names as the metadata states them, without those of a label image.
    datasets
        Path and shape of each level, finest first.
    ratios
        Full-resolution pixels in a pixel of each level, ``(y, x)``.
    dtype
        Pixel type.
    """

    tree: Tree
    path: str
    axes: str
    pixel_size: float | None
    names: tuple[str, ...]
    datasets: tuple[tuple[str, tuple[int, ...]], ...]
    ratios: tuple[Grid, ...]
    dtype: np.dtype[Any]

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return self.tree.where(self.path)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width at full resolution."""
        return _plane(self.datasets[0][1])

    @property
    def depth(self) -> int:
        """Number of focal planes."""
        return self._size("z")

    def channels(self) -> tuple[str, ...]:
        """Return the canonical stain names.

        Raises
        ------
        DataError
            Where a channel has no name, or two have the same.
        """
        n = self._size("c")
        if len(self.names) != n:
            raise DataError(
                f"{self.where}: has {n} channels, but its metadata names {len(self.names)}; write "
                "one entry a channel, with a 'label', under 'omero', 'channels'"
            )
        return canonical_channels(self.names, self.where)

    def field(self, pixel_size: float) -> FieldImage:
        """Return the pyramid at ``pixel_size`` micrometres a full-resolution pixel."""
        levels = tuple(
            Level(pixel_size * ratio[0], _plane(shape), self._reader(path))
            for (path, shape), ratio in zip(self.datasets, self.ratios, strict=True)
        )
        return FieldImage(levels, self.dtype)

    def labels(self) -> PlaneReader:
        """Return what reads the full-resolution plane of a label image, ``(1, y, x)``.

        Raises
        ------
        DataError
            Where its pixels are no whole numbers, or it has several channels.
        """
        if self.dtype.kind not in "iu" or self._size("c") != 1:
            raise DataError(
                f"{self.where}: a label image has one channel of whole numbers; this one has "
                f"{self._size('c')} of {self.dtype}"
            )
        return self._reader(self.datasets[0][0])

    def _size(self, axis: str) -> int:
        return self.datasets[0][1][self.axes.index(axis)] if axis in self.axes else 1

    def _reader(self, path: str) -> PlaneReader:
        return PlaneReader(self.tree, path, self.axes)


class PlaneReader:
    """Reads a region of every channel of one level: time 0, the middle focal plane."""

    def __init__(self, tree: Tree, path: str, axes: str) -> None:
        self._tree, self._path, self._axes = tree, path, axes

    @functools.cached_property
    def _array(self) -> Any:
        return self._tree.array(self._path)

    @property
    def chunk(self) -> tuple[int, int]:
        """Height and width of what is decoded at once."""
        return _plane(self._array.chunks)

    def __call__(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        """Return the pixels ``(C, y1 - y0, x1 - x0)`` of a region."""
        array = self._array
        at: dict[str, int | slice] = {"t": 0, "c": slice(None)}
        at |= {"y": slice(y0, y1), "x": slice(x0, x1)}
        if "z" in self._axes:
            at["z"] = array.shape[self._axes.index("z")] // 2
        try:
            pixels = np.asarray(array[tuple(at[axis] for axis in self._axes)])
        except Exception as error:  # each codec and each store has errors of its own
            raise DataError(
                f"{self._tree.where(self._path)}: pixels at rows {y0}-{y1}, columns {x0}-{x1} "
                f"cannot be read ({error}); a chunk may be truncated: copy it again from the source"
            ) from error
        if "c" not in self._axes:
            pixels = pixels[None]
        return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def ngff(attributes: Attributes) -> Attributes:
    """Return what NGFF says in the attributes of a group: under ``ome`` in 0.5, bare in 0.4."""
    nested = attributes.get("ome")
    return nested if isinstance(nested, dict) else attributes


def open_multiscales(tree: Tree, paths: Sequence[str]) -> list[Multiscale | DataError]:
    """Open the image in each group.

    Returns
    -------
    The images; in place of one the error where there is no such group, or its metadata is broken,
    of another version of NGFF, or of an image with several times.
    """
    out: list[Multiscale | DataError] = []
    stated = [
        _stated(tree, *both)
        for both in zip(paths, each_document(tree.attributes, paths), strict=True)
    ]
    levels = [one.datasets if isinstance(one, _Stated) else () for one in stated]
    arrays = iter(each_document(tree.arrays, [path for some in levels for path in some]))
    for path, one, some in zip(paths, stated, levels, strict=True):
        documents = [next(arrays) for _ in some]
        try:
            out.append(one if isinstance(one, DataError) else _assemble(tree, path, one, documents))
        except DataError as error:
            out.append(error)
    return out


def each_document(
    fetch: Callable[[Sequence[str]], Sequence[Attributes | None]], paths: Sequence[str]
) -> list[Attributes | DataError | None]:
    """Fetch a document for each path, with the error in its place where one is broken."""
    try:
        return list(fetch(paths))
    except DataError:
        out: list[Attributes | DataError | None] = []
        for path in paths:
            try:
                out += fetch([path])
            except DataError as error:
                out.append(error)
        return out


def _stated(
    tree: Tree, path: str, attributes: Attributes | DataError | None
) -> _Stated | DataError:
    where = tree.where(path)
    if isinstance(attributes, DataError):
        return attributes
    if attributes is None:
        return DataError(f"{where}: missing, but metadata lists it; copy it again")
    try:
        return _parse(tree, path, ngff(attributes))
    except DataError as error:
        return error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return DataError(
            f"{where}: its OME-Zarr metadata is broken ({type(error).__name__}: {error}); write "
            "it again"
        )


@dataclass(frozen=True)
class _Stated:
    """What the metadata of one image says."""

    axes: str
    unit: float | None
    names: tuple[str, ...]
    datasets: tuple[str, ...]
    scales: tuple[Grid | None, ...]


def _parse(tree: Tree, path: str, attributes: Attributes) -> _Stated:
    where = tree.where(path)
    if not attributes.get("multiscales"):
        raise DataError(f"{where}: its metadata has no 'multiscales'; it is no OME-Zarr image")
    image = attributes["multiscales"][0]
    version = str(image.get("version", attributes.get("version", "0.4")))
    axes = image.get("axes")
    if not version.startswith(("0.4", "0.5")) or not all(isinstance(a, dict) for a in axes or [0]):
        raise DataError(
            f"{where}: OME-Zarr of version {version}; phenoseq reads 0.4 and 0.5: convert it"
        )
    names = "".join(str(axis["name"]) for axis in axes)
    if [a for a in "tczyx" if a in names] != list(names) or not names.endswith("yx"):
        raise DataError(f"{where}: axes {list(names)} are not (t, c, z,) y, x in this order")
    units = {micrometres(axis.get("unit")) for axis in axes if axis["name"] in "yx"}
    whole = _scale(image.get("coordinateTransformations"), len(names)) or (1.0, 1.0)
    scales = []
    for dataset in image["datasets"]:
        scale = _scale(dataset.get("coordinateTransformations"), len(names))
        scales.append(scale and (scale[0] * whole[0], scale[1] * whole[1]))
    channels = (attributes.get("omero") or {}).get("channels") or []
    return _Stated(
        axes=names,
        unit=units.pop() if len(units) == 1 else None,
        names=tuple(str(channel.get("label") or "") for channel in channels),
        datasets=tuple(
            "/".join(part for part in (path, inside(d["path"], where)) if part)
            for d in image["datasets"]
        ),
        scales=tuple(scales),
    )


def _scale(transformations: Sequence[Attributes] | None, n_axes: int) -> Grid | None:
    """Return the ``(y, x)`` scale that NGFF states; transformations with an ``output`` are not."""
    for one in transformations or ():
        if one.get("type") == "scale" and "output" not in one:
            values = [float(value) for value in one["scale"]]
            if len(values) != n_axes or not all(math.isfinite(v) and v > 0 for v in values[-2:]):
                raise ValueError(f"scale {values} is not one positive number an axis")
            return values[-2], values[-1]
    return None


def _assemble(
    tree: Tree, path: str, stated: _Stated, documents: Sequence[Attributes | DataError | None]
) -> Multiscale:
    where = tree.where(path)
    shapes, types = [], []
    for dataset, document in zip(stated.datasets, documents, strict=True):
        if isinstance(document, DataError):
            raise document
        if document is None:
            raise DataError(f"{tree.where(dataset)}: missing, but {where} lists it; copy it again")
        try:
            shape = tuple(int(side) for side in document["shape"])
            kind = np.dtype(document.get("data_type", document.get("dtype")))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{tree.where(dataset)}: no array of numbers ({error}); copy it again"
            ) from error
        if len(shape) != len(stated.axes) or 0 in shape:
            raise DataError(
                f"{tree.where(dataset)}: its shape {shape} does not fit the axes "
                f"{list(stated.axes)}; write its metadata again"
            )
        shapes.append(shape)
        types.append(kind.newbyteorder("="))
    if "t" in stated.axes and shapes[0][stated.axes.index("t")] != 1:
        raise DataError(
            f"{where}: has {shapes[0][stated.axes.index('t')]} times; save one of them as an image "
            "of its own"
        )
    if any(kind != types[0] for kind in types):
        raise DataError(f"{where}: its levels differ in pixel type: {[str(t) for t in types]}")
    first, size = stated.scales[0], None
    if first is not None and stated.unit is not None:
        if abs(first[0] / first[1] - 1) > 0.01:
            raise DataError(f"{where}: pixels of {first[0]} by {first[1]} are not square; resample")
        size = first[0] * stated.unit
    ratios = []
    for dataset, shape, scale in zip(stated.datasets, shapes, stated.scales, strict=True):
        height, width = (a / b for a, b in zip(_plane(shapes[0]), _plane(shape), strict=True))
        ratio = (height, width)
        if scale is not None and first is not None and scale != first:
            ratio = (scale[0] / first[0], scale[1] / first[1])
            if not all(
                abs(r * side - full) <= 2 * max(r, 1)
                for r, side, full in zip(ratio, _plane(shape), _plane(shapes[0]), strict=True)
            ):
                raise DataError(
                    f"{tree.where(dataset)}: is {_plane(shape)} pixels, which at the stated scale "
                    f"of {ratio} does not cover the {_plane(shapes[0])} of the first level; write "
                    "the metadata again"
                )
        ratios.append(ratio)
    return Multiscale(
        tree=tree,
        path=path,
        axes=stated.axes,
        pixel_size=size,
        names=stated.names,
        datasets=tuple(zip(stated.datasets, shapes, strict=True)),
        ratios=tuple(ratios),
        dtype=types[0],
    )


def _plane(shape: Sequence[int]) -> tuple[int, int]:
    return int(shape[-2]), int(shape[-1])
