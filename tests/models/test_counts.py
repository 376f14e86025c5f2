"""Negative-binomial counts against scipy and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from scipy.special import gammaln

from phenoseq.models.counts import MAX_COUNT, TAIL, nb_log_likelihood, nb_quantile, thin
from phenoseq.models.counts import summarise_mixture as summarise


def scipy_nb(mu, theta):
    """The distribution of mean mu and variance mu + mu^2 / theta."""
    return stats.nbinom(theta, theta / (theta + np.asarray(mu)))


def tensor(values) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float64)


def mixture_cdf(mu: np.ndarray, theta: float, top: int) -> np.ndarray:
    """Cumulative probability at 0, 1, ... of the equal mixture of components of means ``mu``."""
    return np.mean([scipy_nb(m, theta).cdf(np.arange(top)) for m in mu], axis=0)


# ------------------------------------------------------------------------------------ likelihood


def test_log_likelihood_is_scipys_up_to_a_term_of_the_counts():
    rng = np.random.default_rng(0)
    mu, theta = rng.gamma(1, 5, (50, 4)) + 1e-3, np.array([0.1, 1.0, 7.0, 300.0])
    counts = rng.poisson(mu)
    ours = nb_log_likelihood(tensor(counts), tensor(mu), tensor(theta)).numpy()
    left_out = ours - scipy_nb(mu, theta).logpmf(counts)
    np.testing.assert_allclose(left_out, gammaln(counts + 1), atol=1e-9)


def test_log_likelihood_nears_poisson_for_a_large_dispersion():
    counts, mu = np.arange(20.0), np.full(20, 6.5)
    ours = nb_log_likelihood(tensor(counts), tensor(mu), tensor(np.full(20, 1e7))).numpy()
    poisson = stats.poisson.logpmf(counts, mu)
    np.testing.assert_allclose(ours, poisson + gammaln(counts + 1), atol=1e-4)


# ------------------------------------------------------------------------------------- quantiles


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    mu=st.floats(0.005, 80),
    theta=st.floats(0.2, 100),
    level=st.floats(0.001, 0.999),
)
def test_quantile_of_one_component_is_scipys(mu, theta, level):
    ours = nb_quantile(tensor([[level]]), tensor([[[mu]]]), tensor([theta])).item()
    distribution = scipy_nb(mu, theta)
    assert distribution.cdf(ours) >= level - 1e-9
    assert ours == 0 or distribution.cdf(ours - 1) <= level + 1e-9


@pytest.mark.parametrize("level", [0.02, 0.05, 0.5, 0.9, 0.95, 0.999])
def test_quantile_of_a_mixture_is_that_of_its_cumulative_distribution(level):
    rng = np.random.default_rng(1)
    mu, theta = rng.gamma(0.6, 8, (6, 5, 3)), np.array([0.5, 3.0, 40.0])
    ours = nb_quantile(tensor(np.full((6, 3), level)), tensor(mu), tensor(theta)).numpy()
    for b in range(6):
        for g in range(3):
            cdf = mixture_cdf(mu[b, :, g], theta[g], 1500)
            assert ours[b, g] == np.argmax(cdf >= level)


def test_uniform_levels_draw_the_distribution():
    n, mu, theta = 40_000, 4.0, 2.0
    levels = (tensor(np.arange(n)) + 0.5) / n  # every level once: the draw without its own noise
    draw = nb_quantile(levels[:, None], torch.full((n, 1, 1), mu).double(), tensor([theta]))
    draw = draw.numpy().ravel()
    assert draw.mean() == pytest.approx(mu, rel=0.005)
    assert draw.var() == pytest.approx(mu + mu**2 / theta, rel=0.01)
    share = np.bincount(draw.astype(int))[:15] / n
    np.testing.assert_allclose(share, scipy_nb(mu, theta).pmf(np.arange(15)), atol=2 / n)


def test_large_means_come_out_right_within_the_highest_count():
    mu, theta = tensor([[[600.0]]]), tensor([50.0])
    for level in (0.05, 0.5, 0.95):
        assert nb_quantile(tensor([[level]]), mu, theta).item() == scipy_nb(600, 50).ppf(level)


def test_means_beyond_the_highest_count_stay_finite():
    draw = nb_quantile(tensor([[0.5, 0.5]]), tensor([[[1e6, 3.0]]]), tensor([5.0, 5.0]))
    assert draw.tolist() == [[MAX_COUNT, scipy_nb(3, 5).ppf(0.5)]]


def test_a_mean_of_zero_gives_zero_at_every_level():
    mu = torch.zeros(3, 2, 4)
    levels = torch.tensor([1e-6, 0.5, 1 - 1e-7])[:, None].expand(3, 4)
    assert not nb_quantile(levels, mu, torch.ones(4)).any()
    mean, std, quantiles = summarise(mu, torch.ones(4), torch.ones(3), (0.05, 0.95))
    assert not mean.any()
    assert not std.any()
    assert not any(q.any() for q in quantiles)


def test_genes_and_cells_do_not_touch_each_other():
    rng = np.random.default_rng(2)
    mu, theta = tensor(rng.gamma(0.5, 30, (7, 3, 5))), tensor(rng.gamma(2, 2, 5) + 0.1)
    level = tensor(rng.random((7, 5)))
    whole = nb_quantile(level, mu, theta)
    for b in range(7):
        for g in range(5):
            some = nb_quantile(level[b : b + 1, g : g + 1], mu[b : b + 1, :, g : g + 1], theta[[g]])
            assert whole[b, g] == some.item()


# --------------------------------------------------------------------------------------- summary


def brute_summary(
    mu: np.ndarray, theta: float, scale: float, levels
) -> tuple[float, float, list[float]]:
    pmf = np.mean([scipy_nb(m, theta).pmf(np.arange(6000)) for m in mu], axis=0)
    values = np.log1p(scale * np.arange(6000))
    mean = (pmf * values).sum()
    cdf = np.cumsum(pmf)
    std = np.sqrt((pmf * (values - mean) ** 2).sum())
    return mean, std, [values[np.argmax(cdf >= level)] for level in levels]


def test_summary_is_that_of_the_mixture():
    rng = np.random.default_rng(3)
    mu, theta = rng.gamma(0.5, 12, (5, 4, 6)), rng.gamma(2, 3, 6) + 0.2
    scale, levels = rng.gamma(2, 1, 5), (0.05, 0.5, 0.95)
    mean, std, quantiles = summarise(tensor(mu), tensor(theta), tensor(scale), levels)
    for b in range(5):
        for g in range(6):
            want_mean, want_std, want = brute_summary(mu[b, :, g], theta[g], scale[b], levels)
            assert mean[b, g].item() == pytest.approx(want_mean, rel=1e-3, abs=1e-3)
            assert std[b, g].item() == pytest.approx(want_std, rel=5e-3, abs=1e-3)
            assert [q[b, g].item() for q in quantiles] == pytest.approx(want)


def test_summaries_of_genes_and_cells_do_not_touch_each_other():
    """A pair alone and beside means of any size, whose tails are reached sooner or later."""
    rng = np.random.default_rng(5)
    mu, theta = rng.gamma(0.5, 30, (7, 3, 5)), tensor(rng.gamma(2, 2, 5) + 0.1)
    scale = tensor(rng.gamma(2, 1, 7))
    mean, std, (low, high) = summarise(tensor(mu), theta, scale, (0.05, 0.95))
    for b in range(7):
        for g in range(5):
            some = tensor(mu[b : b + 1, :, g : g + 1])
            middle, alone, quantiles = summarise(some, theta[[g]], scale[[b]], (0.05, 0.95))
            assert middle.item() == pytest.approx(mean[b, g].item(), rel=1e-9)
            assert alone.item() == pytest.approx(std[b, g].item(), rel=1e-9)
            assert [q.item() for q in quantiles] == [low[b, g].item(), high[b, g].item()]


def test_spread_of_the_draws_adds_to_counting_noise():
    theta, scale = tensor([1e5]), tensor([1.0])
    _, alike, _ = summarise(tensor([[[20.0], [20.0]]]), theta, scale, ())
    _, apart, _ = summarise(tensor([[[5.0], [35.0]]]), theta, scale, ())
    between = np.std(np.log1p([5.0, 35.0]))
    assert alike.item() == pytest.approx(1 / np.sqrt(20), rel=0.05)  # delta method, Poisson
    assert apart.item() > 0.95 * np.hypot(between, alike.item())


def test_float32_as_the_predictor_uses_it_agrees_with_float64():
    rng = np.random.default_rng(4)
    mu, theta = rng.gamma(0.4, 5, (64, 16, 20)), rng.gamma(2, 3, 20) + 0.2
    arguments = (tensor(mu), tensor(theta), torch.ones(64).double())
    exact = summarise(*arguments, (0.05, 0.95))
    single = summarise(*(a.float() for a in arguments), (0.05, 0.95))
    for i in (0, 1):
        torch.testing.assert_close(single[i].double(), exact[i], atol=2e-3, rtol=1e-3)
    for a, b in zip(single[2], exact[2], strict=True):
        assert (a.double() - b).abs().gt(1e-5).double().mean() < 1e-3


def test_tail_is_cut_where_the_module_says():
    top = nb_quantile(tensor([[1 - 1e-12]]), tensor([[[9.0]]]), tensor([2.0])).item()
    assert top == scipy_nb(9, 2).ppf(1 - TAIL)


# -------------------------------------------------------------------------------------- thinning


def test_thinned_counts_add_up_and_keep_mean_and_dispersion():
    rng = np.random.default_rng(0)
    mu, theta, share = 6.0, 2.0, 0.25
    counts = scipy_nb(mu, theta).rvs((100_000, 1), random_state=0).astype(np.float32)
    first, second = (part.numpy() for part in thin(sparse.csr_matrix(counts), share, rng))
    assert (first + second == counts).all()
    assert (first >= 0).all()
    for part, mean in ((first, (1 - share) * mu), (second, share * mu)):
        assert part.mean() == pytest.approx(mean, rel=0.02)
        assert part.var() == pytest.approx(mean + mean**2 / theta, rel=0.03)


def test_the_parts_of_poisson_counts_tell_nothing_of_each_other():
    counts = np.random.default_rng(0).poisson(4.0, (100_000, 1)).astype(np.float32)
    parts = thin(sparse.csr_matrix(counts), 0.4, np.random.default_rng(1))
    first, second = (part.numpy().ravel() for part in parts)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01
