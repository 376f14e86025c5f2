"""Everything a user may hand to `predict`, and every way in which it may be wrong."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import phenoseq
from phenoseq.data.readers import read_xenium
from phenoseq.data.simulate import CHANNELS, PIXEL_SIZE
from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.inference.inputs import open_inputs

XENIUM = ("DNA", "Boundary", "18S", "InteriorProtein")


@pytest.fixture(scope="module")
def image(model):
    return model.config.image


@pytest.fixture
def array(crops):
    return crops[:6].copy()


def all_crops(inputs, batch_size=7):
    batches = list(inputs.crops(inputs.order, batch_size))
    assert [row for b in batches for row in b.rows] == inputs.order.tolist()
    assert all(len(b.rows) <= batch_size for b in batches)
    rows = np.concatenate([b.rows for b in batches])
    assert sorted(rows) == list(range(len(inputs.obs)))
    return np.concatenate([b.images for b in batches])[np.argsort(rows)]


def from_array(array, image, **options):
    return open_inputs(array, image, **{"channels": CHANNELS, "pixel_size": PIXEL_SIZE, **options})


# ----------------------------------------------------------------------------------------- arrays


def test_an_array_is_its_own_crops(array, image):
    inputs = from_array(array, image)
    np.testing.assert_array_equal(all_crops(inputs, 4), array)
    assert list(inputs.obs.index) == ["0", "1", "2", "3", "4", "5"]
    assert inputs.placed == (0, 1, 2, 3, 4)
    assert inputs.gain.tolist() == [1] * 5


def test_wider_crops_are_cut_to_their_middle(array, image):
    wide = np.pad(array, [(0, 0), (0, 0), (8, 8), (8, 8)], constant_values=9)
    np.testing.assert_array_equal(all_crops(from_array(wide, image)), array)


def test_finer_pixels_are_resampled(array, image):
    fine = array.repeat(2, axis=2).repeat(2, axis=3)
    crops = all_crops(from_array(fine, image, pixel_size=PIXEL_SIZE / 2))
    assert crops.dtype == array.dtype
    assert crops.shape == array.shape
    difference = np.abs(crops.astype(float) - array)
    assert difference.mean() < 0.1 * array.std()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[0], r"crops are \(n, C, H, W\)"),
        (lambda a: a[..., :20], r"H equal to W"),
        (lambda a: a[:0], "zero cells; there is nothing to predict"),
        (lambda a: a[:, :4], "has 4 channels, but 5 are named"),
        (lambda a: a[..., 4:28, 4:28], r"crops are 15\.6 um wide, the model looks at 20\.8 um"),
        (lambda a: a.astype(complex), "pixels of type complex128"),
        (lambda a: a > 300, "pixels of type bool"),
    ],
)
def test_an_array_of_the_wrong_kind(array, image, change, message):
    with pytest.raises(DataError, match=message):
        from_array(change(array), image)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers(array, image, value):
    broken = array.astype(np.float32)
    broken[3, 1, 5, 5] = broken[4] = value
    with pytest.raises(DataError, match=r"NaN or infinite pixels in 2 cells, the first at index 3"):
        from_array(broken, image)


@pytest.mark.parametrize("missing", ["channels", "pixel_size"])
def test_an_array_that_does_not_say_what_it_is(array, image, missing):
    with pytest.raises(DataError, match=r"channels=\[\.\.\.\].*'DNA'.*pixel_size="):
        from_array(array, image, **{missing: None})


@pytest.mark.parametrize("size", [0.0, -1.0, np.nan, 1e6])
def test_pixel_sizes_that_cannot_be_right(array, image, size):
    with pytest.raises(DataError, match="pixel size"):
        from_array(array, image, pixel_size=size)


def test_an_unknown_stain_names_those_known(array, image):
    with pytest.raises(DataError, match=r"does not know the stain\(s\) \['CD8'\]; it knows.*Mito"):
        from_array(array, image, channels=("DNA", "RNA", "AGP", "Mito", "CD8"))


def test_a_stain_named_twice(array, image):
    with pytest.raises(DataError, match=r"\['DNA', 'Hoechst'\] all mean the stain 'DNA'"):
        from_array(array, image, channels=("DNA", "Hoechst", "AGP", "Mito", "ER"))


def test_cells_do_not_go_with_an_array(array, image, plate):
    with pytest.raises(DataError, match="'cells' goes with a folder"):
        from_array(array, image, cells=plate.source.obs)


def test_missing_stains_are_placed_by_name(array, image):
    inputs = from_array(array[:, [3, 0]], image, channels=("MitoTracker", "DAPI"))
    assert inputs.placed == (1, None, None, 0, None)


def test_gain_goes_by_the_999th_thousandth(array, image):
    eight_bit = (array // 256).astype(np.uint8) + np.uint8(3)
    inputs = from_array(eight_bit, image)
    top = np.quantile(eight_bit, 0.999, axis=(0, 2, 3))
    np.testing.assert_allclose(inputs.gain, np.array(image.p999) / top, rtol=1e-5)


def test_a_black_stain_of_another_type_is_left_black(array, image):
    floats = array.astype(np.float32)
    floats[:, 2] = 0
    assert from_array(floats, image).gain[2] == 1


# ------------------------------------------------------------------------------------------ store


def test_a_store_of_other_crops_is_brought_to_the_models(make_model, store, image):
    half = make_model(crop_px=16, pixel_size=PIXEL_SIZE).config.image
    crops = all_crops(open_inputs(store, half))
    np.testing.assert_array_equal(crops, store.read(0, len(store))[..., 8:24, 8:24])


def test_a_store_of_narrower_crops_is_refused(make_model, store):
    wide = make_model(crop_px=64).config.image
    with pytest.raises(DataError, match=r"crops are 20\.8 um wide, the model looks at 41\.6 um"):
        open_inputs(store, wide)


def test_options_that_do_not_go_with_a_store(store, image, plate):
    with pytest.raises(DataError, match="'channels' names the channels of an array"):
        open_inputs(store, image, channels=CHANNELS)
    with pytest.raises(DataError, match="'pixel_size' goes with an array or a folder"):
        open_inputs(store, image, pixel_size=1.0)
    for given in (store, store.path):
        with pytest.raises(DataError, match="a store holds the crops of its own cells"):
            open_inputs(given, image, cells=plate.source.obs)


def test_paths_that_are_nothing(tmp_path, image):
    with pytest.raises(DataError, match=r"none: no such file or folder"):
        open_inputs(tmp_path / "none", image)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not a layout that phenoseq reads"):
        open_inputs(str(tmp_path / "empty"), image)


# ---------------------------------------------------------------------------- images and own cells


@pytest.fixture
def table(plate, tmp_path):
    """The plate's cells as a user's CSV: other order, fewer cells, moved by a pixel."""
    rows = [7, 3, 61, 60, 0]
    obs = plate.source.obs.iloc[rows][["field", "x_centroid", "y_centroid"]]
    obs = obs.rename(index=lambda i: f"mine-{i}")
    path = tmp_path / "cells.csv"
    obs.to_csv(path)
    return path, rows, obs


def test_cells_of_a_csv_are_predicted_in_its_order(model, plate, table):
    path, rows, obs = table
    got = phenoseq.predict(plate.source, model=model, cells=path, n_samples=1, device="cpu")
    assert list(got.obs_names) == list(obs.index)
    np.testing.assert_allclose(got.obsm["spatial"], obs[["x_centroid", "y_centroid"]])
    by_table = phenoseq.predict(plate.source, model=model, cells=obs, n_samples=1, device="cpu")
    np.testing.assert_array_equal(by_table.X, got.X)
    inputs = open_inputs(plate.source, model.config.image, cells=path)
    whole = all_crops(open_inputs(plate.source, model.config.image))
    np.testing.assert_array_equal(all_crops(inputs), whole[rows])


def test_several_fields_need_a_column_field(plate, image, table):
    obs = table[2].drop(columns="field")
    obs.index.name = None
    with pytest.raises(DataError, match="several fields; 'cells' needs a column 'field', of"):
        open_inputs(plate.source, image, cells=obs)
    obs["field"] = "elsewhere"
    with pytest.raises(
        DataError, match="elsewhere: the table 'cells' has cells there, but there is no"
    ):
        open_inputs(plate.source, image, cells=obs)


def test_numbers_for_ids_are_text_in_the_output(model, plate, table):
    obs = table[2].reset_index(drop=True)
    got = phenoseq.predict(plate.source, model=model, cells=obs, n_samples=1, device="cpu")
    assert list(got.obs_names) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_other_columns_of_the_table_are_kept(tmp_path, model, plate, table, suffix):
    obs = table[2].assign(
        area=[1.5, np.nan, 2.0, 3.0, 4.0],
        note=["é", None, "x", "x", "007"],
        seen=[True, None, False, True, True],
        day=pd.to_datetime("2026-01-02"),
        n=[1, 2, 3, 4, 5],
        ood_score="mine",
    )
    out = tmp_path / f"o{suffix}"
    phenoseq.predict(plate.source, model=model, cells=obs, n_samples=1, device="cpu", out=out)
    read = ad.read_h5ad(out) if suffix == ".h5ad" else ad.read_zarr(out)
    assert list(read.obs_names) == list(obs.index)
    np.testing.assert_array_equal(read.obs["area"], obs["area"])
    assert read.obs["note"].tolist()[0] == "é"
    assert read.obs["note"].isna().tolist() == read.obs["seen"].isna().tolist() == [0, 1, 0, 0, 0]
    assert read.obs["note"].tolist()[4] == "007"
    assert read.obs["n"].tolist() == [1, 2, 3, 4, 5]
    assert str(read.obs["day"].iloc[0]).startswith("2026-01-02")
    assert read.obs["ood_score"].dtype == np.float32  # what is predicted takes that name
    with pytest.raises(DataError, match=r"columns \['um/px'\]: names of columns are text"):
        open_inputs(plate.source, model.config.image, cells=table[2].assign(**{"um/px": 1}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.drop(columns="x_centroid"), "x_centroid"),
        (lambda t: t.iloc[:0], "no cells in it"),
        (lambda t: pd.concat([t, t]), "twice"),
        (lambda t: t.assign(y_centroid=np.nan), "no position"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "frame"])
def test_tables_of_cells_that_cannot_be_used(tmp_path, plate, image, table, spoil, message, kind):
    cells = spoil(table[2])
    if kind == "csv":
        cells.to_csv(tmp_path / "bad.csv")
        cells = tmp_path / "bad.csv"
    with pytest.raises(DataError, match=message):
        open_inputs(plate.source, image, cells=cells)


def test_a_missing_table_of_cells(tmp_path, plate, image):
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        open_inputs(plate.source, image, cells=tmp_path / "none.csv")


def test_positions_in_pixels_are_noticed(plate, image, table):
    obs = table[2].copy()
    obs[["x_centroid", "y_centroid"]] = 100 / PIXEL_SIZE + 300
    with pytest.raises(DataError, match=r"5 of 5 cells lie outside.*in pixels"):
        open_inputs(plate.source, image, cells=obs)


def test_a_source_without_cells(model, plate):
    nobody = replace(plate.source, obs=plate.source.obs.iloc[:0], counts=None, var=None)
    with pytest.raises(DataError, match="zero cells; there is nothing to predict"):
        phenoseq.predict(nobody, model=model, device="cpu")


# --------------------------------------------------------------------------------- Xenium folders


@pytest.fixture(scope="module")
def xenium_model(make_model):
    return make_model(XENIUM, pixel_size=0.425)


def test_a_xenium_folder(xenium_model, xenium_set):
    got = phenoseq.predict(xenium_set.path, model=xenium_model, n_samples=1, device="cpu")
    assert list(got.obs_names) == list(xenium_set.cells.index)
    np.testing.assert_allclose(
        got.obsm["spatial"], xenium_set.cells[["x_centroid", "y_centroid"]], atol=1e-6
    )
    assert (got.obs["missing_channels"] == "").all()
    image = xenium_model.config.image
    crops = all_crops(open_inputs(xenium_set.path, image))
    want = [[xenium_set.blob(cell, c) for c in range(4)] for cell in range(len(crops))]
    np.testing.assert_array_equal(crops[:, :, 16, 16], want)  # each cell at its crop's middle


def test_a_xenium_folder_at_positions_of_a_csv(tmp_path, xenium_model, xenium_set):
    rows = [30, 2, 17]
    chosen = xenium_set.cells.iloc[rows][["x_centroid", "y_centroid"]]
    chosen.rename(index=lambda i: f"nucleus {i}").to_csv(tmp_path / "cells.csv")
    image = xenium_model.config.image
    inputs = open_inputs(xenium_set.path, image, cells=tmp_path / "cells.csv")
    np.testing.assert_array_equal(
        all_crops(inputs)[:, 0, 16, 16], [xenium_set.blob(row, 0) for row in rows]
    )
    got = phenoseq.predict(
        xenium_set.path, model=xenium_model, n_samples=1, device="cpu", cells=tmp_path / "cells.csv"
    )
    assert list(got.obs_names) == [f"nucleus {i}" for i in chosen.index]


def test_a_layout_that_is_named(xenium_model, xenium_set, store):
    image = xenium_model.config.image
    named = open_inputs(xenium_set.path, image, format="xenium")
    assert named.identity == open_inputs(xenium_set.path, image).identity
    with pytest.raises(DataError, match="no image; expected 'mosaic_STAIN"):
        open_inputs(xenium_set.path, image, format="merscope")
    with pytest.raises(DataError, match="did you mean 'xenium'"):
        open_inputs(xenium_set.path, image, format="xenum")
    with pytest.raises(DataError, match="'format' is the layout of a folder"):
        open_inputs(store, image, format="xenium")


def test_a_xenium_folder_without_counts_is_predicted_alike(xenium_model, xenium_folder):
    whole, bare = (
        xenium_folder("a", dtype="uint16"),
        xenium_folder("b", dtype="uint16", matrix=False),
    )
    how = {"model": xenium_model, "n_samples": 2, "device": "cpu"}
    a, b = phenoseq.predict(whole.path, **how), phenoseq.predict(bare.path, **how)
    np.testing.assert_array_equal(a.X, b.X)
    np.testing.assert_array_equal(a.layers["std"], b.layers["std"])


def test_a_broken_count_matrix_may_be_removed(xenium_model, xenium_folder):
    folder = xenium_folder(dtype="uint16")
    (folder.path / "cell_feature_matrix.h5").write_bytes(b"not a matrix")
    with pytest.raises(DataError, match=r"cell_feature_matrix\.h5.*remove it to predict without"):
        open_inputs(folder.path, xenium_model.config.image)


def test_a_section_of_dapi_alone(xenium_model, xenium_folder):
    folder = xenium_folder(layout="one", dtype="uint16")
    with pytest.warns(PhenoseqWarning, match="Boundary.*are missing"):
        got = phenoseq.predict(folder.path, model=xenium_model, n_samples=1, device="cpu")
    assert (got.obs["missing_channels"] == "Boundary,18S,InteriorProtein").all()


def test_eight_bit_images_for_a_sixteen_bit_model(xenium_model, xenium_folder):
    folder = xenium_folder(dtype="uint8")
    with pytest.warns(PhenoseqWarning, match="pixels are uint8"):
        got = phenoseq.predict(folder.path, model=xenium_model, n_samples=1, device="cpu")
    assert min(got.uns["phenoseq"]["intensity_gain"]) > 1


def test_a_folder_that_states_no_pixel_size(xenium_model, xenium_folder):
    folder = xenium_folder(dtype="uint16")
    (folder.path / "experiment.xenium").write_text("{}")
    with pytest.raises(DataError, match="--pixel-size"):
        open_inputs(folder.path, xenium_model.config.image)
    crops = all_crops(open_inputs(folder.path, xenium_model.config.image, pixel_size=0.2125))
    np.testing.assert_array_equal(crops[:, 0, 16, 16], folder.blob(np.arange(len(crops)), 0))


def test_a_source_opened_by_the_user_is_taken_as_it_is(xenium_model, xenium_set):
    source = read_xenium(xenium_set.path)
    inputs = open_inputs(source, xenium_model.config.image)
    assert inputs.identity == source.identity
    with pytest.raises(DataError, match="'pixel_size' goes with an array or a folder"):
        open_inputs(source, xenium_model.config.image, pixel_size=0.2125)
