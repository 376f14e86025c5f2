"""The example that tells labels of a store's cells."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from phenoseq.errors import DataError
from phenoseq.evaluation.report import normalised
from phenoseq.models.load import load_folder
from phenoseq.training import arms
from phenoseq.training.train import train

PATH = Path(__file__).parents[2] / "examples" / "section_labels.py"
SPEC = importlib.util.spec_from_file_location("section_labels", PATH)
section_labels = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(section_labels)


@pytest.mark.filterwarnings("ignore")
def test_labels_of_a_store(store, arguments, tmp_path, monkeypatch, capsys):
    model = train(arguments(epochs=1, **{"trainer.limit_train_batches": 2}))
    seen = []
    monkeypatch.setattr(
        arms._Task, "run", lambda self, arm, size, tests: seen.append(self.examples) or
        {"predicted": {part: self.truth(items).tolist() for part, items in tests.items()}},
    )  # fmt: skip
    out = tmp_path / "out"
    args = [str(store.path), str(out), "--model", str(model), "--device", "cpu", "--draws", "20"]
    with pytest.raises(DataError, match="graph_cluster"):
        section_labels.main(args)
    section_labels.main([*args, "--label", "Metadata_Treatment", "--cells", "40", "--epochs", "2"])
    facts = json.loads((out / "metrics.json").read_text())
    assert facts["cells"]["train"] == facts["cells"]["test"] == 40
    assert {r["arm"] for r in facts["scores"]} == set(arms.ARMS) - {"imaging + its bag"}
    assert "circular" in facts["note"]
    assert "circular" in capsys.readouterr().out
    examples, obs = seen[0], store.obs()
    for part in ("train", "test"):  # blocks, or wells here, are in one part
        here = set(examples.groups[examples.part == part])
        assert not here & set(examples.groups[examples.part != part])
    expression = load_folder(model).config.expression
    whole = normalised(store.counts(np.arange(len(obs))), expression.median_library)
    every = np.arange(len(examples.labels))
    real = examples.modalities["real"].take(every).numpy()
    for cell in every[::5]:
        row = np.flatnonzero((whole == real[cell]).all(axis=1))[0]
        assert examples.labels[cell] == obs["Metadata_Treatment"].iloc[row]
        assert examples.groups[cell] == obs["Metadata_Well"].iloc[row]
    synthetic = examples.modalities["synthetic"].take(every).numpy()
    assert np.isfinite(synthetic).all()
    assert not (synthetic == examples.modalities["shuffled"].take(every).numpy()).all()
