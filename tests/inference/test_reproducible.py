"""A cell gets the same numbers however it is predicted: batches, order, company, processes."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import phenoseq
from phenoseq.inference.inputs import open_inputs
from phenoseq.inference.predictor import image_job
from phenoseq.inference.table import predict_table

CLOSE = 2e-5
"""Largest difference of latents and scores, in units of about 1: float32's last bits."""

CLOSE_SUMMARY = 5e-4
"""The same of means and standard deviations: a last bit may move the cut of a tail by one count."""

DRAWS = [f"draw_{k}" for k in range(4)]


def go(model, source, *, n_samples=4, seed=11, rows=None, **options) -> ad.AnnData:
    inputs = open_inputs(source, model.config.image, rows=rows)
    options = {"n_samples": n_samples, "seed": seed, "keep_draws": True} | options
    return predict_table(image_job(model, inputs, device="cpu", **options))


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


def same(a: ad.AnnData, b: ad.AnnData) -> None:
    """Equal to `CLOSE`, but for rare quantiles and draws that a last bit pushes over a step."""
    b = b[a.obs_names]
    for x, y in (
        (a.obsm["X_phenoseq"], b.obsm["X_phenoseq"]),
        (a.obs["ood_score"], b.obs["ood_score"]),
    ):
        np.testing.assert_allclose(x, y, atol=CLOSE, rtol=CLOSE)
    for x, y in ((a.X, b.X), (a.layers["std"], b.layers["std"])):
        np.testing.assert_allclose(x, y, atol=CLOSE_SUMMARY)
    for name in ("q05", "q95"):
        assert (np.abs(a.layers[name] - b.layers[name]) > CLOSE).mean() < 1e-3
    for name in DRAWS:
        flipped = np.abs(dense(a.layers[name]) - dense(b.layers[name])).max(axis=1) > CLOSE
        assert flipped.mean() <= 0.05, name


@pytest.fixture(scope="module")
def whole(model, plate):
    return go(model, plate.source)


@pytest.fixture(scope="module")
def stored(model, store):
    return go(model, store)


@pytest.mark.long
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_matter(model, plate, whole, batch_size):
    same(whole, go(model, plate.source, batch_size=batch_size))


def test_order_does_not_matter(model, plate, whole):
    order = np.random.default_rng(0).permutation(80)
    shuffled = replace(plate.source, obs=plate.source.obs.iloc[order])
    got = go(model, shuffled, batch_size=16)
    assert list(got.obs_names) == list(shuffled.obs.index)
    same(whole, got)


def test_the_company_of_other_cells_does_not_matter(model, plate, whole):
    some = replace(plate.source, obs=plate.source.obs.iloc[[3, 40, 41, 77]])
    got = go(model, some)
    same(whole[got.obs_names], got)


def test_other_cells_and_draws_do_differ(whole):
    """So that the comparisons here can fail."""
    moved = whole[[*whole.obs_names[1:], whole.obs_names[0]]].copy()
    moved.obs_names = whole.obs_names
    with pytest.raises(AssertionError):
        same(whole, moved)
    for k, name in enumerate(DRAWS[1:], 1):
        for other in DRAWS[:k]:
            differ = dense(whole.layers[name]) != dense(whole.layers[other])
            assert differ.any(axis=1).all()


def test_a_store_gives_what_its_source_gives(model, store, whole, stored):
    assert list(stored.obs_names) == list(store.table().obs_names)
    same(whole[stored.obs_names], stored)
    np.testing.assert_array_equal(stored.obsm["spatial"], whole[stored.obs_names].obsm["spatial"])
    by_path = phenoseq.predict(
        store.path, model=model, n_samples=4, seed=11, device="cpu", keep_draws=True
    )
    same(stored, by_path)


def test_rows_of_a_store(model, store, stored):
    rows = np.array([5, 2, 30])
    got = go(model, store, rows=rows)
    assert list(got.obs_names) == list(stored.obs_names[rows])
    same(got, stored)


PART = """
import numpy as np
from phenoseq import Store, load_model
from phenoseq.inference.inputs import open_inputs
from phenoseq.inference.predictor import image_job
from phenoseq.inference.table import predict_table

store, model = Store(store), load_model(model)
inputs = open_inputs(store, model.config.image, rows=np.arange(part, len(store), 2))
job = image_job(model, inputs, n_samples=4, seed=11, keep_draws=True, batch_size=16, device="cpu")
predict_table(job).write_h5ad(out)
"""


def test_two_processes_give_what_one_gives(fork, model_folder, store, stored, tmp_path):
    """Every other cell each, from the saved model."""
    outs = [tmp_path / f"part{i}.h5ad" for i in range(2)]
    running = [
        fork(PART, store=store.path, model=model_folder, part=i, out=out)
        for i, out in enumerate(outs)
    ]
    for process in running:
        process.join(timeout=600)
        assert process.exitcode == 0
    parts = [ad.read_h5ad(out) for out in outs]
    assert [p.n_obs for p in parts] == [(len(store) + 1) // 2, len(store) // 2]
    assert not set(parts[0].obs_names) & set(parts[1].obs_names)
    for part in parts:
        same(part, stored)
        assert part.uns["phenoseq"]["seed"] == 11


def test_one_seed_gives_the_same_bits_and_another_other_draws(model, plate):
    few = replace(plate.source, obs=plate.source.obs.iloc[:20])
    first, again, other = (go(model, few, n_samples=16, seed=s) for s in (1, 1, 2))
    assert [p.uns["phenoseq"]["seed"] for p in (first, again, other)] == [1, 1, 2]
    np.testing.assert_array_equal(first.X, again.X)
    for layer in first.layers:
        np.testing.assert_array_equal(dense(first.layers[layer]), dense(again.layers[layer]))
    for name in DRAWS:
        assert (dense(first.layers[name]) != dense(other.layers[name])).any(axis=1).all()
    assert not np.array_equal(first.layers["std"], other.layers["std"])
    np.testing.assert_array_equal(first.obs["ood_score"], other.obs["ood_score"])
