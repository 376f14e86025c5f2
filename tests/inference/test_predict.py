"""What `predict` gives: the numbers, and what they are called."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import torch
from scipy import sparse

import phenoseq
from phenoseq.data.simulate import CHANNELS, PIXEL_SIZE
from phenoseq.data.source import Problem
from phenoseq.errors import DataError, ModelError, PhenoseqWarning
from phenoseq.inference.inputs import open_inputs
from phenoseq.inference.predictor import image_job
from phenoseq.inference.randomness import cell_normals, cell_uniforms
from phenoseq.inference.table import predict_table
from phenoseq.models.counts import nb_quantile
from phenoseq.models.phenoseq import PhenoSeq, pool
from phenoseq.models.recalibration import Recalibration

LAYERS = ("std", "q05", "q95", "draw")


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


def go(model, source, *, batch_size=64, **options) -> ad.AnnData:
    inputs = open_inputs(source, model.config.image)
    return predict_table(image_job(model, inputs, device="cpu", batch_size=batch_size, **options))


@pytest.fixture(scope="module")
def by_hand(model, plate, crops):
    """Draws of every cell, made from the model's parts: latents, rates, library sizes."""
    names = list(plate.source.obs.index)
    noise = torch.from_numpy(cell_normals(11, names, 4, 7))
    with torch.inference_mode():
        latent = model.generate(model.encode(torch.from_numpy(crops.astype(np.float32))), noise)
        return latent, *model.expression.decode(latent)


# -------------------------------------------------------------------------------- what comes out


def test_cells_and_genes_are_those_of_source_and_model(predicted, plate, model):
    config = model.config
    assert predicted.shape == (80, 60)
    assert list(predicted.obs_names) == list(plate.source.obs.index)
    assert tuple(predicted.var_names) == config.expression.genes
    assert tuple(predicted.var["symbol"]) == config.expression.symbols
    np.testing.assert_allclose(predicted.var["reliability"], config.training.reliability, atol=1e-6)
    assert np.allclose(predicted.var[["reliability_low", "reliability_high"]], (-0.1, 0.7))
    assert set(predicted.layers) == set(LAYERS)
    assert set(predicted.obsm) == {"X_phenoseq", "spatial"}
    assert predicted.X.dtype == np.float32
    assert predicted.obsm["X_phenoseq"].shape == (80, 7)
    assert sparse.isspmatrix_csr(predicted.layers["draw"])
    for name in ("X", *LAYERS):
        values = dense(predicted.X if name == "X" else predicted.layers[name])
        assert np.isfinite(values).all(), name
        assert (values >= 0).all(), name


def test_obs_has_positions_metadata_and_flags(predicted, plate):
    source = plate.source.obs
    for column in ("field", "x_centroid", "y_centroid", "Metadata_Well", "Metadata_Treatment"):
        assert (predicted.obs[column] == source[column]).all()
    np.testing.assert_array_equal(
        predicted.obsm["spatial"], source[["x_centroid", "y_centroid"]].to_numpy()
    )
    assert (predicted.obs["missing_channels"] == "").all()
    assert predicted.obs["saturated"].dtype == bool
    assert not predicted.obs["saturated"].any()
    half, side = 16 * PIXEL_SIZE, 384 * PIXEL_SIZE
    centres = source[["x_centroid", "y_centroid"]].to_numpy()
    cut = ((centres < half) | (centres > side - half)).any(axis=1)
    sure = (np.abs(centres - half) > 1).all(axis=1) & (np.abs(centres - side + half) > 1).all(
        axis=1
    )
    assert cut.any()
    assert not cut.all()
    np.testing.assert_array_equal(predicted.obs["cut_by_border"][sure], cut[sure])


def test_uns_tells_how_it_was_made_as_plain_json(predicted, model):
    record = predicted.uns["phenoseq"]
    assert json.loads(json.dumps(record)) == record
    assert record["phenoseq_version"] == phenoseq.__version__
    assert record["source"] == "simulated plate3"
    assert record["source_identity"] == model.config.training.identity
    assert (record["seed"], record["n_samples"]) == (11, 4)
    assert (record["sampler"], record["steps"]) == ("dpmpp_2m", 8)
    assert record["pairing"] == "cell"
    assert record["channels"] == list(CHANNELS)
    assert record["missing_channels"] == record["skipped_cells"] == []
    assert record["intensity_gain"] == [1.0] * 5
    assert record["median_library"] == model.config.expression.median_library


def test_columns_of_the_source_that_are_not_metadata_stay_there(model, plate):
    obs = plate.source.obs.assign(cell_area=1.0, Metadata_Dose=0.5)
    got = go(model, replace(plate.source, obs=obs), n_samples=1)
    assert "cell_area" not in got.obs
    assert (got.obs["Metadata_Dose"] == 0.5).all()


# -------------------------------------------------------------------------------------- the maths


def test_x_is_the_mean_of_what_would_be_measured(predicted, model):
    """Principal components are linear in that value, so that their mean tells its mean."""
    space = model.expression
    spread, axes, mean = (x.numpy() for x in (space.spread, space.axes, space.mean))
    value = predicted.obsm["X_phenoseq"][:, :-1] * spread @ axes + mean
    np.testing.assert_allclose(predicted.X, np.maximum(value, 0), rtol=1e-4, atol=1e-4)
    assert predicted.X.min() >= 0


def test_the_latent_is_that_of_the_regression_and_without_one_the_mean_over_draws(
    predicted, by_hand, model, plate, crops
):
    how = replace(model.config.diffusion, centred=False)
    plain = PhenoSeq(replace(model.config, diffusion=how), model.expression).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    got = go(plain, plate.source, n_samples=4, seed=11)
    with torch.inference_mode():
        mean = model.mean_head(pool(*model.encode(torch.from_numpy(crops.astype(np.float32)))))
    np.testing.assert_allclose(predicted.obsm["X_phenoseq"], mean.numpy(), atol=1e-4)
    draws = by_hand[0] - mean[:, None]  # draws of the one are those of the other about its mean
    np.testing.assert_allclose(got.obsm["X_phenoseq"], draws.mean(dim=1).numpy(), atol=1e-4)


def test_a_draw_sums_to_the_median_library(predicted, model):
    total = np.expm1(dense(predicted.layers["draw"])).sum(axis=1)
    np.testing.assert_allclose(total, model.config.expression.median_library, rtol=1e-4)


def test_a_draw_is_counts_of_the_first_latent_at_its_library(predicted, by_hand, model, plate):
    _, rates, library = by_hand
    uniform = torch.from_numpy(cell_uniforms(11, list(plate.source.obs.index), 1, 60))[:, 0]
    mu = rates[:, :1] * library[:, :1, None]
    counts = nb_quantile(uniform, mu, model.expression.theta).detach().numpy()
    share = counts / counts.sum(axis=1, keepdims=True)
    want = np.log1p(share * model.config.expression.median_library)
    off = np.abs(dense(predicted.layers["draw"]) - want).max(axis=1) > 1e-3
    assert off.mean() <= 0.02  # a uniform number that lands on a step may fall to either side


def test_a_cell_without_counts_draws_zeros(make_model, plate):
    model = make_model()
    model.expression.library[2:] = -9.0  # next to no counts at all
    draw = dense(go(model, plate.source, n_samples=2).layers["draw"])
    assert not draw.any(axis=1).all()
    assert np.isfinite(draw).all()


def test_interval_and_spread_are_those_of_many_draws(model, plate):
    """Samples of the mixture that the layers describe, at the predicted library size."""
    few = replace(plate.source, obs=plate.source.obs.iloc[:6])
    got = go(model, few, n_samples=16, seed=5)
    names, median = list(few.obs.index), model.config.expression.median_library
    inputs = open_inputs(few, model.config.image)
    batch = next(inputs.crops(inputs.order, 64))
    noise = torch.from_numpy(cell_normals(5, names, 16, 7))[batch.rows]
    with torch.inference_mode():
        latent = model.generate(model.encode(torch.from_numpy(batch.images.astype("f4"))), noise)
        rates, library = model.expression.decode(latent)
    expected = library.mean(dim=1).numpy()
    rng, theta = np.random.default_rng(0), model.expression.theta.detach().numpy()
    which = rng.integers(16, size=(6, 6000))
    mu = np.take_along_axis(rates.numpy(), which[..., None], axis=1) * expected[:, None, None]
    counts = rng.poisson(rng.gamma(theta, mu / theta))
    values = np.log1p(counts * (median / expected)[:, None, None])
    np.testing.assert_allclose(got.layers["std"][batch.rows], values.std(axis=1), atol=0.04)
    for name, level in {"q05": 0.05, "q95": 0.95}.items():
        low, high = np.quantile(values, [level - 0.012, level + 0.012], axis=1, method="lower")
        inside = (got.layers[name][batch.rows] >= low - 1e-4) & (
            got.layers[name][batch.rows] <= high + 1e-4
        )
        assert inside.all(), name


def test_quantiles_stand_in_order(predicted):
    q05, q95, std = (predicted.layers[n] for n in ("q05", "q95", "std"))
    assert (q05 <= q95).all()
    assert ((q95 > q05) | (std < 0.6)).all()
    assert (q95 - q05).mean() > std.mean()


def test_ood_score_is_about_one_inside_and_high_outside(predicted, model, crops):
    assert 0.6 < np.median(predicted.obs["ood_score"]) < 1.5
    noise = np.random.default_rng(0).integers(0, 65535, crops[:8].shape, dtype=np.uint16)
    strange = phenoseq.predict(
        noise, model=model, n_samples=1, channels=CHANNELS, pixel_size=PIXEL_SIZE, device="cpu"
    )
    assert strange.obs["ood_score"].min() > 2 * np.median(predicted.obs["ood_score"])


def test_saturated_cells_are_flagged(model, crops):
    bright = crops[:6].copy()
    bright[2, 1, :8, :8] = 65535  # 6% of a stain
    bright[3, 1, :2, :2] = 65535  # 0.4%
    got = phenoseq.predict(
        bright, model=model, n_samples=1, channels=CHANNELS, pixel_size=PIXEL_SIZE, device="cpu"
    )
    assert got.obs["saturated"].tolist() == [False, False, True, False, False, False]


# ---------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("n", [1, 2, 5])
def test_number_of_samples(model, plate, n):
    few = replace(plate.source, obs=plate.source.obs.iloc[:5])
    got = go(model, few, n_samples=n)
    assert got.uns["phenoseq"]["n_samples"] == n
    assert set(got.layers) == set(LAYERS)
    assert np.isfinite(got.X).all()


def test_keeping_the_draws(model, plate):
    few = replace(plate.source, obs=plate.source.obs.iloc[:20])
    got = go(model, few, n_samples=3, keep_draws=True)
    draws = [dense(got.layers[f"draw_{k}"]) for k in range(3)]
    assert set(got.layers) == {*LAYERS, "draw_0", "draw_1", "draw_2"}
    np.testing.assert_array_equal(draws[0], dense(got.layers["draw"]))
    assert (draws[0] != draws[1]).any(axis=1).all()
    assert (draws[1] != draws[2]).any(axis=1).all()
    plain = go(model, few, n_samples=3)
    np.testing.assert_array_equal(dense(plain.layers["draw"]), draws[0])
    np.testing.assert_array_equal(plain.X, got.X)


def test_steps_are_the_models_own_unless_given(model, plate):
    few = replace(plate.source, obs=plate.source.obs.iloc[:5])
    own, said, fine = (go(model, few, n_samples=2, steps=steps) for steps in (None, 8, 40))
    assert [p.uns["phenoseq"]["steps"] for p in (own, said, fine)] == [8, 8, 40]
    np.testing.assert_array_equal(own.layers["std"], said.layers["std"])
    assert not np.array_equal(own.layers["std"], fine.layers["std"])


def test_the_callers_model_is_left_as_it_was(model, plate):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    go(model, replace(plate.source, obs=plate.source.obs.iloc[:3]), n_samples=1)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_progress_counts_to_the_end(model, plate):
    seen = []
    inputs = open_inputs(plate.source, model.config.image)
    job = image_job(model, inputs, n_samples=1, batch_size=30, device="cpu")
    predict_table(job, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (80, 80)
    assert [d for d, _ in seen] == sorted({d for d, _ in seen})


# ----------------------------------------------------------------------------- written and opened


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_round_trip_and_scanpy(tmp_path, model_folder, store, suffix):
    path = tmp_path / f"prediction{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that libraries say to those who write files
        made = phenoseq.predict(store, model=model_folder, n_samples=2, out=path, device="cpu")
    assert not isinstance(made.X, np.ndarray)  # it stays in the file
    made = made.to_memory()
    read = ad.read_h5ad(path) if suffix == ".h5ad" else ad.read_zarr(path)
    np.testing.assert_array_equal(read.X, made.X)
    assert list(read.obs_names) == list(made.obs_names)
    assert list(read.var_names) == list(made.var_names)
    for layer in LAYERS:
        np.testing.assert_array_equal(dense(read.layers[layer]), dense(made.layers[layer]))
    assert read.uns["phenoseq"]["model"] == str(model_folder)
    assert read.uns["phenoseq"]["n_samples"] == 2
    assert list(read.uns["phenoseq"]["missing_channels"]) == []
    sc.pp.pca(read, n_comps=5)
    sc.tl.rank_genes_groups(read, "Metadata_Treatment", method="t-test")
    assert read.obsm["X_pca"].shape == (read.n_obs, 5)


# --------------------------------------------------------------------------------- worse than whole


def test_a_missing_stain_is_warned_of_and_recorded(model, crops, predicted):
    channels = ("DNA", "RNA", "AGP", "ER")
    with pytest.warns(PhenoseqWarning, match=r"stains \['Mito'\] are missing"):
        got = phenoseq.predict(
            crops[:, [0, 1, 2, 4]],
            model=model, channels=channels, pixel_size=PIXEL_SIZE, n_samples=1, device="cpu",
        )  # fmt: skip
    assert (got.obs["missing_channels"] == "Mito").all()
    assert got.uns["phenoseq"]["missing_channels"] == ["Mito"]
    assert got.uns["phenoseq"]["channels"] == ["DNA", "RNA", "AGP", "ER"]
    assert np.isfinite(got.X).all()
    assert not np.allclose(got.X, predicted.X, atol=1e-3)


def test_nothing_is_warned_of_when_all_is_well(model, crops):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phenoseq.predict(
            crops[:2], model=model, channels=CHANNELS, pixel_size=PIXEL_SIZE,
            n_samples=1, device="cpu",
        )  # fmt: skip


def test_channels_go_by_their_names(model, crops):
    order = [3, 0, 4, 2, 1]
    aliases = {"DNA": "Hoechst 33342", "Mito": "MitoTracker", "ER": "ConA"}
    how = {"model": model, "pixel_size": PIXEL_SIZE, "n_samples": 2, "device": "cpu"}
    plain = phenoseq.predict(crops[:10], channels=CHANNELS, **how)
    named = [aliases.get(CHANNELS[i], CHANNELS[i]) for i in order]
    permuted = phenoseq.predict(crops[:10, order], channels=named, **how)
    np.testing.assert_array_equal(permuted.X, plain.X)
    wrong = phenoseq.predict(crops[:10, order], channels=CHANNELS, **how)
    assert np.abs(wrong.X - plain.X).max() > 1e-3


def test_another_pixel_type_is_scaled_and_warned_of(model, crops):
    how = {"model": model, "channels": CHANNELS, "pixel_size": PIXEL_SIZE, "device": "cpu"}
    how |= {"n_samples": 1}
    plain = phenoseq.predict(crops, **how)
    smaller = (crops / crops.max(axis=(0, 2, 3), keepdims=True)).astype(np.float32)
    with pytest.warns(PhenoseqWarning, match="pixels are float32.*trained on uint16"):
        scaled = phenoseq.predict(smaller, **how)
    np.testing.assert_allclose(scaled.X, plain.X, atol=0.02)
    gain = scaled.uns["phenoseq"]["intensity_gain"]
    np.testing.assert_allclose(gain, crops.max(axis=(0, 2, 3)), rtol=0.02)


def test_cells_outside_the_image_are_left_out_and_named(model, plate):
    obs = plate.source.obs.copy()
    lost = list(obs.index[[4, 50]])
    obs.loc[lost, "x_centroid"] = [-5.0, 1e5]
    with pytest.warns(PhenoseqWarning, match="2 cells lie outside the image"):
        got = go(model, replace(plate.source, obs=obs), n_samples=1)
    assert list(got.obs_names) == [i for i in obs.index if i not in lost]
    assert got.uns["phenoseq"]["skipped_cells"] == lost


def test_fields_that_could_not_be_read_are_in_the_record(model, plate):
    some = replace(plate.source, obs=plate.source.obs.iloc[:4])
    source = replace(some, problems=(Problem("A03", "A03_ER.tif: truncated", 7),))
    assert go(model, some, n_samples=1).uns["phenoseq"]["problems"] == []
    record = go(model, source, n_samples=1).uns["phenoseq"]
    assert record["problems"] == ["A03: A03_ER.tif: truncated (7 cells)"]


@pytest.mark.parametrize("n", [0, -1])
def test_no_samples_are_refused(model, plate, n):
    with pytest.raises(DataError, match=f"n_samples is {n}"):
        go(model, plate.source, n_samples=n)


@pytest.mark.parametrize("steps", [0, -2])
def test_no_steps_are_refused(model, plate, steps):
    with pytest.raises(ModelError, match=f"steps = {steps}"):
        go(model, plate.source, n_samples=1, steps=steps)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "xpu:77"])
def test_a_device_that_is_not_there(model, plate, device):
    inputs = open_inputs(plate.source, model.config.image)
    with pytest.raises(DataError, match=f"no device '{device}' here"):
        image_job(model, inputs, device=device)


def test_an_unknown_model_is_refused_before_any_work(tmp_path, plate):
    with pytest.raises(ModelError, match=r"'simulated-plates'.*did you mean 'simulated-plate'"):
        phenoseq.predict(plate.source, model="simulated-plates", out=tmp_path / "o.h5ad")
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- recalibrated


@pytest.fixture(scope="module")
def narrower(make_model):
    """A model that has learned that the truth lies nearer to the middle than it says."""
    model = make_model()
    even = np.linspace(0, 1, 41)
    share = tuple(np.clip(1.5 * (even - 0.5) + 0.5, 0, 1).tolist())
    model.config = replace(model.config, recalibration=Recalibration((0.3,), (share, share)))
    return model


def test_a_recalibration_is_applied_to_all_but_the_mean(predicted, narrower, plate):
    got = phenoseq.predict(plate.source, model=narrower, n_samples=4, seed=11, device="cpu")
    assert got.uns["phenoseq"]["recalibrated"]
    assert not predicted.uns["phenoseq"]["recalibrated"]
    np.testing.assert_array_equal(got.X, predicted.X)
    assert got.layers["std"].mean() < 0.9 * predicted.layers["std"].mean()
    wide = got.X.mean(axis=0) > 1  # where there are not only zeros
    for layers, near in (("q05", np.greater_equal), ("q95", np.less_equal)):
        assert near(got.layers[layers], predicted.layers[layers]).all()
        assert (got.layers[layers] != predicted.layers[layers])[:, wide].mean() > 0.5
    for one, other in ((got, predicted),):
        away = [np.abs(dense(x.layers["draw"]) - x.X)[:, wide].mean() for x in (one, other)]
        assert away[0] < 0.9 * away[1]


def test_recalibrated_draws_do_not_depend_on_how_many_are_kept_or_on_the_batch(narrower, plate):
    how = {"model": narrower, "seed": 11, "device": "cpu"}
    kept = phenoseq.predict(plate.source, n_samples=4, keep_draws=True, **how)
    few = replace(plate.source, obs=plate.source.obs.iloc[:3])
    some = phenoseq.predict(few, n_samples=4, keep_draws=True, **how)
    assert np.array_equal(dense(kept.layers["draw"]), dense(kept.layers["draw_0"]))
    for k in range(4):
        a, b = (dense(x[some.obs_names].layers[f"draw_{k}"]) for x in (kept, some))
        assert (np.abs(a - b) > 1e-3).mean() < 0.01  # where a number lands on a step


def test_a_recalibration_that_says_nothing_changes_nothing(predicted, make_model, plate):
    model = make_model()
    even = tuple(np.linspace(0, 1, 41).tolist())
    model.config = replace(model.config, recalibration=Recalibration((), (even,)))
    got = phenoseq.predict(plate.source, model=model, n_samples=4, seed=11, device="cpu")
    np.testing.assert_allclose(got.layers["std"], predicted.layers["std"], atol=2e-3)
    np.testing.assert_allclose(got.X, predicted.X, atol=2e-3)
    for name in ("q05", "q95", "draw"):
        a, b = (dense(x.layers[name]) for x in (got, predicted))
        assert (np.abs(a - b) > 1e-3).mean() < 0.005, name
