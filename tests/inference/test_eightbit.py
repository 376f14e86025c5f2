"""Sixteen bits become eight by numbers worked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from phenoseq.data.source import FieldImage, Level
from phenoseq.errors import DataError
from phenoseq.inference.eightbit import check_eight_bit, fit_scale


@pytest.fixture
def source_of(ramp_source):
    """Give a function that makes a source of two stains from fields ``(2, H, W)``."""

    def make(*fields: np.ndarray):
        def field(pixels: np.ndarray) -> FieldImage:
            def read(y0, y1, x0, x1):
                return pixels[:, y0:y1, x0:x1].copy()

            return FieldImage((Level(0.5, pixels.shape[1:], read),), pixels.dtype)

        images = {f"f{k}": field(pixels) for k, pixels in enumerate(fields)}
        return replace(ramp_source(4, fields=len(fields)), fields=images)

    return make


def never(field, why):
    raise AssertionError(why)


def test_full_range(source_of):
    source = source_of(np.zeros((2, 40, 50), "uint16"))
    scale = fit_scale(source, [0, 1], "full", never)
    assert scale.mode == "full"
    assert list(scale.top) == [65535, 65535]
    pixels = np.array([0, 128, 129, 256, 257, 32768, 65406, 65407, 65535], "uint16")
    out = scale(np.broadcast_to(pixels, (1, 2, 1, 9)))
    assert out.dtype == np.uint8
    # 255 / 65535 is 1 / 257: half of it rounds to even, and the middle to 128.
    assert out[0, 1, 0].tolist() == [0, 0, 1, 1, 1, 128, 254, 255, 255]


def test_percentile_is_of_each_stain_over_all_fields(source_of):
    """Of 2,000 pixels two may be brighter, whatever field they are in."""
    one, two = np.full((2, 2, 20, 50), 10, "uint16")
    one[0, 3, 3], two[0, 5, 5], two[0, 6, 6] = 60000, 50000, 1000
    two[1] = 510
    scale = fit_scale(source_of(one, two), [0, 1], "percentile", never)
    assert list(scale.top) == [1000, 510]
    pixels = np.array([[0, 10, 500, 1000, 60000], [0, 1, 255, 510, 511]], "uint16")
    out = scale(pixels[None, :, None])
    assert out[0, 0, 0].tolist() == [0, 3, 128, 255, 255]  # 2.55, 127.5 to even
    assert out[0, 1, 0].tolist() == [0, 0, 128, 255, 255]  # 0.5 and 127.5 to even


def test_channels_are_those_asked_for(source_of):
    pixels = np.stack([np.full((40, 50), value, "uint16") for value in (300, 700)])
    assert list(fit_scale(source_of(pixels), [1, 0], "percentile", never).top) == [700, 300]


def test_eight_bits_stay_as_they_are_unless_asked(source_of):
    pixels = np.random.default_rng(0).integers(0, 100, (2, 40, 50), dtype=np.uint8)
    source = source_of(pixels)
    for mode in (None, "full"):
        np.testing.assert_array_equal(
            fit_scale(source, [0, 1], mode, never)(pixels[None])[0], pixels
        )
    assert fit_scale(source, [0, 1], "percentile", never)(pixels[None]).max() == 255


def test_floats_come_as_integers_do(source_of):
    rng = np.random.default_rng(0)
    whole = rng.gamma(2.0, 300.0, (2, 200, 210)).astype("uint16")
    tops = fit_scale(source_of(whole), [0, 1], "percentile", never).top
    for factor in (1.0, 1 / 65535, 3.7):
        floats = fit_scale(source_of((whole * factor).astype("f4")), [0, 1], "percentile", never)
        np.testing.assert_allclose(floats.top, tops * factor, rtol=1e-3)
    assert list(tops) == [np.quantile(w, 0.999, method="inverted_cdf") for w in whole]


def test_blank_and_sparse_and_negative_stains(source_of):
    pixels = np.zeros((2, 40, 50), "int16")
    pixels[1, 0, 0], pixels[1, 0, 1] = 300, -20
    scale = fit_scale(source_of(pixels), [0, 1], "percentile", never)
    assert scale.top[0] == 0
    assert scale.top[1] == pytest.approx(300)
    out = scale(pixels[None])
    assert out[0, 0].max() == 0
    assert out[0, 1, 0, :3].tolist() == [255, 0, 0]


def test_field_that_cannot_be_read_does_not_count(source_of):
    good, bad = np.full((2, 2, 40, 50), 10, "float32")
    bad[1, 4, 4:7] = [np.nan, np.inf, 5e9]
    failed = {}
    scale = fit_scale(source_of(good, bad), [0, 1], "percentile", failed.__setitem__)
    np.testing.assert_allclose(scale.top, 10, rtol=1e-4)
    assert list(failed) == ["f1"]
    assert failed["f1"].endswith("field f1: 2 pixels are not numbers")


def test_regions_of_a_large_field(source_of, monkeypatch):
    """The same top, whatever is read at once."""
    pixels = np.random.default_rng(1).integers(0, 60000, (2, 75, 110), dtype=np.uint16)
    whole = fit_scale(source_of(pixels), [0, 1], "percentile", never).top
    monkeypatch.setattr("phenoseq.inference.eightbit.REGION", 32)
    np.testing.assert_array_equal(
        fit_scale(source_of(pixels), [0, 1], "percentile", never).top, whole
    )


def test_a_choice_must_be_made(source_of):
    source = source_of(np.zeros((2, 40, 50), "uint16"))
    with pytest.raises(DataError, match=r"uint16.*'full'.* 0\.\.65535 .*'percentile'.*99\.9th"):
        check_eight_bit(source, None)
    with pytest.raises(DataError, match="'half': no such choice"):
        check_eight_bit(source, "half")
    with pytest.raises(DataError, match=r"float32.*no full range; take .*percentile"):
        check_eight_bit(source_of(np.zeros((2, 40, 50), "float32")), "full")
