"""The modules: what they build, that every trained weight gets a gradient, and fixed validation."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from phenoseq.data.datamodule import StoreDataModule
from phenoseq.data.samplemodule import SampleDataModule
from phenoseq.data.splits import SplitConfig
from phenoseq.errors import DataError, ModelError
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.diffusion import make_path
from phenoseq.models.embedding import EmbeddingSpace
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.published_config import FeatureConfig, PublishedNoise
from phenoseq.models.sample import SamplePhenoSeq
from phenoseq.training.base import Drawn, targets_of
from phenoseq.training.figures import SampleFigures, draw_samples, log_figure
from phenoseq.training.finalise import finalise
from phenoseq.training.logs import CsvLogger
from phenoseq.training.module import PhenoSeqModule
from phenoseq.training.published import PublishedModule

PROTOCOL = SplitConfig(
    by="Replicate",
    block=None,
    declared={"train": ["3"], "val": ["5"], "test_we": ["4"], "test_he": ["1", "2"]},
)
BY_REPLICATE = SplitConfig(by="Metadata_Replicate", block=None, test=0.2, val=0.2, cal=0)
STAINS = ("DNA", "RNA", "AGP", "Mito", "ER")


def of_cells(store, **options):
    split = SplitConfig(by="Metadata_Well", block=None, test=0.2)
    return opened(StoreDataModule(store.path, split, **{"batch_size": 16, **options}))


def of_features(store, **options):
    how = {"n_images": 4, "n_rna": 3, "batch_size": 4, **options}
    return opened(SampleDataModule(store.path, PROTOCOL, **how))


def of_crops(store, **options):
    how = {"n_images": 3, "n_rna": 2, "batch_size": 4, **options}
    return opened(SampleDataModule(store.path, BY_REPLICATE, **how))


def opened(data):
    data.setup()
    return data


def small(data, **options):
    """A module with its model built, as Lightning would."""
    how = {
        "encoder": EncoderConfig("test_resnet"),
        "denoiser": DenoiserConfig(32, 2, 2, 2),
        "features": FeatureConfig("statistics", STAINS, 1),
        "components": 5,
        "hidden": 8,
        "levels": 2,
    }
    return built(PhenoSeqModule(**{**how, **options}), data)


def published(data, **options):
    how = {"dim": 16, "heads": 4, "layers": 2, "encoder_layers": 1, "time_dim": 8, **options}
    return built(PublishedModule(**how), data)


def built(module, data):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module.model, module.scored = module.build(data)
    return module


def first(data):
    return next(iter(data.train_dataloader()))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fit the decoder in few steps."""
    monkeypatch.setattr("phenoseq.models.expression._MIN_STEPS", 20)


@pytest.fixture
def kinds(store, embedded, counted):
    """Give, by name, a function that makes a module and its data."""
    return {
        "cells": lambda **how: (small(data := of_cells(store), **how), data),
        "features": lambda **how: (small(data := of_features(embedded), **how), data),
        "crops": lambda **how: (small(data := of_crops(counted), **how), data),
        "published": lambda **how: (published(data := of_features(embedded), **how), data),
    }


# --------------------------------------------------------------------------------- what is built


def test_what_stores_are_made_into(kinds):
    models = {name: make()[0].model for name, make in kinds.items()}
    assert isinstance(models["cells"], PhenoSeq)
    assert all(isinstance(models[name], SamplePhenoSeq) for name in ("features", "crops"))
    assert isinstance(models["features"].expression, EmbeddingSpace)
    assert models["features"].config.cells.width == 25
    assert models["features"].config.bag_size == 4
    assert len(models["crops"].config.expression.genes) == 60


@pytest.mark.parametrize("name", ["features", "published"])
def test_statistics_are_of_training_samples_alone(kinds, embedded, name):
    module, data = kinds[name]()
    model = module.model
    rna, images = (embedded.rna_obs(), embedded.image_obs())
    rna_rows = np.flatnonzero(rna["Replicate"].astype(str) == "3")
    image_rows = np.flatnonzero(images["Replicate"].astype(str) == "3")
    embedding = embedded.rna.read(0, len(rna))[rna_rows]
    features = embedded.images.take(image_rows)
    if name == "published":
        found = (model.rna_mean, model.rna_std, model.features_mean, model.features_std)
    else:
        of, by = model.expression, model.encoder
        found = (of.mean, of.std, by.mean, by.std)
    wanted = (embedding.mean(0), embedding.std(0), features.mean(0), features.std(0))
    for tensor, array in zip(found, wanted, strict=True):
        np.testing.assert_allclose(tensor, array, rtol=1e-4, atol=1e-4)
    record = model.config.origin if name == "published" else model.config.training
    assert record.n_cells == len(rna_rows)
    assert record.split_digest == data.parts.digest


def test_stores_that_hold_other_things_are_refused(store, embedded, counted):
    for data in (of_cells(store), of_crops(counted)):
        with pytest.raises(DataError, match="reads features of samples and predicts embeddings"):
            published(data)
    with pytest.raises(ModelError, match=r"25 features a cell are not those of 2 stains"):
        small(of_features(embedded), features=FeatureConfig("x", ("DNA", "ER"), 1))
    for option in ({"frozen_stages": "all"}, {"recompute": True}):
        with pytest.raises(DataError, match="features have no backbone"):
            small(of_features(embedded), **option)


def test_the_same_model_is_built_again(kinds):
    for make in kinds.values():
        one, two = (make()[0].model.state_dict() for _ in range(2))
        assert all(torch.equal(one[key], two[key]) for key in one)


# ------------------------------------------------------------------------------------- gradients

#: Chances of the context, and of a stain.
DROPPED = [(0.1, 0.05), (1.0, 0.05), (0.0, 0.05), (0.1, 1.0)]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("cells", {}),
        ("cells", {"encoder": EncoderConfig("test_resnet", "separate")}),
        ("features", {}),
        ("crops", {}),
    ],
    ids=str,
)
def test_every_trained_weight_gets_a_gradient_in_every_step(kinds, name, how):
    """So that several devices need not look for unused weights; whatever is dropped."""
    module, data = kinds[name](**how)
    for context, channel in DROPPED:
        module.drop_context, module.drop_channel = context, channel
        module.zero_grad()
        all_get_gradients(module, data)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("cells", {"encoder": EncoderConfig("test_vit")}),
        ("cells", {"encoder": EncoderConfig("regnetx_002")}),
        ("cells", {"encoder": EncoderConfig("mobilenetv4_conv_small_050", "separate")}),
        ("cells", {"recompute": True}),
        ("cells", {"frozen_stages": 2}),
        ("cells", {"frozen_stages": "all"}),
        ("features", {"features": FeatureConfig("x", (), 1)}),
        ("crops", {"encoder": EncoderConfig("test_resnet", "separate")}),
    ],
    ids=str,
)
def test_so_it_does_with_other_encoders(kinds, name, how):
    all_get_gradients(*kinds[name](**how))


def all_get_gradients(module, data):
    module.train()
    module.training_loss(first(data), torch.Generator().manual_seed(0)).backward()
    without = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    with_ = [n for n, p in module.named_parameters() if not p.requires_grad and p.grad is not None]
    assert with_ == []


def test_every_weight_of_the_published_network_gets_a_gradient(kinds):
    module, data = kinds["published"]()
    module.training_loss(first(data), torch.Generator().manual_seed(0)).backward()
    assert all(p.requires_grad and p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_recomputing_changes_no_gradient(kinds, backbone):
    grads = []
    for recompute in (False, True):
        module, data = kinds["cells"](encoder=EncoderConfig(backbone), recompute=recompute)
        module.train()
        module.training_loss(first(data), torch.Generator().manual_seed(0)).backward()
        grads.append([p.grad for p in module.parameters() if p.grad is not None])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


# ---------------------------------------------------------------------------------------- frozen


@pytest.mark.parametrize(("stages", "moved"), [(0, 1.0), (2, 0.5), ("all", 0.0)])
def test_what_is_frozen_does_not_move(kinds, stages, moved):
    module, data = kinds["cells"](
        encoder=EncoderConfig("test_resnet", norm="batch"), frozen_stages=stages, warmup_steps=1
    )
    module.train()
    before = {k: v.clone() for k, v in module.model.encoder.backbone.state_dict().items()}
    optimiser = torch.optim.AdamW(module.parameter_groups(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        module.training_loss(first(data), torch.Generator().manual_seed(0)).backward()
        optimiser.step()
        optimiser.zero_grad()
    after = module.model.encoder.backbone.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    if moved == 0:
        assert not changed
    elif moved == 1:
        assert any("running_mean" in k for k in changed)
        assert any(k.startswith("conv1") or k.startswith("stem") for k in changed)
    else:
        assert 0 < len(changed) < len(before)
        assert not any(k.startswith(("conv1", "bn1", "stem")) for k in changed)


def test_stages_that_are_not_there(kinds):
    with pytest.raises(ModelError, match=r"test_resnet has \d+ stages; freeze fewer"):
        kinds["cells"](frozen_stages=40)


def test_a_backbone_that_cannot_be_recomputed(kinds):
    with pytest.raises(ModelError, match="no gradient checkpointing"):
        kinds["cells"](encoder=EncoderConfig("dla46_c"), recompute=True)


# --------------------------------------------------------------------------- targets and their loss


def test_an_encoded_bag_serves_its_rna_cells_one_by_one(kinds):
    """The loss of a bag of three is that of each with the same context, times and noise."""
    module, data = kinds["features"]()
    batch = first(data)
    model = module.model.eval()
    rows, _ = targets_of(batch)
    t = torch.rand(*rows.shape, 2)
    noise = torch.randn(*rows.shape, 2, 6)
    context = module.encode(batch)
    whole = model.denoising_loss(context, batch["embedding"], t.flatten(1), noise.flatten(1, 2))
    for k in range(rows.shape[1]):
        one = model.denoising_loss(context, batch["embedding"][:, k], t[:, k], noise[:, k])
        torch.testing.assert_close(whole.view(t.shape)[:, k], one)


def test_rna_that_only_fills_a_bag_does_not_count(kinds):
    for name in ("features", "published"):
        module, data = kinds[name]()
        batch = first(data)
        module.eval()
        batch["keep_rna"][:, 1:] = False
        changed = {k: v.clone() for k, v in batch.items()}
        changed["embedding"][:, 1:] += 100
        losses = [
            module.training_loss(b, torch.Generator().manual_seed(0)) for b in (batch, changed)
        ]
        assert torch.equal(*losses)


def test_image_cells_that_only_fill_a_bag_are_not_read(kinds):
    module, data = kinds["features"]()
    batch = first(data)
    batch["keep"][:, 2:] = False
    changed = batch | {"features": batch["features"].clone()}
    changed["features"][:, 2:] *= 3
    model = module.model
    torch.nn.init.normal_(model.denoiser.outward.weight)
    for block in model.denoiser.blocks:
        torch.nn.init.normal_(block.modulate.weight)
    a, b = (module.validation_losses(x)["val_loss"] for x in (batch, changed))
    torch.testing.assert_close(a, b)
    batch["features"][:, 0] *= 3
    assert not torch.allclose(module.validation_losses(batch)["val_loss"], a)


def test_the_published_loss_is_that_of_the_noise(kinds):
    """Against the formula: even times k / T, x_t by the schedule, squared error of the noise."""
    module, data = kinds["published"](noise=PublishedNoise("linear", 50, steps=5))
    module.eval()
    batch, generator = first(data), torch.Generator().manual_seed(3)
    again = torch.Generator().manual_seed(3)
    k = torch.randint(1, 51, batch["rows"].shape, generator=again)
    noise = torch.randn(batch["embedding"].shape, generator=again)
    alpha2 = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 50, dtype=torch.float64), 0)[
        k - 1
    ].float()
    model = module.model
    clean = (batch["embedding"] - model.rna_mean) / model.rna_std
    x = alpha2.sqrt()[..., None] * clean + (1 - alpha2).sqrt()[..., None] * noise
    made = model.denoise(x, k / 50, model.remember(model.encode(batch["features"])))
    error = (made - noise).square().mean(-1)[batch["keep_rna"]].mean()
    torch.testing.assert_close(module.training_loss(batch, generator), error)
    assert make_path("linear", 50).timesteps == 50


# ------------------------------------------------------------------------------- fixed validation


@pytest.mark.parametrize("name", ["cells", "features", "crops", "published"])
def test_validation_does_not_depend_on_ranks_and_batches(kinds, name, monkeypatch):
    module, data = kinds[name](draws=2)
    module.eval()

    def validate(world, batch_size):
        data.batch_size = batch_size
        losses, drawn = {}, {}
        for rank in range(world):
            monkeypatch.setattr("phenoseq.data.dataset._world", lambda: world)
            monkeypatch.setattr("phenoseq.data.dataset._rank", lambda rank=rank: rank)
            for batch in data.val_dataloader():
                rows, keep = targets_of(batch)
                with torch.no_grad():
                    loss = module.validation_losses(batch)["val_loss"]
                    made = module.sample(batch)
                losses.update(zip(rows[keep].tolist(), loss[keep].tolist(), strict=True))
                own = keep.flatten()
                pairs = zip(made.rows[own].tolist(), made.draw[own], strict=True)
                drawn.update(pairs)
        return losses, drawn

    one, drawn = validate(1, 16)
    two, drawn_two = validate(2, 3)
    assert sorted(one) == sorted(two)
    np.testing.assert_allclose([two[row] for row in one], list(one.values()), rtol=1e-4, atol=1e-5)
    for row, draw in drawn.items():
        torch.testing.assert_close(drawn_two[row], draw, rtol=1e-3, atol=1e-3)


def test_noise_is_of_the_cell_and_the_purpose(kinds):
    module, _ = kinds["cells"]()
    rows = torch.tensor([[3, 8], [5, 3]])
    noise = module.fixed_normals("val", rows, 4)
    assert torch.equal(noise[0, 0], noise[1, 1])
    assert not torch.equal(noise[0, 0], noise[0, 1])
    assert not torch.equal(module.fixed_normals("draw", rows, 4), noise)
    many = module.fixed_normals("val", torch.arange(500), 40)
    assert abs(float(many.mean())) < 0.03
    assert abs(float(many.std()) - 1) < 0.03


def test_drawn_values_are_on_the_scale_of_the_truth(kinds):
    """Counts: log1p of shares at the median library; embeddings: their own scale."""
    module, data = kinds["crops"](draws=4)
    batch = next(iter(data.val_dataloader()))
    drawn = module.sample(batch)
    rows, _ = targets_of(batch)
    median = module.model.config.expression.median_library
    counts = batch["counts"].flatten(0, 1)
    share = torch.log1p(counts / counts.sum(1, keepdim=True) * median)
    torch.testing.assert_close(drawn.truth, share)
    assert drawn.rows.tolist() == rows.flatten().tolist()
    total = torch.expm1(drawn.draw).sum(dim=1)
    torch.testing.assert_close(total, torch.full_like(total, median), rtol=1e-3, atol=0)
    # both RNA cells of a bag have the mean of the bag's draws, and draws of their own
    mean, draw = (x.unflatten(0, (-1, 2)) for x in (drawn.mean, drawn.draw))
    assert torch.equal(mean[:, 0], mean[:, 1])
    assert not torch.equal(draw[:, 0], draw[:, 1])


# ---------------------------------------------------------------------------------------- at last


def test_a_model_of_samples_knows_its_cells_and_its_genes(kinds):
    module, data = kinds["crops"]()
    model = finalise(module.model, data)
    assert model.config.training.reliability == ()  # of three validation samples it says nothing
    scores = [
        model.strangeness(module.encode(batch), batch["images"]).detach()
        for batch in data.fixed("train", 10**6, alone=True)
    ]
    assert float(torch.cat(scores).square().mean().sqrt()) == pytest.approx(1, abs=0.05)
    batch = first(data)
    batch["images"] = 255 - batch["images"].float()
    strange = model.strangeness(module.encode(batch), batch["images"]).detach()
    assert float(strange.min()) > 1.5


# ---------------------------------------------------------------------------------------- figures


def some_drawn(n=50, g=12):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(n, g, generator=generator)
    truth[:, 3] = 0
    return Drawn(truth, truth + 0.1, truth.clone(), torch.arange(n))


def test_a_figure_is_given_to_each_logger(tmp_path):
    from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

    scored = np.ones(12, dtype=bool)
    figure = draw_samples(some_drawn(), [f"G{i}" for i in range(12)], scored)
    assert len(figure.axes) == 7
    assert figure.axes[0].get_title().endswith("r = 1.00")
    log_figure(CsvLogger(tmp_path), "val_samples", figure, 12)
    assert (tmp_path / "val_samples" / "step_00000012.png").stat().st_size > 10_000

    seen = []

    class Wandb(WandbLogger):
        def __init__(self):
            pass

        def log_image(self, key, images):
            seen.append((key, images[0].shape[2]))

    class Flow(MLFlowLogger):
        run_id = "r"

        def __init__(self):
            pass

        @property
        def experiment(self):
            return self

        def log_figure(self, run, figure, file):
            seen.append((run, file))

    log_figure(Wandb(), "val_samples", figure, 12)
    log_figure(Flow(), "val_samples", figure, 12)
    assert seen == [("val_samples", 4), ("r", "val_samples/step_00000012.png")]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="no tensorboard here")
def test_tensorboard_takes_figures(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger

    figure = draw_samples(some_drawn(), [f"G{i}" for i in range(12)], np.ones(12, dtype=bool))
    logger = TensorBoardLogger(tmp_path)
    log_figure(logger, "val_samples", figure, 3)
    logger.finalize("success")
    assert sum(p.stat().st_size for p in tmp_path.rglob("events*")) > 10_000


def test_no_figure_where_nothing_was_drawn(kinds):
    module, _ = kinds["cells"]()
    SampleFigures().on_validation_end(None, module)  # asks the trainer for nothing
