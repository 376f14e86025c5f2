"""Fine-tuning of models of samples: what is kept, what is frozen, bags of tokens, and refusals."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import phenoseq
from phenoseq import tuning
from phenoseq.cli import main
from phenoseq.data.backed import Cells
from phenoseq.data.samplemodule import SampleDataModule
from phenoseq.data.samplewriter import RnaConfig, write_sample_store
from phenoseq.data.selection import SelectedSampleStore
from phenoseq.data.simulate import PIXEL_SIZE, simulate_plate
from phenoseq.data.splits import SplitConfig
from phenoseq.errors import DataError, ModelError, PhenoseqWarning
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.files import digest_of_model
from phenoseq.models.published_config import FeatureConfig
from phenoseq.models.sample import SamplePhenoSeq
from phenoseq.training.finetune import FinetuneModule
from phenoseq.training.finetunedata import open_data, with_tokens
from phenoseq.training.module import PhenoSeqModule

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quick")]
SPLIT = SplitConfig(by="Metadata_Replicate", block=None, test=0.2, val=0.2, cal=0)
PROTOCOL = SplitConfig(
    by="Replicate", block=None, declared={"train": ["3", "4"], "val": ["5"], "test": ["1", "2"]}
)
SAMPLE = ["Metadata_Treatment", "Metadata_Replicate"]


def untrained(store, split, **how) -> SamplePhenoSeq:
    """A small model that has seen a store but was not trained."""
    data = SampleDataModule(store.path, split, n_images=4, n_rna=2)
    data.setup()
    module = PhenoSeqModule(
        encoder=EncoderConfig("test_resnet"), denoiser=DenoiserConfig(32, 2, 2, 2),
        components=6, hidden=16, **how,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phenoseq.models.expression._MIN_STEPS", 20)
        torch.manual_seed(0)
        return module.build(data)[0].eval()


@pytest.fixture(scope="module")
def base(counted) -> SamplePhenoSeq:
    """Of crops and counts."""
    return untrained(counted, SPLIT)


@pytest.fixture(scope="module")
def reader(embedded) -> SamplePhenoSeq:
    """Of features and embeddings."""
    stains = ("DNA", "RNA", "AGP", "Mito", "ER")
    return untrained(embedded, PROTOCOL, features=FeatureConfig("statistics", stains, 1))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A store of another plate: its genes in another order, six of them unknown to the base."""
    plate = simulate_plate(
        seed=7, treatments=("DMSO", "drugA", "drugB"), wells_per_treatment=5, sites_per_well=1,
        cells_per_site=10,
    )  # fmt: skip
    source = plate.source
    order = np.random.default_rng(0).permutation(len(source.var))
    var = source.var.iloc[order].rename_axis(None)
    var.index = [f"NEW{i}" if i < 6 else gene for i, gene in enumerate(var.index)]
    var["symbol"] = [f"NEW{i}" if i < 6 else name for i, name in enumerate(var["symbol"])]
    rna = ad.AnnData(source.counts[:, order], obs=source.obs, var=var)
    path = tmp_path_factory.mktemp("other") / "store.zarr"
    return write_sample_store(
        source, Cells(rna), path, columns=SAMPLE, pixel_size=PIXEL_SIZE, crop_px=32
    )[0]


@pytest.fixture
def no_training(monkeypatch):
    """Leave out the training, and what a model learns about itself."""
    monkeypatch.setattr(tuning, "fit", lambda *args, **how: None)
    monkeypatch.setattr(FinetuneModule, "finish", lambda self, data, device: self.model)


def tuned(base, store, **how):
    return phenoseq.finetune(base, store.path, **{"epochs": 1, "device": "cpu", **how})


def losses(root):
    return pd.read_csv(root / "metrics.csv")["val_loss"].dropna().to_numpy()


# ----------------------------------------------------------------------------------- what comes out


def test_the_command_makes_a_better_model_and_leaves_the_old_one(base, other, tmp_path, capsys):
    folder, out, run = base.save(tmp_path / "base"), tmp_path / "new", tmp_path / "new.run"
    before = digest_of_model(base)
    genes = tmp_path / "genes.txt"
    genes.write_text("\n".join(other.manifest.genes[:50]))
    options = ["--channels", "DNA,RNA,AGP", "--genes", genes, "--epochs", 6, "--lr", 5e-3]
    args = ["finetune", folder, other.path, "--out", out, "--device", "cpu", *options]
    assert main([str(a) for a in args]) == 0
    said = capsys.readouterr().out
    assert "44 shared" in said
    assert "6 new (NEW0" in said
    assert "stains: 3 shared (DNA, RNA, AGP), 0 new, 2 dropped (" in said
    assert f"phenoseq predict SOURCE --model {out} --sample COLUMN" in said
    seen = losses(run)
    assert seen.min() < 0.95 * seen[0]
    assert sorted(p.name for p in run.iterdir()) == [  # the tokens are gone
        "checkpoints", "config.yaml", "kept.json", "metrics.csv",
    ]  # fmt: skip
    kept = json.loads((run / "kept.json").read_text())
    assert len(kept["expression"]["genes"]["shared"]) == 44

    new = phenoseq.load_model(out)
    assert isinstance(new, SamplePhenoSeq)
    assert digest_of_model(base) == before == digest_of_model(phenoseq.load_model(folder))
    assert new.config.bag_size == base.config.bag_size
    assert new.config.cells.channels == ("DNA", "RNA", "AGP")
    record = new.config.training
    assert (record.base["digest"], record.base["freeze"]) == (before, "encoder")
    assert record.split == base.config.training.split
    assert record.n_cells <= 10 * 9  # nine samples of ten cells, less those without counts
    plate = simulate_plate(seed=7, wells_per_treatment=1, sites_per_well=1, cells_per_site=6)
    made = phenoseq.predict(
        plate.source, model=new, sample="Metadata_Well", n_samples=2, device="cpu"
    )
    assert list(made.var_names) == list(other.manifest.genes[:50])
    assert np.isfinite(made.X).all()


@pytest.mark.parametrize(
    ("freeze", "moved"),
    [
        ("encoder", {"denoiser"}),
        ("none", {"encoder", "denoiser"}),
        ("all-but-head", {"denoiser.inward", "denoiser.last", "denoiser.outward"}),
    ],
)
@pytest.mark.parametrize("kind", ["crops", "features"])
def test_what_is_frozen_stays(base, reader, counted, embedded, freeze, moved, kind):
    model, store = (base, counted) if kind == "crops" else (reader, embedded)
    new, old = tuned(model, store, freeze=freeze).state_dict(), model.state_dict()
    changed = {
        name for name in old
        if name.startswith(("encoder", "denoiser")) and not torch.equal(old[name], new[name])
    }  # fmt: skip
    assert all(name.startswith(tuple(moved)) for name in changed)
    assert {part for part in moved if any(n.startswith(part) for n in changed)} == moved


def test_features_are_standardised_anew_and_the_embedding_stays(embedded, no_training):
    """Features of other instruments are shifted and scaled; an embedding is one and the same."""
    moved = untrained(embedded, PROTOCOL, features=FeatureConfig("statistics", (), 1))
    with torch.no_grad():
        moved.encoder.mean += 3.0
        moved.encoder.std *= 2.0
        moved.expression.mean += 1.0
    told = []
    new = tuned(moved, embedded, report=told.append)
    data = SampleDataModule(embedded.path, PROTOCOL)
    data.setup()
    features = data.image_sample("train", 10**6)
    np.testing.assert_allclose(new.encoder.mean, features.mean(axis=0), rtol=1e-4, atol=1e-5)
    assert torch.equal(new.expression.mean, moved.expression.mean)
    assert torch.equal(new.denoiser.inward.weight, moved.denoiser.inward.weight)
    assert told[0].splitlines() == [
        "embedding: as the base model's", "features: as many a cell as the base model reads",
    ]  # fmt: skip


# ------------------------------------------------------------------------------ bags and selections


def test_cached_bags_are_those_of_the_crops(base, counted, tmp_path, monkeypatch):
    """Also of samples that are filled, having fewer cells than a bag."""
    monkeypatch.setattr(base, "config", replace(base.config, bag_size=12))
    data = open_data(counted.path, base, None, channels=None, genes=None, seed=3)
    cached = with_tokens(data, base, tmp_path)
    module = FinetuneModule(base, freeze="encoder", new_stains=False, lr=1.0, seed=0)
    for loader in ("train_dataloader", "val_dataloader"):
        pairs = list(zip(getattr(data, loader)(), getattr(cached, loader)(), strict=True))
        assert len(pairs) > 1
        for crops, tokens in pairs:
            for name in ("rows", "image_rows", "keep", "keep_rna", "sample"):
                assert torch.equal(crops[name], tokens[name]), name
            assert not crops["keep"].all()
            with torch.no_grad():
                (a, there), (b, too) = module.encode(crops), module.encode(tokens)
            assert torch.equal(there, too)
            torch.testing.assert_close(a, b, atol=4e-3, rtol=2e-3)
    base.requires_grad_(False)


def test_every_rna_cell_of_the_training_samples_is_in_a_batch(base, counted):
    data = open_data(counted.path, base, None, channels=None, genes=None, seed=0)
    seen = np.concatenate([b["rows"][b["keep_rna"]] for b in data.train_dataloader()])
    key = counted.rna_obs()["sample_key"].astype(str).iloc[seen]
    train = counted.samples.index[data.parts.rows("train")]
    assert len(seen) == len(np.unique(seen)) == data.n_cells("train")
    assert set(key) == set(train)


def test_a_selection_holds_what_it_says_and_no_empty_cells(counted):
    counts = counted.rna.read(0, counted.rna.shape[0]).toarray()
    rare = np.sort(counts.sum(0).argsort()[:4])
    genes = [counted.manifest.genes[i] for i in rare[::-1]]
    some = SelectedSampleStore(counted.path, ["AGP", "DAPI"], genes)
    filled = np.flatnonzero(counts[:, rare].any(axis=1))
    assert 0 < len(filled) < len(counts)
    np.testing.assert_array_equal(
        some.rna.read(0, len(filled)).toarray(), counts[filled][:, rare[::-1]]
    )
    assert some.rna.read(3, 3).shape == (0, 4)
    for (_, new), (_, old) in zip(some.samples.iterrows(), counted.samples.iterrows(), strict=True):
        within = filled[new["rna_start"] : new["rna_stop"]]
        expected = filled[(filled >= old["rna_start"]) & (filled < old["rna_stop"])]
        np.testing.assert_array_equal(within, expected)
    at = [counted.manifest.channels.index(name) for name in ("AGP", "DNA")]
    rows = np.array([9, 4])
    np.testing.assert_array_equal(some.images.take(rows), counted.images.take(rows)[:, at])
    assert some.manifest.genes == tuple(genes)


def test_a_stopped_run_on_bags_of_tokens_goes_on_as_if_it_had_not(
    base, counted, tmp_path, monkeypatch
):
    how = {"epochs": 2, "freeze": "encoder"}
    whole = tuned(base, counted, out=tmp_path / "whole", **how).state_dict()
    step = FinetuneModule.training_step

    def killed(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 2):
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneModule, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            tuned(base, counted, out=tmp_path / "cut", **how)
    assert (tmp_path / "cut.run" / "tokens").exists()
    again = tuned(base, counted, out=tmp_path / "cut", **how).state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "cut.run"), losses(tmp_path / "whole.run"))


# ------------------------------------------------------------------------------ warnings and errors


def test_it_warns_of_few_samples(base, counted, no_training, monkeypatch):
    with pytest.warns(PhenoseqWarning, match="9 training samples are few") as found:
        tuned(base, counted)
    assert found[0].filename == __file__  # of the caller
    monkeypatch.setattr("phenoseq.training.finetune.FEW_SAMPLES", 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PhenoseqWarning)
        tuned(base, counted)


def test_pairing_of_model_and_store_must_be_the_same(base, store, counted, tmp_path, capsys):
    with pytest.raises(DataError, match=r"pairs images and counts by cell.*--pair-by sample"):
        tuned(base, store)
    folder = base.save(tmp_path / "base")
    args = ["finetune", str(folder), str(store.path), "--out", str(tmp_path / "new")]
    assert main(args) == 1
    assert "--pair-by sample" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"of single cells.*'phenoseq prepare SOURCE'"):
        phenoseq.finetune("simulated-plate", counted.path)
    with pytest.raises(DataError, match="no phenoseq store"):
        phenoseq.finetune(base, tmp_path / "nothing.zarr")


def test_what_a_store_holds_must_be_what_the_model_reads_and_predicts(
    base, reader, counted, embedded, scgenescope, tmp_path, monkeypatch
):
    with pytest.raises(DataError, match="holds features of the image cells, and the model reads c"):
        tuned(base, embedded, split=PROTOCOL)
    with pytest.raises(DataError, match="holds crops of the image cells, and the model reads feat"):
        tuned(reader, counted, split=SPLIT)
    with pytest.raises(DataError, match="features, whose stains it does not name"):
        tuned(reader, embedded, channels=["DNA"])
    with pytest.raises(DataError, match="holds an embedding, and no genes"):
        tuned(reader, embedded, genes=["ACTB"])
    with pytest.raises(DataError, match="samples cannot be split by 'Replicate'"):
        tuned(base, counted, split=PROTOCOL)
    other = replace(reader.config.expression, name="scVI")
    monkeypatch.setattr(reader, "config", replace(reader.config, expression=other))
    with pytest.raises(DataError, match="holds scGPT, and the model predicts the embedding scVI"):
        tuned(reader, embedded)
    monkeypatch.undo()
    features = scgenescope / "features"
    images, rna = features / "imaging/imagenet/vit-l", features / "rnaseq/scgpt"
    obs = Cells(images).obs
    narrow = ad.AnnData(np.ones((len(obs), 3), np.float32), obs=obs)
    made = write_sample_store(
        Cells(narrow), Cells(rna), tmp_path / "narrow.zarr", columns=["Treatment", "Replicate"],
        config=RnaConfig(embedding="scGPT"),
    )[0]  # fmt: skip
    with pytest.raises(ModelError, match="holds 3 features a cell, and the model reads 25"):
        tuned(reader, made)
