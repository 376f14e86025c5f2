"""Nuclei are found where they were drawn, and where others found them in real images."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import tifffile
from skimage import io, measure, segmentation

from phenoseq.data.segment import find_nuclei, overlay
from phenoseq.errors import DataError

#: A 20x objective with 2 x 2 binning, as the table of the jump plate states.
REAL_PIXEL_SIZE = 0.598


def draw(circles, pixel_size=0.5, size_um=(100, 130), noise=20, level=3000, seed=0):
    """Draw discs (y, x, diameter in um) of some brightness on a noisy background of 500."""
    shape = [round(side / pixel_size) for side in size_um]
    y, x = (np.mgrid[: shape[0], : shape[1]] + 0.5) * pixel_size
    image = np.full(shape, 500.0)
    for cy, cx, diameter in circles:
        image[np.hypot(y - cy, x - cx) < diameter / 2] = level
    return image + np.random.default_rng(seed).normal(0, noise, shape)


APART = [(20, 20, 12), (60, 30, 20), (40, 90, 15), (80, 110, 9), (80, 60, 18)]


def f1(found, true, iou=0.5):
    """Harmonic mean of precision and recall; a pair of objects matches from that overlap on."""
    shared = np.zeros((found.max() + 1, true.max() + 1))
    np.add.at(shared, (found.ravel(), true.ravel()), 1)
    union = shared.sum(axis=1)[1:, None] + shared.sum(axis=0)[None, 1:] - shared[1:, 1:]
    hits = (shared[1:, 1:] / union >= iou).sum()  # above a half, no object can match twice
    return 2 * hits / (found.max() + true.max())


def within(outlines):
    """Number the objects that closed outlines enclose, with the outlines themselves."""
    inner = measure.label(outlines == 0, connectivity=1)
    border = np.concatenate([inner[0], inner[-1], inner[:, 0], inner[:, -1]])
    inner[np.isin(inner, border)] = 0
    grown = segmentation.expand_labels(inner, 1.5)
    objects = np.where((outlines > 0) | (inner > 0), grown, 0)
    objects[(np.bincount(objects.ravel()) < 30)[objects]] = 0
    return segmentation.relabel_sequential(objects)[0]


@pytest.mark.parametrize("pixel_size", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_discs_are_found_at_any_pixel_size(pixel_size, dtype):
    labels = find_nuclei(draw(APART, pixel_size).astype(dtype), pixel_size)
    assert labels.dtype == np.int32
    assert set(np.unique(labels)) == set(range(len(APART) + 1))
    found = {
        tuple(round((c + 0.5) * pixel_size) for c in region.centroid): region.area * pixel_size**2
        for region in measure.regionprops(labels)
    }
    for y, x, diameter in APART:
        assert found[y, x] == pytest.approx(np.pi / 4 * diameter**2, rel=0.35)


def test_touching_nuclei_are_parted_and_round_ones_are_not():
    touching = [(50, 50, 16), (50, 63, 16), (62, 69, 16), (85, 100, 25)]
    labels = find_nuclei(draw(touching), 0.5)
    at = [labels[round(y / 0.5), round(x / 0.5)] for y, x, _ in touching]
    assert sorted(at) == [1, 2, 3, 4] == list(range(1, labels.max() + 1))


def test_numbers_are_in_the_order_of_rows():
    labels = find_nuclei(draw(APART), 0.5)
    first = [np.flatnonzero(labels.ravel() == k)[0] for k in range(1, labels.max() + 1)]
    assert first == sorted(first)


@pytest.mark.parametrize("noise", [0, 1, 50])
def test_empty_field_has_no_nuclei(noise):
    assert find_nuclei(draw([], noise=noise), 0.5).max() == 0
    shaded = draw([], noise=noise) + np.linspace(0, 300, 260)
    assert find_nuclei(shaded, 0.5).max() == 0


def test_uneven_light_does_not_hide_nuclei():
    image = draw(APART, level=1500) + np.linspace(0, 800, 260)
    assert find_nuclei(image, 0.5).max() == len(APART)


def test_sizes_that_are_no_nuclei_are_left_out():
    circles = [(20, 20, 3), (60, 60, 12), (50, 100, 55)]
    assert find_nuclei(draw(circles), 0.5).max() == 1
    assert find_nuclei(draw(circles), 0.5, min_diameter=2).max() == 2
    assert find_nuclei(draw([(60, 60, 12)]), 0.5, max_diameter=11).max() == 0


def test_nuclei_at_the_border_are_kept():
    labels = find_nuclei(draw([(0, 50, 16), (75, 130, 16)]), 0.5)
    assert labels.max() == 2


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((2, 9, 9)), {}, "one plane"),
        (np.zeros((0, 9)), {}, "one plane"),
        (np.full((9, 9), np.nan), {}, "NaN"),
        (np.zeros((9, 9)), {"pixel_size": 0.0}, "cannot be right"),
        (np.zeros((9, 9)), {"pixel_size": float("nan")}, "cannot be right"),
        (np.zeros((9, 9)), {"min_diameter": 50}, "cannot be"),
        (np.zeros((9, 9)), {"method": "otsu"}, "no method 'otsu'"),
    ],
)
def test_bad_input(image, options, message):
    with pytest.raises(DataError, match=message):
        find_nuclei(image, **{"pixel_size": 0.5, **options})


# ------------------------------------------------------------------------------------ Cellpose


def test_cellpose_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cellpose", None)
    with pytest.raises(DataError, match=r"not installed; pip install 'phenoseq\[segment\]'"):
        find_nuclei(draw(APART), 0.5, method="cellpose")


def test_cellpose_is_asked_in_pixels_and_its_sizes_are_checked(monkeypatch):
    asked = {}

    class Model:
        def __init__(self, gpu):
            asked["gpu"] = gpu

        def eval(self, image, diameter):
            asked["diameter"] = diameter
            masks = np.zeros(image.shape, dtype=np.uint16)
            masks[5:45, 5:45] = 7
            masks[60:62, 60:62] = 9
            return masks, [], []

    models = types.ModuleType("cellpose.models")
    models.CellposeModel = Model
    monkeypatch.setitem(sys.modules, "cellpose", types.ModuleType("cellpose"))
    monkeypatch.setitem(sys.modules, "cellpose.models", models)
    labels = find_nuclei(draw(APART), 0.5, method="cellpose")
    assert asked["diameter"] == 24
    assert labels.max() == 1
    assert (labels > 0).sum() == 1600


# ------------------------------------------------------------------------------------- overlay


def test_overlay_shows_image_and_outlines():
    image = np.zeros((30, 40), dtype=np.uint16)
    image[:, 20:] = 40000
    labels = np.zeros((30, 40), dtype=np.int32)
    labels[10:20, 10:30] = 1
    picture = overlay(image, labels)
    assert picture.shape == (30, 40, 3)
    assert picture.dtype == np.uint8
    orange = (picture == (255, 140, 0)).all(axis=-1)
    edge = np.zeros_like(orange)
    edge[10:20, 10:30] = True
    edge[11:19, 11:29] = False
    np.testing.assert_array_equal(orange, edge)
    assert (picture[0, 0] == 0).all()
    assert (picture[0, -1] == 255).all()


def test_overlay_of_other_shape():
    with pytest.raises(DataError, match=r"\(3, 4\) and labels \(4, 3\)"):
        overlay(np.zeros((3, 4)), np.zeros((4, 3), dtype=int))


# ---------------------------------------------------------------------------------- real images


@pytest.mark.parametrize(
    ("dna", "outlines", "n"),
    [
        (
            "pediatric/images/orig/r03c03f03p01-ch5sk1fk1fl1.tiff",
            "pediatric/images/outlines/NucleiOutlines_BR00143976_C03_3.tiff",
            37,
        ),
        (
            "jump/images/orig/r01c01f01p01-ch5sk1fk1fl1.tiff",
            "jump/images/outlines/r01c01f01p01-ch5sk1fk1fl1_nuclei_outlines.png",
            188,
        ),
    ],
)
def test_real_nuclei(shared_data, dna, outlines, n):
    """Against CellProfiler's, which leaves out nuclei at the border; so that is done here too."""
    folder = shared_data / "cell_painting"
    drawn = io.imread(folder / outlines)
    true = within(drawn.max(axis=-1) if drawn.ndim == 3 else drawn)
    assert true.max() == n
    labels = find_nuclei(tifffile.imread(folder / dna), REAL_PIXEL_SIZE)
    whole = segmentation.relabel_sequential(segmentation.clear_border(labels))[0]
    score, strict = f1(whole, true), f1(whole, true, 0.7)
    print(
        f"\n{dna}: {labels.max()} nuclei, {whole.max()} of them whole, {n} by CellProfiler; "
        f"F1 {score:.3f} at IoU 0.5, {strict:.3f} at 0.7, {f1(labels, true):.3f} with the cut ones"
    )
    assert score >= 0.9
