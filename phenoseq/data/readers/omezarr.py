"""OME-Zarr (NGFF 0.4 and 0.5): plates and single images, with label images as cells."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from phenoseq.data.readers.cells import check_cells, no_cells
from phenoseq.data.readers.labels import centroids
from phenoseq.data.readers.multiscale import (
    Attributes,
    Multiscale,
    each_document,
    ngff,
    open_multiscales,
)
from phenoseq.data.readers.plate import well_name
from phenoseq.data.readers.scale import pixel_size_of
from phenoseq.data.readers.storage import Place, Tree, inside, place_of
from phenoseq.data.source import Problem, Source, digest_of, tell_problems
from phenoseq.errors import DataError, PhenoseqWarning

#: Of several label images, the one of the first of these names is read.
LABELS = ("cells", "cell", "nuclei", "nucleus")
_KINDS = {
    "plate": "a plate",
    "multiscales": "an image",
    "well": "a well",
    "bioformats2raw.layout": "a collection",
}


@dataclass(frozen=True)
class _Spot:
    """One field: its group, its name, and what its cells are told of it."""

    path: str
    name: str
    metadata: dict[str, str]


def detect(place: Place) -> str | None:
    """Return what makes ``place`` look like OME-Zarr, or None.

    Raises
    ------
    DataError
        Where Zarr metadata is there but broken, or a URL cannot be reached.
    """
    names = (".zattrs", "zarr.json")
    if isinstance(place, Path) and not any((place / name).is_file() for name in names):
        return None
    attributes = _root_attributes(Tree(place))
    kind = next((said for key, said in _KINDS.items() if key in attributes), None)
    return kind and f"its metadata tells of {kind} of OME-Zarr"


def read_omezarr(
    source: str | Path, *, pixel_size: float | None = None, cells: bool = True
) -> Source:
    """Read an OME-Zarr plate or image, local or behind a URL; images are opened, not loaded.

    Cells are the labels of a label image under ``labels/``: ``cells`` or ``nuclei`` where there
    are several. It is read once, block by block, for the centroids. Of several focal planes the
    middle one is read, with a warning.

    Parameters
    ----------
    source
        Folder, or URL that fsspec knows (``s3://``, ``https://``).
    pixel_size
        Micrometres a pixel at full resolution, in place of what the metadata states.
    cells
        False to open the images alone, for cells from elsewhere.

    Raises
    ------
    DataError
        Where the metadata of the whole is missing or broken, no pixel size is stated, or more than
        a fifth of the fields cannot be used: missing, broken, unlike the first in stains, pixel
        type or pixel size, or without a label image.
    """
    tree = Tree(place_of(source))
    attributes = _root_attributes(tree)
    problems: list[Problem] = []
    idle: list[Problem] = []
    if "plate" in attributes:
        wells = _wells(tree, attributes["plate"])
        spots, problems = _spots(tree, attributes["plate"], wells)
        idle = _unlisted(tree, wells)
    elif "multiscales" in attributes:
        spots = [_Spot("", _stem(tree.where("")), {})]
    elif "well" in attributes:
        raise DataError(f"{tree.root}: a well of a plate; give the plate, two folders above it")
    elif "bioformats2raw.layout" in attributes:
        raise DataError(f"{tree.root}: a collection of images; give one of them: {tree.where('0')}")
    else:
        raise DataError(f"{tree.root}: its metadata tells of neither a plate nor an image")
    images, broken = _images(tree, spots, given=pixel_size is not None)
    size = 1.0
    if images:
        first = images[0][1]
        size = pixel_size_of(pixel_size, first.pixel_size, first.where)
        _tell_depth(first, tree)
    obs, without = _cells(tree, images, size) if cells else (no_cells(), [])
    problems += [*broken, *without]
    lost = {problem.where for problem in problems}
    fields = {spot.name: image.field(size) for spot, image in images if spot.name not in lost}
    tell_problems(problems, len(fields), str(tree.root))
    if cells:
        obs = check_cells(obs, str(tree.root))
    return Source(
        kind="ome-zarr",
        name=str(tree.root),
        channels=first.channels(),
        fields=fields,
        obs=obs,
        counts=None,
        var=None,
        identity=digest_of(size, obs),
        problems=(*problems, *idle),
        about={spot.name: spot.metadata for spot, _ in images},
    )


def _images(
    tree: Tree, spots: Sequence[_Spot], *, given: bool
) -> tuple[list[tuple[_Spot, Multiscale]], list[Problem]]:
    """Open the image of every field; return those that are alike, and the others with a reason."""
    images: list[tuple[_Spot, Multiscale]] = []
    problems = []
    opened = open_multiscales(tree, [spot.path for spot in spots])
    for spot, image in zip(spots, opened, strict=True):
        try:
            if isinstance(image, DataError):
                raise image
            _same(image, images[0][1] if images else image, given=given)
            images.append((spot, image))
        except DataError as error:
            problems.append(Problem(spot.name, str(error)))
    return images, problems


def _tell_depth(image: Multiscale, tree: Tree) -> None:
    if image.depth > 1:
        warnings.warn(
            f"{tree.root}: {image.depth} focal planes; only the middle one, plane "
            f"{image.depth // 2}, is read",
            PhenoseqWarning,
            stacklevel=3,
        )


def _root_attributes(tree: Tree) -> Attributes:
    (attributes,) = tree.attributes([""])
    return ngff(attributes or {})


def _stem(where: str) -> str:
    name = where.rstrip("/").rsplit("/", 1)[-1]
    return name.removesuffix(".zarr").removesuffix(".ome") or name


def _title(tree: Tree, plate: Attributes) -> str:
    return str(plate.get("name") or _stem(tree.where("")))


def _wells(tree: Tree, plate: Attributes) -> list[str]:
    """Return the paths of a plate's wells, in the order of its metadata."""
    where = tree.where("")
    try:
        return [inside(well["path"], where) for well in plate["wells"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: broken metadata of the plate ({error!r}); copy it again") from (
            error
        )


def _spots(
    tree: Tree, plate: Attributes, wells: Sequence[str]
) -> tuple[list[_Spot], list[Problem]]:
    """Return the fields of a plate, in the order of its metadata, and wells that cannot be used."""
    title = _title(tree, plate)
    spots, problems = [], []
    for path, attributes in zip(wells, each_document(tree.attributes, wells), strict=True):
        where, well = tree.where(path), well_name(path)
        try:
            if isinstance(attributes, DataError):
                raise attributes
            if attributes is None:
                raise DataError(f"{where}: a well that is missing, but the plate lists it; copy it")
            paths = [inside(i["path"], where) for i in ngff(attributes)["well"]["images"]]
        except (KeyError, TypeError) as error:
            reason = f"{where}: broken metadata of the well ({error!r}); copy it again"
            problems.append(Problem(f"{title}-{well}", reason))
            continue
        except DataError as error:
            problems.append(Problem(f"{title}-{well}", str(error)))
            continue
        spots += [
            _Spot(
                f"{path}/{site}",
                f"{title}-{well}-s{site}",
                {"Metadata_Plate": title, "Metadata_Well": well, "Metadata_Site": site},
            )
            for site in paths
        ]
    if len({spot.name for spot in spots}) < len(spots):
        names = [spot.name for spot in spots]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(
            f"{tree.where('')}: its metadata lists fields twice: {twice[:3]}; list each once"
        )
    return spots, problems


def _unlisted(tree: Tree, wells: Sequence[str]) -> list[Problem]:
    """Return the wells that are on the disk, but not in the plate's metadata, and warn of them."""
    if not isinstance(tree.root, Path):
        return []
    marks = (".zattrs", "zarr.json")
    there = {
        str(well.relative_to(tree.root))
        for well in tree.root.glob("*/*")
        if any((well / mark).is_file() for mark in marks)
    }
    rows = {path.split("/")[0] for path in wells}
    unlisted = sorted(path for path in there - set(wells) if path.split("/")[0] in rows)
    if unlisted:
        warnings.warn(
            f"{tree.root}: {len(unlisted)} wells are not in the plate's metadata and are left out: "
            f"{unlisted[:3]}",
            PhenoseqWarning,
            stacklevel=3,
        )
    return [Problem(path, "a well that is not in the plate's metadata") for path in unlisted]


def _same(image: Multiscale, first: Multiscale, *, given: bool) -> None:
    """Check that a field has the stains, pixel type and pixel size of the first."""
    for what, one, other in (
        ("channels", image.channels(), first.channels()),
        ("pixel type", image.dtype, first.dtype),
        ("pixel size in um", *((None, None) if given else (image.pixel_size, first.pixel_size))),
        ("number of focal planes", image.depth, first.depth),
    ):
        if one != other:
            raise DataError(
                f"{image.where}: its {what}, {one}, differs from {other} of {first.where}; fields "
                "of one source must match: keep those that differ apart"
            )


def _cells(
    tree: Tree, images: Sequence[tuple[_Spot, Multiscale]], size: float
) -> tuple[pd.DataFrame, list[Problem]]:
    """Return the cells of every field, from its label image, and the fields that have none."""
    groups = [f"{image.path}/labels".strip("/") for _, image in images]
    lists = each_document(tree.attributes, groups)
    chosen: list[tuple[_Spot, Multiscale, str]] = []
    parts = [pd.DataFrame({"field": [], "x_centroid": [], "y_centroid": []})]
    problems = []
    for (spot, image), attributes in zip(images, lists, strict=True):
        where = f"{image.where}/labels"
        try:
            if isinstance(attributes, DataError):
                raise attributes
            name = inside(_choose(list(ngff(attributes or {}).get("labels") or ()), where), where)
            chosen.append((spot, image, f"{image.path}/labels/{name}".strip("/")))
        except DataError as error:
            problems.append(Problem(spot.name, str(error)))
    opened = open_multiscales(tree, [path for _, _, path in chosen])
    for (spot, image, _), labels in zip(chosen, opened, strict=True):
        try:
            if isinstance(labels, DataError):
                raise labels
            found = _positions(labels, image, size)
        except DataError as error:
            problems.append(Problem(spot.name, str(error)))
            continue
        part = pd.DataFrame(
            {"field": spot.name, "x_centroid": found["x"], "y_centroid": found["y"]}
        ).assign(**spot.metadata)
        part.index = pd.Index([f"{spot.name}-{label}" for label in found.index], dtype=object)
        parts.append(part)
    return pd.concat(parts if len(parts) == 1 else parts[1:]), problems


def _choose(names: Sequence[str], where: str) -> str:
    if not names:
        raise DataError(
            f"{where}: no label images, so nothing says where cells are; write a label image of "
            "the cells or nuclei under 'labels' of each image"
        )
    if len(names) == 1:
        return names[0]
    folded = {str(name).lower(): name for name in names}
    for name in LABELS:
        if name in folded:
            return folded[name]
    raise DataError(
        f"{where}: several label images, {names}, none of them called one of {list(LABELS)}; call "
        "the one that holds the cells 'cells'"
    )


def _positions(labels: Multiscale, image: Multiscale, size: float) -> pd.DataFrame:
    """Return the centroids in micrometres from the upper left corner of the image."""
    shapes = [shape[-2:] for _, shape in image.datasets]
    if labels.shape not in shapes:
        raise DataError(
            f"{labels.where}: {labels.shape} pixels, but its image has levels of {shapes}; a label "
            "image must have the size of one of them"
        )
    ratio = image.ratios[shapes.index(labels.shape)]
    read = labels.labels()
    found = centroids(lambda *region: read(*region)[0], labels.shape, read.chunk)
    found["y"] *= ratio[0] * size
    found["x"] *= ratio[1] * size
    return found
