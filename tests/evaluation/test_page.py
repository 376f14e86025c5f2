"""The report in a real browser: it loads offline, searches, redraws, and fits a phone."""

from __future__ import annotations

import base64
import json
import sys

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from phenoseq.evaluation import page
from phenoseq.evaluation.compare import compare
from phenoseq.evaluation.page import write_page
from phenoseq.evaluation.tables import BASELINES, open_baselines, open_prediction, open_truth


class FakeStore:
    """Has a crop for every cell."""

    def __init__(self, obs):
        self._obs = obs
        self.manifest = type("Manifest", (), {"channels": ("DNA", "ER", "RNA", "Mito")})()

    def obs(self):
        return self._obs

    def take(self, rows):
        return np.random.default_rng(0).integers(0, 900, (len(rows), 4, 16, 16), dtype=np.uint16)


@pytest.fixture(scope="module")
def report(cells, tmp_path_factory):
    """A report of a model whose name and genes would break a careless page."""
    cells = {name: table.copy() for name, table in cells.items()}
    cells["truth"].var["symbol"] = [
        "</script><b>X",
        "ACTB",
        "actg1",
        "CD3E",
        "G$1",
        "É",
        "G7",
        "G8",
    ]
    truth = open_truth(cells["truth"], cells["baselines"])
    model = open_prediction(cells["model"], truth, "<i>my</i> model")
    everything = [model, *open_baselines(cells["baselines"], truth)]
    scores, results = compare(truth, everything, n_resamples=50)
    facts = {
        "n_cells": 297,
        "n_groups": 6,
        "n_genes": 7,
        "model": "<i>my</i> model",
        "x": float("nan"),
    }
    facts["calibration"] = {r.name: vars(r.calibration) for r in results if r.calibration}
    path = tmp_path_factory.mktemp("report") / "report.html"
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, "umap", None)  # as where it is not installed
    write_page(path, truth, model, scores, results, facts, FakeStore(cells["truth"].obs))
    patch.undo()
    return path


def test_one_file_that_asks_for_nothing(report):
    text = report.read_text()
    assert len(text.encode()) < 10_000_000
    own = text.replace(get_plotlyjs(), "")
    for outside in ("http://", "https://", 'src="//', "@import", "url("):
        assert outside not in own, outside
    assert "<b>X" not in own
    assert sorted(p.name for p in report.parent.iterdir()) == ["report.html"]


def test_wells_are_told_apart_by_plate(cells):
    table = cells["truth"].copy()
    table.obs["Metadata_Well"] = "A01"
    alone = page._places(open_truth(table, cells["baselines"]), np.arange(2))
    assert alone == {"kind": "plate", "plate": ["", ""], "well": ["A01", "A01"]}
    table.obs["Metadata_Plate"] = np.where(np.arange(len(table)) < 100, "p1", "p2")
    places = page._places(open_truth(table, cells["baselines"]), np.array([0, 200]))
    assert places == alone | {"plate": ["p1", "p2"]}


def test_umap_where_it_is_installed(monkeypatch):
    class Fake:
        def __init__(self, **how):
            assert how["random_state"] == 3

        def fit_transform(self, x):
            return x[:, 1::-1] * 2

    monkeypatch.setitem(sys.modules, "umap", type("umap", (), {"UMAP": Fake}))
    true, draw = np.random.default_rng(0).random((2, 30, 5)).astype(np.float32)
    assert page._embedding(true, draw, 3)["how"] == "UMAP"
    monkeypatch.setitem(sys.modules, "umap", None)
    placed = page._embedding(true, draw, 3)
    assert placed["how"] == "PCA"
    assert np.shape(placed["true"]) == np.shape(placed["draw"]) == (2, 30)


def test_fewer_cells_than_components_are_placed(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    true, draw = np.random.default_rng(0).random((2, 20, 45)).astype(np.float32)
    assert np.shape(page._embedding(true, draw, 0)["draw"]) == (2, 20)


def test_packed_values_come_back():
    values = np.array([[0.0, 2.0], [1.0, 4.0]], dtype=np.float32)
    packed = page._packed(values)
    steps = np.frombuffer(base64.b64decode(packed["bytes"]), np.uint8).reshape(2, 2)
    np.testing.assert_allclose(steps.T / 255 * packed["top"], values, atol=0.01)


# ------------------------------------------------------------------------------------- in a browser


@pytest.mark.long
def test_in_a_browser(browse, report):
    """One visit, since starting a browser takes longest."""

    async def steps(browser):
        assert await browser.run("document.title") == "<i>my</i> model: evaluation"
        plots = await browser.run("document.querySelectorAll('.plot .main-svg').length")
        assert plots >= 7
        rows = "document.querySelectorAll('#score-table tbody tr').length"
        assert await browser.run(rows) == 1 + len(BASELINES)
        # the search filters, whatever the case
        names = (
            "[...document.querySelectorAll('#gene-table tbody td:first-child')]"
            ".map(x => x.textContent)"
        )
        assert len(await browser.run(names)) == 7
        await browser.run("document.getElementById('search').focus()")
        await browser.call("Input.insertText", text="act")
        assert sorted(await browser.run(names)) == ["ACTB", "actg1"]
        assert "2 of 7 genes" in await browser.run("document.getElementById('found').textContent")
        # by keyboard alone: past the table's frame to the second gene, whose choice redraws
        title = "document.querySelector('#scatter .gtitle').textContent"
        drawn = "document.querySelector('#scatter').data[0].y.join()"
        before = await browser.run(drawn)
        second = (await browser.run(names))[1]
        for _ in range(3):
            await browser.press("Tab", 9)
        assert await browser.run("document.activeElement.tagName") == "BUTTON"
        assert await browser.run("document.activeElement.textContent") == second
        await browser.press("Enter", 13, text="\r")
        await browser.until(f"{title} === {json.dumps(second)}")
        assert await browser.run(drawn) != before
        # the list does the same
        await browser.run(
            "(() => { const c = document.getElementById('choice'); c.selectedIndex = 6;"
            "c.dispatchEvent(new Event('change')); })()"
        )
        chosen = await browser.run(
            "document.getElementById('choice').selectedOptions[0].textContent"
        )
        await browser.until(f"{title} === {json.dumps(chosen)}")
        # coverage: by level, by total counts (in quarters) and by predicted level (in five)
        for table, columns in (("coverage", 10), ("strata", 2 + 4 + 5)):
            heads = f"document.querySelectorAll('#{table} thead th').length"
            assert await browser.run(heads) == columns
            row = f"document.querySelector('#{table} tbody tr').children.length"
            assert await browser.run(row) == columns
        # every control can be reached, has a name, and every picture says what it is
        bare = (
            "[...document.querySelectorAll('input, select, button, a, [role=img], img')]"
            ".filter(x => !(x.textContent.trim() || x.ariaLabel || x.alt"
            " || x.labels && x.labels.length)).length"
        )
        assert await browser.run(bare) == 0
        assert await browser.run("document.querySelectorAll('[tabindex=\"-1\"]').length") == 0
        assert await browser.run("document.querySelectorAll('#cards img').length") == 12
        # readable at both widths: nothing sticks out of the window, text is not tiny
        for width in (1280, 400):
            await browser.wide(width)
            await browser.until(
                "document.querySelector('#scatter .main-svg').clientWidth < innerWidth"
            )
            assert await browser.run("document.documentElement.scrollWidth") <= width
            size = await browser.run("parseFloat(getComputedStyle(document.body).fontSize)")
            assert size >= 16
            small = await browser.run("document.querySelector('#scatter .main-svg').clientWidth")
            assert small >= 300

    browse(report, steps)
