"""The expression space: what its latents mean, and how well it gives rates back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from phenoseq.errors import DataError
from phenoseq.models.counts import nb_log_likelihood
from phenoseq.models.expression import fit_expression_space


def dense(counts: sparse.csr_matrix) -> torch.Tensor:
    return torch.from_numpy(counts.toarray()).float()


def fit(counts, **options):
    g = counts.shape[1]
    names = tuple(f"g{i}" for i in range(g))
    return fit_expression_space(counts, names, names, **{"epochs": 1, "hidden": 8, **options})


@pytest.fixture(scope="module")
def train(cells):
    return cells.split(1000)[0]


@pytest.fixture(scope="module")
def held_out(cells):
    return cells.split(1000)[1]


def test_latents_and_rates_have_the_shapes_said(space, train):
    counts = dense(train.counts[:12]).view(3, 4, -1)
    latent = space.encode(counts)
    rates, library = space.decode(latent)
    assert latent.shape == (3, 4, space.config.latent_dim) == (3, 4, 7)
    assert rates.shape == counts.shape
    assert library.shape == (3, 4)
    assert space.theta.shape == (40,)
    assert (rates > 0).all()
    torch.testing.assert_close(rates.sum(-1), torch.ones(3, 4))


def test_axes_are_orthonormal_and_in_order_of_what_they_explain(space):
    torch.testing.assert_close(space.axes @ space.axes.T, torch.eye(6), atol=1e-5, rtol=0)
    assert (space.spread.diff() < 0).all()


def test_axes_are_the_principal_components_of_log_expression(space, train):
    total = train.counts.sum(axis=1).A1
    scaled = np.log1p(train.counts.toarray() / total[:, None] * np.median(total[total >= 20]))
    _, singular, axes = np.linalg.svd(scaled - scaled.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(space.spread, singular[:6] / np.sqrt(len(scaled)), rtol=1e-3)
    cosine = np.abs((space.axes.numpy()[:3] * axes[:3]).sum(axis=1))  # the others are all noise
    np.testing.assert_allclose(cosine, 1, atol=1e-3)


def test_latents_of_training_cells_are_standardised(space, train):
    latent = space.encode(dense(train.counts))
    torch.testing.assert_close(latent.mean(0), torch.zeros(7), atol=1e-3, rtol=0)
    torch.testing.assert_close(latent.std(0), torch.ones(7), atol=2e-3, rtol=0)


def test_a_latent_does_not_depend_on_sequencing_depth_but_in_its_last_number(space, train):
    counts = dense(train.counts[:50])
    latent, deeper = space.encode(counts), space.encode(3 * counts)
    torch.testing.assert_close(latent[:, :-1], deeper[:, :-1], atol=1e-4, rtol=0)
    step = (deeper - latent)[:, -1] * space.library[1]
    torch.testing.assert_close(step, torch.full((50,), np.log(3.0)).float(), atol=1e-4, rtol=0)


def test_library_comes_back_and_is_held_within_that_of_training_cells(space, train):
    counts = dense(train.counts)
    total = counts.sum(1)
    low, high = space.library[2:].exp()
    _, library = space.decode(space.encode(counts))
    torch.testing.assert_close(library, total.clamp(low, high), rtol=1e-3, atol=0.1)
    extremes = torch.zeros(2, 7)
    extremes[:, -1] = torch.tensor([-50.0, 50.0])
    assert low > total.min()
    torch.testing.assert_close(space.decode(extremes)[1], torch.stack([low, high]))


def test_median_library_is_over_cells_with_20_counts():
    rng = np.random.default_rng(0)
    rich, poor = rng.poisson(10, (31, 8)) + 3, np.eye(8, dtype=int)[rng.integers(8, size=90)]
    counts = np.concatenate([rich, poor])
    assert rich.sum(axis=1).min() >= 20
    assert poor.sum(axis=1).max() < 20
    space = fit(sparse.csr_matrix(counts.astype(np.float32)), components=2)
    assert space.config.median_library == np.median(rich.sum(axis=1))


def test_decoder_knows_the_rates_of_held_out_cells(space, train, held_out):
    counts = held_out.counts.toarray()
    mu_scale = torch.from_numpy(counts.sum(axis=1, keepdims=True))
    rates, _ = space.decode(space.encode(torch.from_numpy(counts)))
    mean = dense(train.counts).sum(0)
    baseline = (mean / mean.sum()).expand_as(rates)
    truth = torch.from_numpy(held_out.rates).float()

    def divergence(of: torch.Tensor) -> float:
        return float((truth * (truth / of).log()).sum(1).mean())

    assert divergence(rates) < 0.35 * divergence(baseline)

    def likelihood(of: torch.Tensor) -> float:
        values = nb_log_likelihood(torch.from_numpy(counts), of * mu_scale, space.theta)
        return float(values.sum(1).mean())

    assert likelihood(rates) > likelihood(baseline) + 5
    assert likelihood(truth) > likelihood(baseline) + 5


def test_the_decoder_does_not_give_counting_noise_back():
    """From counts that are noise alone, latents tell nothing, and rates are the same for all."""
    rng = np.random.default_rng(0)
    rate = rng.dirichlet(np.full(30, 2.0))
    counts = rng.poisson(60 * rate, (3000, 30)).astype(np.float32)
    space = fit(sparse.csr_matrix(counts), components=12, hidden=32, epochs=60)
    fresh = rng.poisson(60 * rate, (1000, 30)).astype(np.float32)
    rates, _ = space.decode(space.encode(torch.from_numpy(fresh)))
    away = (rates / torch.from_numpy(rate).float()).log()
    noise = np.sqrt(1 / (60 * rate)).mean()  # what giving it back would cost
    assert away.std(dim=0).mean() < 0.25 * noise


def test_dispersion_tells_a_noisy_gene_from_a_poisson_one():
    rng = np.random.default_rng(0)
    mean = np.full((1500, 10), 12.0)
    shape = np.array([0.7] * 5 + [1e4] * 5)
    counts = rng.poisson(rng.gamma(shape, mean / shape)).astype(np.float32)
    assert counts.sum(axis=1).min() > 0
    space = fit(sparse.csr_matrix(counts), components=1)
    assert (space.theta[:5] < 4).all()
    assert (space.theta[5:] > 5).all()


def test_weights_of_the_latent_follow_the_deviation_each_number_carries(space):
    weight = space.weight
    assert weight.shape == (7,)
    torch.testing.assert_close(weight[:6] / weight[0], space.spread / space.spread[0])
    assert weight.mean().item() == pytest.approx(1)


def test_equal_seeds_give_equal_spaces(train):
    first, again, other = (
        fit(train.counts[:64], components=3, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["decoder.0.weight"], other["decoder.0.weight"])


def test_nothing_in_a_fitted_space_is_trained_further(space):
    assert not any(p.requires_grad for p in space.parameters())


@pytest.mark.parametrize("components", [8, 40, 100])
def test_too_few_cells_or_genes_are_refused(train, components):
    with pytest.raises(DataError, match=r"8 training cells and 40 genes are too few.*components"):
        fit(train.counts[:8], components=components)


def test_a_training_cell_without_counts_is_refused(train):
    counts = sparse.vstack([train.counts[:50], sparse.csr_matrix((1, 40), dtype=np.float32)])
    with pytest.raises(DataError, match="no counts"):
        fit(counts.tocsr(), components=3)
