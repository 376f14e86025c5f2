"""A model fitted to other data: what it keeps, what it makes anew, and that the base stays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from phenoseq.errors import ModelError
from phenoseq.models.adapt import adapt, stem_name
from phenoseq.models.expression import fit_expression_space
from phenoseq.models.files import digest_of_model
from phenoseq.models.phenoseq import PhenoSeq


@pytest.fixture
def base(make_model):
    return make_model()


@pytest.fixture(scope="module")
def train(cells):
    return cells.split(1000)[0]


@pytest.fixture(scope="module")
def other(cells):
    return cells.split(1000)[1]


def adapted(base, cells, columns=None, *, channels=None, genes=None, symbols=None, **image):
    """Adapt to some columns of the cells' genes, or to stains, with all else as it was."""
    columns = np.arange(len(cells.genes)) if columns is None else np.asarray(columns)
    config = base.config
    if channels is not None:
        n = len(channels)
        image |= {"channels": channels, "mean": (1.0,) * n, "std": (2.0,) * n, "p999": (9.0,) * n}
    return adapt(
        base,
        replace(config.image, **image),
        cells.counts[:, columns],
        [cells.genes[i] for i in columns] if genes is None else genes,
        [cells.symbols[i] for i in columns] if symbols is None else symbols,
        config.training,
    )


def dense(cells, columns=slice(None)):
    return torch.from_numpy(cells.counts.toarray()[:, columns])


# -------------------------------------------------------------------------------------------- genes


def test_the_same_panel_keeps_space_network_and_base(base, other):
    before = digest_of_model(base)
    model, kept = adapted(base, other)
    assert digest_of_model(base) == before
    assert kept.expression.space_kept
    assert kept.expression.captured == pytest.approx(1)
    assert (
        kept.expression.genes.new,
        kept.expression.genes.dropped,
        kept.expression.by_symbol,
    ) == ((), (), 0)
    for name in ("encoder", "denoiser"):
        old, new = getattr(base, name).state_dict(), getattr(model, name).state_dict()
        assert all(torch.equal(old[key], new[key]) for key in old)
    counts = dense(other)
    torch.testing.assert_close(  # but for the library size, which is of the new cells
        model.expression.encode(counts)[:, :-1], base.expression.encode(counts)[:, :-1]
    )
    library = model.expression.encode(counts)[:, -1]
    assert abs(float(library.mean())) < 1e-3
    assert float(library.std()) == pytest.approx(1, abs=0.01)


def test_genes_in_another_order_are_the_same_genes(base, other):
    order = np.random.default_rng(0).permutation(40)
    model, kept = adapted(base, other, order)
    assert kept.expression.space_kept
    assert model.config.expression.genes == tuple(other.genes[i] for i in order)
    torch.testing.assert_close(
        model.expression.encode(dense(other, order))[:, :-1],
        base.expression.encode(dense(other))[:, :-1],
        atol=1e-4,
        rtol=1e-4,
    )


def test_what_the_decoder_knows_of_shared_genes_is_kept(base, other):
    """From so few cells alone rates could not be learned."""
    few = other.split(40)[0]
    model, _ = adapted(base, few)
    alone = fit_expression_space(few.counts, few.genes, few.symbols, components=6, hidden=32)
    truth = torch.from_numpy(other.rates).float()

    def error(space):
        return float((space.decode(space.encode(dense(other)))[0] - truth).square().mean())

    assert error(model.expression) < 1.5 * error(base.expression)
    assert error(model.expression) < 0.7 * error(alone)


def test_a_new_gene_is_learned_beside_those_kept(make_model, cells, other, base):
    """The base model has seen all genes but the last two, the new panel has all."""
    train = cells.split(1000)[0]
    space = fit_expression_space(
        train.counts[:, :38], train.genes[:38], train.symbols[:38], components=6, hidden=32
    )
    without = PhenoSeq(replace(base.config, expression=space.config), space)
    model, kept = adapted(without, other)
    assert kept.expression.space_kept
    assert kept.expression.genes.new == ("S38", "S39")
    rates, _ = model.expression.decode(model.expression.encode(dense(other)))
    torch.testing.assert_close(rates.sum(1), torch.ones(len(rates)))
    truth = other.rates[:, 38:]
    made = rates[:, 38:].numpy()
    for gene in range(2):
        assert np.corrcoef(np.log(truth[:, gene]), np.log(made[:, gene]))[0, 1] > 0.5
    scale = np.median(made / truth, axis=0)
    np.testing.assert_allclose(scale, 1, atol=0.25)


def test_genes_match_by_id_and_then_by_symbol(base, other):
    names = [f"S{i}" if i < 5 else f"ENSG{i:011d}" for i in range(40)]  # five without an id
    _, kept = adapted(base, other, genes=names)
    assert kept.expression.by_symbol == 5
    assert len(kept.expression.genes.shared) == 40
    assert "40 shared" in str(kept)
    assert "5 of the shared by symbol alone" in str(kept)


def test_with_few_genes_in_common_a_space_is_fitted_and_turned_to_the_old_one(base, train):
    columns = np.arange(12, 40)
    model, kept = adapted(base, train, columns)
    assert not kept.expression.space_kept
    assert kept.expression.captured < 0.9
    assert len(kept.expression.genes.dropped) == 12
    old, new = base.denoiser.inward.weight, model.denoiser.inward.weight
    turn = torch.linalg.lstsq(old, new).solution.detach()  # what the latent went through
    torch.testing.assert_close(turn.T @ turn, torch.eye(len(turn)), atol=1e-3, rtol=0)
    # A cell's turned latent lies near its old one, where the three dimensions of the data are.
    before = base.expression.encode(dense(train))
    after = model.expression.encode(dense(train, columns))
    near = [np.corrcoef((after @ turn.T)[:, i], before[:, i])[0, 1] for i in range(3)]
    straight = [abs(np.corrcoef(after[:, i], before[:, i])[0, 1]) for i in range(3)]
    assert min(near) > 0.7
    assert np.mean(near) >= np.mean(straight) - 0.05


def test_turning_the_latent_leaves_the_denoiser_what_it_was(base, train, rng):
    """Given turned latents, the adapted denoiser and mean predict what the base does."""
    model, _ = adapted(base, train, np.arange(12, 40))
    turn = torch.linalg.lstsq(base.denoiser.inward.weight, model.denoiser.inward.weight).solution
    x = torch.randn(5, 3, 7, generator=rng)
    context, keep = torch.randn(5, 4, 32, generator=rng), torch.ones(5, 4, dtype=torch.bool)
    t = torch.rand(5, 3, generator=rng)
    with torch.no_grad():
        there = model.denoiser(x, t, model.denoiser.remember(context, keep))
        here = base.denoiser(x @ turn.T, t, base.denoiser.remember(context, keep))
        new, old = (m.mean_head(context[:, 0]) for m in (model, base))
    torch.testing.assert_close(there, here @ turn, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(new, old @ turn, atol=1e-5, rtol=1e-4)


def test_no_gene_in_common_still_gives_a_model(base, train):
    names = [f"OTHER{i}" for i in range(40)]
    model, kept = adapted(base, train, genes=names, symbols=names)
    assert kept.expression.genes.shared == ()
    assert kept.expression.captured == 0
    assert not kept.expression.space_kept
    assert model.config.expression.genes == tuple(names)


def test_a_small_panel_gets_a_smaller_latent(base, train):
    model, _ = adapted(base, train, np.arange(8))
    assert model.config.expression.components == 4
    assert model.denoiser.inward.weight.shape[1] == 5
    assert model.denoiser.outward.weight.shape[0] == 5


# --------------------------------------------------------------------------------- stains and crops


@pytest.mark.parametrize("mode", ["joint", "separate"])
def test_shared_stains_keep_their_stem_and_new_ones_start_from_the_mean(make_model, other, mode):
    base = make_model(channel_mode=mode)
    model, kept = adapted(base, other, channels=("Mito", "PolyT", "DNA"))
    assert kept.cells.stains.shared == ("Mito", "DNA")
    assert (kept.cells.stains.new, kept.cells.stains.dropped) == (("PolyT",), ("RNA",))
    old, new = base.encoder.stain, model.encoder.stain
    assert torch.equal(new[0], old[2])
    assert torch.equal(new[2], old[0])
    torch.testing.assert_close(new[1], old.mean(0))
    before, after = (m.encoder.backbone.get_submodule(stem_name(m.encoder)).weight
                     for m in (base, model))  # fmt: skip
    if mode == "separate":
        assert torch.equal(before, after)
    else:
        assert torch.equal(after[:, 0], before[:, 2])
        assert torch.equal(after[:, 2], before[:, 0])
        torch.testing.assert_close(after[:, 1], before.mean(1))
    assert model.image_mean.flatten().tolist() == [1.0] * 3


def test_the_same_stains_in_another_order_give_the_same_tokens(base, other, rng):
    model, _ = adapted(base, other, channels=("Mito", "DNA", "RNA"))
    order = [2, 0, 1]
    with torch.no_grad():
        images = torch.rand(4, 3, 32, 32, generator=rng) * 255
        model.image_mean.copy_(base.image_mean)
        model.image_std.copy_(base.image_std)
        torch.testing.assert_close(model.encode(images[:, order])[0], base.encode(images)[0])


def test_another_crop_size_moves_the_positions(base, other):
    model, kept = adapted(base, other, crop_px=64, pixel_size=0.25)
    old, new = base.encoder.position, model.encoder.position
    assert len(new) == 4 * len(old)
    torch.testing.assert_close(new.mean(0), old.mean(0), atol=1e-5, rtol=0)
    assert kept.cells.rescaled
    assert "crops: 64 px at 0.25 um, the base model's were 32 px at 0.5 um" in str(kept)
    with torch.no_grad():
        assert model.encode(torch.rand(2, 3, 64, 64))[0].shape == (2, len(new), 32)


def test_a_backbone_of_fixed_size_says_what_to_prepare(make_model, other):
    base = make_model(backbone="test_vit")
    with pytest.raises(ModelError, match="--crop-px of the base model"):
        adapted(base, other, crop_px=64)
