"""The nearest cells are exactly the nearest, whatever the blocks, and equal ones come in order."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import zarr
from scipy.spatial import distance

from phenoseq.errors import DataError
from phenoseq.inference import neighbours
from phenoseq.inference.neighbours import make_search, nearest

exact = make_search("exact")


def find(queries, reference, k, *, search=exact, without=None, **options):
    without = np.full(len(queries), -1) if without is None else np.asarray(without)
    queries = np.asarray(queries, dtype=np.float32)
    return nearest(queries, reference, k, search=search, without=without, **options)


@pytest.fixture
def points():
    """Queries and a reference whose offset and scale are unkind to |q|^2 + |r|^2 - 2qr."""
    rng = np.random.default_rng(0)
    reference = (50 + 0.1 * rng.standard_normal((500, 24))).astype(np.float32)
    queries = (50 + 0.1 * rng.standard_normal((90, 24))).astype(np.float32)
    return queries, reference


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 41 cells, and of few queries, of the points above."""
    monkeypatch.setattr(neighbours, "BLOCK", 41 * 24)
    monkeypatch.setattr(neighbours, "CHUNK", 7 * 24 * 26)


@pytest.mark.parametrize("k", [1, 10, 60])
@pytest.mark.parametrize("blocks", ["one", "many"])
def test_exactly_those_of_all_distances(points, k, blocks, request):
    if blocks == "many":
        request.getfixturevalue("small_blocks")
    queries, reference = points
    got = find(queries, reference, k)
    every = distance.cdist(queries.astype("f8"), reference.astype("f8"))
    order = every.argsort(axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(got.rows, order)
    want = np.take_along_axis(every, order, axis=1)
    np.testing.assert_allclose(got.distance, want, rtol=1e-12)


def test_faiss_finds_the_same(points, small_blocks):
    pytest.importorskip("faiss", reason="faiss is an optional extra: pip install 'phenoseq[faiss]'")
    queries, reference = (p - 50 for p in points)
    want, got = (find(queries, reference, 10, search=make_search(b)) for b in ("exact", "faiss"))
    np.testing.assert_array_equal(got.rows, want.rows)
    np.testing.assert_array_equal(got.distance, want.distance)


def test_faiss_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(DataError, match=r"pip install 'phenoseq\[faiss\]'"):
        make_search("faiss")


@pytest.mark.parametrize("kind", ["h5", "zarr"])
def test_a_reference_on_disk_is_read_in_blocks(points, small_blocks, tmp_path, kind):
    queries, reference = points
    if kind == "h5":
        on_disk = h5py.File(tmp_path / "r.h5", "w").create_dataset("e", data=reference)
    else:
        on_disk = zarr.create_array(tmp_path / "r.zarr", data=reference)
    want, got = find(queries, reference, 5), find(queries, on_disk, 5)
    np.testing.assert_array_equal(got.rows, want.rows)
    np.testing.assert_array_equal(got.distance, want.distance)


def test_blocks_and_other_queries_change_no_bit(points, request):
    queries, reference = points
    whole = find(queries, reference, 10)
    request.getfixturevalue("small_blocks")
    for rows in (slice(None), slice(3, 4), [70, 5, 31]):
        got = find(queries[rows], reference, 10)
        np.testing.assert_array_equal(got.rows, whole.rows[rows])
        np.testing.assert_array_equal(got.distance, whole.distance[rows])


def test_equal_distances_go_by_the_row(monkeypatch):
    """Copies of a cell, and cells on either side, across blocks."""
    reference = np.array([[3.0], [1.0], [-1.0], [1.0], [5.0], [1.0], [-1.0]], dtype=np.float32)
    for block in (1, 2, 3, 100):
        monkeypatch.setattr(neighbours, "BLOCK", block)
        got = find([[0.0], [1.0]], reference, 4)
        assert got.rows.tolist() == [[1, 2, 3, 5], [1, 3, 5, 0]]
        assert got.distance.tolist() == [[1, 1, 1, 1], [0, 0, 0, 2]]


def test_a_row_left_out_is_not_its_copy(monkeypatch):
    reference = np.array([[0.0], [2.0], [0.0], [5.0]], dtype=np.float32)
    for block in (1, 4):
        monkeypatch.setattr(neighbours, "BLOCK", block)
        got = find(reference, reference, 2, without=[0, 1, 2, -1])
        assert got.rows.tolist() == [[2, 1], [0, 2], [0, 1], [3, 1]]
        assert got.distance.tolist() == [[0, 2], [2, 2], [0, 2], [0, 3]]


def test_a_block_is_one_cell_at_least(points, monkeypatch):
    queries, reference = points[0][:5], points[1][:20]
    whole = find(queries, reference, 3)
    monkeypatch.setattr(neighbours, "BLOCK", 5)
    monkeypatch.setattr(neighbours, "CHUNK", 5)
    got = find(queries, reference, 3)
    np.testing.assert_array_equal(got.rows, whole.rows)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reference_that_is_not_finite_is_refused_by_row(points, small_blocks, value):
    queries, reference = points
    reference[[99, 104], 3] = value
    with pytest.raises(DataError, match=r"not finite in 2 cells, e\.g\. rows \[99, 104\]"):
        find(queries, reference, 3)


def test_progress_counts_rows(points, small_blocks):
    seen = []
    find(*points, 3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(min(n, 500), 500) for n in range(41, 541, 41)]
