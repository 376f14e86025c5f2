"""SpatialData folders of both containers: elements of every kind, transformations, and trouble."""

from __future__ import annotations

import json
import shutil
import struct
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from phenoseq.data.readers import find_reader, open_source
from phenoseq.data.readers.transformation import to_global
from phenoseq.data.readers.wkb import centroid
from phenoseq.errors import DataError, PhenoseqWarning

VERSIONS = ("0.4", "0.5")
#: Image pixels (x, y) to "global": turned, stretched and moved.
AFFINE = [[0.4, 0.1, 5.0], [-0.1, 0.4, 7.0]]


def system(axes: str, unit: str = "unit", name: str = "global") -> dict:
    listed = [{"name": a, "type": "channel" if a == "c" else "space"} for a in axes]
    for axis in listed:
        if axis["type"] == "space":
            axis["unit"] = unit
    return {"name": name, "axes": listed}


def affine(axes: str, matrix=AFFINE, **options) -> dict:
    """Write a matrix on (x, y, 1) for these input axes; the output is in the order (c,) x, y."""
    to = ("c" if "c" in axes else "") + "xy"
    rows = []
    for axis in to:
        row = dict.fromkeys((*axes, "1"), 0.0)
        if axis == "c":
            row["c"] = 1.0
        else:
            row["x"], row["y"], row["1"] = matrix["xy".index(axis)]
        rows.append(list(row.values()))
    return {
        "type": "affine",
        "affine": rows,
        "input": system(axes, name=axes),
        "output": system(to, **options),
    }


def identity(axes: str = "xy", **options) -> dict:
    return {"type": "identity", "input": system(axes), "output": system(axes, **options)}


def square(x: float, y: float, half: float, order: str = "<") -> bytes:
    ring = [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    flat = [value for point in [*ring, ring[0]] for value in point]
    return struct.pack(f"{order}BIII10d", order == "<", 3, 1, 5, *flat)


@pytest.fixture
def folder(tmp_path, fake):
    """Give a function that writes a SpatialData folder whose table is of one element."""

    def make(name="sdata.zarr", kind="labels", version="0.5", unit="unit", **table):
        path = tmp_path / name
        format = 2 if version == "0.4" else 3
        pixels, masks, centres = fake.field(5)
        whole = {"spatialdata_attrs": {"version": "0.2"}}
        set_bare(fake, path, whole, version)
        for kinds in ("images", "labels", "shapes", "points", "tables"):
            set_bare(fake, path / kinds, {}, version)
        fake.multiscale(path / "images/morphology focus", pixels, version=version, unit=None)
        fake.multiscale(path / "labels/cells", masks, version=version, axes="yx", names=None)
        place(path / "images/morphology focus", [affine("cyx", unit=unit)], fake, version)
        place(path / "labels/cells", [affine("yx")], fake, version)
        points = centres[:, ::-1] @ np.array(AFFINE)[:, :2].T + np.array(AFFINE)[:, 2]
        region, ids = "cells", np.arange(9) + 1
        if kind == "shapes":
            region, ids = "circles", np.array([f"z{k}" for k in range(9)])
            shapes = [
                struct.pack("<BI2d", 1, 1, *p) if k % 2 else square(*p, 2.0, "<>"[k // 2 % 2])
                for k, p in enumerate(points)
            ]
            set_bare(
                fake, path / "shapes/circles", {"coordinateTransformations": [identity()]}, version
            )
            pd.DataFrame({"geometry": shapes, "radius": 3.0}, index=ids).to_parquet(
                path / "shapes/circles/shapes.parquet"
            )
        if kind == "points":
            region, ids = "spots", np.arange(9) + 2**60
            scale = {**identity(), "type": "scale", "scale": [2.0, 4.0]}
            moved = {**identity(), "type": "translation", "translation": [1.0, -1.0]}
            both = {**identity(), "type": "sequence", "transformations": [scale, moved]}
            set_bare(fake, path / "points/spots", {"coordinateTransformations": [both]}, version)
            file = path / "points/spots/points.parquet"
            file.mkdir()
            frame = pd.DataFrame((points - [1, -1]) / [2, 4], columns=["x", "y"], index=ids)
            frame.assign(gene="A").iloc[:5].to_parquet(file / "part.0.parquet")
            frame.assign(gene="A").iloc[5:].to_parquet(file / "part.1.parquet")
        order = np.random.default_rng(3).permutation(9)
        counts = np.random.default_rng(4).poisson(3.0, (9, 5))
        obs = pd.DataFrame({"region": pd.Categorical([region] * 9), "cell": ids[order]})
        obs.index = [f"row{k}" for k in range(9)]
        var = pd.DataFrame({"gene_ids": [f"ENSG{g:011d}.2" for g in range(5)]})
        var.index = [f"G{g}" for g in range(5)]
        x = table.pop("x", sparse.csr_matrix(counts[order].astype(np.float32)))
        data = ad.AnnData(x, obs=obs, var=table.pop("var", var), **table)
        with ad.settings.override(zarr_write_format=format), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data.write_zarr(path / "tables/table")
        said = {"region": region, "region_key": "region", "instance_key": "cell"}
        mark(path / "tables/table", said, fake, version)
        return path, pixels, centres, counts, [str(i) for i in ids]

    return make


def set_bare(fake, path, attributes, version) -> None:
    """Write attributes that stand bare in both versions."""
    fake.attributes(path, {}, version)
    if version == "0.5":
        fake.edit(path / "zarr.json", lambda d: d.update(attributes=attributes))
    else:
        (path / ".zattrs").write_text(json.dumps(attributes))


def mark(path, attributes, fake, version) -> None:
    """Add attributes to those of a group."""
    if version == "0.5":
        fake.edit(path / "zarr.json", lambda d: d["attributes"].update(attributes))
    else:
        fake.edit(path / ".zattrs", lambda d: d.update(attributes))


def place(path, transformations, fake, version="0.5") -> None:
    """Set the transformations of an image."""

    def edit(d):
        said = d["attributes"]["ome"] if version == "0.5" else d
        image = said["multiscales"][0]
        image["coordinateTransformations"] = transformations
        if version == "0.4":
            image["version"] = "0.4-dev-spatialdata"
        else:
            said["version"] = "0.5-dev-spatialdata"

    fake.edit(path / ("zarr.json" if version == "0.5" else ".zattrs"), edit)


@pytest.mark.parametrize("kind", ["labels", "shapes", "points"])
@pytest.mark.parametrize("version", VERSIONS)
def test_cells_of_every_kind(folder, kind, version):
    path, pixels, centres, counts, ids = folder(kind=kind, version=version)
    assert find_reader(path)[0].name == "spatialdata"
    source = open_source(path, pixel_size=0.2)
    assert source.channels == ("DNA", "ER", "Mito")
    assert sorted(source.obs.index) == sorted(ids)
    assert list(source.obs.index) != ids  # in the order of the table
    obs = source.obs.loc[ids]
    np.testing.assert_allclose(obs[["y_centroid", "x_centroid"]], 0.2 * centres)
    rows = source.obs.index.get_indexer(ids)
    np.testing.assert_array_equal(source.counts[rows].toarray(), counts)
    assert list(source.var.index) == [f"ENSG{g:011d}" for g in range(5)]
    assert list(source.var["symbol"]) == [f"G{g}" for g in range(5)]
    field = source.fields["morphology focus"]
    assert [level.pixel_size for level in field.levels] == [0.2, 0.4]
    np.testing.assert_array_equal(field.levels[0].read(5, 99, 8, 140), pixels[:, 5:99, 8:140])


def test_pixel_size_from_the_unit_of_the_system(folder):
    path, *_ = folder(unit="micrometer")
    assert open_source(path).pixel_size == pytest.approx(np.sqrt(0.4**2 + 0.1**2))
    path, *_ = folder("b.zarr")
    with pytest.raises(DataError, match=r"morphology focus: states no pixel size.*--pixel-size"):
        open_source(path)


def test_choice_of_the_image(folder):
    path, *_ = folder()
    shutil.copytree(path / "images/morphology focus", path / "images/autre à côté")
    with pytest.raises(
        DataError, match=r"several images, \['autre à côté', .*give the one to read"
    ):
        open_source(path, pixel_size=0.2)
    one = path / "images/morphology focus"
    assert find_reader(one)[0].name == "spatialdata"
    assert list(open_source(one, pixel_size=0.2).fields) == ["morphology focus"]


def test_without_a_table_cells_are_the_labels(folder):
    path, _, centres, _, ids = folder()
    shutil.rmtree(path / "tables/table")
    source = open_source(path, pixel_size=0.2)
    assert source.counts is None
    assert list(source.obs.index) == ids
    np.testing.assert_allclose(source.obs[["y_centroid", "x_centroid"]], 0.2 * centres)
    shutil.rmtree(path / "labels/cells")
    with pytest.raises(DataError, match="no table, labels or shapes, so no cells"):
        open_source(path, pixel_size=0.2)
    shutil.rmtree(path / "images/morphology focus")
    with pytest.raises(DataError, match="no image; write it again"):
        open_source(path, pixel_size=0.2)


# -------------------------------------------------------------------------------------- transforms


def test_sequence_is_applied_in_its_order():
    scale = {**identity(), "type": "scale", "scale": [2.0, 3.0]}
    moved = {**identity(), "type": "translation", "translation": [10.0, 20.0]}
    both = {**identity(unit="nanometer"), "type": "sequence", "transformations": [scale, moved]}
    matrix, unit = to_global([both], "x")
    np.testing.assert_array_equal(matrix, [[2, 0, 10], [0, 3, 20], [0, 0, 1]])
    assert unit == 1e-3
    both["transformations"] = [moved, scale]
    np.testing.assert_array_equal(to_global([both], "x")[0][:2, 2], [20, 60])


def test_axes_of_any_order():
    matrix, unit = to_global([affine("zyx")], "x")
    np.testing.assert_array_equal(matrix[:2], AFFINE)
    assert unit is None
    scale = {**identity("cyx"), "type": "scale", "scale": [1.0, 3.0, 2.0]}
    np.testing.assert_array_equal(to_global([scale], "x")[0], np.diag([2, 3, 1]))


@pytest.mark.parametrize(
    ("one", "said"),
    [
        ({**identity(), "type": "mapAxis"}, "of the kind 'mapAxis'; identity, scale"),
        (identity(name="tissue"), r"in the coordinate systems \['tissue'\], not in 'global'"),
        ({**identity(), "type": "scale", "scale": [0.0, 1.0]}, "cannot be inverted"),
        ({**identity(), "type": "scale"}, r"broken \(KeyError\('scale'\)\)"),
        (identity("yz"), "broken"),
    ],
)
def test_transformations_that_are_not_read(folder, fake, one, said):
    path, *_ = folder()
    place(path / "labels/cells", [one], fake)
    with pytest.raises(DataError, match=rf"labels/cells: .*{said}"):
        open_source(path, pixel_size=0.2)


# ------------------------------------------------------------------------------------------ tables


def test_values_that_are_no_counts(folder):
    path, *_ = folder(x=np.full((9, 5), 0.75, np.float32))
    with pytest.raises(DataError, match=r"table/X: 45 values are no counts, such as 0\.75.*layers"):
        open_source(path, pixel_size=0.2)
    raw = np.arange(45.0).reshape(9, 5)
    path, *_ = folder("b.zarr", x=np.log1p(raw), layers={"counts": raw})
    np.testing.assert_array_equal(open_source(path, pixel_size=0.2).counts.toarray(), raw)


def test_features_that_are_no_genes_are_dropped(folder):
    kinds = ["Gene Expression"] * 3 + ["Negative Control Probe"] * 2
    var = pd.DataFrame({"feature_types": kinds}, index=[f"G{g}" for g in range(5)])
    path, *_, counts, ids = folder(var=var)
    with pytest.warns(PhenoseqWarning, match="3 genes have no Ensembl id"):
        source = open_source(path, pixel_size=0.2)
    assert list(source.var.index) == ["G0", "G1", "G2"]
    rows = source.obs.index.get_indexer(ids)
    np.testing.assert_array_equal(source.counts[rows].toarray(), counts[:, :3])


def test_cells_without_a_label(folder, fake):
    path, *_ = folder()
    shutil.rmtree(path / "labels/cells")
    _, masks, _ = fake.field(5)
    for gone, said in ((9, 1), (7, 3)):
        masks[masks >= gone] = 0
        fake.multiscale(path / "labels/cells", masks, version="0.5", axes="yx", names=None)
        place(path / "labels/cells", [affine("yx")], fake)
        with pytest.raises(
            DataError, match=rf"{said} of 9 cells of the table are not in .*'cells'"
        ):
            open_source(path, pixel_size=0.2)
        shutil.rmtree(path / "labels/cells")


def test_few_cells_without_a_shape_are_left_out(folder, monkeypatch):
    monkeypatch.setattr("phenoseq.data.readers.spatialdata.MIN_MATCHED", 0.5)
    path, _, centres, counts, ids = folder(kind="shapes")
    file = path / "shapes/circles/shapes.parquet"
    pd.read_parquet(file).iloc[1:].to_parquet(file)
    with pytest.warns(PhenoseqWarning, match=r"1 cells of the table are not in the element"):
        source = open_source(path, pixel_size=0.2)
    rows = source.obs.index.get_indexer(ids[1:])
    assert len(source.obs) == 8
    np.testing.assert_array_equal(source.counts[rows].toarray(), counts[1:])
    found = source.obs.iloc[rows][["y_centroid", "x_centroid"]]
    np.testing.assert_allclose(found, 0.2 * centres[1:])


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"region": ["cells", "other"]}, r"is of several elements, \['cells', 'other'\]"),
        ({"region": "gone"}, "the table is of 'gone', which is not there"),
        ({"region": "../../secret"}, r"states the path '\.\./\.\./secret'"),
        ({"instance_key": "nothing"}, "does not say which element its rows are of"),
        ({"region": None}, "does not say which element its rows are of"),
    ],
)
def test_tables_of_other_things(folder, fake, said, match):
    path, *_ = folder()
    mark(path / "tables/table", said, fake, "0.5")
    with pytest.raises(DataError, match=match):
        open_source(path, pixel_size=0.2)


def test_instances_that_stand_twice(folder):
    path, *_ = folder(kind="shapes")
    file = path / "shapes/circles/shapes.parquet"
    shapes = pd.read_parquet(file)
    shapes.set_axis(["z1", *shapes.index[1:]]).to_parquet(file)
    with pytest.raises(DataError, match=r"shapes/circles: instances stand there twice.*'z1'"):
        open_source(path, pixel_size=0.2)


def test_truncated_parts(folder, cut_file):
    path, *_ = folder(kind="shapes")
    cut_file(path / "shapes/circles/shapes.parquet", 0.5)
    with pytest.raises(DataError, match=r"shapes/circles: its positions cannot be read"):
        open_source(path, pixel_size=0.2)
    path, *_ = folder("b.zarr")
    chunk = next(p for p in (path / "tables/table/X/data/c").iterdir())
    cut_file(chunk, 0.5)
    with pytest.raises(DataError, match=r"tables/table: not a table that can be read"):
        open_source(path, pixel_size=0.2)


def test_identity_covers_the_counts(folder):
    first = open_source(folder("a.zarr")[0], pixel_size=0.2)
    again = open_source(folder("b.zarr")[0], pixel_size=0.2)
    other = open_source(folder("c.zarr", x=np.ones((9, 5), np.float32))[0], pixel_size=0.2)
    assert first.identity == again.identity != other.identity


# ---------------------------------------------------------------------------------------- geometry


@given(
    x=st.floats(-1e6, 1e6),
    y=st.floats(-1e6, 1e6),
    order=st.sampled_from("<>"),
    z=st.booleans(),
    srid=st.booleans(),
)
def test_centroid_of_a_square_with_a_hole(x, y, order, z, srid):
    """A square of 4 by 4 without one of 2 by 2 in its upper right: its centroid is at -1/3."""
    code = 3 + (0x20000000 if srid else 0) + (1000 if z else 0)
    out = struct.pack(f"{order}BI", order == "<", code)
    if srid:
        out += struct.pack(f"{order}I", 4326)
    out += struct.pack(f"{order}I", 2)
    for cx, half in ((x, 2.0), (x + 1, 1.0)):
        cy = y + (cx - x)
        corners = [(-half, -half), (half, -half), (half, half), (-half, half), (-half, -half)]
        out += struct.pack(f"{order}I", 5)
        for u, v in corners:
            out += struct.pack(f"{order}{3 if z else 2}d", cx + u, cy + v, *([7.0] if z else []))
    assert centroid(out) == pytest.approx((x - 1 / 3, y - 1 / 3), abs=1e-6)


def test_centroids_of_several_polygons_and_broken_shapes():
    both = struct.pack("<BII", 1, 6, 2) + square(0, 0, 1) + square(10, 0, 2, ">")
    assert centroid(both) == pytest.approx((8.0, 0.0))
    for bad, said in (
        (square(0, 0, 1)[:-3], "truncated"),
        (b"\x01", "truncated"),
        (square(0, 0, 1) + b"x", "ends at"),
        (square(0, 0, 0), "without an area"),
        (struct.pack("<BII", 1, 2, 0), "kind 2"),
    ):
        with pytest.raises(ValueError, match=said):
            centroid(bad)
