"""Fine-tuning: learns, leaves the base alone, keeps what is shared, and goes on when killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import phenoseq
from phenoseq import tuning
from phenoseq.cli import main
from phenoseq.data.datamodule import StoreDataModule, split_of
from phenoseq.data.selection import SelectedStore
from phenoseq.data.simulate import PIXEL_SIZE, simulate_plate
from phenoseq.data.splits import SplitConfig
from phenoseq.data.storewriter import write_store
from phenoseq.errors import DataError, ModelError, PhenoseqWarning
from phenoseq.models.config import DiffusionConfig
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.files import digest_of_model
from phenoseq.training import finetune as module_of
from phenoseq.training.baselines import BASELINES
from phenoseq.training.build import image_of
from phenoseq.training.cache import TokenStream, cache_tokens
from phenoseq.training.finetune import FinetuneModule
from phenoseq.training.finetunedata import open_data
from phenoseq.training.module import PhenoSeqModule

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quick")]
SPLIT = SplitConfig(by="Metadata_Well", block=None, test=0.2)


@pytest.fixture(scope="module")
def base(store, request):
    """A small model that has seen the plate's images but was not trained; a norm may be asked."""
    data = StoreDataModule(store.path, SPLIT)
    data.setup()
    module = PhenoSeqModule(
        encoder=EncoderConfig("test_resnet", norm=getattr(request, "param", "group")),
        denoiser=DenoiserConfig(dim=32, depth=2, heads=2, tokens=2),
        diffusion=DiffusionConfig(steps=4),
        components=6,
        hidden=16,
    )
    torch.manual_seed(0)
    return module.build(data)[0].eval()


@pytest.fixture
def folder(base, tmp_path):
    return base.save(tmp_path / "base")


def tuned(base, store, out=None, **how):
    settings = {"epochs": 2, "device": "cpu", "split": SPLIT, "out": out, **how}
    return phenoseq.finetune(base, store.path, **settings)


@pytest.fixture
def no_training(monkeypatch):
    """Leave out the training; return the training cells of each that was left out."""
    trained = []

    def fit(module, data, *args, **kwargs):
        trained.append([row for b in data.train_dataloader() for row in b["rows"].tolist()])

    monkeypatch.setattr(tuning, "fit", fit)
    monkeypatch.setattr(FinetuneModule, "finish", lambda self, data, device: self.model)
    return trained


def losses(root):
    return pd.read_csv(root / "metrics.csv")["val_loss"].dropna().to_numpy()


# ----------------------------------------------------------------------------------- what comes out


@pytest.mark.long
def test_the_new_model_is_better_and_the_old_one_is_as_it_was(base, store, tmp_path, folder):
    before = digest_of_model(base), [f.read_bytes() for f in sorted(folder.iterdir())]
    out = tmp_path / "new"
    told = []
    new = phenoseq.finetune(
        folder, store.path, epochs=8, lr=5e-3, freeze="none", device="cpu", out=out,
        report=told.append,
    )  # fmt: skip
    assert (digest_of_model(base), [f.read_bytes() for f in sorted(folder.iterdir())]) == before
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    seen = losses(tmp_path / "new.run")
    assert seen.min() < 0.95 * seen[0]
    assert "60 shared" in told[0]
    kept = json.loads((tmp_path / "new.run" / "kept.json").read_text())
    assert kept["expression"]["space_kept"]

    again = phenoseq.load_model(out)
    assert digest_of_model(again) == digest_of_model(new)
    record = again.config.training
    assert record.base == {
        "model": "base",
        "digest": before[0],
        "source": base.config.training.source,
        "identity": store.manifest.identity,
        "freeze": "none",
    }
    assert record.split == base.config.training.split
    assert len(record.reliability) == 60
    assert np.mean(record.reliability) > 0.05
    prediction = phenoseq.predict(store.path, model=again, n_samples=4, device="cpu")
    assert 0.5 < np.median(prediction.obs["ood_score"]) < 2


@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_pixels_are_scaled_as_by_the_base_unless_the_cells_predict_better(store, gain):
    """The base has seen such plates, or such of another gain, which is not a matter of cells."""
    base = phenoseq.load_model("simulated-plate")
    image = base.config.image
    scale = {name: tuple(v / gain for v in getattr(image, name)) for name in ("mean", "std")}
    base.with_image(**scale)
    data = open_data(store.path, base, SPLIT, channels=None, genes=None, seed=0)
    model, kept = module_of.adapted(base, data, "base", "encoder", 0)
    assert kept.cells.pixels_kept == (gain == 1)
    now = model.config.image
    expected = scale["mean"] if gain == 1 else image_of(data).mean
    assert now.mean == expected
    assert model.image_mean.flatten().tolist() == pytest.approx(expected)
    assert ("as by the base model" in str(kept)) == (gain == 1)
    assert model.denoiser.training  # Lightning trains in the mode that it finds
    assert model.encoder.project.training


@pytest.mark.parametrize("base", ["batch"], indirect=True)
def test_batch_norms_keep_the_statistics_of_the_base(base, store):
    new = tuned(base, store, freeze="none", epochs=1).state_dict()
    same = {k: torch.equal(new[k], v) for k, v in base.state_dict().items() if "backbone" in k}
    held = [name for name in same if "running" in name]
    assert held
    assert all(same[name] for name in held)
    assert not any(same[name] for name in same if name.endswith("bn1.weight"))  # these are trained


def test_the_best_weights_are_kept_and_not_the_last(base, store, tmp_path, monkeypatch):
    losses_of = FinetuneModule.validation_losses
    monkeypatch.setattr(  # the first epoch is the best
        FinetuneModule, "validation_losses",
        lambda self, batch: {
            name: loss + 9 * self.current_epoch for name, loss in losses_of(self, batch).items()
        },
    )  # fmt: skip
    monkeypatch.setattr(module_of, "PATIENCE", 2)
    new = tuned(base, store, tmp_path / "new", epochs=12, freeze="all-but-head").state_dict()
    assert len(losses(tmp_path / "new.run")) == module_of.PATIENCE + 1  # and then it stopped
    files = tmp_path / "new.run" / "checkpoints"
    best, last = (
        torch.load(files / f"{name}.ckpt", weights_only=False)["state_dict"]
        for name in ("best", "last")
    )
    name = "denoiser.outward.weight"
    assert torch.equal(best[f"model.{name}"], new[name])
    assert not torch.equal(last[f"model.{name}"], new[name])


@pytest.mark.parametrize(
    ("freeze", "moved"),
    [
        ("encoder", {"denoiser"}),
        ("none", {"encoder", "denoiser"}),
        ("all-but-head", {"denoiser.inward", "denoiser.last", "denoiser.outward"}),
    ],
)
def test_what_is_frozen_stays(base, store, freeze, moved):
    new = tuned(base, store, epochs=1, freeze=freeze).state_dict()
    old = base.state_dict()
    changed = {
        name for name in old
        if name.startswith(("encoder", "denoiser")) and not torch.equal(old[name], new[name])
    }  # fmt: skip
    assert changed
    assert all(name.startswith(tuple(moved)) for name in changed)
    assert {part for part in moved if any(n.startswith(part) for n in changed)} == moved


def test_stages_of_the_encoder_learn_slower_towards_the_image(base):
    module = FinetuneModule(base, freeze="none", new_stains=False, lr=1.0, seed=0)
    rate = {id(p): group["lr"] for group in module.parameter_groups() for p in group["params"]}
    named = dict(base.named_parameters())
    backbone = [n for n in named if n.startswith("encoder.backbone.") and id(named[n]) in rate]
    rates = [rate[id(named[n])] for n in backbone]
    assert rates == sorted(rates)
    assert max(rates) == pytest.approx(0.7)
    assert min(rates) == pytest.approx(0.7 ** len(set(rates)))
    assert rate[id(base.denoiser.inward.weight)] == rate[id(base.encoder.stain)] == 1.0
    # but for a stem that has new channels
    module = FinetuneModule(base, freeze="none", new_stains=True, lr=1.0, seed=0)
    rate = {id(p): group["lr"] for group in module.parameter_groups() for p in group["params"]}
    assert rate[id(named["encoder.backbone.conv1.0.weight"])] == 1.0
    base.requires_grad_(False)


def test_only_training_cells_are_trained_on(base, store, no_training):
    for cache in (True, False):
        tuned(base, store, cache=cache)
    train = split_of(store, SPLIT).rows("train").tolist()
    assert [sorted(rows) for rows in no_training] == [train, train]


# --------------------------------------------------------------------------------- genes and stains


def test_some_genes_and_stains_of_a_store(base, store, no_training, tmp_path, monkeypatch):
    """The model is of these alone, and predicts and is scored on a store that holds more."""
    genes = [*store.manifest.genes[3:20], store.manifest.symbols[40]]
    stains = store.manifest.channels[1:3]
    new = tuned(base, store, genes=genes, channels=stains)
    assert new.config.image.channels == stains
    assert new.config.expression.genes == (*store.manifest.genes[3:20], store.manifest.genes[40])
    crops = store.take(np.arange(4))[:, 1:3]
    made = phenoseq.predict(crops, model=new, channels=stains, pixel_size=store.manifest.pixel_size,
                            n_samples=2, device="cpu")  # fmt: skip
    assert made.shape == (4, 18)
    monkeypatch.setitem(sys.modules, "umap", None)  # which takes long to import
    how = {"out": tmp_path / "scores", "regressor": tmp_path / "regressor", "epochs": 1}
    scores = phenoseq.evaluate(new, store.path, n_samples=2, device="cpu", **how)
    assert [s.name for s in scores] == ["this model", *BASELINES.values()]
    assert all(np.isfinite(s.pcc_gene_median) for s in scores[2:])
    truth = ad.read_zarr(tmp_path / "scores" / "truth.zarr")
    assert truth.var_names.tolist() == list(new.config.expression.genes)
    assert truth.X.sum(axis=1).min() >= 20
    with pytest.raises(DataError, match="for example"):
        tuned(base, store, channels=["DAPPI"])
    with pytest.raises(DataError, match=r"lack 1 of the 1 wanted, \['NOGENE'\]"):
        tuned(base, store, genes=["NOGENE"])
    with pytest.raises(DataError, match="each once"):
        tuned(base, store, channels=["DNA", "DAPI"])


def test_a_selection_reads_what_it_says(store):
    some = SelectedStore(store.path, ["AGP", "DAPI"], [store.manifest.symbols[5]])
    at = [store.manifest.channels.index(name) for name in ("AGP", "DNA")]
    rows = np.array([7, 3])
    np.testing.assert_array_equal(some.take(rows), store.take(rows)[:, at])
    np.testing.assert_array_equal(some.read(2, 5), store.read(2, 5)[:, at])
    np.testing.assert_array_equal(some.counts(rows).toarray(), store.counts(rows).toarray()[:, [5]])
    assert list(some.table().var_names) == [store.manifest.genes[5]]
    assert set(some.manifest.channel_stats) == {"AGP", "DNA"}


def test_cells_without_counts_of_the_chosen_genes_are_left_out(base, store):
    rare = store.counts(np.arange(len(store))).toarray().sum(0).argsort()[:6]
    genes = [store.manifest.genes[i] for i in rare]
    data = open_data(store.path, base, SPLIT, channels=None, genes=genes, seed=0)
    kept = np.flatnonzero(data.parts.part != "unassigned")
    total = store.counts(np.arange(len(store)))[:, np.sort(rare)].sum(axis=1).A1
    assert set(kept) == set(np.flatnonzero(total > 0))


# ------------------------------------------------------------------------------ warnings and errors


def test_it_warns_of_few_cells_and_of_new_stains(base, store, monkeypatch, no_training):
    with pytest.warns(PhenoseqWarning, match="training cells are few"):
        tuned(base, store, epochs=1)
    strange = SelectedStore(store.path)
    monkeypatch.setattr(type(strange), "__init__", _renamed(type(strange).__init__, "DNA", "CD8"))
    with pytest.warns(PhenoseqWarning, match=r"the stains \['CD8'\] are new to the encoder"):
        tuned(base, store, epochs=1)


def _renamed(init, old, new):
    def renamed(self, *args, **kwargs):
        init(self, *args, **kwargs)
        names = tuple(new if name == old else name for name in self.manifest.channels)
        self.manifest = replace(self.manifest, channels=names)

    return renamed


def test_another_pixel_size_is_told_with_the_command_that_avoids_it(base, tmp_path, no_training):
    plate = simulate_plate(seed=5, wells_per_treatment=4, sites_per_well=1, cells_per_site=12)
    other = write_store(
        plate.source, tmp_path / "other.zarr", pixel_size=2 * PIXEL_SIZE, crop_px=48
    )
    command = f"--crop-pixel-size {PIXEL_SIZE} --crop-px 32"
    with pytest.warns(PhenoseqWarning, match=command):
        new = tuned(base, other, epochs=1)
    assert new.config.image.crop_px == 48
    assert new.config.image.pixel_size == 2 * PIXEL_SIZE


def test_errors_say_what_to_do(base, store, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(DataError, match="exists already; remove it"):
        tuned(base, store, tmp_path / "there")
    with pytest.raises(ModelError, match="choose from"):
        tuned(base, store, freeze="head")
    with pytest.raises(ModelError, match="cannot be fine-tuned"):
        tuned(torch.nn.Linear(1, 1), store)


def test_a_folder_of_another_run_is_refused(base, store, tmp_path):
    tuned(base, store, tmp_path / "a", epochs=1)
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(ModelError, match="holds a run with other settings: epochs is 2"):
        tuned(base, store, tmp_path / "a", epochs=2)


def test_a_store_that_divides_otherwise_than_the_base_is_refused(base, store, monkeypatch):
    record = replace(base.config.training, split_digest="0" * 64)
    monkeypatch.setattr(base, "config", replace(base.config, training=record))
    with pytest.raises(DataError, match="divides its cells otherwise"):
        tuned(base, store)


def test_a_split_that_judges_by_cells_of_the_base_is_refused(base, store, no_training):
    wells = store.obs()["Metadata_Well"]
    part = split_of(store, SPLIT).part
    of = {name: sorted(set(wells[part == name])) for name in ("train", "val", "test")}
    (*rest, last), val, test = of.values()
    leaky = SplitConfig(
        "Metadata_Well", None, declared={"train": rest, "val": [last], "test": test}
    )
    n = int((wells == last).sum())
    with pytest.raises(DataError, match=f"{n} cells of validation, .* trained the base model"):
        tuned(base, store, split=leaky)
    fewer = SplitConfig("Metadata_Well", None, declared={"train": rest, "val": val, "test": test})
    assert tuned(base, store, split=fewer)


def test_the_command(folder, store, tmp_path, capsys, no_training):
    genes = tmp_path / "genes.txt"
    genes.write_text("\n".join(store.manifest.genes[:30]))
    out = tmp_path / "new"
    options = ["--genes", genes, "--channels", "DNA,RNA", "--epochs", 1, "--device", "cpu"]
    args = ["finetune", folder, store.path, "--out", out, "--split-by", "Metadata_Well", *options]
    assert main([str(a) for a in args]) == 0
    said = capsys.readouterr().out
    assert "30 shared" in said
    assert f"model in {out}; try: phenoseq evaluate --model {out} --store {store.path}" in said
    assert phenoseq.load_model(out).config.image.channels == ("DNA", "RNA")
    assert main([str(a) for a in args]) == 1
    assert "exists already" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- the cache


def test_cached_tokens_are_those_of_the_encoder(base, store, tmp_path):
    rows = np.array([5, 2, 300, 77])
    cache = cache_tokens(base, store, rows, tmp_path)
    batch = cache.batch(np.array([77, 2]))
    crops = torch.from_numpy(store.take(np.array([77, 2])).astype(np.float32))
    with torch.no_grad():
        torch.testing.assert_close(batch["tokens"], base.encode(crops)[0], atol=4e-3, rtol=2e-3)
    expected = store.counts(np.array([77, 2])).toarray()
    np.testing.assert_array_equal(batch["counts"].numpy(), expected)


def test_a_stale_cache_is_not_used(base, store, tmp_path):
    rows = np.arange(20)
    first = cache_tokens(base, store, rows, tmp_path).path
    stamp = (first / "tokens.npy").stat().st_mtime_ns
    assert cache_tokens(base, store, rows[::-1], tmp_path).path == first
    assert (first / "tokens.npy").stat().st_mtime_ns == stamp
    others = [
        cache_tokens(base, store, rows[1:], tmp_path).path,
        cache_tokens(base, SelectedStore(store.path, genes=store.manifest.genes[:9]), rows,
                     tmp_path).path,
    ]  # fmt: skip
    with torch.no_grad():
        base.encoder.position[0, 0] += 1e-3
    others.append(cache_tokens(base, store, rows, tmp_path).path)
    with torch.no_grad():
        base.encoder.position[0, 0] -= 1e-3
    assert len({first, *others}) == 4


def test_a_cache_that_was_cut_short_is_not_there(base, store, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phenoseq.training.cache._write_tokens", full)
    with pytest.raises(DataError, match="the disk is full"):
        cache_tokens(base, store, np.arange(20), tmp_path)
    assert not [p for p in tmp_path.rglob("*.npy")]


def test_the_token_stream_gives_every_cell_once_and_goes_on_where_it_was(base, store, tmp_path):
    rows = np.arange(10, 75)
    cache = cache_tokens(base, store, rows, tmp_path)
    how = {"batch_size": 16, "shuffle": True, "seed": 1}
    stream = TokenStream(cache, rows, **how)
    batches = given(stream)
    assert len(batches) == len(stream) == 5
    assert sorted(chain(*batches)) == rows.tolist()
    stream.start = 3
    assert given(stream) == batches[3:]
    stream.start, stream.epoch = 0, 1
    assert given(stream) != batches
    ranks = []
    for rank in range(3):
        stream = TokenStream(cache, rows, **how, workers=2)
        stream.world, stream.rank = 3, rank
        for worker in range(2):
            stream._turn = lambda worker=worker: (worker, 0)
            ranks += given(stream)
    assert sorted(chain(*ranks)) == rows.tolist()


def given(stream):
    return [batch["rows"].tolist() for batch in stream]


def test_one_cached_level_has_the_loss_of_several_on_average(base, store):
    """The mixture of levels is that of training with the crops themselves."""
    module = FinetuneModule(base, freeze="encoder", new_stains=False, lr=1.0, seed=0)
    rows = np.arange(64)
    with torch.no_grad():
        images = torch.from_numpy(store.take(rows).astype(np.float32))
        tokens = base.encode(images)[0]
        counts = torch.from_numpy(store.counts(rows).toarray())
        cached = {"tokens": tokens, "counts": counts, "rows": torch.from_numpy(rows)}
        whole = {"images": images, "counts": counts, "rows": torch.from_numpy(rows)}
        module.drop_context = module.drop_channel = 0.0
        generator = torch.Generator().manual_seed(0)
        one = torch.stack([module.training_loss(cached, generator) for _ in range(100)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("phenoseq.training.module.augment", lambda images, generator: images)
            four = torch.stack([module.training_loss(whole, generator) for _ in range(50)])
    error = (one.var() / len(one) + four.var() / len(four)).sqrt()
    assert abs(one.mean() - four.mean()) < 4 * error
    base.requires_grad_(False)


# ------------------------------------------------------------------------------------- kill, resume

#: As `tuned` does, in a process that kills itself in the second epoch.
_RUN = """
import os, signal
import phenoseq
from phenoseq.training import finalise
from phenoseq.training.finetune import FinetuneModule

finalise._CELLS = 64
step = FinetuneModule.training_step

def killed(self, batch, batch_idx):
    if (self.current_epoch, batch_idx) == (1, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)

FinetuneModule.training_step = killed
phenoseq.finetune(base, store, out=out, epochs=2, device="cpu", split=split)
"""


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(base, folder, store, fork, tmp_path):
    tuned(folder, store, tmp_path / "whole")
    process = fork(_RUN, base=folder, store=store.path, out=tmp_path / "killed", split=SPLIT)
    process.join(timeout=240)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / "killed.run" / "tokens").exists()
    tuned(folder, store, tmp_path / "killed")
    whole, killed = (phenoseq.load_model(tmp_path / n).state_dict() for n in ("whole", "killed"))
    for name, tensor in whole.items():
        torch.testing.assert_close(killed[name], tensor, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        losses(tmp_path / "killed.run"), losses(tmp_path / "whole.run"), rtol=1e-5
    )
    assert not (tmp_path / "killed.run" / "tokens").exists()


def test_a_run_killed_after_it_stopped_early_trains_no_more(base, store, tmp_path, monkeypatch):
    """What is on the disk is what a kill leaves: training is over, nothing is saved."""
    out, run = tmp_path / "killed", tmp_path / "killed.run"
    losses_of = FinetuneModule.validation_losses

    def rising(self, batch):  # the first epoch is the best
        found = losses_of(self, batch)
        return {name: loss + 9 * self.current_epoch for name, loss in found.items()}

    def killed(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr(FinetuneModule, "validation_losses", rising)
    with monkeypatch.context() as patch:
        patch.setattr(module_of, "PATIENCE", 1)
        patch.setattr(FinetuneModule, "finish", killed)
        with pytest.raises(RuntimeError, match="killed"):
            tuned(base, store, out, epochs=9, freeze="all-but-head")
    assert not out.exists()
    assert (run / "tokens").exists()
    seen = losses(run)
    assert len(seen) == 2
    monkeypatch.setattr(FinetuneModule, "training_step", killed)  # is not called
    new = tuned(base, store, out, epochs=9, freeze="all-but-head").state_dict()
    np.testing.assert_array_equal(losses(run), seen)
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(new["denoiser.outward.weight"], best["model.denoiser.outward.weight"])


def test_a_loss_that_is_no_number_says_what_to_do(base, store, monkeypatch):
    monkeypatch.setattr(
        FinetuneModule, "validation_losses", lambda self, batch: {
            name: torch.full((len(batch["rows"]), 1), float("nan"))
            for name in ("val_loss", "val_mean_loss")
        },
    )  # fmt: skip
    with pytest.raises(ModelError, match="never a number; set a lower lr"):
        tuned(base, store, freeze="all-but-head")


def test_the_study_of_the_diffusion_runs_and_goes_on(base, store, tmp_path, example, capsys):
    study = example("diffusion_study")
    study.arms = lambda how, size: [
        study.Arm("as released"),
        study.Arm("not centred", diffusion=replace(how, centred=False)),
        study.Arm("autoencoder of 4", "autoencoder", 4),
    ]
    model = base.save(tmp_path / "base")
    command = [str(store.path), str(tmp_path / "out"), "--model", str(model), "--epochs", "1"]
    study.main(command)
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert len(table) == 3
    assert np.isfinite(table.drop(columns="arm")).all(axis=None)
    capsys.readouterr()
    study.main(command)
    assert "M weights  pcc_gene" not in (told := capsys.readouterr().out)  # nothing was run again
    assert told.count("\n| ") == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("freeze", ["encoder", "none"])
def test_a_gpu_makes_the_model_that_the_cpu_makes(base, store, monkeypatch, freeze):
    monkeypatch.setattr(tuning, "fit", lambda *args, **kwargs: None)
    cpu, gpu = (tuned(base, store, freeze=freeze, device=name) for name in ("cpu", "cuda"))
    assert {x.device.type for x in gpu.state_dict().values()} == {"cpu"}
    for name, want in cpu.state_dict().items():
        torch.testing.assert_close(gpu.state_dict()[name], want, rtol=0.01, atol=0.01)


@pytest.mark.slow
def test_the_study_of_fine_tuning_runs_and_goes_on(store, tmp_path):
    study = Path(__file__).resolve().parents[2] / "examples" / "finetune_study.py"
    small = ["--epochs", "1", "--base-epochs", "1", "--sizes", "100", "--test", "50"]
    command = [sys.executable, str(study), "section", str(store.path), str(tmp_path), *small]
    subprocess.run(command, check=True)
    rows = pd.read_csv(tmp_path / "results.csv")
    assert len(rows) == 6
    rows.iloc[:5].to_csv(tmp_path / "results.csv", index=False)
    subprocess.run(command, check=True)
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "results.csv").drop(columns="seconds"), rows.drop(columns="seconds")
    )
    assert (tmp_path / "results.png").exists()
