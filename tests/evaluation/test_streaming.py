"""Metrics by batch are those over all cells, however these are cut, ordered or divided."""

from __future__ import annotations

import copy
import multiprocessing as mp

import numpy as np
import pytest
import torch
import torch.distributed as dist

from phenoseq.evaluation import metrics, pairs
from phenoseq.evaluation.streaming import EDistance, PccGene, VarianceRatio, middle

GENES = torch.tensor([True, True, False, True, True, True])


@pytest.fixture
def cells():
    """Truth and one draw of 500 cells, two genes of which hardly vary."""
    rng = np.random.default_rng(0)
    true = rng.gamma(2, 1, (500, 6)) * [1, 2, 1, 0.01, 1, 0] + [0, 0, 0, 50, 0, 1.7]
    draw = 0.6 * true + rng.gamma(2, 0.3, true.shape) * [1, 1, 1, 0.01, 1, 1]
    return torch.from_numpy(true).float(), torch.from_numpy(draw).float()


def plain(true, draw):
    x, y = true[:, GENES].numpy(), draw[:, GENES].numpy()
    return (
        np.median(metrics.pcc_gene(x, y)),
        metrics.variance_ratio(x, y),
        metrics.e_distance(x, y),
    )


def feed(metric, true, draw, rows):
    if isinstance(metric, EDistance):
        metric.update(draw[rows], true[rows], rows)
    else:
        metric.update(draw[rows], true[rows])


def make():
    return PccGene(GENES), VarianceRatio(GENES), EDistance(GENES, seed=0)


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_batches_make_no_difference(cells, batch):
    true, draw = cells
    want = plain(true, draw)
    order = torch.randperm(len(true), generator=torch.Generator().manual_seed(1))
    for metric, value in zip(make(), want, strict=True):
        for rows in order.split(batch):
            feed(metric, true, draw, rows)
        got = float(metric.compute())
        assert got == pytest.approx(value[0] if isinstance(value, tuple) else value, rel=1e-4)
        if isinstance(value, tuple):
            assert metric.error == pytest.approx(value[1], rel=1e-4)


def test_a_million_cells_on_a_large_mean():
    """Raw sums in float32 would be lost here."""
    rng = torch.Generator().manual_seed(0)
    one = torch.ones(1, dtype=torch.bool)
    pearson, ratio = PccGene(one), VarianceRatio(one)
    kept = []
    for _ in range(250):
        true = 30 + 0.1 * torch.randn(4000, 1, generator=rng)
        draw = 60 + 0.5 * (true - 30) + 0.05 * torch.randn(4000, 1, generator=rng)
        pearson.update(draw, true)
        ratio.update(draw, true)
        kept.append(torch.cat([true, draw], dim=1).double())
    covariance = torch.cov(torch.cat(kept).T)
    want = covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()
    assert float(pearson.compute()) == pytest.approx(float(want), abs=1e-4)
    want = covariance[1, 1] / covariance[0, 0]
    assert float(ratio.compute()) == pytest.approx(float(want), rel=1e-3)


@pytest.mark.parametrize("level", [0.0, 0.1, 1.7, 1e4])
def test_constant_genes(level):
    """No correlation with a constant, also one that float32 noise makes look alive."""
    varies = torch.randn(1001, 2, generator=torch.Generator().manual_seed(0))
    constant = torch.full((1001, 2), level)
    noisy = constant * (1 + 1e-7 * varies)
    both = torch.ones(2, dtype=torch.bool)
    for true, draw in ((varies, constant), (constant, varies), (varies, noisy)):
        metric = PccGene(both)
        for t, d in zip(true.split(100), draw.split(100), strict=True):
            metric.update(d, t)
        assert metric.compute() == 0
    ratio = VarianceRatio(both)
    ratio.update(varies, constant)
    assert ratio.compute().isnan()


def test_the_subsample_depends_on_seed_and_numbers_alone(cells, monkeypatch):
    monkeypatch.setattr(pairs, "PAIR_CELLS", 60)
    true, draw = cells
    numbers = torch.arange(len(true))
    values = set()
    for batch, order in ((5, numbers), (64, numbers.flip(0)), (500, numbers)):
        metric = EDistance(GENES, seed=3)
        for rows in order.split(batch):
            feed(metric, true, draw, rows)
        values.add((float(metric.compute()), metric.error))
        assert sum(map(len, metric.cells)) <= 500
    assert len(values) == 1
    want = metrics.e_distance(true[:, GENES].numpy(), draw[:, GENES].numpy(), seed=3)
    assert values.pop() == pytest.approx(want, rel=1e-4)
    other = EDistance(GENES, seed=4)
    feed(other, true, draw, numbers)
    assert float(other.compute()) != pytest.approx(want[0], rel=1e-4)


def test_what_is_kept_does_not_grow(cells, monkeypatch):
    monkeypatch.setattr(pairs, "PAIR_CELLS", 20)
    true, draw = cells
    metric = EDistance(GENES)
    for rows in torch.arange(500).split(10):
        feed(metric, true, draw, rows)
        assert sum(map(len, metric.draw)) <= 40


def test_a_cell_given_twice_counts_once(cells):
    true, draw = cells
    once, twice = EDistance(GENES), EDistance(GENES)
    feed(once, true, draw, torch.arange(300))
    feed(twice, true, draw, torch.cat([torch.arange(300), torch.arange(50)]))
    assert float(once.compute()) == float(twice.compute())


def test_reset_clone_and_nothing(cells):
    for metric in make():
        feed(metric, *cells, torch.arange(200))
        value = float(metric.compute())
        other = copy.deepcopy(metric)
        metric.reset()
        feed(metric, *cells, torch.arange(200))
        assert float(metric.compute()) == float(other.compute()) == value
        assert not metric.state_dict()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert EDistance(GENES).compute().isnan()


def test_forward_gives_the_batch_and_adds_it(cells):
    true, draw = cells
    metric, whole = PccGene(GENES), PccGene(GENES)
    for rows in torch.arange(500).split(250):
        alone = PccGene(GENES)
        alone.update(draw[rows], true[rows])
        assert float(metric(draw[rows], true[rows])) == pytest.approx(float(alone.compute()))
    whole.update(draw, true)
    assert float(metric.compute()) == pytest.approx(float(whole.compute()), rel=1e-5)


def test_the_middle():
    assert middle(torch.tensor([4.0, 1, 3, 2])) == 2.5
    assert middle(torch.tensor([5.0, 1, 3])) == 3


def _rank(rank, folder, true, draw):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    own = torch.arange(len(true))[rank::2][: 220 if rank else None]
    values = []
    for metric in make():
        for rows in own.split(33):
            feed(metric, true, draw, rows)
        values.append(float(metric.compute()))
    np.save(folder / f"{rank}.npy", values)
    dist.destroy_process_group()


def test_two_ranks_with_uneven_shares(cells, tmp_path):
    true, draw = cells
    context = mp.get_context("fork")
    ranks = [context.Process(target=_rank, args=(k, tmp_path, true, draw)) for k in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    first, second = (np.load(tmp_path / f"{k}.npy") for k in range(2))
    np.testing.assert_array_equal(first, second)
    seen = torch.cat([torch.arange(0, 500, 2), torch.arange(1, 500, 2)[:220]])
    want = plain(true[seen], draw[seen])
    np.testing.assert_allclose(first, [want[0], want[1], want[2][0]], rtol=1e-4)
