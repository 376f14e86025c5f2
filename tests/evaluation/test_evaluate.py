"""``phenoseq evaluate`` on what exists already: files in, a folder of tables and a page out."""

from __future__ import annotations

import json

import h5py
import pandas as pd
import pytest

from phenoseq.cli import main
from phenoseq.evaluation import page
from phenoseq.evaluation.tables import BASELINES


@pytest.fixture(scope="module")
def paths(cells, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    for name, table in cells.items():
        table.write_h5ad(folder / f"{name}.h5ad")
    return folder


def arguments(paths, out):
    given = [paths / f"{name}.h5ad" for name in ("model", "truth", "baselines")]
    return ["evaluate", str(given[0]), str(given[1]), "--baselines", str(given[2]), "-o", str(out)]


def test_what_exists_is_scored(paths, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(page, "_embedding", lambda *_: {"how": "PCA", "true": [[]], "draw": [[]]})
    assert main(arguments(paths, tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "| model |" in said
    assert "| training mean |" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "calibration.parquet",
        "cells.parquet",
        "genes.parquet",
        "metrics.json",
        "metrics.md",
        "report.html",
        "scores.parquet",
    ]
    facts = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (facts["n_cells"], facts["n_groups"], facts["n_genes"]) == (297, 6, 7)
    assert [s["name"] for s in facts["scores"]][1:] == list(BASELINES.values())
    assert facts["regressor"] == {"config": {"epochs": 3}, "encoder_weights": {}, "steps": 40}
    low, high = facts["scores"][1]["differences"]["energy_score"]
    assert low <= high < 0
    scores = pd.read_parquet(tmp_path / "out/scores.parquet")
    assert scores.loc["model", "energy_score"] == pytest.approx(facts["scores"][0]["energy_score"])
    assert scores.loc["training mean", "energy_score_differences_high"] == pytest.approx(high)
    genes = pd.read_parquet(tmp_path / "out/genes.parquet")
    assert genes["model"].isna().tolist() == [False] * 7 + [True]
    cells = pd.read_parquet(tmp_path / "out/cells.parquet")
    assert len(cells) == 297
    assert cells["model"].mean() == pytest.approx(scores.loc["model", "energy_score"])
    coverage = pd.read_parquet(tmp_path / "out/calibration.parquet")
    assert set(coverage["level"]) == {0.5, 0.8, 0.9}
    assert coverage["crps"][0] == pytest.approx(facts["scores"][0]["crps"])
    assert len(set(coverage["empty_crps"])) == 1  # the empty answer is the same to all


def test_baselines_cannot_be_left_out(paths, tmp_path, capsys):
    given = arguments(paths, tmp_path / "out")
    assert main([a for a in given if a != "--baselines" and "baselines.h5ad" not in a]) == 1
    assert "Baselines are part of every report" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--split", "val"), ("--n-samples", "4"), ("--encoder-weights", "hub")]
)
def test_options_that_would_say_nothing_are_refused(paths, tmp_path, capsys, option, value):
    assert main([*arguments(paths, tmp_path / "out"), option, value]) == 1
    assert f"{option}: nothing is predicted or fitted" in capsys.readouterr().err
    assert main(["evaluate", "--model", "m", "--store", "s", "--group", "g"]) == 1
    assert "--group: a model is scored by the groups of its split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("out", "is a file; name a folder"),
        ("text", "is no AnnData"),
        ("empty", "is no AnnData"),
        ("h5", "is no AnnData, it has no 'var'"),
    ],
)
def test_what_cannot_be_read_or_written_is_told(paths, tmp_path, capsys, broken, told):
    file = tmp_path / "it"
    if broken == "empty":
        file.mkdir()
    elif broken == "h5":
        h5py.File(file, "w").close()
    else:
        file.write_text("nothing")
    given = arguments(paths, file if broken == "out" else tmp_path / "out")
    if broken != "out":
        given[given.index("--baselines") + 1] = str(file)
    assert main(given) == 1
    assert told in capsys.readouterr().err
