"""The model as a whole: saved and loaded, sampled, trained by its loss."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from phenoseq.errors import ModelError
from phenoseq.models.appearance import Appearance
from phenoseq.models.phenoseq import PhenoSeq, pool
from phenoseq.models.strict import SCHEMA_VERSION


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def crops(rng):
    return torch.randint(0, 256, (6, 3, 32, 32), generator=rng, dtype=torch.uint8)


@pytest.fixture
def noise(rng, model):
    return torch.randn(6, 4, model.config.expression.latent_dim, generator=rng)


@torch.inference_mode()
def outputs(model, crops, noise):
    context = model.encode(crops)
    latent = model.generate(context, noise)
    return (*context, latent, *model.expression.decode(latent), model.strangeness(context, crops))


# ------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("encoder", [{}, {"channel_mode": "separate", "backbone": "test_vit"}])
def test_a_loaded_model_gives_the_same_bits(tmp_path, make_model, crops, noise, encoder):
    model = make_model(**encoder)
    model.context_mean.uniform_()
    model.context_whiten.uniform_()
    loaded = PhenoSeq.load(model.save(tmp_path / "model"))
    assert loaded.config == model.config
    assert not loaded.training
    for a, b in zip(outputs(model, crops, noise), outputs(loaded, crops, noise), strict=True):
        assert torch.equal(a, b)


def test_a_folder_holds_its_two_files_and_no_pickle(tmp_path, model):
    folder = model.save(tmp_path / "deep" / "model")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["schema_version"] == SCHEMA_VERSION
    assert set(load_file(folder / "model.safetensors")) == set(model.state_dict())


def test_saving_again_replaces_the_model(tmp_path, make_model, crops, noise):
    folder = make_model(0).save(tmp_path)
    other = make_model(1)
    other.save(folder)
    loaded = PhenoSeq.load(folder)
    assert torch.equal(outputs(loaded, crops, noise)[2], outputs(other, crops, noise)[2])


def test_a_model_trained_in_half_precision_or_on_strided_weights_is_saved_whole(tmp_path, model):
    model.denoiser.inward.weight.data = model.denoiser.inward.weight.data.T.contiguous().T
    loaded = PhenoSeq.load(model.save(tmp_path))
    assert torch.equal(loaded.denoiser.inward.weight, model.denoiser.inward.weight)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, model, name):
    folder = model.save(tmp_path / "m")
    (folder / name).unlink()
    with pytest.raises(ModelError, match=rf"no {name} there"):
        PhenoSeq.load(folder)


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["pytorch_model.pt", "last.ckpt", "model.pkl"])
def test_pickles_are_never_opened(tmp_path, model, name):
    (tmp_path / name).write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ModelError, match=rf"{name}.*pickles, which phenoseq never opens"):
        PhenoSeq.load(tmp_path)
    model.save(tmp_path)
    assert PhenoSeq.load(tmp_path).config == model.config


def test_a_pickle_by_the_name_of_the_weights_is_refused(tmp_path, model):
    folder = model.save(tmp_path)
    (folder / "model.safetensors").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        PhenoSeq.load(folder)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(tmp_path, model, share):
    weights = model.save(tmp_path) / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"model\.safetensors: does not hold the weights"):
        PhenoSeq.load(tmp_path)


def test_weights_of_another_configuration_are_refused(tmp_path, make_model):
    make_model().save(tmp_path)
    deeper = replace(make_model().config, denoiser=replace(make_model().config.denoiser, depth=3))
    (tmp_path / "config.json").write_text(deeper.to_json())
    with pytest.raises(ModelError, match="does not hold the weights of its config"):
        PhenoSeq.load(tmp_path)


def test_weights_that_lack_a_tensor_are_refused(tmp_path, model):
    weights = model.save(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    del tensors["context_mean"]
    save_file(tensors, weights)
    with pytest.raises(ModelError, match="context_mean"):
        PhenoSeq.load(tmp_path)


def test_a_broken_configuration_is_refused_by_file(tmp_path, model):
    model.save(tmp_path)
    for data in (b"{", b"\xff\xfe\x00binary\x80"):
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(ModelError, match=r"config\.json"):
            PhenoSeq.load(tmp_path)


# ---------------------------------------------------------------------------------------- sampled


def test_draws_go_by_their_noise_and_their_cell(model, crops, noise):
    with torch.inference_mode():
        context = model.encode(crops)
        latent = model.generate(context, noise)
        same = model.generate(context, noise[:, :1].expand_as(noise))
        shared = model.generate(context, noise[:1].expand_as(noise))
    assert latent.shape == noise.shape
    assert latent.std(dim=1).min() > 1e-4
    torch.testing.assert_close(same[:, 0], latent[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(same[:, 1], latent[:, 0], atol=1e-5, rtol=1e-4)
    assert (shared[0] - shared[1]).abs().max() > 1e-4


def test_steps_are_the_models_own_unless_given(model, crops, noise):
    with torch.inference_mode():
        context = model.encode(crops)
        own = model.generate(context, noise)
        assert torch.equal(own, model.generate(context, noise, steps=model.config.diffusion.steps))
        assert not torch.equal(own, model.generate(context, noise, steps=3))


def test_no_steps_at_all_are_refused(model, crops, noise):
    with pytest.raises(ModelError, match="steps"):
        model.generate(model.encode(crops), noise, steps=0)


@pytest.mark.parametrize("encoder", [{}, {"channel_mode": "separate"}])
def test_guidance(make_model, crops, noise, encoder):
    """0 ignores the image; in between and beyond, the network's outputs are combined linearly."""
    model = make_model(**encoder)
    with torch.inference_mode():
        context = model.encode(crops)
        plain = model.generate(context, noise)
        assert torch.equal(model.generate(context, noise, guidance=1.0), plain)
        for weight in (0.0, 2.0):
            assert (model.generate(context, noise, guidance=weight) - plain).abs().max() > 1e-4
        blank = model.encode(torch.zeros_like(crops))
        torch.testing.assert_close(
            model.generate(context, noise, guidance=0.0),
            model.generate(blank, noise, guidance=0.0),
        )
        first = {w: model.generate(context, noise, steps=1, guidance=w) for w in (0.0, 1.0, 3.0)}
        combined = first[0.0] + 3 * (first[1.0] - first[0.0])  # with one step, x0 itself
        torch.testing.assert_close(first[3.0], combined, atol=1e-4, rtol=1e-3)


def test_pixels_of_any_type_mean_the_same(model, crops):
    tokens, _ = model.encode(crops)
    for dtype in (torch.float32, torch.int32, torch.float64):
        assert torch.equal(model.encode(crops.to(dtype))[0], tokens)


def test_pixels_are_scaled_by_stored_statistics_and_never_by_the_crop(model, crops):
    tokens, _ = model.encode(crops)
    brighter, _ = model.encode(crops.float() * 1.5)
    assert (tokens - brighter).abs().max() > 1e-3
    seen = []
    hook = model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.encode(crops)
    hook.remove()
    torch.testing.assert_close(seen[0], (crops.float() - 40) / 20)


def test_a_missing_stain_is_recorded_in_the_tokens_to_attend_to(make_model, crops):
    model = make_model(channel_mode="separate")
    present = torch.ones(6, 3, dtype=torch.bool)
    present[:3, 2] = False
    _, keep = model.encode(crops, present)
    assert keep[:3].float().mean() == pytest.approx(2 / 3)
    assert keep[3:].all()


# ------------------------------------------------------------------------- computed once, not often


@contextmanager
def calls(**modules) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """Record the shape of the input of every call of some modules."""
    seen = {name: [] for name in modules}

    def watch(name):
        return lambda _, inputs: seen[name].append(tuple(inputs[0].shape))

    hooks = [m.register_forward_pre_hook(watch(name)) for name, m in modules.items()]
    yield seen
    for hook in hooks:
        hook.remove()


def parts(model) -> dict[str, torch.nn.Module]:
    """The encoder, what depends on the context alone, on time alone, and on the draws."""
    named = {"encoder": model.encoder, "time": model.denoiser.time, "last": model.denoiser.last}
    for i, block in enumerate(model.denoiser.blocks):
        named |= {f"kv{i}": block.cross.kv, f"modulate{i}": block.modulate, f"q{i}": block.cross.q}
    return named


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_a_sample_computes_keys_once_and_time_once_a_step(model, crops, noise, steps):
    """Whatever the number of draws and cells: the context's share once, time's for no cell."""
    cells, draws = noise.shape[:2]
    width = (model.config.denoiser.dim,)
    with torch.inference_mode(), calls(**parts(model)) as seen:
        tokens, keep = model.encode(crops)
        model.generate((tokens, keep), noise, steps=steps)
    assert seen["encoder"] == [tuple(crops.shape)]
    assert len(model.denoiser.blocks) >= 2
    for i in range(len(model.denoiser.blocks)):
        assert seen[f"kv{i}"] == [tuple(tokens.shape)]
        assert seen[f"modulate{i}"] == [width] * steps
        assert [s[0] for s in seen[f"q{i}"]] == [cells * draws] * steps
    assert seen["time"] == seen["last"] == [width] * steps


def test_guidance_computes_keys_twice_and_no_more(model, crops, noise):
    with torch.inference_mode(), calls(**parts(model)) as seen:
        context = model.encode(crops)
        model.generate(context, noise, steps=5, guidance=2.0)
    assert len(seen["encoder"]) == 1
    assert len(seen["kv0"]) == 2
    assert len(seen["q0"]) == 10


def test_training_reads_a_context_once_for_all_its_targets(model, crops, cells, rng):
    counts = torch.from_numpy(cells.counts[:6].toarray())
    levels = 5
    t = torch.rand(6, levels, generator=rng)
    noise = torch.randn(6, levels, model.config.expression.latent_dim, generator=rng)
    with calls(**parts(model)) as seen:
        tokens, keep = model.encode(crops)
        model.denoising_loss((tokens, keep), counts, t, noise)
    assert seen["encoder"] == [tuple(crops.shape)]
    for i in range(len(model.denoiser.blocks)):
        assert seen[f"kv{i}"] == [tuple(tokens.shape)]  # six cells, not thirty
        assert [s[0] for s in seen[f"q{i}"]] == [6 * levels]


def test_no_number_is_drawn_but_from_what_is_given(model, crops, noise):
    """The global generators are left alone, and so do not matter."""
    context = model.encode(crops)
    before = torch.get_rng_state()
    first = model.generate(context, noise)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(model.generate(context, noise), first)
    torch.set_rng_state(before)


# ------------------------------------------------------------------------------------------- loss


def test_loss_is_zero_only_where_the_clean_latent_is_found(model, crops, cells, rng):
    counts = torch.from_numpy(cells.counts[:6].toarray())
    clean = model.expression.encode(counts)
    t = torch.tensor([[1.0, 0.5, 0.01]]).expand(6, 3)
    noise = torch.randn(6, 3, clean.shape[1], generator=rng)
    context = model.encode(crops)

    mean = torch.randn(6, 1, clean.shape[1], generator=rng)
    model.mean_head.forward = lambda _: mean[:, 0]

    def loss_of(answer):
        model.denoiser.forward = lambda x, t, memory: answer - mean
        return model.denoising_loss(context, counts, t, noise)

    assert loss_of(clean[:, None].expand_as(noise)).max() < 1e-8
    wrong = loss_of(clean[:, None].expand_as(noise) + 0.5)
    assert wrong.shape == (6, 3)
    weights = torch.tensor([1.0, 4.0, 400.0])  # of the velocity: 1 / sigma^2, at most 400
    torch.testing.assert_close(wrong, (0.25 * weights).expand(6, 3), rtol=1e-4, atol=1e-5)


def test_loss_of_a_dropped_cell_ignores_its_image(model, crops, cells, rng):
    counts = torch.from_numpy(cells.counts[:6].toarray())
    t = torch.rand(6, 2, generator=rng)
    noise = torch.randn(6, 2, model.config.expression.latent_dim, generator=rng)
    drop = torch.tensor([True, True, False, False, False, False])
    first = model.denoising_loss(model.encode(crops), counts, t, noise, drop)
    other = model.denoising_loss(model.encode(crops // 2), counts, t, noise, drop)
    torch.testing.assert_close(first[:2], other[:2])
    assert (first - other)[2:].abs().max() > 1e-5


# ------------------------------------------------------------------------------------------- mean


@pytest.mark.parametrize("output", ["x0", "eps", "v"])
@pytest.mark.parametrize("path", ["straight", "cosine"])
def test_draws_are_the_mean_and_what_the_diffusion_of_the_rest_gives(
    model, crops, noise, path, output
):
    """Without the regression the same denoiser gives the same draws, less the mean."""
    config = model.config
    how = replace(config.diffusion, path=path, output=output)
    centred = PhenoSeq(replace(config, diffusion=how), model.expression).eval()
    centred.load_state_dict(model.state_dict())
    plain = PhenoSeq(
        replace(config, diffusion=replace(how, centred=False)), model.expression
    ).eval()
    loaded = plain.load_state_dict(model.state_dict(), strict=False)
    assert {name.split(".")[0] for name in loaded.unexpected_keys} == {"mean_head"}
    assert not loaded.missing_keys
    with torch.inference_mode():
        context = centred.encode(crops)
        mean = centred.mean_head(pool(*context))[:, None]
        assert mean.std(dim=0).max() > 0.01
        torch.testing.assert_close(
            centred.generate(context, noise) - mean,
            plain.generate(context, noise),
            atol=2.0 if output == "eps" else 1e-4,  # its errors grow 665 times, and so do mistakes
            rtol=1e-3,
        )


def test_the_mean_learns_by_its_own_loss_and_the_rest_by_the_other(model, crops, cells, rng):
    counts = torch.from_numpy(cells.counts[:6].toarray())
    noise = torch.randn(6, 2, model.config.expression.latent_dim, generator=rng)
    context = model.encode(crops)
    model.denoising_loss(context, counts, torch.rand(6, 2, generator=rng), noise).mean().backward(
        retain_graph=True
    )
    assert all(p.grad is None for p in model.mean_head.parameters())
    assert all(p.grad is not None for p in model.denoiser.blocks.parameters())
    model.denoiser.zero_grad()
    loss = model.mean_loss(context, counts)
    loss.mean().backward()
    assert all(p.grad.any() for p in model.mean_head.parameters())
    assert all(p.grad is None for p in model.denoiser.parameters())
    with torch.no_grad():
        error = model.mean_head(pool(*context)) - model.expression.encode(counts)
        want = (error**2 @ model.expression.weight / error.shape[1])[:, None]
    torch.testing.assert_close(loss.detach(), want)


# ------------------------------------------------------------------------------------ strangeness


def test_pool_averages_the_tokens_that_count():
    tokens = torch.arange(12.0).view(2, 3, 2)
    keep = torch.tensor([[True, False, True], [False, True, False]])
    assert pool(tokens, keep).tolist() == [[2.0, 3.0], [8.0, 9.0]]
    assert not pool(tokens, torch.zeros_like(keep)).any()


def test_strangeness_is_a_mahalanobis_distance(model, rng):
    dim = model.config.denoiser.dim
    mean, spread = torch.randn(dim, generator=rng), torch.rand(dim, generator=rng) + 0.5
    model.context_mean.copy_(mean)
    model.context_whiten.copy_(torch.diag(1 / spread))
    tokens = torch.stack([mean, mean + 3 * spread])[:, None]
    keep = torch.ones(2, 1, dtype=torch.bool)
    crops = torch.zeros(2, 3, 32, 32)
    np.testing.assert_allclose(model.strangeness((tokens, keep), crops), [0, 3], atol=1e-5)
    model.with_image(
        appearance=Appearance.fit(model.pixels(torch.rand(90, 3, 32, 32, generator=rng)))
    )
    present = torch.tensor([[True, True, True], [True, False, True]])
    looks = model.config.image.appearance.distance(model.pixels(crops), present)
    want = ((torch.tensor([0, 9]) + looks**2) / 2).sqrt()
    torch.testing.assert_close(model.strangeness((tokens, keep), crops, present), want)
    assert looks.min() > 5
    assert type(model.config).from_json(model.config.to_json(), "here") == model.config


def test_disagreement_is_the_spread_of_the_draws_in_that_of_cells(model, rng):
    dim = model.config.expression.latent_dim
    agreed = torch.randn(2, 1, dim, generator=rng).expand(-1, 40, -1)
    assert model.disagreement(agreed).tolist() == [0, 0]
    free = torch.randn(2, 40_000, dim, generator=rng)
    torch.testing.assert_close(model.disagreement(free), torch.ones(2), atol=0.02, rtol=0)
    assert model.disagreement(free[:, :1]).tolist() == [0, 0]
