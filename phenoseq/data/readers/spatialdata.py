"""SpatialData folders (scverse), read from their Zarr layout without the spatialdata package."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import sparse

from phenoseq.data.readers.cells import check_cells
from phenoseq.data.readers.labels import centroids
from phenoseq.data.readers.multiscale import Multiscale, ngff, open_multiscales
from phenoseq.data.readers.scale import pixel_size_of
from phenoseq.data.readers.storage import Tree, inside
from phenoseq.data.readers.transformation import to_global
from phenoseq.data.readers.wkb import centroid
from phenoseq.data.source import Source, digest_of
from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.genes import genes_of, tell_symbols

#: Least share of the table's cells that must have a shape, label or point.
MIN_MATCHED = 0.9
_KINDS = ("labels", "shapes", "points")


def detect(path: Path) -> str | None:
    """Return what makes ``path`` look like a SpatialData folder or an image in one, or None."""
    root, _ = _split(path)
    if not any((root / name).is_file() for name in (".zattrs", "zarr.json")):
        return None
    try:
        (attributes,) = Tree(root).attributes([""])
    except DataError:
        return None
    if "spatialdata_attrs" in (attributes or {}):
        return "it has 'spatialdata_attrs'"
    both = bool(_elements(root, "images") and _elements(root, "tables"))
    return "it has 'images' and 'tables'" if both else None


def read_spatialdata(path: Path, *, pixel_size: float | None = None) -> Source:
    """Read one image of a SpatialData folder, and the cells and counts of its table.

    The table names the element (labels, shapes or points) that holds its cells; image and element
    meet in the coordinate system "global", by identity, scale, translation, affine or a sequence
    of these.

    Parameters
    ----------
    path
        The folder or, where it has several images, the one to read: ``FOLDER/images/NAME``.
    pixel_size
        Micrometres a pixel of the image, where the unit of "global" is not a length.

    Raises
    ------
    DataError
        Where an element is missing, broken, or not in "global", it is not clear which image or
        table is meant, counts are no whole numbers, or the pixel size is not known.
    """
    root, name = _split(Path(path))
    tree = Tree(root)
    name = name or _one(root, "images")
    image = _raster(tree, f"images/{name}")
    matrix, unit = _placed(tree, f"images/{name}")
    stated = None if unit is None else float(np.sqrt(abs(np.linalg.det(matrix)))) * unit
    size = pixel_size_of(pixel_size, stated, image.where)
    table = _table(root)
    if table is None:
        region = _one(root, "labels") if _elements(root, "labels") else _one(root, "shapes")
        positions = _positions(tree, region)
        ids, counts, var = list(positions.index), None, None
    else:
        region, ids, counts, var = _read_table(tree, table)
        positions = _positions(tree, region)
    place = positions.index.get_indexer(pd.Index(ids))
    lost = int((place < 0).sum())
    if lost > (1 - MIN_MATCHED) * len(ids):
        raise DataError(
            f"{root}: {lost} of {len(ids)} cells of the table are not in the element {region!r} "
            f"(the table has such as {ids[:2]}, the element {list(positions.index[:2])})"
        )
    if lost:
        warnings.warn(
            f"{root}: {lost} cells of the table are not in the element {region!r} and are left out",
            PhenoseqWarning,
            stacklevel=2,
        )
    kept = np.flatnonzero(place >= 0)
    points = positions.to_numpy()[place[kept]]
    to_image = np.linalg.inv(matrix) @ _placed(tree, _path_of(root, region))[0]
    pixels = points @ to_image[:2, :2].T + to_image[:2, 2]
    obs = pd.DataFrame(
        {"field": name, "x_centroid": pixels[:, 0] * size, "y_centroid": pixels[:, 1] * size},
        index=pd.Index([ids[k] for k in kept], dtype=object),
    )
    obs = check_cells(obs, str(root))
    counts = None if counts is None else counts[kept]
    return Source(
        kind="spatialdata",
        name=str(root),
        channels=image.channels(),
        fields={name: image.field(size)},
        obs=obs,
        counts=counts,
        var=var,
        identity=digest_of(size, obs, counts, var),
    )


def _split(path: Path) -> tuple[Path, str | None]:
    """Return the folder and, for ``FOLDER/images/NAME``, the name of the image."""
    path = path.absolute()
    return (path.parent.parent, path.name) if path.parent.name == "images" else (path, None)


def _elements(root: Path, kind: str) -> list[str]:
    """Return the names of the elements of a kind."""
    marks = (".zattrs", ".zgroup", "zarr.json")
    return sorted(p.name for p in root.glob(f"{kind}/*") if any((p / m).is_file() for m in marks))


def _one(root: Path, kind: str) -> str:
    names = _elements(root, kind)
    if not names:
        needed = "no image" if kind == "images" else "no table, labels or shapes, so no cells"
        raise DataError(f"{root}: {needed}; write it again with such an element")
    if len(names) > 1:
        remedy = (
            f"give the one to read, such as {root / 'images' / names[0]}"
            if kind == "images"
            else "keep one, or add a table that names it as its region"
        )
        raise DataError(f"{root}: several {kind}, {names}; {remedy}")
    return names[0]


def _path_of(root: Path, element: str) -> str:
    """Return the path of the labels, shapes or points of that name."""
    for kind in _KINDS:
        if element in _elements(root, kind):
            return f"{kind}/{element}"
    have = {kind: _elements(root, kind) for kind in _KINDS}
    raise DataError(f"{root}: the table is of {element!r}, which is not there (it has {have})")


def _raster(tree: Tree, path: str) -> Multiscale:
    (image,) = open_multiscales(tree, [path])
    if isinstance(image, DataError):
        raise image
    return image


def _placed(tree: Tree, path: str) -> tuple[NDArray[np.float64], float | None]:
    """Return the transformation of an element to "global", and that system's unit."""
    (attributes,) = tree.attributes([path])
    said: Mapping[str, Any] = ngff(attributes or {})
    images = said.get("multiscales") or [attributes or {}]
    return to_global(images[0].get("coordinateTransformations") or [], tree.where(path))


def _positions(tree: Tree, region: str) -> pd.DataFrame:
    """Return x and y of every instance of an element in its own frame, indexed by id as text."""
    assert isinstance(tree.root, Path)
    path = _path_of(tree.root, region)
    kind = path.split("/")[0]
    try:
        if kind == "labels":
            image = _raster(tree, path)
            read = image.labels()
            found = centroids(lambda *box: read(*box)[0], image.shape, read.chunk)
        elif kind == "shapes":
            file = tree.root / path / "shapes.parquet"
            table = pq.read_table(file, columns=["geometry"], use_pandas_metadata=True)
            shapes = table.to_pandas()
            points = [centroid(shape) for shape in shapes["geometry"]]
            found = pd.DataFrame(points, columns=["x", "y"], index=shapes.index)
        else:
            files = pds.dataset(tree.root / path / "points.parquet", format="parquet")
            found = files.to_table(columns=_with_index(files.schema)).to_pandas()
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"{tree.where(path)}: its positions cannot be read ({error}); copy it again, or write "
            "it with a newer spatialdata"
        ) from error
    found.index = pd.Index([_text(i) for i in found.index], dtype=object)
    if found.index.duplicated().any():
        twice = sorted(set(found.index[found.index.duplicated()]))
        raise DataError(f"{tree.where(path)}: instances stand there twice, e.g. {twice[:3]}")
    return found[["x", "y"]]


def _with_index(schema: pa.Schema) -> list[str]:
    stated = (schema.pandas_metadata or {}).get("index_columns", [])
    return ["x", "y", *(name for name in stated if isinstance(name, str))]


def _text(instance: object) -> str:
    return instance.decode() if isinstance(instance, bytes) else str(instance)


def _table(root: Path) -> str | None:
    names = _elements(root, "tables")
    if len(names) > 1 and "table" not in names:
        raise DataError(f"{root}: several tables, {names}; call the one of the cells 'table'")
    if not names:
        return None
    return "table" if "table" in names else names[0]


def _read_table(tree: Tree, name: str) -> tuple[str, list[str], sparse.csr_matrix, pd.DataFrame]:
    """Return the element that a table is of, its instances, counts and genes."""
    path = f"tables/{name}"
    where = tree.where(path)
    group = tree.group(path)
    said = {key: group.attrs.get(key) for key in ("region", "region_key", "instance_key")}
    try:
        if said["region"] is None and "uns/spatialdata_attrs" in group:
            said |= ad.io.read_elem(group["uns/spatialdata_attrs"])
        obs, var = ad.io.read_elem(group["obs"]), ad.io.read_elem(group["var"])
        layer = "layers/counts" if "layers/counts" in group else "X"
        counts = sparse.csr_matrix(ad.io.read_elem(group[layer]))
    except Exception as error:  # anndata, zarr and each codec have errors of their own
        raise DataError(
            f"{where}: not a table that can be read ({error}); copy it again"
        ) from error
    regions = [str(r) for r in np.atleast_1d(np.asarray(said["region"], dtype=object))]
    if said["region"] is None or said["instance_key"] not in obs:
        raise DataError(
            f"{where}: does not say which element its rows are of ('region', 'instance_key' in its "
            "attributes); write it with spatialdata"
        )
    if len(regions) > 1:
        raise DataError(f"{where}: is of several elements, {regions}; make a folder of each")
    values = counts.data
    bad = values[~(np.isfinite(values) & (values >= 0) & (values == np.rint(values)))]
    if len(bad):
        raise DataError(
            f"{where}/{layer}: {len(bad):,} values are no counts, such as {bad[0]:.4g}; raw counts "
            "are needed: put them into layers['counts']"
        )
    if "feature_types" in var:
        genes = np.flatnonzero(var["feature_types"].astype(str) == "Gene Expression")
        if not len(genes):
            kinds = sorted(set(var["feature_types"].astype(str)))
            raise DataError(f"{where}: no feature of the type 'Gene Expression', only {kinds}")
        counts, var = counts[:, genes], var.iloc[genes]
    table = genes_of(var, where)
    tell_symbols(table, where)
    counts = counts.astype(np.float32)
    counts.sort_indices()
    instances = [_text(i) for i in obs[said["instance_key"]]]
    return inside(regions[0], where), instances, counts, table
