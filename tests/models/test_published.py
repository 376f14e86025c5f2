"""The published network: its golden values, its parts as mathematics, and its files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from phenoseq.errors import ModelError
from phenoseq.models.diffusion import make_path, sampler_times
from phenoseq.models.load import load_folder
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.published import PublishedPhenoSeq, published_times
from phenoseq.models.published_config import (
    FeatureConfig,
    Origin,
    PublishedConfig,
    PublishedNoise,
    PublishedSizes,
)

SIZES = PublishedSizes(24, 6, 16, 4, 2, 2, 8, 2, 0.1)
ORIGIN = Origin("a" * 64, "b" * 64, "ema", "some/repo", "c" * 40)
B, K, N = 3, 5, 7


def make(sizes=SIZES, seed=0, **noise) -> PublishedPhenoSeq:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        noise = {"steps": min(20, noise.get("timesteps", 20)), **noise}
        model = PublishedPhenoSeq(PublishedConfig(ORIGIN, sizes, PublishedNoise(**noise))).eval()
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn(parameter.shape))
        for name, buffer in model.named_buffers():
            buffer.add_(torch.rand(buffer.shape) * (0.5 if "std" in name else 1.0))
    return model


@pytest.fixture
def model():
    return make()


@pytest.fixture
def bags(rng):
    return torch.randn(B, N, SIZES.features, generator=rng)


@pytest.fixture
def noise(rng):
    return torch.randn(B, K, SIZES.embedding, generator=rng)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------- values of the published network


@pytest.fixture(scope="module")
def golden(shared_data):
    values = np.load(shared_data / "reference_phenoseq" / "golden.npz")
    return {name: torch.from_numpy(values[name]) for name in values}


@pytest.fixture(scope="module")
def tiny(shared_data):
    """The reference network, with features that are standardised already."""
    path = shared_data / "reference_phenoseq" / "tiny_checkpoint.pt"
    from phenoseq.zoo.convert import read_checkpoint

    config, tensors = read_checkpoint(path, weights="raw")
    model = PublishedPhenoSeq(PublishedConfig(ORIGIN, config.sizes, config.noise))
    own = {name: tensor for name, tensor in model.state_dict().items() if "features" in name}
    model.load_state_dict({**tensors, **own})
    return model.eval()


def test_golden_context(tiny, golden):
    with torch.inference_mode():
        close(tiny.encode(golden["img_features"])[0], golden["context"])


@pytest.mark.parametrize("draws", [1, 1000])
@pytest.mark.parametrize("grad", [True, False])
def test_golden_noise(tiny, golden, draws, grad):
    t = ((golden["timestep"] + 1) / 1000)[:, None]
    with torch.set_grad_enabled(grad):
        memory = tiny.remember(tiny.encode(golden["img_features"]), draws=draws)
        got = tiny.denoise(golden["noisy_rna"][:, None], t, memory)[:, 0]
    close(got.detach(), golden["noise_pred"])


@pytest.mark.parametrize("steps", [10, 50])
def test_golden_samples(tiny, golden, steps):
    with torch.inference_mode():
        context = tiny.encode(golden["img_features"])
        start = golden[f"ddim{steps}_init"][:, None]
        got = tiny.generate(context, start, steps=steps, published_steps=True)[:, 0]
        many = tiny.generate(context, start.repeat(1, 6, 1), steps=steps, published_steps=True)
    want = golden[f"ddim{steps}_final"]
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert (many - want[:, None]).abs().max() < 1e-4 * want.abs().max()


def test_golden_schedules(tiny, golden):
    assert (tiny.path.alphas_cumprod - golden["alphas_cumprod"]).abs().max() < 1e-6
    assert (tiny.path.betas - golden["betas"]).abs().max() < 1e-6
    assert (make_path("linear").betas - golden["betas_linear"]).abs().max() < 1e-6


def test_golden_noising(tiny, golden):
    t = (golden["timestep"] + 1).double() / 1000
    got = tiny.path.mix(golden["noisy_rna"], golden["q_noise"], t).float()
    close(got, golden["q_sample"], 1e-6)


# ------------------------------------------------------------------------------ any size, any path


@pytest.mark.parametrize(
    "sizes",
    [
        SIZES,
        PublishedSizes(5, 3, 8, 1, 1, 1, 2, 1, 0.0),
        PublishedSizes(7, 9, 24, 6, 3, 0, 10, 4, 0.5),
        PublishedSizes(30, 4, 12, 3, 2, 4, 6, 3, 0.1),
    ],
)
@pytest.mark.parametrize("noise", [{}, {"schedule": "linear", "timesteps": 30, "beta_end": 0.2}])
def test_every_size_and_path_samples_and_trains(sizes, noise, rng):
    model = make(sizes, **noise)
    features = torch.randn(2, 4, sizes.features, generator=rng)
    start = torch.randn(2, 3, sizes.embedding, generator=rng)
    context = model.encode(features)
    with torch.inference_mode():
        for published in (False, True):
            out = model.generate(context, start, steps=9, published_steps=published)
            assert out.shape == start.shape
            assert torch.isfinite(out).all()
            assert (out[0] - out[1]).abs().max() > 1e-4
    t = torch.full((2, 3), 0.5)
    loss = model.denoising_loss(context, start, t, start)
    assert loss.shape == (2, 3)
    loss.sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None]
    assert not still


def test_fewer_published_steps_than_training_ones(model):
    few = make(timesteps=10)
    assert few.config.noise.steps == 10
    with pytest.raises(ModelError, match="steps = 11: choose a number from 1 to 10"):
        few.generate(few.encode(torch.zeros(1, 2, 24)), torch.zeros(1, 1, 6), steps=11)


# ------------------------------------------------------------------------------------- the network


def test_folded_memory_gives_what_the_plain_one_gives(model, bags, noise):
    keep = torch.ones(B, 4, dtype=torch.bool)
    keep[0, 3:] = False
    t = torch.rand(B, K)
    with torch.inference_mode():
        for mask in (None, keep):
            context = model.encode(bags[:, :4], mask)
            plain = model.denoise(noise, t, model.remember(context))
            folded = model.remember(context, draws=1000)
            assert folded.offsets
            close(model.denoise(noise, t, folded), plain)
        assert not model.remember(model.encode(bags), draws=1000).offsets  # more work than it saves


def test_one_time_for_all_is_that_time_for_each(model, bags, noise):
    memory = model.remember(model.encode(bags))
    for time in (0.001, 0.4, 1.0):
        each = model.denoise(noise, torch.full((B, K), time), memory)
        close(model.denoise(noise, torch.tensor(time), memory), each)
    several = model.denoise(noise, torch.linspace(0.1, 1, B * K).view(B, K), memory)
    assert (several - each).abs().amax(dim=-1)[:, :-1].min() > 1e-5


def test_draws_and_bags_do_not_see_each_other(model, bags, noise):
    with torch.inference_mode():
        whole = model.generate(model.encode(bags), noise)
        for b in range(B):
            alone = model.generate(model.encode(bags[[b]]), noise[[b]])
            close(alone[0], whole[b], 1e-4)
            close(model.generate(model.encode(bags[[b]]), noise[[b], :1])[0, 0], whole[b, 0], 1e-4)


def test_the_order_of_the_cells_of_a_bag_is_no_information(model, bags, noise):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        first = model.generate(model.encode(bags), noise)
        close(model.generate(model.encode(bags[:, order]), noise), first, 1e-4)


@pytest.mark.parametrize("draws", [1, 8])
def test_cells_that_do_not_count_change_nothing(model, bags, rng, draws):
    start = torch.randn(B, draws, SIZES.embedding, generator=rng)
    keep = torch.ones(B, N, dtype=torch.bool)
    keep[:, 4:] = False
    with torch.inference_mode():
        short = model.generate(model.encode(bags[:, :4]), start)
        other = bags.clone()
        other[:, 4:] = 50.0
        close(model.generate(model.encode(other, keep), start), short, 1e-4)
        assert (model.generate(model.encode(other), start) - short).abs().max() > 1e-3


def test_features_and_embeddings_are_in_their_own_scale(bags, noise):
    plain, scaled = make(), make()
    with torch.inference_mode():
        for name, buffer in plain.named_buffers():
            buffer.fill_(1.0 if "std" in name else 0.0)
        scaled.features_mean.copy_(torch.rand(24) * 9)
        scaled.features_std.copy_(torch.rand(24) + 0.5)
        own = bags * scaled.features_std + scaled.features_mean
        first = plain.generate(plain.encode(bags), noise)
        second = scaled.generate(scaled.encode(own), noise)
        close(second, first * scaled.rna_std + scaled.rna_mean, 1e-3)


def test_weights_that_change_are_merged_anew(model, bags, noise):
    """An optimiser step, or an average swapped in, must not meet the old merged map."""

    def both():
        memory, t = model.remember(model.encode(bags)), torch.tensor(0.5)
        with torch.no_grad():
            fast = model.denoise(noise, t, memory)
        slow = model.denoise(noise, t, memory).detach()
        close(fast, slow)
        return fast

    first = both()
    with torch.no_grad():
        model.denoiser.layers[0].self_attn.out_proj.weight.mul_(1.5)
    second = both()
    assert (first - second).abs().max() > 1e-4
    model.load_state_dict(make(seed=1).state_dict())
    third = both()
    assert (third - second).abs().max() > 1e-3
    model.double().float()
    close(both(), third)


def test_weights_made_in_inference_mode_are_merged_too(bags, noise):
    with torch.inference_mode():
        model = make()
        memory, t = model.remember(model.encode(bags)), torch.tensor(0.5)
        first = model.denoise(noise, t, memory)
        model.denoiser.layers[0].self_attn.out_proj.weight.mul_(1.5)
        assert (model.denoise(noise, t, memory) - first).abs().max() > 1e-4


def test_dropout_is_for_training_only(model, bags):
    assert torch.equal(model.encode(bags)[0], model.encode(bags)[0])
    model.train()
    assert not torch.equal(model.encode(bags)[0], model.encode(bags)[0])


# ------------------------------------------------------------------------------------ the samplers


@pytest.mark.parametrize(
    ("timesteps", "steps", "evaluations", "first"),
    [(1000, 50, 50, 0.981), (1000, 30, 31, 0.991), (1000, 600, 1000, 1.0), (10, 3, 4, 1.0)],
)
def test_published_times(timesteps, steps, evaluations, first):
    times = published_times(timesteps, steps)
    assert len(times) == evaluations + 1
    assert float(times[0]) == pytest.approx(first)
    assert times[-1] == 0
    close(times * timesteps, (times * timesteps).round(), 1e-9)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_published_times_that_cannot_be(steps):
    with pytest.raises(ModelError, match=f"steps = {steps}: choose a number from 1 to 1000"):
        published_times(1000, steps)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun"])
def test_the_network_is_evaluated_at_the_times_of_the_sampler(model, bags, noise, sampler):
    seen = []
    forward = model.denoiser.forward
    model.denoiser.forward = lambda *inputs: seen.append(1) or forward(*inputs)
    with torch.inference_mode():
        out = model.generate(model.encode(bags), noise, steps=8, sampler=sampler)
        assert len(seen) == 8
        assert not torch.equal(out, model.generate(model.encode(bags), noise, steps=9))
    times = sampler_times(model.path, "eps", sampler, 8)[:-1] * 1000
    close(times, times.round(), 1e-9)  # of which each is one that the network was trained at


def test_steps_and_sampler_are_the_models_own_unless_given(model, bags, noise):
    with torch.inference_mode():
        context = model.encode(bags)
        own = model.generate(context, noise)
        assert torch.equal(own, model.generate(context, noise, steps=20, sampler="dpmpp_2m"))
        assert not torch.equal(own, model.generate(context, noise, published_steps=True))
        published = model.generate(context, noise, published_steps=True)
        fifty = model.generate(context, noise, published_steps=True, steps=50, sampler="ddim")
        assert torch.equal(published, fifty)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"steps": 1001}, "steps = 1001"),
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"published_steps": True, "sampler": "heun"}, "published_steps is a way of DDIM"),
        ({"published_steps": True, "steps": 1500}, "steps = 1500"),
    ],
)
def test_impossible_ways_to_sample(model, bags, noise, how, message):
    with pytest.raises(ModelError, match=message):
        model.generate(model.encode(bags), noise, **how)


# ---------------------------------------------------------------------------------------- the loss


def test_loss_is_the_squared_error_of_the_noise(model, bags, noise, rng):
    clean = torch.randn(B, K, SIZES.embedding, generator=rng)
    own = clean * model.rna_std + model.rna_mean
    t = (torch.randint(1000, (B, K), generator=rng) + 1) / 1000
    context, seen = model.encode(bags), []

    def answer(x, t, memory):
        seen.append(x)
        return noise + 0.5

    model.denoise = answer
    loss = model.denoising_loss(context, own, t, noise)
    close(loss, torch.full((B, K), 0.25))
    alpha = model.path.alphas_cumprod[(t * 1000).round().long() - 1].sqrt()[..., None]
    close(seen[0], (alpha * clean + (1 - alpha**2).sqrt() * noise).float(), 1e-4)


def test_one_encoded_bag_serves_all_its_targets(model, bags, noise, rng):
    own = torch.randn(B, K, SIZES.embedding, generator=rng)
    t = torch.rand(B, K, generator=rng)
    context = model.encode(bags)
    loss = model.denoising_loss(context, own, t, noise)
    for k in range(K):
        one = model.denoising_loss(context, own[:, [k]], t[:, [k]], noise[:, [k]])
        close(one[:, 0], loss[:, k])


# --------------------------------------------------------------------------------------- the files


def test_a_loaded_model_gives_the_same_bits(tmp_path, model, bags, noise):
    folder = model.save(tmp_path / "deep" / "model")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert set(load_file(folder / "model.safetensors")) == set(model.state_dict())
    loaded = load_folder(folder)
    assert isinstance(loaded, PublishedPhenoSeq)
    assert loaded.config == model.config
    assert not loaded.training
    with torch.inference_mode():
        first = model.generate(model.encode(bags), noise)
        assert torch.equal(loaded.generate(loaded.encode(bags), noise), first)


def test_either_network_is_loaded_by_what_its_config_says(tmp_path, model, make_model):
    model.save(tmp_path / "published")
    make_model().save(tmp_path / "own")
    assert isinstance(load_folder(tmp_path / "own"), PhenoSeq)
    for cls, name in ((PhenoSeq, "published"), (PublishedPhenoSeq, "own")):
        with pytest.raises(ModelError, match=r"config\.json: is of the network.*load_model"):
            cls.load(tmp_path / name)
    raw = json.loads((tmp_path / "own" / "config.json").read_text())
    del raw["network"]  # as it was written before there was another
    raw["schema_version"] = 1
    (tmp_path / "own" / "config.json").write_text(json.dumps(raw))
    assert isinstance(load_folder(tmp_path / "own"), PhenoSeq)
    (tmp_path / "own" / "config.json").write_text(json.dumps(raw | {"network": "third"}))
    with pytest.raises(ModelError, match="network 'third', this phenoseq knows"):
        load_folder(tmp_path / "own")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.pop("rna_std"),
        lambda t: t.update(extra=torch.zeros(1)),
        lambda t: t.update(rna_mean=torch.zeros(5)),
        lambda t: t.update(rna_mean=torch.zeros(6, dtype=torch.float64)),
    ],
)
def test_other_weights_than_the_config_asks_for_are_refused(tmp_path, model, spoil):
    weights = model.save(tmp_path / "m") / "model.safetensors"
    tensors = load_file(weights)
    spoil(tensors)
    save_file(tensors, weights)
    with pytest.raises(ModelError, match="does not hold the weights of its config"):
        load_folder(tmp_path / "m")


CONFIG = PublishedConfig(ORIGIN, SIZES)


def test_configuration_round_trip():
    assert PublishedConfig.from_json(CONFIG.to_json(), "here") == CONFIG
    other = replace(
        CONFIG,
        noise=PublishedNoise("linear", 100, 1e-3, 0.1, "heun", 7),
        features=FeatureConfig("dinov2", ("DNA",), 64),
        bag_size=4,
        embedding="scVI",
    )
    assert PublishedConfig.from_json(other.to_json(), "here") == other


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("sizes", "dim", 0, "dim is 0"),
        ("sizes", "dim", 10**9, "dim is 1000000000"),
        ("sizes", "heads", 3, "3 heads do not divide a dim of 16"),
        ("sizes", "heads", -4, "heads is -4"),
        ("sizes", "layers", 0, "layers is 0"),
        ("sizes", "layers", 2.5, "layers: 2.5 is not"),
        ("sizes", "time_dim", 7, "do not divide a time_dim of 7"),
        ("sizes", "dropout", float("nan"), "nan is no number"),
        ("sizes", "surprise", 1, r"unknown \['surprise'\]"),
        ("noise", "schedule", "sigmoid", "sigmoid"),
        ("noise", "timesteps", 0, "timesteps is 0"),
        ("noise", "steps", 1001, "steps is 1001"),
        ("noise", "beta_end", 2.0, "beta_end is 2.0"),
        ("noise", "sampler", "euler", "euler"),
        ("features", "channels", [], "of no channel"),
        ("origin", "weights", "best", "best"),
        (None, "bag_size", 0, "bag_size is 0"),
        (None, "network", "phenoseq", "is of the network 'phenoseq'"),
        (None, "schema_version", 99, "schema version 99"),
        (None, "pairing", "cell", "cell"),
    ],
)
def test_a_configuration_that_cannot_be(part, name, value, message):
    raw = json.loads(CONFIG.to_json())
    (raw[part] if part else raw)[name] = value
    with pytest.raises(ModelError, match=f"some/config.json.*{message}"):
        PublishedConfig.from_json(json.dumps(raw), "some/config.json")


def test_heads_of_the_encoder_must_divide_too():
    with pytest.raises(ModelError, match="4 heads of the encoder do not divide a dim of 10"):
        make(replace(SIZES, dim=10, heads=5))
