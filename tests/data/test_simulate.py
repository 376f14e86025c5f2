"""Simulated plates: the same from the same seed, honest in counts, and readable from the images."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from phenoseq.data.simulate import (
    CHANNELS,
    FIELD_PX,
    PIXEL_SIZE,
    STATE_NAMES,
    SimulatedPlate,
    _Renderer,
    expression_rates,
    simulate_plate,
)
from phenoseq.data.source import FieldImage
from phenoseq.errors import DataError

SMALL = {"wells_per_treatment": 1, "sites_per_well": 1, "cells_per_site": 5, "n_genes": 10}


@pytest.fixture(scope="module")
def plate() -> SimulatedPlate:
    return simulate_plate(wells_per_treatment=6)


@pytest.fixture(scope="module")
def looks(plate: SimulatedPlate) -> dict[str, np.ndarray]:
    """Measure each cell that is wholly in its field; ``rows`` says which these are."""
    rows, area, light = [], [], []
    for number, (name, cells) in enumerate(plate.source.obs.groupby("field", sort=False)):
        if number == 25:
            break
        image = whole(plate.source.fields[name])
        labels, _ = ndimage.label(image[0] > 550)
        for cell, x, y in zip(cells.index, cells.x_centroid, cells.y_centroid, strict=True):
            i, j = int(y / PIXEL_SIZE), int(x / PIXEL_SIZE)
            if not 28 <= min(i, j) <= max(i, j) < FIELD_PX - 28:
                continue
            crop = labels[i - 28 : i + 28, j - 28 : j + 28]
            rows.append(plate.source.obs.index.get_loc(cell))
            area.append((crop == crop[28, 28]).sum() if crop[28, 28] else 0)
            light.append(image[:, i - 18 : i + 18, j - 18 : j + 18].mean(axis=(1, 2)) - 200)
    out = {"rows": np.array(rows), "dna_area": np.array(area)}
    return out | dict(zip(CHANNELS, np.array(light).T, strict=True))


def whole(image: FieldImage) -> np.ndarray:
    level = image.levels[0]
    return level.read(0, level.shape[0], 0, level.shape[1])


def treatment_means(plate: SimulatedPlate) -> np.ndarray:
    treatment = plate.source.obs["Metadata_Treatment"].to_numpy()
    names = list(dict.fromkeys(treatment))
    return np.array([plate.state[treatment == name].mean(axis=0) for name in names])


def test_follows_the_contract_of_a_source(plate: SimulatedPlate) -> None:
    source = plate.source
    n_obs = 4 * 6 * 2 * 20
    assert source.kind == "simulated"
    assert source.channels == CHANNELS == ("DNA", "RNA", "AGP", "Mito", "ER")
    assert source.pixel_size == PIXEL_SIZE
    assert source.dtype == np.uint16
    assert len(source.obs) == n_obs
    assert source.obs.index.is_unique
    assert source.obs.index[3] == "plate0-A01-s1-003"
    assert set(source.obs["field"]) == set(source.fields)
    for name in ("x_centroid", "y_centroid"):
        assert source.obs[name].between(0, FIELD_PX * PIXEL_SIZE, inclusive="left").all()
    assert source.obs["Metadata_Well"].nunique() == 24
    assert source.obs.groupby("Metadata_Well")["Metadata_Treatment"].nunique().eq(1).all()
    assert sorted(source.obs["Metadata_Replicate"].unique()) == [1, 2, 3, 4, 5, 6]
    assert source.var.index.is_unique
    assert source.var.index[0] == "SIMG00000000001"
    assert source.var["symbol"].iloc[-1] == "SIM0060"
    assert source.counts.shape == plate.rates.shape == (n_obs, 60)
    assert source.counts.dtype == plate.rates.dtype == plate.state.dtype == np.float32
    assert plate.state.shape == (n_obs, len(STATE_NAMES))
    assert plate.library.shape == (n_obs,)
    np.testing.assert_allclose(plate.rates.sum(axis=1), 1, atol=1e-5)


def test_same_seed_same_plate_other_seed_another() -> None:
    one, again, other = (simulate_plate(seed=seed, **SMALL) for seed in (3, 3, 4))
    assert one.source.identity == again.source.identity != other.source.identity
    assert one.source.obs.equals(again.source.obs)
    assert (one.source.counts != again.source.counts).nnz == 0
    np.testing.assert_array_equal(one.state, again.state)
    field = "plate3-A02-s1"
    pixels = whole(one.source.fields[field])
    np.testing.assert_array_equal(pixels, whole(again.source.fields[field]))
    assert not np.array_equal(pixels, whole(other.source.fields["plate4-A02-s1"]))
    assert not set(one.source.obs.index) & set(other.source.obs.index)


@pytest.mark.parametrize("change", [{"effect": 0.5}, {"treatments": ("DMSO", "x", "y", "z")}])
def test_identity_changes_with_the_arguments(change: dict) -> None:
    assert (
        simulate_plate(**SMALL).source.identity != simulate_plate(**SMALL, **change).source.identity
    )


def test_more_wells_keep_the_cells_there_were() -> None:
    few, many = simulate_plate(**SMALL), simulate_plate(**SMALL | {"wells_per_treatment": 3})
    np.testing.assert_array_equal(few.state, many.state[: len(few.state)])
    assert few.source.obs.equals(many.source.obs.iloc[: len(few.state)])
    field = "plate0-A01-s1"
    np.testing.assert_array_equal(whole(few.source.fields[field]), whole(many.source.fields[field]))


def test_genes_follow_the_state_alike_on_every_plate() -> None:
    for seed in (0, 1):
        plate = simulate_plate(seed=seed, **SMALL)
        np.testing.assert_array_equal(plate.rates, expression_rates(plate.state, 10))
    state = np.random.default_rng(0).standard_normal((50, len(STATE_NAMES)))
    few, many = expression_rates(state, 10), expression_rates(state, 40)
    shared = many[:, :10] / many[:, :10].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(few, shared, rtol=1e-4)


def test_counts_are_overdispersed_around_rate_times_library(plate: SimulatedPlate) -> None:
    counts = plate.source.counts.toarray()
    assert (counts >= 0).all()
    assert (counts == np.rint(counts)).all()
    mean = plate.rates.astype(float) * plate.library[:, None]
    assert 250 < mean.sum(axis=1).mean() < 350
    most = mean + mean**2 / 2  # variance at the smallest dispersion
    z = (counts.sum(axis=0) - mean.sum(axis=0)) / np.sqrt(most.sum(axis=0))
    assert np.abs(z).max() < 4.5
    assert np.mean(z**2) < 1.5
    residual = (counts - mean) ** 2
    assert np.mean(residual / most) < 1 < np.mean(residual / mean)


def test_larger_cells_have_more_counts(plate: SimulatedPlate) -> None:
    assert np.corrcoef(plate.state[:, 1], plate.library)[0, 1] > 0.4


@pytest.mark.parametrize(
    ("measured", "dimension", "least"),
    [
        ("dna_area", "nuclear_size", 0.7),
        ("AGP", "spread", 0.5),
        ("Mito", "mito", 0.7),
        ("RNA", "rna_er", 0.7),
        ("ER", "rna_er", 0.7),
    ],
)
def test_the_state_shows(
    plate: SimulatedPlate,
    looks: dict[str, np.ndarray],
    measured: str,
    dimension: str,
    least: float,
) -> None:
    assert len(looks["rows"]) > 200
    state = plate.state[looks["rows"], STATE_NAMES.index(dimension)]
    assert np.corrcoef(state, looks[measured])[0, 1] > least


def test_the_hidden_dimension_acts_on_genes_and_does_not_show(
    plate: SimulatedPlate, looks: dict[str, np.ndarray]
) -> None:
    hidden = STATE_NAMES.index("hidden")
    for name in ("dna_area", *CHANNELS):
        assert abs(np.corrcoef(plate.state[looks["rows"], hidden], looks[name])[0, 1]) < 0.25
    with_gene = [np.corrcoef(plate.state[:, hidden], np.log(rate))[0, 1] for rate in plate.rates.T]
    assert np.abs(with_gene).max() > 0.5
    field = plate.source.obs.iloc[:20]
    other = plate.state[:20].copy()
    other[:, hidden] *= -1
    images = [_Renderer(0, field, state).image("plate0-A01-s1") for state in (plate.state, other)]
    np.testing.assert_array_equal(*map(whole, images))


def test_treatments_shift_the_visible_state_only_when_they_act(plate: SimulatedPlate) -> None:
    control, *treated = treatment_means(plate)
    for mean in treated:
        assert np.linalg.norm(mean[:4] - control[:4]) > 1
        assert abs(mean[4] - control[4]) < 0.5
    null = simulate_plate(wells_per_treatment=6, effect=0)
    control, *treated = treatment_means(null)
    assert max(np.abs(mean - control).max() for mean in treated) < 0.45
    untreated = plate.source.obs["Metadata_Treatment"].eq("DMSO").to_numpy()
    np.testing.assert_array_equal(plate.state[untreated], null.state[untreated])


def test_a_treatment_does_the_same_on_every_plate() -> None:
    one, other = (
        treatment_means(simulate_plate(seed=seed, treatments=names, wells_per_treatment=6))
        for seed, names in ((0, ("DMSO", "drugA", "drugB")), (1, ("DMSO", "drugB", "drugA")))
    )
    np.testing.assert_allclose((one - one[0])[1:], (other - other[0])[[2, 1]], atol=0.5)


def test_a_region_is_the_same_however_it_is_read() -> None:
    source = simulate_plate(**SMALL | {"wells_per_treatment": 2}).source
    first = next(iter(source.fields))
    pixels = whole(source.fields[first])
    assert pixels.shape == (5, FIELD_PX, FIELD_PX)
    for image in source.fields.values():  # more fields than are kept
        image.levels[0].read(0, 1, 0, 1)
    part = source.fields[first].levels[0].read(100, 180, 7, 50)
    np.testing.assert_array_equal(part, pixels[:, 100:180, 7:50])
    part[:] = 0  # the reader's own to change
    np.testing.assert_array_equal(whole(source.fields[first]), pixels)


def test_looks_like_a_camera_took_it(plate: SimulatedPlate) -> None:
    pixels = whole(plate.source.fields["plate0-A01-s1"])
    assert pixels.dtype == np.uint16
    for channel in pixels:
        assert 200 < np.median(channel) < 600
        assert np.percentile(channel, 99.5) > 600
        assert channel.max() < 65535


def test_nuclei_keep_apart_even_when_crowded() -> None:
    source = simulate_plate(wells_per_treatment=1, sites_per_well=1, cells_per_site=60).source
    for _, cells in source.obs.groupby("field"):
        at = cells[["x_centroid", "y_centroid"]].to_numpy()
        apart = np.linalg.norm(at[:, None] - at[None], axis=2)[np.triu_indices(len(at), 1)]
        assert apart.min() > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cells_per_site": 0}, "cells_per_site"),
        ({"cells_per_site": 61}, "cells_per_site"),
        ({"cells_per_site": 2.5}, "whole number"),
        ({"sites_per_well": -1}, "sites_per_well"),
        ({"wells_per_treatment": 0}, "wells_per_treatment"),
        ({"wells_per_treatment": 97}, "1 to 96"),
        ({"n_genes": 0}, "n_genes"),
        ({"effect": -0.1}, "effect"),
        ({"effect": float("nan")}, "effect"),
        ({"seed": -1}, "seed"),
        ({"treatments": ()}, "control first"),
        ({"treatments": ("DMSO", " ")}, "control first"),
        ({"treatments": ("DMSO", "a", "a")}, "named twice"),
        ({"treatments": tuple(map(str, range(400)))}, "384 wells"),
    ],
)
def test_refuses_what_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        simulate_plate(**arguments)
