"""OME-Zarr: plates and images of both versions, local and served, and what is wrong with some."""

from __future__ import annotations

import shutil
import tracemalloc
import warnings

import numpy as np
import pytest
import zarr

from phenoseq.data.crops import iter_crops
from phenoseq.data.readers import find_reader, open_source
from phenoseq.errors import DataError, PhenoseqWarning

VERSIONS = ("0.4", "0.5")


@pytest.fixture
def image(tmp_path, fake):
    """Give a function that writes one image with label images; returns path, pixels, centres."""

    def make(name: str = "image.ome.zarr", version: str = "0.4", labels: bool = True, **options):
        pixels, masks, centres = fake.field(5)
        path = tmp_path / name
        fake.multiscale(path, pixels, version=version, **options)
        if labels:
            fake.labels(path, masks, version=version, levels=1)
        return path, pixels, centres

    return make


def document(path, version="0.4"):
    return path / (".zattrs" if version == "0.4" else "zarr.json")


def positions(source):
    return source.obs[["y_centroid", "x_centroid"]].to_numpy()


def check_plate(source, centres) -> None:
    """Check that fields, ids, positions and pixels are those written."""
    assert source.channels == ("DNA", "ER", "Mito")
    assert (source.pixel_size, source.dtype) == (0.5, np.uint16)
    names = {
        "A/1/0": "plate 1-A01-s0",
        "A/1/1": "plate 1-A01-s1",
        "B/02/0": "plate 1-B02-s0",
        "B/02/1": "plate 1-B02-s1",
    }
    assert list(source.fields) == list(names.values())
    expected = np.concatenate([centres[path] for path in names])
    np.testing.assert_allclose(positions(source), 0.5 * expected)
    assert list(source.obs.index) == [f"{n}-{k}" for n in names.values() for k in range(1, 10)]
    assert set(source.obs["Metadata_Well"]) == {"A01", "B02"}
    assert set(source.obs["Metadata_Plate"]) == {"plate 1"}
    assert set(source.obs["Metadata_Site"]) == {"0", "1"}
    seen = 0
    for batch in iter_crops(source, 0.5, 4):
        for row, crop in zip(batch.rows, batch.images, strict=True):
            label = int(source.obs.index[row].rsplit("-", 1)[1])
            wanted = 10 * label + np.arange(3)[:, None, None]
            np.testing.assert_array_equal(crop, np.broadcast_to(wanted, crop.shape))
            seen += 1
    assert seen == 36


@pytest.mark.parametrize("version", VERSIONS)
def test_plate(tmp_path, fake, version):
    centres = fake.plate(tmp_path / "p.zarr", version=version)
    reader, reason = find_reader(tmp_path / "p.zarr")
    assert (reader.name, "a plate" in reason) == ("ome-zarr", True)
    check_plate(open_source(tmp_path / "p.zarr"), centres)


@pytest.mark.parametrize("version", VERSIONS)
def test_plate_behind_a_url(tmp_path, fake, web, version):
    centres = fake.plate(tmp_path / "été à 20 %.zarr", version=version)
    source = open_source(f"{web.url}/été à 20 %.zarr/")
    assert source.name == f"{web.url}/été à 20 %.zarr"
    check_plate(source, centres)


def test_only_chunks_of_the_region_are_fetched(image, web):
    path, pixels, _ = image()
    source = open_source(f"{web.url}/{path.name}")
    web.paths.clear()
    (field,) = source.fields.values()
    part = field.levels[0].read(70, 80, 70, 80)
    np.testing.assert_array_equal(part, pixels[:, 70:80, 70:80])
    chunks = {p for _, p in web.paths if p.rsplit("/", 1)[1].isdigit()}
    assert chunks == {f"/{path.name}/0/{c}/1/1" for c in range(3)}


def test_url_without_anything(web):
    with pytest.raises(DataError, match="no Zarr hierarchy"):
        open_source(f"{web.url}/nothing.zarr")
    with pytest.raises(DataError, match=r"xenium is read from a folder; copy it"):
        open_source(f"{web.url}/nothing.zarr", format="xenium")


def test_url_that_nobody_serves():
    with pytest.raises(DataError, match=r"cannot be read .*within reach"):
        open_source("http://127.0.0.1:9/plate.zarr")


def test_url_of_an_unknown_scheme():
    with pytest.raises(DataError, match=r"quux://.*phenoseq\[remote\]"):
        open_source("quux://bucket/plate.zarr")


@pytest.mark.parametrize("version", VERSIONS)
def test_single_image(image, version):
    path, pixels, centres = image("Früh stück.ome.zarr", version, pixel_size=0.25)
    source = open_source(path)
    assert list(source.fields) == ["Früh stück"]
    assert source.obs.index[0] == "Früh stück-1"
    np.testing.assert_allclose(positions(source), 0.25 * centres)
    (field,) = source.fields.values()
    assert [(level.pixel_size, level.shape) for level in field.levels] == [
        (0.25, (120, 150)),
        (0.5, (60, 75)),
    ]
    np.testing.assert_array_equal(field.levels[0].read(11, 95, 7, 149), pixels[:, 11:95, 7:149])
    np.testing.assert_array_equal(
        field.levels[1].read(3, 60, 5, 75), pixels[:, ::2, ::2][:, 3:60, 5:75]
    )
    assert find_reader(path)[1] == "its metadata tells of an image of OME-Zarr"


@pytest.mark.parametrize(
    ("axes", "index"), [("tczyx", np.s_[None, :, None]), ("czyx", np.s_[:, None]), ("yx", 0)]
)
def test_axes(tmp_path, fake, axes, index):
    pixels, masks, _ = fake.field(5)
    names = ("DAPI", "ER", "Mito")[: 1 if axes == "yx" else 3]
    fake.multiscale(tmp_path / "i.zarr", pixels[index], axes=axes, names=names)
    lead = tuple(0 if index == 0 else np.newaxis for a in axes if a not in "yx")
    fake.labels(
        tmp_path / "i.zarr",
        masks[(*lead, ...)] if axes != "yx" else masks,
        version="0.4",
        axes=axes,
    )
    (field,) = open_source(tmp_path / "i.zarr").fields.values()
    found = field.levels[0].read(20, 90, 10, 120)
    np.testing.assert_array_equal(found, pixels[: len(names), 20:90, 10:120])


def test_middle_plane_of_a_stack_with_a_warning(tmp_path, fake):
    pixels, masks, _ = fake.field(5)
    stack = np.stack([pixels * 0 + 7, pixels * 0 + 8, pixels, pixels * 0 + 9], axis=1)
    fake.multiscale(tmp_path / "i.zarr", stack, axes="czyx")
    fake.labels(tmp_path / "i.zarr", masks, version="0.4")
    with pytest.warns(PhenoseqWarning, match=r"4 focal planes; only the middle one, plane 2"):
        source = open_source(tmp_path / "i.zarr")
    (field,) = source.fields.values()
    np.testing.assert_array_equal(field.levels[0].read(0, 120, 0, 150), pixels)


def test_several_times_are_refused(tmp_path, fake):
    pixels, _, _ = fake.field(5)
    fake.multiscale(tmp_path / "i.zarr", np.stack([pixels, pixels]), axes="tcyx")
    with pytest.raises(DataError, match=r"i\.zarr: has 2 times; save one"):
        open_source(tmp_path / "i.zarr")


@pytest.mark.parametrize(
    ("unit", "size", "expected"),
    [("nanometer", 325.0, 0.325), ("angstrom", 5000.0, 0.5), ("millimeter", 0.0005, 0.5)],
)
def test_units(image, unit, size, expected):
    assert open_source(image(unit=unit, pixel_size=size)[0]).pixel_size == pytest.approx(expected)


def test_pixel_size_without_unit_is_asked_for(image):
    path, _, centres = image(unit=None)
    with pytest.raises(DataError, match=r"without a unit of length.*--pixel-size"):
        open_source(path)
    source = open_source(path, pixel_size=0.65)
    assert [level.pixel_size for level in source.fields["image"].levels] == [0.65, 1.3]
    np.testing.assert_allclose(positions(source), 0.65 * centres)


def test_pixels_that_are_not_square(image, fake):
    path, _, _ = image()

    def stretch(attributes):
        for dataset in attributes["multiscales"][0]["datasets"]:
            dataset["coordinateTransformations"][0]["scale"][-1] *= 2

    fake.edit(document(path), stretch)
    with pytest.raises(DataError, match=r"pixels of 0\.5 by 1\.0 are not square"):
        open_source(path)


def test_scale_of_the_whole_image_counts(image, fake):
    path, _, _ = image()
    whole = [{"type": "scale", "scale": [1, 0.5, 0.5]}]
    fake.edit(document(path), lambda a: a["multiscales"][0].update(coordinateTransformations=whole))
    assert open_source(path).pixel_size == 0.25


def test_level_that_does_not_fit_its_scale(image, fake):
    path, _, _ = image()

    def shift(attributes):
        second = attributes["multiscales"][0]["datasets"][1]
        second["coordinateTransformations"][0]["scale"] = [1, 3.0, 3.0]

    fake.edit(document(path), shift)
    with pytest.raises(DataError, match=r"ome\.zarr/1: is \(60, 75\) pixels.*does not cover"):
        open_source(path)


# ------------------------------------------------------------------------------------ label images


def test_coarser_label_image(image, fake):
    path, _, centres = image(labels=False)
    _, masks, _ = fake.field(5)
    fake.labels(path, masks[::2, ::2], version="0.4", levels=1)
    found = positions(open_source(path))
    np.testing.assert_allclose(found, 0.5 * centres, atol=0.51)


def test_label_image_of_another_size(image, fake):
    path, _, _ = image(labels=False)
    fake.labels(path, np.ones((50, 50), np.uint8), version="0.4", levels=1)
    with pytest.raises(DataError, match=r"labels/cells: \(50, 50\) pixels.*size of one of them"):
        open_source(path)


@pytest.mark.parametrize(
    ("dtype", "shape", "said"),
    [("float32", (120, 150), "1 of float32"), ("u1", (2, 120, 150), "2")],
)
def test_label_image_of_other_things(image, fake, dtype, shape, said):
    path, _, _ = image(labels=False)
    axes = "cyx" if len(shape) == 3 else "yx"
    fake.labels(path, np.ones(shape, dtype), version="0.4", levels=1, axes=axes)
    with pytest.raises(DataError, match=f"one channel of whole numbers; this one has {said}"):
        open_source(path)


def test_no_label_image(image):
    with pytest.raises(DataError, match=r"no label images.*write a label image"):
        open_source(image(labels=False)[0])


def test_choice_among_label_images(image, fake):
    path, _, centres = image(labels=False)
    _, masks, _ = fake.field(5)
    other = np.zeros_like(masks)
    for name in ("a", "b"):
        fake.labels(path, other + 1, name=name, version="0.4", levels=1)
    with pytest.raises(DataError, match=r"several label images, \['a', 'b'\].*'cells'"):
        open_source(path)
    fake.labels(path, other + 1, name="nuclei", version="0.4", levels=1)
    assert len(open_source(path).obs) == 1
    fake.labels(path, masks, name="Cells", version="0.4", levels=1)
    np.testing.assert_allclose(positions(open_source(path)), 0.5 * centres)


def problem(plate, field, said):
    """Return the source, of which one of six fields is left out, told and recorded."""
    with pytest.warns(PhenoseqWarning, match=rf"1 of 6 fields cannot be used.*\n.*{said}"):
        source = open_source(plate)
    assert len(source.fields) == 5
    assert field not in source.fields
    assert set(source.obs["field"]) == set(source.fields)
    assert [one.where for one in source.problems] == [field]
    return source


@pytest.fixture
def plate(tmp_path, fake):
    """Give a plate of six fields."""
    fake.plate(tmp_path / "p.zarr", wells=("A/1", "A/2", "B/3"))
    return tmp_path / "p.zarr"


def test_field_without_label_image(plate):
    shutil.rmtree(plate / "A/2/1/labels")
    problem(plate, "plate 1-A02-s1", "A/2/1/labels: no label images")


def test_field_that_is_missing(plate):
    shutil.rmtree(plate / "A/1/0")
    problem(plate, "plate 1-A01-s0", "A/1/0: missing, but metadata lists it")


@pytest.mark.parametrize("file", [".zattrs", "0/.zarray", "labels/.zattrs", "labels/cells/.zattrs"])
@pytest.mark.parametrize("field", ["A/1/0", "B/3/0"])
def test_broken_metadata_of_one_field(plate, cut_file, file, field):
    cut_file(plate / field / file, 0.5)
    name = f"plate 1-{field[0]}0{field[2]}-s0"
    problem(plate, name, rf"{field}.*: not JSON .*truncated")


def test_truncated_labels_of_one_field(plate, cut_file):
    cut_file(plate / "B/3/1/labels/cells/0/1/1", 0.5)
    problem(plate, "plate 1-B03-s1", "pixels at rows .*truncated: copy it")


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_well_that_cannot_be_used(tmp_path, fake, cut_file, damage):
    path = tmp_path / "p.zarr"
    fake.plate(path, wells=("A/1", "A/2", "A/3"))
    if damage == "missing":
        shutil.rmtree(path / "A/3")
    else:
        fake.edit(document(path / "A/3"), lambda a: a["well"].pop("images"))
    with pytest.warns(PhenoseqWarning, match=r"1 of 5 fields cannot be used.*\n.*A/3: .*copy it"):
        source = open_source(path)
    assert len(source.fields) == 4
    assert [one.where for one in source.problems] == ["plate 1-A03"]


def test_opening_a_plate_behind_a_url_downloads_no_image(plate, web):
    """Metadata and labels are fetched; then of an image only what is read."""
    source = open_source(f"{web.url}/p.zarr")
    chunks = [p for _, p in web.paths if p.rsplit("/", 1)[1].isdigit()]
    assert chunks
    assert all("/labels/" in path for path in chunks)
    web.paths.clear()
    source.fields["plate 1-A02-s0"].levels[0].read(0, 120, 0, 150)
    assert web.paths
    assert all(path.startswith("/p.zarr/A/2/0/0/") for _, path in web.paths)


def test_memory_does_not_grow_with_the_label_image(tmp_path, fake):
    """64 million label pixels of 4 bytes; a few blocks of a million are held at a time."""
    side = 8000
    fake.multiscale(tmp_path / "i.zarr", np.zeros((16, 16), np.uint8), axes="yx", names=("DAPI",))
    for k, path in enumerate((tmp_path / "i.zarr/0", tmp_path / "i.zarr/labels/cells/0")):
        shutil.rmtree(path, ignore_errors=True)
        array = zarr.create_array(
            path, shape=(side, side), chunks=(1000, 1000), dtype=f"uint{8 + 24 * k}", zarr_format=2
        )
        array[3000:3010, 7000:7020] = 5
    fake.edit(document(tmp_path / "i.zarr"), lambda a: a["multiscales"][0]["datasets"].pop())
    fake.labels(tmp_path / "i.zarr", np.zeros((16, 16), np.uint8), version="0.4", name="x")
    shutil.rmtree(tmp_path / "i.zarr/labels/x")
    shutil.copy(document(tmp_path / "i.zarr"), document(tmp_path / "i.zarr/labels/cells"))
    fake.attributes(tmp_path / "i.zarr/labels", {"labels": ["cells"]}, "0.4")
    tracemalloc.start()
    source = open_source(tmp_path / "i.zarr")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(positions(source), [[1502.5, 3505.0]])
    assert peak < 40e6, f"{peak / 1e6:.0f} MB for labels of 256 MB"


# ----------------------------------------------------------------------------------------- trouble


@pytest.mark.parametrize("version", VERSIONS)
def test_truncated_chunk(image, cut_file, version):
    path, _, _ = image(version=version)
    source = open_source(path)
    chunk = path / ("0/1/1/1" if version == "0.4" else "0/c/1/1/1")
    cut_file(chunk, 0.5)
    (field,) = source.fields.values()
    field.levels[0].read(0, 60, 0, 60)
    with pytest.raises(DataError, match=r"ome\.zarr/0: pixels at rows 0-120.*truncated: copy it"):
        field.levels[0].read(0, 120, 0, 150)
    cut_file(path / ("labels/cells/0/1/1" if version == "0.4" else "labels/cells/0/c/1/1"), 0.5)
    with pytest.raises(DataError, match=r"labels/cells/0: pixels at rows .*truncated: copy it"):
        open_source(path)


def test_truncated_metadata(image, cut_file):
    path, _, _ = image()
    cut_file(path / "0/.zarray", 0.5)
    with pytest.raises(DataError, match=r"0/\.zarray: not JSON.*truncated"):
        open_source(path)
    cut_file(path / ".zattrs", 0.5)
    with pytest.raises(DataError, match=r"ome\.zarr/\.zattrs: not JSON.*truncated"):
        open_source(path)


def test_level_that_is_missing(image):
    path, _, _ = image()
    shutil.rmtree(path / "1")
    with pytest.raises(DataError, match=r"ome\.zarr/1: missing, but .* lists it"):
        open_source(path)


def test_wells_that_the_metadata_does_not_list(plate, fake):
    fake.edit(document(plate), lambda attributes: attributes["plate"]["wells"].pop(1))
    with pytest.warns(PhenoseqWarning, match=r"1 wells are not in the plate's metadata .*'A/2'"):
        source = open_source(plate)
    assert {field[:11] for field in source.fields} == {"plate 1-A01", "plate 1-B03"}
    assert [one.where for one in source.problems] == ["A/2"]


def test_plate_without_any_field(plate, fake):
    for field in plate.glob("*/*/*/"):
        shutil.rmtree(field)
    with pytest.raises(DataError, match=r"6 of 6 fields cannot be used, more than 20%"):
        open_source(plate)
    fake.edit(document(plate), lambda attributes: attributes["plate"]["wells"].clear())
    with pytest.raises(DataError, match=r"p\.zarr: no cells in it"):
        open_source(plate)


def test_one_well_by_two_names(tmp_path, fake):
    fake.plate(tmp_path / "p.zarr", wells=("A/1", "A/01"))
    with pytest.raises(DataError, match=r"lists fields twice: \['plate 1-A01-s0'"):
        open_source(tmp_path / "p.zarr")


@pytest.mark.parametrize("bad", ["../../secret", "/etc", "A/../../x", "http://h/x", "..\\x", ""])
def test_paths_that_leave_the_plate(tmp_path, fake, image, bad):
    plate = tmp_path / "p.zarr"
    fake.plate(plate, wells=("A/1",))
    well = document(plate / "A/1")
    fake.edit(well, lambda a: a["well"]["images"][0].update(path=bad))
    with pytest.raises(DataError, match=r"p\.zarr/A/1: states the path .* not lie below"):
        open_source(plate)
    fake.edit(document(plate), lambda a: a["plate"]["wells"][0].update(path=bad))
    with pytest.raises(DataError, match=r"p\.zarr: states the path .* not lie below"):
        open_source(plate)
    path, _, _ = image()
    fake.edit(document(path / "labels"), lambda a: a.update(labels=[bad, "cells"][:1]))
    with pytest.raises(DataError, match=r"labels: states the path .* not lie below"):
        open_source(path)
    fake.edit(document(path), lambda a: a["multiscales"][0]["datasets"][0].update(path=bad))
    with pytest.raises(DataError, match=r"ome\.zarr: states the path .* not lie below"):
        open_source(path)


def test_loops_of_links(tmp_path, fake, image):
    loop = tmp_path / "loop.zarr"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match=r"loop\.zarr: no such file or folder"):
        open_source(loop)
    path, _, _ = image()
    shutil.rmtree(path / "0")
    (path / "0").symlink_to(path / "0")
    with pytest.raises(DataError, match=r"ome\.zarr/0/\.zarray: cannot be read"):
        open_source(path)
    plate = tmp_path / "p.zarr"
    centres = fake.plate(plate)
    (plate / "A" / "again").symlink_to(plate)  # a folder that holds itself is not walked into
    with pytest.warns(PhenoseqWarning, match=r"'A/again'"):
        check_plate(open_source(plate), centres)


def test_fields_that_differ(plate, fake):
    pixels, masks, _ = fake.field(3)
    changes = {
        r"channels, \('DNA', 'RNA', 'Mito'\)": {"names": ("DAPI", "RNA", "Mito")},
        "pixel type, uint8": {"pixels": pixels.astype(np.uint8)},
        r"pixel size in um, 0\.3": {"pixel_size": 0.3},
    }
    for said, change in changes.items():
        shutil.rmtree(plate / "A/1/1")
        fake.multiscale(plate / "A/1/1", **{"pixels": pixels, **change})
        fake.labels(plate / "A/1/1", masks, version="0.4")
        problem(plate, "plate 1-A01-s1", rf"A/1/1: its {said}.*differs from.*A/1/0")
    assert len(open_source(plate, pixel_size=0.4).fields) == 6


def test_channels_without_names(image):
    with pytest.raises(DataError, match=r"has 3 channels, but its metadata names 0.*'omero'"):
        open_source(image(names=None)[0])
    with pytest.raises(DataError, match=r"a stain has no name"):
        open_source(image("b.zarr", names=("DAPI", "", "ER"))[0])


def test_other_versions_and_kinds(image, tmp_path, fake):
    path, _, _ = image()
    fake.edit(document(path), lambda a: a["multiscales"][0].update(version="0.3"))
    with pytest.raises(DataError, match=r"version 0\.3; phenoseq reads 0\.4 and 0\.5"):
        open_source(path)
    fake.edit(document(path), lambda a: a["multiscales"][0].update(version="0.4", axes=["y", "x"]))
    with pytest.raises(DataError, match=r"phenoseq reads 0\.4 and 0\.5"):
        open_source(path)
    fake.plate(tmp_path / "p.zarr")
    with pytest.raises(DataError, match="give the plate, two folders above it"):
        open_source(tmp_path / "p.zarr/A/1")
    fake.attributes(tmp_path / "b.zarr", {"bioformats2raw.layout": 3}, "0.4")
    with pytest.raises(DataError, match=r"give one of them: .*b\.zarr/0"):
        open_source(tmp_path / "b.zarr")


def test_broken_metadata_is_explained(image, fake):
    path, _, _ = image()
    fake.edit(document(path), lambda a: a["multiscales"][0].pop("datasets"))
    with pytest.raises(DataError, match=r"metadata is broken \(KeyError: 'datasets'\)"):
        open_source(path)


def test_identity(image, fake):
    path, _, _ = image()
    first = open_source(path)
    assert open_source(path).identity == first.identity
    seen = {first.identity, open_source(path, pixel_size=0.6).identity}
    labels = zarr.open_array(path / "labels/cells/0", mode="a")
    labels[0, 0] = 1
    seen.add(open_source(path).identity)
    assert len(seen) == 3


def test_no_warning_where_nothing_is_wrong(tmp_path, fake):
    fake.plate(tmp_path / "p.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_source(tmp_path / "p.zarr")
