"""The table of scores, and what it rests on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import sparse

from phenoseq.evaluation.report import Scores, as_json, markdown, normalised, scored_genes


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


@pytest.fixture
def old():
    """A row as the first versions wrote it."""
    return Scores("a model", 0.1234, 0.2, 0.3, 0.45678, 0.9, 0.1, 0.01)


def test_markdown_has_a_row_each_and_as_many_cells_as_its_head(old):
    rows = markdown([old]).splitlines()
    assert len(rows) == 3
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2] == "| a model | 0.123 | 0.200 | 0.300 | 0.4568 | 0.90 | 0.100 ± 0.010 |"


def test_columns_that_one_row_has_stand_for_all(old):
    new = Scores("new", *[0.5] * 7, crps=0.12345, energy_score=2.0)
    rows = markdown([old, new]).splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert rows[0].endswith("| `crps` | `energy_score` |")
    assert rows[2].endswith("|  |  |")
    assert rows[3].endswith("| 0.1235 | 2.000 |") or rows[3].endswith("| 0.1234 | 2.000 |")


def test_json_says_none_for_what_is_no_number(old):
    raw = as_json([old], {"part": "test", "x": float("nan"), "y": (1.0, float("inf"))})
    again = json.loads(json.dumps(raw, allow_nan=False))
    assert (again["part"], again["x"], again["y"]) == ("test", None, [1.0, None])
    assert Scores(**again["scores"][0]) == old
