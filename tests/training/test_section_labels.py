"""The example that tells labels of a store's cells."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest
import zarr

from phenoseq.data.datamodule import split_of
from phenoseq.data.samplestore import SampleStore
from phenoseq.data.simulate import simulate_plate
from phenoseq.data.splits import SplitConfig
from phenoseq.errors import DataError, ModelError
from phenoseq.evaluation.report import normalised
from phenoseq.models.load import load_folder
from phenoseq.training import arms
from phenoseq.training.train import train

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quick")]
FEW = {"trainer.limit_train_batches": 2, "data.max_val": 20, "model.sample_every": 5}


@pytest.fixture
def section_labels(example):
    return example("section_labels")


@pytest.fixture
def seen(monkeypatch):
    """Give the examples that arms are run on; none is."""
    found = []
    monkeypatch.setattr(
        arms._Task, "run", lambda self, arm, size, tests: found.append(self.examples) or
        {"predicted": {part: self.truth(items).tolist() for part, items in tests.items()}},
    )  # fmt: skip
    return found


def test_labels_of_a_store(section_labels, store, arguments, tmp_path, seen, capsys):
    model = train(arguments(epochs=1, **FEW))
    out = tmp_path / "out"
    args = [str(store.path), str(out), "--model", str(model), "--device", "cpu", "--draws", "20"]
    with pytest.raises(DataError, match="graph_cluster"):
        section_labels.main([*args[:1], str(tmp_path / "none"), *args[2:]])
    args += ["--label", "Metadata_Treatment", "--epochs", "2"]
    section_labels.main([*args, "--cells", "40"])
    with pytest.raises(ModelError, match="cells is 30, and was 40"):
        section_labels.main([*args, "--cells", "30"])
    facts = json.loads((out / "metrics.json").read_text())
    assert facts["cells"]["train"] == facts["cells"]["test"] == 40
    assert {r["arm"] for r in facts["scores"]} == set(arms.ARMS) - {"imaging + its bag"}
    assert "circular" in facts["note"]
    assert "circular" in capsys.readouterr().out
    examples, obs = seen[0], store.obs()
    for part in ("train", "test"):  # blocks, or wells here, are in one part
        here = set(examples.groups[examples.part == part])
        assert not here & set(examples.groups[examples.part != part])
    whole = normalised(store.counts(np.arange(len(obs))), model_median(model))
    every = np.arange(len(examples.labels))
    real = examples.modalities["real"].take(every).numpy()
    for cell in every[::5]:
        row = np.flatnonzero((whole == real[cell]).all(axis=1))[0]
        assert examples.labels[cell] == obs["Metadata_Treatment"].iloc[row]
        assert examples.groups[cell] == obs["Metadata_Well"].iloc[row]
    synthetic = examples.modalities["synthetic"].take(every).numpy()
    assert np.isfinite(synthetic).all()
    assert not (synthetic == examples.modalities["shuffled"].take(every).numpy()).all()


@pytest.mark.long
def test_models_of_samples(example, section_labels, store, arguments, tmp_path, seen):
    """A model that knows blocks and labels of cells, and not which RNA is of which."""
    plate = simulate_plate(seed=4, wells_per_treatment=6, sites_per_well=1, cells_per_site=25)
    samples = tmp_path / "samples.zarr"
    example("section_samples").main(plate.source, store, samples, "Metadata_Treatment")
    written = SampleStore(samples)
    parts = split_of(store, SplitConfig()).part
    assert (
        len(written.image_obs()) == len(written.rna_obs()) == np.isin(parts, ["train", "val"]).sum()
    )
    assert set(written.image_obs()["part"]) == {"train", "val"}
    split = "{by: part, block: null, declared: {train: [train], val: [val]}}"
    how = {"data.store": samples, "data.split": split, "data.n_images": 3, "data.batch_size": 8}
    model = train(["--data", "SampleDataModule", *arguments(epochs=1, **FEW, **how)])
    out = tmp_path / "out"
    args = [str(store.path), str(out), "--model", str(model), "--device", "cpu", "--draws", "20"]
    section_labels.main([*args, "--label", "Metadata_Treatment", "--cells", "30", "--epochs", "2"])
    examples = seen[0]
    assert examples.arms == list(arms.ARMS)
    read = examples.modalities
    bag = read["context"].rows
    for one in np.unique(bag):
        cells = np.flatnonzero(bag == one)
        assert len(cells) <= 3
        assert len(set(examples.groups[cells])) == len(set(examples.labels[cells])) == 1
        if len(cells) == 3:
            mean = read["imaging"].take(cells[None])
            np.testing.assert_allclose(read["context"].take(cells[:1]), mean, rtol=1e-4, atol=1e-5)
    drawn = zarr.open_group(out / "work" / "prediction.zarr", mode="r")
    ids = store.obs().index
    first = json.loads(ad.io.read_elem(drawn["obs"])["cells"].iloc[0])
    values = ad.io.read_elem(drawn["layers/draw_1"])[0].toarray()
    at = np.flatnonzero((read["synthetic"].values == values).all(axis=1))
    real = normalised(store.counts(ids.get_indexer([first[1]])), model_median(model))
    np.testing.assert_array_equal(read["real"].take(at[:1]).numpy(), real)


def model_median(model):
    return load_folder(model).config.expression.median_library
