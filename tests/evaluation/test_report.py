"""Scores of one prediction, of several, and the table of them."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from phenoseq.errors import DataError
from phenoseq.evaluation.metrics import e_distance, variance_ratio
from phenoseq.evaluation.report import (
    Scores,
    as_json,
    markdown,
    normalised,
    score,
    score_all,
    scored_genes,
)

ALL = np.ones(4, dtype=bool)


@pytest.fixture
def truth():
    return np.random.default_rng(0).gamma(2, 1, (60, 4)).astype(np.float32)


def prediction(mean, draw=None) -> ad.AnnData:
    return ad.AnnData(np.asarray(mean, np.float32), layers={} if draw is None else {"draw": draw})


def test_normalised_is_log1p_at_the_median_library():
    counts = sparse.csr_matrix([[1.0, 3, 0], [0, 0, 0], [10, 0, 10]])
    out = normalised(counts, 8.0)
    np.testing.assert_allclose(
        out, [np.log1p([2, 6, 0]), np.zeros(3), np.log1p([4, 0, 4])], rtol=1e-6
    )
    assert out.dtype == np.float32
    assert isinstance(out, np.ndarray)


def test_scored_genes_are_seen_in_more_than_two_percent_of_cells():
    counts = np.zeros((100, 4))
    counts[:2, 1], counts[:3, 2], counts[:, 3] = 50, 1, 1
    assert scored_genes(sparse.csr_matrix(counts)).tolist() == [False, False, True, True]


def test_a_perfect_prediction(truth):
    scores, each = score("it", truth, prediction(truth, truth), ALL)
    assert scores.name == "it"
    np.testing.assert_allclose(each, 1, atol=1e-6)
    for value in (scores.pcc_gene_median, scores.pcc_gene_mean, scores.pcc_gene_top50):
        assert value == pytest.approx(1)
    assert scores.mse == 0
    assert scores.variance_ratio == 1
    assert scores.e_distance < 0


def test_mean_and_draw_are_each_scored_for_what_they_are(truth):
    rng = np.random.default_rng(1)
    mean, draw = truth + 0.5, (truth + rng.normal(0, 1, truth.shape)).astype(np.float32)
    for layer in (draw, sparse.csr_matrix(draw)):
        scores, _ = score("it", truth, prediction(mean, layer), ALL)
        assert scores.mse == pytest.approx(0.25, rel=1e-5)
        assert scores.variance_ratio == pytest.approx(variance_ratio(truth, draw))
        distance = e_distance(truth, draw)
        assert (scores.e_distance, scores.e_distance_se) == pytest.approx(distance)
    without, _ = score("it", truth, prediction(mean), ALL)
    assert without.variance_ratio == pytest.approx(1, rel=1e-5)


def test_unscored_genes_do_not_count(truth):
    mean = truth.copy()
    mean[:, 1] = 1e3 * np.random.default_rng(0).normal(size=60)
    genes = np.array([True, False, True, True])
    scores, each = score("it", truth, prediction(mean, mean), genes)
    assert np.isnan(each[1])
    assert scores.mse == 0
    assert scores.pcc_gene_mean == pytest.approx(1)
    assert scores.e_distance < 0


def test_median_mean_and_top_fifty():
    """100 genes, of which the k-th is correlated as k / 100."""
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(np.c_[np.ones(300), rng.normal(size=(300, 200))])[0][:, 1:]
    wanted = np.arange(100) / 100
    truth = basis[:, :100]
    mean = wanted * truth + np.sqrt(1 - wanted**2) * basis[:, 100:]
    order = rng.permutation(100)
    scores, each = score("it", truth[:, order].astype("f4"), prediction(mean[:, order]), order >= 0)
    np.testing.assert_allclose(each, wanted[order], atol=1e-4)
    assert scores.pcc_gene_median == pytest.approx(0.495, abs=1e-4)
    assert scores.pcc_gene_mean == pytest.approx(0.495, abs=1e-4)
    assert scores.pcc_gene_top50 == pytest.approx(0.745, abs=1e-4)


def test_other_cells_or_genes_are_refused(truth):
    for other in (truth[:-1], truth[:, :3]):
        with pytest.raises(DataError, match="it: predicts"):
            score("it", truth, prediction(other), ALL)


def test_no_gene_to_score_is_refused(truth):
    with pytest.raises(DataError, match="no gene is seen in more than 2%"):
        score("it", truth, prediction(truth), ~ALL)


def test_all_are_scored_in_their_order(truth):
    flat = np.broadcast_to(truth.mean(axis=0), truth.shape)
    scores, each = score_all(truth, {"model": prediction(truth), "mean": prediction(flat)}, ALL)
    assert [s.name for s in scores] == ["model", "mean"]
    assert list(each) == ["model", "mean"]
    assert scores[1].pcc_gene_median == scores[1].variance_ratio == 0


def test_markdown_has_a_row_each_and_as_many_cells_as_its_head():
    rows = markdown([Scores("a model", 0.1234, 0.2, 0.3, 0.45678, 0.9, 0.1, 0.01)]).splitlines()
    assert len(rows) == 3
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2] == "| a model | 0.123 | 0.200 | 0.300 | 0.4568 | 0.90 | 0.100 ± 0.010 |"


def test_json_is_plain(truth):
    scores, _ = score("it", truth, prediction(truth), ALL)
    raw = json.loads(json.dumps(as_json([scores], {"part": "test"})))
    assert raw["part"] == "test"
    assert raw["scores"][0]["name"] == "it"
    assert raw["scores"][0]["mse"] == 0
