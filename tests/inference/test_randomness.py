"""A cell's random numbers: its own, the same wherever it is predicted, and truly random."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from phenoseq.inference.randomness import cell_normals, cell_uniforms

CELLS = [f"cell{i}" for i in range(400)]
both = pytest.mark.parametrize("draw", [cell_normals, cell_uniforms])


@both
def test_numbers_go_with_the_cell_and_not_with_its_place(draw):
    whole = draw(3, CELLS, 4, 5)
    assert whole.shape == (400, 4, 5)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(draw(3, CELLS[::-1], 4, 5), whole[::-1])
    np.testing.assert_array_equal(draw(3, CELLS[17:18], 4, 5), whole[17:18])


@both
def test_seed_and_cell_both_count(draw):
    whole = draw(3, CELLS, 2, 5)
    assert (whole != draw(4, CELLS, 2, 5)).any(axis=(1, 2)).all()
    assert len(np.unique(whole[:, 0, 0])) == len(CELLS)


@both
def test_seed_and_cell_are_not_run_together(draw):
    """Seed 1 of cell "1x" is not seed 11 of cell "x"."""
    assert not np.array_equal(draw(1, ["1x"], 1, 4), draw(11, ["x"], 1, 4))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_first_samples_stay_when_more_are_drawn(n):
    more = cell_uniforms(0, CELLS[:5], 8, 3)
    np.testing.assert_array_equal(cell_uniforms(0, CELLS[:5], n, 3), more[:, :n])
    more = cell_normals(0, CELLS[:5], 8, 3)
    np.testing.assert_array_equal(cell_normals(0, CELLS[:5], n, 3), more[:, :n])


def test_distributions():
    normal, uniform = cell_normals(0, CELLS, 2, 30), cell_uniforms(0, CELLS, 2, 30)
    assert stats.kstest(normal[:, 0].ravel(), "norm").pvalue > 0.01
    assert stats.kstest(uniform.ravel(), "uniform").pvalue > 0.01
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_cells_samples_and_purposes_are_independent():
    normal = cell_normals(0, CELLS, 3, 30)
    uniform = cell_uniforms(0, CELLS, 2, 30)
    columns = {
        "neighbours": (normal[:-1, 0], normal[1:, 0]),
        "samples": (normal[:, 0], normal[:, 1]),
        "samples further apart": (normal[:, 0], normal[:, 2]),
        "noise and counts": (normal[:, 0], uniform[:, 0]),
        "samples of counts": (uniform[:, 0], uniform[:, 1]),
        "seeds": (normal[:, 0], cell_normals(1, CELLS, 1, 30)[:, 0]),
    }
    for name, (a, b) in columns.items():
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.04, name
