"""Crops are centred on their cell, whatever the region, batch, level or border they lie at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from phenoseq.data import crops as crops_module
from phenoseq.data.crops import iter_crops, outside, resample
from phenoseq.data.source import FieldImage, Level
from phenoseq.errors import DataError


def gather(source, pixel_size, crop_px, **options):
    """Return rows, images and cut of all batches, in the order of ``obs``."""
    batches = list(iter_crops(source, pixel_size, crop_px, **options))
    rows = np.concatenate([b.rows for b in batches])
    assert len(np.unique(rows)) == len(rows)
    order = np.argsort(rows)
    images = np.concatenate([b.images for b in batches])[order]
    return rows[order], images, np.concatenate([b.cut for b in batches])[order]


def reflect(index, n):
    """Return where ``index`` falls when the axis is mirrored at its borders."""
    index = index % (2 * n)
    return np.where(index < n, index, 2 * n - 1 - index)


def expected_corner(source, side, pixel_size):
    """Return the upper left pixel of a crop of an even number of pixels, ``(n, 2)``, y first."""
    centre = source.obs[["y_centroid", "x_centroid"]].to_numpy() / pixel_size
    return np.round(centre - side / 2).astype(int)


def expected_ramp(source, side, size, pixel_size):
    """Return what the crops of a ramp image hold: rows and columns, mirrored at the border."""
    corner = expected_corner(source, side, pixel_size)
    y = reflect(corner[:, :1] + np.arange(side), size[0]) + 1000
    x = reflect(corner[:, 1:] + np.arange(side), size[1]) + 1000
    shape = (len(corner), side, side)
    rows, columns = np.broadcast_to(y[:, :, None], shape), np.broadcast_to(x[:, None], shape)
    return np.stack([rows, columns], axis=1)


def test_every_pixel_of_every_crop(ramp_source):
    size = (600, 800)
    source = ramp_source(size=size)
    rows, images, cut = gather(source, 0.5, 32)
    np.testing.assert_array_equal(rows, np.arange(300))
    np.testing.assert_array_equal(images, expected_ramp(source, 32, size, 0.5))
    corner = expected_corner(source, 32, 0.5)
    np.testing.assert_array_equal(cut, (corner < 0).any(axis=1) | (corner + 32 > size).any(axis=1))
    assert 10 < cut.sum() < 100


def test_centre_of_the_crop_is_the_cell(ramp_source):
    """At most half a pixel from it, at each level, in micrometres."""
    source = ramp_source(size=(1200, 1600), factors=(1, 2, 4))
    for pixel_size in (0.5, 1.0, 2.0):
        rows, images, cut = gather(source, pixel_size, 16)
        centre = images.astype(float).mean(axis=(2, 3)) - 1000  # in full-resolution pixels
        found = (centre + 0.5) * 0.5
        cells = source.obs[["y_centroid", "x_centroid"]].to_numpy()[rows]
        assert np.abs(found - cells)[~cut].max() <= pixel_size / 2 + 0.26  # ramps are rounded


@pytest.mark.parametrize("region", [37, 64, 250, 4096])
@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_crops_depend_on_neither_region_nor_batch(ramp_source, monkeypatch, region, batch_size):
    source = ramp_source(150)
    monkeypatch.setattr(crops_module, "REGION", region)
    rows, images, cut = gather(source, 0.5, 24, batch_size=batch_size)
    monkeypatch.setattr(crops_module, "REGION", 10**6)
    expected = gather(source, 0.5, 24, batch_size=10**6)
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_array_equal(images, expected[1])
    np.testing.assert_array_equal(cut, expected[2])


def test_batches_and_reads_are_bounded(ramp_source, monkeypatch):
    monkeypatch.setattr(crops_module, "REGION", 100)
    source = ramp_source(2000)
    sides = []

    def watched(level):
        def read(y0, y1, x0, x1):
            sides.append((y1 - y0, x1 - x0))
            return level.read(y0, y1, x0, x1)

        return replace(level, read=read)

    image = source.fields["f0"]
    watching = FieldImage(tuple(watched(level) for level in image.levels), image.dtype)
    batches = list(iter_crops(replace(source, fields={"f0": watching}), 0.5, 20, batch_size=16))
    assert max(len(b.rows) for b in batches) == 16
    # Crops begin in their region, except at the upper left border, and are 20 wide.
    assert np.max(sides) <= 100 + 20
    assert len(sides) == 6 * 8


def test_crop_larger_than_the_image_is_mirrored_all_over(ramp_source):
    size = (20, 30)
    source = ramp_source(10, size=size, factors=(1,))
    _, images, cut = gather(source, 0.5, 90)
    assert cut.all()
    np.testing.assert_array_equal(images, expected_ramp(source, 90, size, 0.5))


def test_crop_that_ends_at_the_border_is_not_cut(ramp_source):
    source = ramp_source(np.array([[8, 8], [392, 292], [7.7, 8], [8, 292.3]]), size=(600, 800))
    _, _, cut = gather(source, 0.5, 32)
    assert cut.tolist() == [False, False, True, True]


# ----------------------------------------------------------------------------------- resolution


@pytest.mark.parametrize(
    ("wanted", "level"),
    [(0.1, 0.5), (0.5, 0.5), (0.9, 0.5), (1.0, 1.0), (1.9, 1.0), (2.0, 2.0), (50.0, 2.0)],
)
def test_coarsest_level_that_is_fine_enough(ramp_source, wanted, level):
    image = ramp_source(5, factors=(1, 2, 4)).fields["f0"]
    assert image.level_for(wanted).pixel_size == level


def test_level_that_is_as_fine_but_for_rounding(ramp_source):
    image = ramp_source(5, pixel_size=0.2125, factors=(1, 2)).fields["f0"]
    assert image.level_for(0.42499999).pixel_size == 0.425


@pytest.mark.parametrize(("pixel_size", "read_at"), [(0.5, 0.5), (1.5, 1.0), (2.0, 2.0)])
def test_only_that_level_is_read(ramp_source, pixel_size, read_at):
    source = ramp_source(20)
    image = source.fields["f0"]

    def forbidden(*_):
        raise AssertionError("the wrong level was read")

    levels = tuple(
        level if level.pixel_size == read_at else replace(level, read=forbidden)
        for level in image.levels
    )
    assert len(levels) == 3
    gather(replace(source, fields={"f0": FieldImage(levels, image.dtype)}), pixel_size, 16)


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0, 0.5])
def test_resampled_crop_covers_the_same_square(ramp_source, factor):
    """A crop of ``n`` pixels of ``p`` um is n * p um wide, centred on the cell."""
    source = ramp_source(np.array([[150.0, 120.0], [200.25, 99.75]]), factors=(1,))
    _, images, cut = gather(source, 0.5 * factor, 40)
    assert images.shape == (2, 2, 40, 40)
    assert images.dtype == np.uint16
    assert not cut.any()
    x = images[:, 1].astype(float).mean(axis=1) - 1000
    y = images[:, 0].astype(float).mean(axis=2) - 1000
    inner = slice(3, -3)  # the filter sees less at the very border
    for positions, centroid in ((x, "x_centroid"), (y, "y_centroid")):
        np.testing.assert_allclose(np.diff(positions[:, inner], axis=1).mean(), factor, rtol=0.04)
        centre = source.obs[centroid].to_numpy() / 0.5 - 0.5
        np.testing.assert_allclose(positions.mean(axis=1), centre, atol=1.0)


def test_resample_averages_so_that_fine_detail_does_not_alias():
    stripes = np.zeros((1, 1, 64, 64), dtype=np.uint8)
    stripes[..., ::2] = 200
    out = resample(stripes, 16)
    assert out.dtype == np.uint8
    assert np.abs(out[..., 2:-2].astype(int) - 100).max() <= 2


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_resample_keeps_type_and_constants(dtype):
    top = 1.0 if dtype is np.float32 else np.iinfo(dtype).max
    full = np.full((2, 3, 10, 10), top, dtype=dtype)
    for size in (5, 10, 17):
        out = resample(full, size)
        assert out.dtype == dtype
        assert out.shape == (2, 3, size, size)
        np.testing.assert_allclose(out, dtype(top), rtol=1e-6 if dtype is np.float32 else 0)


# ------------------------------------------------------------------------------------- outside


def test_cells_outside_the_image_have_no_crop(ramp_source):
    positions = [[-0.1, 5], [5, -0.1], [400, 5], [5, 300], [0, 0], [399.9, 299.9], [5, 5], [9, 9]]
    source = ramp_source(np.array(positions), size=(600, 800))
    assert outside(source).tolist() == [True] * 4 + [False] * 4
    rows, images, _ = gather(source, 0.5, 8)
    assert rows.tolist() == [4, 5, 6, 7]
    assert len(images) == 4


def test_outside_goes_by_the_cells_own_field(ramp_source):
    source = ramp_source(np.array([[100.0, 100]] * 6), fields=2)
    small = ramp_source(1, size=(150, 150)).fields["f0"]
    source = replace(source, fields={**source.fields, "f1": small})
    assert outside(source).tolist() == [False, True] * 3


def test_most_cells_outside_names_pixels_and_micrometres(ramp_source):
    source = ramp_source(100)
    wrong = source.obs.assign(
        x_centroid=source.obs.x_centroid * 10, y_centroid=source.obs.y_centroid * 10
    )
    with pytest.raises(DataError, match=r"ramp: \d\d of 100 cells lie outside.*400 x 300 um") as e:
        list(iter_crops(replace(source, obs=wrong), 0.5, 16))
    assert "in pixels" in str(e.value)
    assert "pixel size of 0.5 um wrong" in str(e.value)


def test_field_without_image(ramp_source):
    source = ramp_source(20, fields=2)
    with pytest.raises(DataError, match="'f1', which has no image"):
        list(iter_crops(replace(source, fields={"f0": source.fields["f0"]}), 0.5, 16))


# -------------------------------------------------------------------------------------- fields


def test_each_cell_is_cut_from_its_own_field(ramp_source):
    """The ramps of field k are 10,000 k higher."""
    source = ramp_source(60, fields=3)
    rows, images, _ = gather(source, 0.5, 8)
    np.testing.assert_array_equal(images.min(axis=(1, 2, 3)) // 10000, rows % 3)


def test_field_column_may_be_categorical_with_an_unused_name(ramp_source):
    source = ramp_source(30, fields=2)
    field = pd.Categorical(source.obs["field"], categories=["f0", "unused", "f1"])
    _, images, _ = gather(replace(source, obs=source.obs.assign(field=field)), 0.5, 8)
    _, expected, _ = gather(source, 0.5, 8)
    np.testing.assert_array_equal(images, expected)


def test_error_of_the_image_comes_through(ramp_source):
    def broken(*_):
        raise DataError("section.tif: cannot be decoded")

    source = ramp_source(10)
    image = FieldImage((Level(0.5, (600, 800), broken),), np.dtype(np.uint16))
    with pytest.raises(DataError, match="cannot be decoded"):
        list(iter_crops(replace(source, fields={"f0": image}), 0.5, 16))
