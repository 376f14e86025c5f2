"""OME-Zarr (NGFF 0.4 and 0.5): plates and single images, with label images as cells."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from phenoseq.data.readers.cells import check_cells
from phenoseq.data.readers.labels import centroids
from phenoseq.data.readers.multiscale import Attributes, Multiscale, ngff, open_multiscales
from phenoseq.data.readers.plate import well_name
from phenoseq.data.readers.scale import pixel_size_of
from phenoseq.data.readers.storage import Place, Tree, inside, place_of
from phenoseq.data.source import Source, digest_of
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


def read_omezarr(source: str | Path, *, pixel_size: float | None = None) -> Source:
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

    Raises
    ------
    DataError
        Where metadata is missing or broken, channels have no names, no pixel size is stated, fields
        differ in stains, pixel type or pixel size, or there are no label images.
    """
    tree = Tree(place_of(source))
    attributes = _root_attributes(tree)
    if "plate" in attributes:
        spots = _plate(tree, attributes["plate"])
    elif "multiscales" in attributes:
        spots = [_Spot("", _stem(tree.where("")), {})]
    elif "well" in attributes:
        raise DataError(f"{tree.root}: a well of a plate; give the plate, two folders above it")
    elif "bioformats2raw.layout" in attributes:
        raise DataError(f"{tree.root}: a collection of images; give one of them: {tree.where('0')}")
    else:
        raise DataError(f"{tree.root}: its metadata tells of neither a plate nor an image")
    opened = open_multiscales(tree, [spot.path for spot in spots])
    lost = [tree.where(s.path) for s, image in zip(spots, opened, strict=True) if image is None]
    _left_out(lost, "fields that the metadata lists are missing", str(tree.root))
    images = [(s, image) for s, image in zip(spots, opened, strict=True) if image is not None]
    if not images:
        raise DataError(f"{tree.root}: none of the fields that its metadata lists is there")
    first = images[0][1]
    size = pixel_size_of(pixel_size, first.pixel_size, first.where)
    channels = first.channels()
    for _, image in images:
        _same(image, first, given=pixel_size is not None)
    if first.depth > 1:
        warnings.warn(
            f"{tree.root}: {first.depth} focal planes; only the middle one, plane "
            f"{first.depth // 2}, is read",
            PhenoseqWarning,
            stacklevel=2,
        )
    fields = {spot.name: image.field(size) for spot, image in images}
    obs = _cells(tree, images, size)
    return Source(
        kind="ome-zarr",
        name=str(tree.root),
        channels=channels,
        fields=fields,
        obs=obs,
        counts=None,
        var=None,
        identity=digest_of(size, obs),
    )


def _root_attributes(tree: Tree) -> Attributes:
    (attributes,) = tree.attributes([""])
    return ngff(attributes or {})


def _stem(where: str) -> str:
    name = where.rstrip("/").rsplit("/", 1)[-1]
    return name.removesuffix(".zarr").removesuffix(".ome") or name


def _plate(tree: Tree, plate: Attributes) -> list[_Spot]:
    """Return the fields of a plate, in the order of its metadata."""
    where = tree.where("")
    try:
        wells = [inside(well["path"], where) for well in plate["wells"]]
        title = str(plate.get("name") or _stem(where))
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: broken metadata of the plate ({error!r}); copy it again") from (
            error
        )
    _check_wells(tree, wells)
    spots, lost = [], []
    for path, attributes in zip(wells, tree.attributes(wells), strict=True):
        if attributes is None:
            lost.append(tree.where(path))
            continue
        try:
            paths = [
                inside(i["path"], tree.where(path)) for i in ngff(attributes)["well"]["images"]
            ]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{tree.where(path)}: broken metadata of the well ({error!r}); copy it again"
            ) from error
        well = well_name(path)
        spots += [
            _Spot(
                f"{path}/{site}",
                f"{title}-{well}-s{site}",
                {"Metadata_Plate": title, "Metadata_Well": well, "Metadata_Site": site},
            )
            for site in paths
        ]
    _left_out(lost, "wells that the plate's metadata lists are missing", where)
    if len({spot.name for spot in spots}) < len(spots):
        names = [spot.name for spot in spots]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{where}: its metadata lists fields twice: {twice[:3]}; list each once")
    return spots


def _check_wells(tree: Tree, wells: Sequence[str]) -> None:
    """Warn of wells that are on the disk, but not in the plate's metadata."""
    if not isinstance(tree.root, Path):
        return
    marks = (".zattrs", "zarr.json")
    there = {
        str(well.relative_to(tree.root))
        for well in tree.root.glob("*/*")
        if any((well / mark).is_file() for mark in marks)
    }
    rows = {path.split("/")[0] for path in wells}
    unlisted = sorted(path for path in there - set(wells) if path.split("/")[0] in rows)
    _left_out(unlisted, "wells are not in the plate's metadata", str(tree.root))


def _left_out(what: Sequence[str], why: str, where: str) -> None:
    if what:
        warnings.warn(
            f"{where}: {len(what)} {why} and are left out: {list(what[:3])}",
            PhenoseqWarning,
            stacklevel=4,
        )


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


def _cells(tree: Tree, images: Sequence[tuple[_Spot, Multiscale]], size: float) -> pd.DataFrame:
    """Return the cells of every field, from its label image."""
    lists = tree.attributes([f"{image.path}/labels".strip("/") for _, image in images])
    chosen: list[tuple[_Spot, Multiscale, str]] = []
    bare = []
    for (spot, image), attributes in zip(images, lists, strict=True):
        names = list(ngff(attributes or {}).get("labels") or ())
        if names:
            where = f"{image.where}/labels"
            name = inside(_choose(names, where), where)
            chosen.append((spot, image, f"{image.path}/labels/{name}".strip("/")))
        else:
            bare.append(image.where)
    if not chosen:
        raise DataError(
            f"{tree.root}: no label images, so nothing says where cells are; write a label image "
            "of the cells or nuclei under 'labels' of each image"
        )
    _left_out(bare, "fields have no label image", str(tree.root))
    parts = []
    opened = open_multiscales(tree, [path for _, _, path in chosen])
    for (spot, image, path), labels in zip(chosen, opened, strict=True):
        if labels is None:
            raise DataError(f"{tree.where(path)}: missing, but its image lists it; copy it again")
        found = _positions(labels, image, size)
        part = pd.DataFrame(
            {"field": spot.name, "x_centroid": found["x"], "y_centroid": found["y"]}
        ).assign(**spot.metadata)
        part.index = pd.Index([f"{spot.name}-{label}" for label in found.index], dtype=object)
        parts.append(part)
    return check_cells(pd.concat(parts), str(tree.root))


def _choose(names: Sequence[str], where: str) -> str:
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
