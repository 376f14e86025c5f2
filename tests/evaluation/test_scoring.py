"""Scores of predictions on disk or in memory: those of the plain functions, whatever the blocks."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.evaluation import metrics, probabilistic, scoring
from phenoseq.evaluation.calibration import Covered
from phenoseq.evaluation.compare import compare
from phenoseq.evaluation.grouped import (
    CoMoments,
    Means,
    Moments,
    PairDistances,
    interval,
    resamples,
    value_of,
)
from phenoseq.evaluation.report import as_json, normalised
from phenoseq.evaluation.scoring import score
from phenoseq.evaluation.tables import BASELINES, open_baselines, open_prediction, open_truth


@pytest.fixture(scope="module")
def opened(cells):
    truth = open_truth(cells["truth"], cells["baselines"])
    model = open_prediction(cells["model"], truth, "a model")
    return truth, [model, *open_baselines(cells["baselines"], truth)]


@pytest.fixture(scope="module")
def arrays(cells):
    """True, mean and draws of the scored cells and genes."""
    true = normalised(cells["truth"].X, 60.0)[3:, :7]
    model = cells["model"]
    draws = np.stack([model.layers[f"draw_{k}"].toarray()[3:, :7] for k in range(5)])
    return true, model.X[3:, :7], draws


@pytest.fixture(scope="module")
def compared(opened):
    return compare(*opened, n_resamples=300)


def test_scores_are_those_of_the_plain_functions(compared, arrays):
    true, mean, draws = arrays
    scores = compared[0][0]
    each = metrics.pcc_gene(true, mean)
    assert scores.pcc_gene_median == pytest.approx(np.median(each), abs=1e-6)
    assert scores.pcc_gene_mean == pytest.approx(each.mean(), abs=1e-6)
    assert scores.mse == pytest.approx(metrics.mse(true, mean), rel=1e-6)
    assert scores.variance_ratio == pytest.approx(metrics.variance_ratio(true, draws[0]), rel=1e-5)
    assert scores.e_distance == pytest.approx(metrics.e_distance(true, draws[0])[0], abs=1e-5)
    assert scores.mmd_rbf == pytest.approx(metrics.mmd_rbf(true, draws[0])[0], abs=1e-6)
    want = metrics.coexpression_error(true, draws[0])
    assert scores.coexpression_error == pytest.approx(want, abs=1e-5)
    assert scores.crps == pytest.approx(probabilistic.crps(true, draws).mean(), rel=1e-5)
    want = probabilistic.energy_score(true, draws)
    assert scores.energy_score == pytest.approx(want.mean(), rel=1e-5)
    np.testing.assert_allclose(compared[1][0].cell_scores, want, rtol=1e-4)
    np.testing.assert_allclose(compared[1][0].pcc_gene, each, atol=1e-6)


def test_blocks_make_no_difference(opened, compared, monkeypatch):
    truth, (model, *_) = opened
    monkeypatch.setattr(scoring, "blocks", lambda n: np.split(np.arange(n), range(37, n, 37)))
    again = score(truth, model)
    for name, value in compared[1][0].values.items():
        assert again.values[name] == pytest.approx(value, rel=1e-4), name
    assert again.calibration.closed == pytest.approx(compared[1][0].calibration.closed)


def test_a_point_forecast(compared):
    mean = compared[0][1]
    assert (mean.pcc_gene_median, mean.variance_ratio) == (0, 0)
    assert mean.energy_score > compared[0][0].energy_score
    assert mean.coverage == {}
    assert compared[1][1].calibration is None


def test_the_model_is_calibrated_and_random_cells_too(compared):
    for result in (compared[1][0], compared[1][-1]):
        found = result.calibration
        for level in ("0.5", "0.8", "0.9"):
            assert found.coverage[level] == pytest.approx(float(level), abs=0.05)
        assert found.closed["0.5"] >= 0.5
        assert np.mean(found.pit) == pytest.approx(1)
        assert found.n_groups == 5  # of 50 cells or more, since three have too few counts


def test_coverage_is_told_by_total_counts_and_level_beside_the_empty_answer(
    opened, compared, arrays
):
    truth, (true, mean, draws) = opened[0], arrays
    found = compared[1][0].calibration
    assert found.empty == pytest.approx((true == 0).mean())
    assert found.empty_crps == pytest.approx(probabilistic.crps(true, 0 * true[None]).mean())
    assert found.width["0.8"] == pytest.approx(
        np.subtract(*probabilistic.interval(draws, 0.8)[::-1]).mean(), rel=1e-5
    )
    level = np.searchsorted(found.level_edges, mean)
    want = [(level == k).mean() for k in range(5)]
    np.testing.assert_allclose(found.level_shares, want, atol=1e-9)
    known = np.array(want) > 0
    each = np.array(found.by_level["0.8"])
    assert np.isfinite(each).tolist() == known.tolist()
    # each is a mean over the values of its bin, so that together they give the whole
    assert np.average(each[known], weights=np.array(want)[known]) == pytest.approx(
        found.coverage["0.8"]
    )
    np.testing.assert_allclose(found.total_edges, np.quantile(truth.total, [0.25, 0.5, 0.75]))
    quarter = np.searchsorted(found.total_edges, truth.total, side="right")
    weights = np.bincount(quarter, minlength=4)
    assert np.average(found.by_total["0.8"], weights=weights) == pytest.approx(
        found.coverage["0.8"]
    )


def test_intervals_and_differences(compared):
    model, mean, *_, random = compared[0]
    assert model.differences == {}
    for scores in compared[0]:
        for name, (low, high) in scores.intervals.items():
            assert low <= high
            assert low - 0.05 <= getattr(scores, name) <= high + 0.05, name
    assert mean.differences["energy_score"][1] < 0
    assert random.differences["crps"][1] < 0
    assert mean.differences["pcc_gene_median"][0] > 0.5


def test_one_draw_is_no_distribution(cells, opened):
    one = cells["model"].copy()
    for k in range(5):
        del one.layers[f"draw_{k}"]
    with pytest.warns(PhenoseqWarning, match="a single draw.*--keep-draws"):
        result = score(opened[0], open_prediction(one, opened[0], "it"))
    assert "crps" not in result.values
    assert result.values["variance_ratio"] > 0


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_files_in_another_order_give_the_same(cells, compared, tmp_path, suffix):
    order = np.random.default_rng(2).permutation(300)
    paths = {}
    for name, table in cells.items():
        table = table[order] if name == "model" else table
        paths[name] = tmp_path / f"{name}{suffix}"
        with ad.settings.override(zarr_write_format=3):
            (table.write_zarr if suffix == ".zarr" else table.write_h5ad)(paths[name])
    truth = open_truth(paths["truth"], paths["baselines"])
    result = score(truth, open_prediction(paths["model"], truth, "a model"))
    for name, value in compared[1][0].values.items():
        assert result.values[name] == pytest.approx(value, rel=1e-6), name
    found = open_baselines(paths["baselines"], truth)
    assert [p.name for p in found] == list(BASELINES.values())


def test_what_does_not_fit_is_refused(cells, opened):
    truth, _ = opened
    with pytest.raises(DataError, match="50 cells of the truth are missing"):
        open_prediction(cells["model"][53:], truth, "it")
    with pytest.raises(DataError, match="its genes are not those"):
        open_prediction(cells["model"][:, ::-1], truth, "it")
    other = cells["model"].copy()
    other.uns["phenoseq"]["median_library"] = 80.0
    with pytest.raises(DataError, match="scaled to 80 counts, the baselines to 60"):
        open_prediction(other, truth, "it")
    with pytest.raises(DataError, match="holds no baselines"):
        open_truth(cells["truth"], cells["model"])
    fewer = cells["baselines"].copy()
    del fewer.layers["regressor_nb"]
    with pytest.raises(DataError, match=re.escape("regressor + counting noise']; 'phenoseq")):
        open_baselines(fewer, truth)
    with pytest.raises(DataError, match="no column 'plate'"):
        open_truth(cells["truth"], cells["baselines"], group="plate")
    logged = cells["truth"].copy()
    logged.X = sparse.csr_matrix(np.log1p(logged.X.toarray()))
    with pytest.raises(DataError, match="are not raw counts"):
        open_truth(logged, cells["baselines"])
    endless = cells["truth"].copy()
    endless.X[5, 0] = np.inf
    with pytest.raises(DataError, match="are not raw counts"):
        open_truth(endless, cells["baselines"])
    none = cells["baselines"].copy()
    none.var["scored"] = False
    with pytest.raises(DataError, match="no gene is seen in more than 2%"):
        open_truth(cells["truth"], none)


@pytest.mark.parametrize("where", ["X", "draw_2"])
def test_a_prediction_that_is_no_number_is_refused(cells, opened, where):
    broken = cells["model"].copy()
    values = broken.X if where == "X" else broken.layers[where].toarray()
    values[7, 3] = np.nan
    if where != "X":
        broken.layers[where] = sparse.csr_matrix(values)
    with pytest.raises(DataError, match="it: predicts NaN or infinite values, first for cell"):
        score(opened[0], open_prediction(broken, opened[0], "it"))


def test_a_constant_has_no_coexpression(compared, opened, arrays):
    """In float32 too, where products of a constant are no zero."""
    assert [s.name for s in compared[0]][1] == "training mean"
    constant = np.broadcast_to(arrays[0].mean(axis=0), arrays[0].shape)
    want = metrics.coexpression_error(arrays[0], constant)
    assert compared[0][1].coexpression_error == pytest.approx(want, abs=1e-5)
    together = CoMoments(2, 3)
    for start in (0, 500):  # far from the first cells
        true = np.random.default_rng(start).normal(start, 1, (500, 3)).astype(np.float32)
        made = np.broadcast_to(np.float32([0.1, 7.7, 1e3]), true.shape)
        together.add(true, made, np.full(500, start // 500))
    assert (together.matrices()[1] == 0).all()


def test_group_means_of_right_draws_are_covered_as_often_as_said(cells):
    rng = np.random.default_rng(0)
    n_groups, size, k = 200, 60, 16
    rate = rng.gamma(2, 1, n_groups).repeat(size)[:, None]
    values = rng.poisson(rate, (k + 1, n_groups * size, 8)).astype(np.float32)
    truth = replace(
        open_truth(cells["truth"], cells["baselines"]),
        total=np.ones(n_groups * size),
        group=np.arange(n_groups).repeat(size),
        groups=np.arange(n_groups),
        genes=np.ones(8, dtype=bool),
        common=np.ones(8, dtype=bool),
    )
    covered = Covered(truth, k, seed=0)
    for some in np.array_split(np.arange(n_groups * size), 5):
        ordered = np.sort(values[1:, some], axis=0)
        covered.add(some, values[0, some], values[1, some], ordered)
        covered.add_group_means(truth.group[some], values[0, some], values[1:, some])
    for level, share in covered.result().group_means.items():
        assert share == pytest.approx(float(level), abs=0.03)


def test_json_is_plain(compared):
    text = json.dumps(as_json(compared[0], {"part": "test"}), allow_nan=False)
    assert json.loads(text)["scores"][0]["name"] == "a model"


# -------------------------------------------------------------------------------- block bootstrap


def test_resampling_groups_is_repeating_their_cells():
    """Weights give what the metric gives on cells drawn with their group."""
    rng = np.random.default_rng(0)
    true, other = rng.normal(size=(2, 60, 4))
    group = np.repeat(np.arange(6), 10)
    moments = Moments(6, 4)
    moments.add(true, other, group)
    weights = resamples(6, 20, seed=1)
    assert (weights.sum(axis=1) == 6).all()
    for row, value in zip(weights, moments.by_gene(weights), strict=True):
        cells = np.repeat(np.arange(60), row.astype(int)[group])
        np.testing.assert_allclose(value, metrics.pcc_gene(true[cells], other[cells]), atol=1e-9)


def test_resampled_e_distance_leaves_out_copies_of_a_cell():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 40, 3)).astype(np.float32)
    y += 0.5
    group = np.repeat(np.arange(4), 10)
    distance = PairDistances(x, y, group, 4)
    assert value_of(distance, 4) == pytest.approx(metrics.e_distance(x, y)[0], abs=1e-5)
    # twice the first two groups: the between-cell means over distinct cells, as of one copy
    some = PairDistances(x[:20], y[:20], group[:20], 2)
    twice = distance(np.array([[2.0, 2, 0, 0]]))[0]
    once = value_of(some, 2)
    assert twice == pytest.approx(once, abs=1e-5)
    assert once == pytest.approx(metrics.e_distance(x[:20], y[:20])[0], abs=1e-5)


def test_the_interval_of_a_mean_is_that_of_the_bootstrap():
    rng = np.random.default_rng(0)
    effect = rng.normal(size=200)
    group = np.repeat(np.arange(200), 5)
    means = Means(200)
    means.add(effect[group], group)
    low, high = interval(means(resamples(200, 2000)))
    error = effect.std() / np.sqrt(200)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert np.isnan(interval(np.full(5, np.nan))).all()
