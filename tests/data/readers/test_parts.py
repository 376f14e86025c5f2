"""The parts that readers share: units, wells, centroids of labels, paths that metadata states."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phenoseq.data.readers import labels
from phenoseq.data.readers.plate import well_name
from phenoseq.data.readers.scale import micrometres, pixel_size_of
from phenoseq.data.readers.storage import inside, is_url, place_of
from phenoseq.errors import DataError


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a1", "A01"),
        ("A/1", "A01"),
        ("A/01", "A01"),
        ("p-24", "P24"),
        ("AF48", "AF48"),
        ("A001", "A01"),
        ("r01c02", "r01c02"),
        ("well 3", "well 3"),
        (" b02 ", "B02"),
    ],
)
def test_wells(text, name):
    assert well_name(text) == name


def test_units():
    assert micrometres("µm") == micrometres("micrometre") == micrometres("Micrometers") == 1
    assert micrometres("meter") == micrometres("m") == 1e6
    assert micrometres(None) is micrometres("second") is micrometres("pixel") is None


@pytest.mark.parametrize("size", [0.0, -1.0, 1e6, float("nan"), float("inf")])
def test_pixel_sizes_that_cannot_be_right(size):
    with pytest.raises(DataError, match=r"x: a pixel size of .* cannot be right"):
        pixel_size_of(size, 0.5, "x")
    assert pixel_size_of(0.25, 0.5, "x") == 0.25


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), chunk=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_centroids_do_not_depend_on_blocks(seed, chunk):
    """Against the mean of the pixel centres of each label, whatever the chunks."""
    rng = np.random.default_rng(seed)
    image = rng.choice([0, 0, 1, 2, 7, 2**40], size=(31, 45))
    before, labels.BLOCK = labels.BLOCK, 7
    try:
        found = labels.centroids(lambda a, b, c, d: image[a:b, c:d], image.shape, chunk)
    finally:
        labels.BLOCK = before
    pixels = pd.DataFrame(np.argwhere(image > 0) + 0.5, columns=["y", "x"])
    groups = pixels.groupby(image[image > 0])
    np.testing.assert_allclose(found[["y", "x"]], groups.mean())
    np.testing.assert_array_equal(found["area"], groups.size())
    assert list(found.index) == sorted(groups.groups)


def test_large_and_negative_labels():
    image = np.array([[-1, -1, 3]], dtype=np.int16)
    found = labels.centroids(lambda a, b, c, d: image[a:b, c:d], image.shape, (1, 3))
    assert list(found.index) == [3]
    image = np.array([[2**64 - 1, 2**64 - 2, 0]], dtype=np.uint64)
    found = labels.centroids(lambda a, b, c, d: image[a:b, c:d], image.shape, (1, 1))
    assert [str(label) for label in found.index] == [str(2**64 - 2), str(2**64 - 1)]
    assert labels.centroids(lambda a, b, c, d: image[a:b, 2:], (1, 1), (1, 1)).empty


def test_places(tmp_path):
    assert place_of("s3://b/plate.zarr/") == "s3://b/plate.zarr"
    assert place_of(f"file://{tmp_path}") == tmp_path
    assert place_of(str(tmp_path)) == tmp_path
    assert is_url("https://h/x")
    assert not is_url("C:/x")


def test_paths_below():
    assert inside("A/1", "x") == "A/1"
    assert inside("à l'été/1", "x") == "à l'été/1"
    assert inside("a/t0:5", "x") == "a/t0:5"
    for bad in ("", ".", "..", "a/..", "/a", "a//b", "C:/x", "s3://b/x", "a\\b", "a/./b"):
        with pytest.raises(DataError, match="does not lie below"):
            inside(bad, "x")
