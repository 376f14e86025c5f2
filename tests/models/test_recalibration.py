"""Recalibration makes wrong distributions right on cells it has not seen, and right ones stay."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

from phenoseq.errors import DataError, ModelError
from phenoseq.models.config import PhenoSeqConfig
from phenoseq.models.counts import matching_nb, nb_cdf, nb_quantile, redraw, summarise_mixture
from phenoseq.models.load import load_folder
from phenoseq.models.recalibration import EDGES, STEPS, Recalibration, fit_recalibration

pytestmark = pytest.mark.long

GENES, DRAWS, MEDIAN = 8, 16, 50.0
RIGHT = 0.5
#: As good as Poisson.
THETA = torch.full((GENES,), 1e6)
IDENTITY = Recalibration((), (tuple(np.linspace(0, 1, 5)),))


def made(n, width, seed):
    """Counts of cells, and the rates and library sizes that a model draws for them.

    The model draws log rates with deviation ``width``, and the true ones have :data:`RIGHT`.
    """
    g = torch.Generator().manual_seed(seed)
    base = torch.logspace(-1.5, 1, GENES) / MEDIAN

    def rates(k, wide):
        away = torch.randn(n, k, GENES, generator=g) * wide
        return base * torch.exp(away - wide**2 / 2)

    library = MEDIAN * torch.exp(0.3 * torch.randn(n, DRAWS + 1, generator=g))
    counts = torch.poisson(rates(1, RIGHT)[:, 0] * library[:, :1], generator=g)
    return counts, library[:, 0], rates(DRAWS, width), library[:, 1:]


def pit(counts, mu, seed=0):
    below, at_most = nb_cdf(counts, mu, THETA)
    v = torch.rand(below.shape, generator=torch.Generator().manual_seed(seed))
    return (below + v * (at_most - below)).numpy()


@cache
def fitted(width):
    counts, total, rates, _ = made(3000, width, seed=1)
    mu = rates * total[:, None, None]
    g = torch.Generator().manual_seed(9)
    own = nb_quantile(torch.rand(counts.shape, generator=g), mu[:, :1], THETA)
    others = mu[:, 1:]
    return fit_recalibration(pit(counts, others), pit(own, others, 1), level(rates).numpy())


def level(rates):
    return torch.log1p(rates.mean(dim=1) * MEDIAN)


def drawn(rates, library, seed):
    """One draw of each cell and component."""
    u = torch.rand(rates.shape, generator=torch.Generator().manual_seed(seed))
    mu = rates * library[..., None]
    return torch.stack([nb_quantile(u[:, k], mu[:, k : k + 1], THETA) for k in range(DRAWS)], 1)


def inside(true, draws, share, seed=0):
    """Share of the randomised PIT of values among draws that lies in the central interval."""
    below, at_most = (draws < true[:, None]).sum(1), (draws <= true[:, None]).sum(1) + 1
    v = torch.rand(true.shape, generator=torch.Generator().manual_seed(seed))
    u = (below + v * (at_most - below)) / (draws.shape[1] + 1)
    return float(((u - 0.5).abs() <= share / 2).float().mean())


# ------------------------------------------------------------------------------------- what is made


@pytest.mark.parametrize("width", [0.2, 0.9], ids=["too narrow", "too wide"])
def test_draws_of_untouched_cells_become_calibrated(width):
    recalibration = fitted(width)
    true, _, rates, library = made(3000, width, seed=2)
    before = drawn(rates, library, seed=3)
    uniforms = torch.rand(before.shape, generator=torch.Generator().manual_seed(4))
    warp = recalibration.at(level(rates))
    after = redraw(before, rates, library, THETA, warp, uniforms)
    common = level(rates).mean(0) > EDGES[3]  # where rates say more than the noise of counting
    for share in (0.5, 0.8, 0.9):
        wrong = abs(inside(true[:, common], before[:, :, common], share) - share)
        assert wrong > 0.04
        assert inside(true[:, common], after[:, :, common], share) == pytest.approx(share, abs=0.02)
        assert inside(true, after, share) == pytest.approx(share, abs=0.02)
    spread = [(x.var(1).mean(0) / before.var(1).mean(0))[common].mean() for x in (after, before)]
    assert (spread[0] > spread[1]) == (width < RIGHT)


@pytest.mark.parametrize("width", [0.2, 0.9], ids=["too narrow", "too wide"])
def test_quantiles_and_spread_are_those_of_the_draws(width):
    recalibration = fitted(width)
    true, total, rates, _ = made(3000, width, seed=5)
    scale = torch.ones(len(total))
    warp = recalibration.at(level(rates))
    mu = rates * total[:, None, None]
    mean, std, (low, high) = summarise_mixture(mu, THETA, scale, (0.05, 0.95), warp)
    y = torch.log1p(true)
    assert float(((y >= low) & (y <= high)).float().mean()) >= 0.9
    library = total[:, None].expand(-1, DRAWS)
    draws = drawn(rates, library, seed=6)
    draws = redraw(draws, rates, library, THETA, warp, torch.rand(draws.shape))
    values = torch.log1p(draws)
    torch.testing.assert_close(mean.mean(0), values.mean(dim=(0, 1)), rtol=0.03, atol=0.005)
    want = (values.var(dim=1).mean(0)).sqrt()
    # ranks of draws are measured by a distribution that is like the mixture, and not quite it
    torch.testing.assert_close(std.square().mean(0).sqrt(), want, rtol=0.08, atol=0.01)
    assert float((values < low[:, None]).float().mean()) <= 0.05
    assert float((values > high[:, None]).float().mean()) <= 0.05


def test_a_calibrated_model_stays_as_it_is():
    found = fitted(RIGHT)
    even = np.linspace(0, 1, STEPS + 1)
    for share in found.shares:
        np.testing.assert_allclose(share, even, atol=0.02)
    _, total, rates, library = made(200, RIGHT, seed=7)
    draws = drawn(rates, library, seed=8)
    again = redraw(draws, rates, library, THETA, IDENTITY.at(level(rates)), torch.rand(draws.shape))
    assert float((again != draws).float().mean()) < 1e-4
    plain = summarise_mixture(rates * total[:, None, None], THETA, total, (0.05, 0.95))
    same = summarise_mixture(
        rates * total[:, None, None], THETA, total, (0.05, 0.95), IDENTITY.at(level(rates))
    )
    for i in (0, 1):
        torch.testing.assert_close(same[i], plain[i], rtol=1e-3, atol=1e-4)
    for a, b in zip(same[2], plain[2], strict=True):
        assert float((a != b).float().mean()) < 1e-3


def test_draws_beyond_the_tail_and_none_at_all():
    rates, library = torch.full((1, 1, 2), 0.5), torch.tensor([[4.0]])
    theta, warp = torch.tensor([9.0, 9.0]), IDENTITY.at(torch.ones(1, 2))
    far = torch.tensor([[[3000.0, 0.0]]])
    assert redraw(far, rates, library, theta, warp, torch.zeros(1, 1, 2)).tolist() == far.tolist()
    none = torch.zeros(1, 1, 2)
    assert redraw(none, rates, library, theta, warp, torch.zeros(1, 1, 2)).tolist() == [[[0, 0]]]


# ---------------------------------------------------------------------------------------- its parts


def test_recalibrated_quantiles_and_spread_are_those_by_hand():
    rng = np.random.default_rng(0)
    mu = np.exp(rng.normal(0, 2, (7, 3, 5)))  # from next to none to hundreds
    theta = np.array([0.5, 1.0, 4.0, 20.0, 1e5])
    how = Recalibration((0.5, 1.5), ((0, 0.1, 1), (0, 0.5, 1), (0, 0.9, 1)))
    level = rng.uniform(0, 2, (7, 5))
    warp = how.at(torch.from_numpy(level))
    top = np.arange(2000)
    for wanted in (0.1, 0.5, 0.9):
        made = nb_quantile(
            torch.full((7, 5), wanted).double(), torch.tensor(mu), torch.tensor(theta), warp
        )
        mean, std, (same,) = summarise_mixture(
            torch.tensor(mu), torch.tensor(theta), torch.ones(7).double(), (wanted,), warp
        )
        torch.testing.assert_close(same, torch.log1p(made))
        for b, g in np.ndindex(7, 5):
            cdf = stats.nbinom(theta[g], theta[g] / (theta[g] + mu[b, :, g, None])).cdf(top).mean(0)
            share = how.shares[np.searchsorted(how.edges, level[b, g])]
            cdf = np.interp(cdf, [0, 0.5, 1], share)
            assert made[b, g] == np.argmax(cdf >= wanted)
            pmf, y = np.diff(cdf, prepend=0), np.log1p(top)
            assert mean[b, g] == pytest.approx(pmf @ y, abs=5e-3)
            assert std[b, g] == pytest.approx(np.sqrt(pmf @ y**2 - (pmf @ y) ** 2), abs=5e-3)


def test_the_map_is_linear_between_its_knots_by_stratum():
    how = Recalibration((1.0,), ((0.0, 0.1, 1.0), (0.0, 0.8, 1.0)))
    warp = how.at(torch.tensor([[1.0, 1.1, 5.0]], dtype=torch.float64))
    got = warp(torch.tensor([[0.25, 0.25, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor([[0.05, 0.4, 1.0]], dtype=torch.float64))
    some = warp.take(torch.tensor([0]), torch.tensor([1]))(torch.tensor([0.75]).double())
    assert some.tolist() == pytest.approx([0.9])


def test_the_fit_is_what_turns_ranks_of_draws_into_those_of_the_truth():
    rng = np.random.default_rng(0)
    low = np.zeros((4000, 5))
    drawn, even = rng.random(low.shape), np.linspace(0, 1, STEPS + 1)
    true = np.sqrt(rng.random(low.shape))  # below u lies a share of u squared
    found = fit_recalibration(true, drawn, low).shares
    np.testing.assert_allclose(found[0], even**2, atol=0.02)
    assert found[1] == pytest.approx(even)  # of which there are no values
    # ranks of draws that are themselves not uniform count as right
    np.testing.assert_allclose(fit_recalibration(true, true, low).shares[0], even, atol=1e-5)
    few = fit_recalibration(true[:5], drawn[:5], low[:5]).shares[0]
    np.testing.assert_allclose(few, even, atol=0.06)
    for broken in (np.nan, 1.5, -0.1):
        with pytest.raises(DataError, match="between 0 and 1"):
            fit_recalibration(np.full((300, 1), broken), drawn[:300, :1], low[:300, :1])


def test_the_distribution_that_measures_ranks_has_the_moments_of_the_mixture():
    rates, theta = torch.tensor([[[0.02], [0.1], [0.06]]]).double(), torch.tensor([3.0]).double()
    mean, size = matching_nb(rates, theta)
    for library in (10.0, 500.0):
        mu = (rates * library).squeeze()
        within, between = (mu + mu**2 / theta).mean(), mu.var(correction=0)
        m = mean.squeeze() * library
        torch.testing.assert_close(m + m**2 / size.squeeze(), within + between)
    torch.testing.assert_close(matching_nb(rates[:, :1], theta)[1].squeeze(), theta.squeeze())


# ---------------------------------------------------------------------------------- kept in a model


def test_it_is_saved_with_the_model(make_model, tmp_path):
    model = make_model()
    found = fitted(1.3)
    model.config = replace(model.config, recalibration=found)
    assert load_folder(model.save(tmp_path / "it")).config.recalibration == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": [1.0, 0.5]}, "3 maps|edges rise|2 edges"),
        ({"edges": []}, "for 0 edges"),
        ({"edges": ["a"]}, "edges"),
        ({"shares": [[0.0, 1.0], [0.0, 0.5, 1.0]]}, r"of \[2, 3\] numbers"),
        ({"shares": [[0.0, 0.6, 0.5, 1.0]] * 2}, "edges rise, and maps"),
        ({"shares": [[0.1, 1.0]] * 2}, "from 0 to 1"),
        ({"shares": [[0.0]] * 2}, "numbers"),
        ({"shares": [[0.0, 1.0]] * 3, "edges": [1.0, 0.5]}, "edges rise"),
        ({"more": 1}, "unknown"),
    ],
)
def test_what_is_no_recalibration_is_refused(make_model, changes, message):
    raw = json.loads(make_model().config.to_json())
    good = asdict(Recalibration((1.0,), ((0.0, 1.0), (0.0, 1.0))))
    assert PhenoSeqConfig.from_json(json.dumps(raw | {"recalibration": good}), "here")
    with pytest.raises(ModelError, match=message):
        PhenoSeqConfig.from_json(json.dumps(raw | {"recalibration": good | changes}), "here")
