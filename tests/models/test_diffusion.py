"""The diffusion mathematics against closed forms; nothing here is random."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path as FilePath
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from phenoseq.errors import ModelError
from phenoseq.models.diffusion import (
    EPS_MIN_LOG_SNR,
    Path,
    guided,
    logit_normal,
    make_path,
    sample,
    to_prediction,
    to_x0,
)

PATHS = ("straight", "cosine", "linear")
OUTPUTS = ("eps", "x0", "v")
SAMPLERS = ("ddim", "dpmpp_2m", "heun")
every_path = pytest.mark.parametrize("name", PATHS)
every_output = pytest.mark.parametrize("output", OUTPUTS)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
GRID = torch.cartesian_prod(torch.tensor([0.0, 1, 7]), torch.tensor([0.2, 0.5, 1, 2])).double()


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def network(name: str, path: Path, output: str, exact_x0: Callable[..., Tensor]) -> Callable:
    """Return the exact network for a posterior mean, by formulas that are not the package's."""

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma = (float(c) for c in path.scales(tensor(t)))
        x0 = exact_x0(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        v = eps - x0 if name == "straight" else alpha * eps - sigma * x0
        return {"eps": eps, "x0": x0, "v": v}[output]

    return denoise


def gaussian(mean: Tensor | float, std: Tensor | float) -> Callable[..., Tensor]:
    def exact_x0(x: Tensor, alpha: float, sigma: float) -> Tensor:
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    return exact_x0


def mixture(weights: Tensor, means: Tensor, std: float) -> Callable[..., Tensor]:
    def exact_x0(x: Tensor, alpha: float, sigma: float) -> Tensor:
        variance = alpha**2 * std**2 + sigma**2
        away = x[:, None] - alpha * means
        share = torch.softmax(weights.log() - away**2 / (2 * variance), dim=1)
        return (share * (means + alpha * std**2 / variance * away)).sum(1)

    return exact_x0


def gaussian_result(
    name: str, output: str, sampler: str, steps: int, timesteps: int = 1000, mean_std: Tensor = GRID
) -> tuple[Tensor, Tensor]:
    """Return error of the mean in deviations and ratio of spreads, for rows of (mean, std).

    A Gaussian target makes the sample affine in the noise, so two numbers tell all of it.
    """
    mean, std = mean_std.T
    path = make_path(name, timesteps)
    noise = tensor(0, 1)[:, None].expand(2, len(mean))
    denoise = network(name, path, output, gaussian(mean, std))
    low, high = sample(denoise, noise, path=path, output=output, sampler=sampler, steps=steps)
    return (low - mean) / std, (high - low) / std


# --- the path -----------------------------------------------------------------------------------


@pytest.fixture
def golden() -> dict[str, np.ndarray]:
    shared = FilePath(__file__).resolve().parents[2].parent / "shared"
    file = shared / "data" / "reference_phenoseq" / "golden.npz"
    if not file.exists():
        pytest.skip("the published network's golden values (../shared) are not here")
    with np.load(file) as arrays:
        return {key: arrays[key] for key in ("betas", "betas_linear", "alphas_cumprod")}


def test_schedules_are_the_published_ones(golden: dict[str, np.ndarray]) -> None:
    total = len(golden["betas"])
    cosine, linear = make_path("cosine", total), make_path("linear", total)
    assert np.abs(cosine.betas.numpy() - golden["betas"]).max() < 1e-6
    assert np.abs(linear.betas.numpy() - golden["betas_linear"]).max() < 1e-6
    assert np.abs(cosine.alphas_cumprod.numpy() - golden["alphas_cumprod"]).max() < 1e-6


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("timesteps", [1, 10, 1000])
def test_discrete_path_meets_its_schedule(name: str, timesteps: int) -> None:
    path = make_path(name, timesteps)
    grid = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alpha_bar = torch.cumprod(1 - path.betas, 0)
    assert torch.allclose(path.alphas_cumprod, alpha_bar, atol=1e-12)
    assert torch.allclose(path.alpha(grid)[1:] ** 2, alpha_bar, atol=1e-12)
    assert (path.alpha(grid)[0], path.sigma(grid)[0]) == (1, 0)
    between = torch.linspace(0, 1, 7777, dtype=torch.float64)
    assert (path.alpha(between).diff() < 0).all()
    assert torch.allclose(path.alpha(between) ** 2 + path.sigma(between) ** 2, tensor(1))


def test_schedule_ends_by_formula() -> None:
    linear = make_path("linear", 400).betas
    assert (float(linear[0]), float(linear[-1])) == pytest.approx((1e-4, 0.02))
    cosine = make_path("cosine").betas
    assert float(cosine[-1]) == 0.999
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    first = math.cos((0.001 + 0.008) / 1.008 * math.pi / 2) ** 2
    assert float(cosine[0]) == pytest.approx(1 - first / start, rel=1e-9)


@every_path
def test_scales_keep_shape_and_dtype(name: str) -> None:
    path = make_path(name)
    t = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        alpha, sigma = path.alpha(t.to(dtype)), path.sigma(t.to(dtype))
        assert alpha.shape == sigma.shape == (2, 3)
        assert alpha.dtype == sigma.dtype == dtype
        assert torch.allclose(alpha.double(), path.alpha(t.double()), atol=tolerance)
        assert torch.allclose(sigma.double(), path.sigma(t.double()), atol=tolerance)


@every_path
def test_time_at_inverts_log_snr(name: str) -> None:
    path = make_path(name)
    t = torch.linspace(0.01, 0.99, 321, dtype=torch.float64)
    alpha, sigma = path.scales(t)
    assert torch.allclose(path.time_at(torch.log(alpha / sigma)), t, atol=1e-9)
    assert path.time_at(tensor(-50, 50)).tolist() == pytest.approx([1, 0], abs=1e-9)


@every_path
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 999, 1000])
def test_times_run_from_noise_to_data(name: str, steps: int) -> None:
    times = make_path(name).times(steps)
    assert len(times) == steps + 1
    assert (float(times[0]), float(times[-1])) == (1, 0)
    assert (times.diff() < 0).all()
    if name != "straight":
        assert torch.allclose(times * 1000, (times * 1000).round(), atol=1e-9)


@every_path
def test_mix_and_weight(name: str) -> None:
    path = make_path(name)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, 4, generator=generator)
    t = torch.tensor([0.0, 0.02, 0.3, 0.7, 1.0])
    mixed = path.mix(x0, eps, t)
    for i in range(5):
        expected = float(path.alpha(t)[i]) * x0[i] + float(path.sigma(t)[i]) * eps[i]
        assert torch.allclose(mixed[i], expected, atol=1e-6)
        assert torch.allclose(path.mix(x0[i], eps[i], float(t[i])), expected, atol=1e-5)


@every_path
def test_v_weight_turns_an_error_of_x0_into_one_of_v(name: str) -> None:
    path = make_path(name)
    t = tensor(0.0, 0.02, 0.3, 0.7, 1.0)
    alpha, sigma = path.scales(t)
    x_t, x0, guess = tensor(0.4), tensor(1.0), tensor(1.3)
    for i in (2, 3, 4):
        v, v_guess = (
            to_prediction(path, "v", data, (x_t - alpha[i] * data) / sigma[i], t[i])
            for data in (x0, guess)
        )
        weighted = path.v_weight(t)[i] * (guess - x0) ** 2
        assert torch.allclose(weighted, (v_guess - v) ** 2, rtol=1e-9)
    assert float(path.v_weight(t)[0]) == pytest.approx(400)
    assert float(path.v_weight(t, min_sigma=0.5)[0]) == pytest.approx(4)


def test_logit_normal_follows_its_generator() -> None:
    first, again = (
        logit_normal(20000, torch.Generator().manual_seed(3), mean=0.4, std=1.5) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert first.shape == (20000,)
    assert 0 < first.min() < first.max() < 1
    logit = torch.logit(first.double())
    assert float(logit.mean()) == pytest.approx(0.4, abs=0.05)
    assert float(logit.std()) == pytest.approx(1.5, abs=0.05)


# --- conversions --------------------------------------------------------------------------------


@every_path
@every_output
def test_conversions_round_trip(name: str, output: str) -> None:
    path = make_path(name)
    x0, eps = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    t = tensor(0.001, 0.1, 0.35, 0.5, 0.9, 0.99)
    x_t = path.mix(x0, eps, t)
    prediction = to_prediction(path, output, x0, eps, t)
    assert torch.allclose(to_x0(path, output, prediction, x_t, t), x0, atol=1e-10)
    one = to_x0(path, output, prediction[2], x_t[2], 0.35)
    assert torch.allclose(one, x0[2], atol=1e-10)
    float32 = to_x0(path, output, prediction[2].float(), x_t[2].float(), 0.35)
    assert float32.dtype == torch.float32


def test_v_is_what_the_papers_call_v() -> None:
    x0, eps, t = tensor(2.0, -1), tensor(0.5, 3), 0.25
    straight, cosine = make_path("straight"), make_path("cosine")
    assert torch.allclose(to_prediction(straight, "v", x0, eps, t), eps - x0)
    alpha, sigma = cosine.scales(tensor(t))
    assert torch.allclose(to_prediction(cosine, "v", x0, eps, t), alpha * eps - sigma * x0)


@every_path
def test_eps_is_bounded_where_no_signal_is_left(name: str) -> None:
    path = make_path(name)
    x0 = to_x0(path, "eps", tensor(0), tensor(1), 1.0)
    assert float(x0) <= 1.001 * math.exp(-EPS_MIN_LOG_SNR)


# --- the samplers against closed forms ----------------------------------------------------------


@pytest.mark.parametrize("name", ["straight", "cosine"])
@every_output
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun"])
@pytest.mark.parametrize("steps", [20, 21])
def test_second_order_at_20_evaluations(name: str, output: str, sampler: str, steps: int) -> None:
    error, ratio = gaussian_result(name, output, sampler, steps)
    assert float(error.abs().max()) <= 0.02
    assert float(ratio.min()) >= 0.97
    assert float(ratio.max()) <= 1.03


@every_output
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun"])
@pytest.mark.parametrize("steps", [20, 21])
def test_the_linear_path_at_20_evaluations(output: str, sampler: str, steps: int) -> None:
    """It ends before pure noise, which loses 0.6% of the mean however many steps there are."""
    error, ratio = gaussian_result("linear", output, sampler, steps)
    lost = GRID[:, 0] * make_path("linear").alpha(tensor(1))
    assert float(lost.max()) == pytest.approx(0.0445, abs=1e-4)
    assert float((error + lost).abs().max()) <= 0.02
    assert float(ratio.min()) >= 0.97
    assert float(ratio.max()) <= 1.03


@every_path
@every_output
@every_sampler
def test_many_evaluations_reach_the_target(name: str, output: str, sampler: str) -> None:
    error, ratio = gaussian_result(name, output, sampler, 500)
    # what is left is the mean that alpha(1), or an eps output's first time, still holds
    lost = {"straight": 0.0, "cosine": 5e-5, "linear": 0.0065}[name]
    lost = max(lost, math.exp(EPS_MIN_LOG_SNR) if output == "eps" else 0)
    assert float(error.abs().max()) <= 7 * lost * 1.02 + 1e-9
    assert float((ratio - 1).abs().max()) <= (0.005 if sampler == "ddim" else 0.001) + lost


@pytest.mark.parametrize("name", ["straight", "cosine"])
@every_output
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)])
def test_error_falls_at_the_samplers_order(
    name: str, output: str, sampler: str, order: int
) -> None:
    std = tensor(0.5, 1, 2)
    targets = torch.stack([torch.ones(3), std], dim=1)
    # an eps output starts a little late; the exact flow from there ends with this spread
    lost = math.exp(EPS_MIN_LOG_SNR) if output == "eps" else 0.0
    length = 1 + lost if name == "straight" else math.hypot(1, lost)
    limit = length / torch.sqrt(lost**2 * std**2 + 1)
    errors = [
        float(
            (gaussian_result(name, output, sampler, steps, 20000, targets)[1] - limit).abs().sum()
        )
        for steps in (32, 64, 128)
    ]
    observed = [math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])]
    assert observed == pytest.approx([order, order], abs=0.15), errors


@every_path
@every_output
@every_sampler
def test_two_component_mixture(name: str, output: str, sampler: str) -> None:
    """One dimension: the sampler's map keeps order, so quantiles must go to quantiles."""
    weights, means, std = tensor(0.3, 0.7), tensor(-1.5, 1), 0.3
    normal = NormalDist()
    level = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)
    noise = tensor(*(normal.inv_cdf(float(p)) for p in level))
    path = make_path(name)
    steps = 200 if sampler == "ddim" else 20
    got = sample(
        network(name, path, output, mixture(weights, means, std)),
        noise,
        path=path,
        output=output,
        sampler=sampler,
        steps=steps,
    )
    assert (got.diff() > 0).all()
    cdf = sum(w * torch.special.ndtr((got - m) / std) for w, m in zip(weights, means, strict=True))
    assert float((cdf - level).abs().max()) < 0.02
    assert float((got < -0.25).double().mean()) == pytest.approx(0.3, abs=0.01)


def test_dpmpp_2m_is_algorithm_2_of_its_paper() -> None:
    path, exact = make_path("linear"), gaussian(0.7, 0.6)
    alpha, sigma = path.scales(path.times(6))
    h = torch.log(alpha / sigma).diff()
    x, data = tensor(-1.0, 0.4), []
    for i in range(6):
        data.append(exact(x, alpha[i], sigma[i]))
        mixed = data[i]
        if 0 < i < 5:
            r = h[i - 1] / h[i]
            mixed = (1 + 1 / (2 * r)) * data[i] - data[i - 1] / (2 * r)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (torch.exp(-h[i]) - 1) * mixed
    denoise = network("linear", path, "x0", exact)
    got = sample(denoise, tensor(-1, 0.4), path=path, output="x0", sampler="dpmpp_2m", steps=6)
    assert torch.allclose(got, x, atol=1e-10)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@every_output
def test_eta_1_is_ancestral_sampling(name: str, output: str) -> None:
    """Every time of a short path, against the posterior of DDPM written from its betas."""
    total = 30
    path = make_path(name, total)
    exact = gaussian(0.7, 0.6)
    fresh = torch.randn(total, 5, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(5, generator=torch.Generator().manual_seed(1)).double()
    x, alpha_bar = noise, torch.cat([tensor(1), path.alphas_cumprod])
    times = torch.arange(total, -1, -1, dtype=torch.float64) / total
    for i, k in enumerate(range(total, 0, -1)):
        beta, now, then = path.betas[k - 1], alpha_bar[k], alpha_bar[k - 1]
        x0 = exact(x, now.sqrt(), (1 - now).sqrt())
        mean = then.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - then) * x
        x = mean / (1 - now) + (beta * (1 - then) / (1 - now)).sqrt() * fresh[i]
    got = sample(
        network(name, path, output, exact),
        noise,
        path=path,
        output=output,
        sampler="ddim",
        steps=total,
        eta=1,
        noise_fn=lambda i: fresh[i],
        times=times,
    )
    assert torch.allclose(got, x, atol=1e-8)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_fresh_noise_keeps_the_spread(eta: float) -> None:
    """The sample is linear in all the noise, so unit vectors give its variance exactly."""
    path, steps, std = make_path("straight"), 400, 0.5
    unit = torch.eye(steps + 1, dtype=torch.float64)
    denoise = network("straight", path, "v", gaussian(0.0, std))
    got = sample(
        denoise,
        unit[-1],
        path=path,
        output="v",
        sampler="ddim",
        steps=steps,
        eta=eta,
        noise_fn=lambda i: unit[i],
    )
    assert float(got.norm()) == pytest.approx(std, rel=0.02)
    assert float(got[:-1].norm()) > 0.3 * std


# --- what the samplers promise ------------------------------------------------------------------


@every_path
@every_output
@every_sampler
def test_steps_are_evaluations(name: str, output: str, sampler: str) -> None:
    path = make_path(name, 30)
    exact = network(name, path, output, gaussian(0.0, 1.0))
    for steps in range(1, 31):
        seen: list[float] = []

        def denoise(x: Tensor, t: float, seen: list[float] = seen) -> Tensor:
            assert isinstance(t, float)
            seen.append(t)
            return exact(x, t)

        got = sample(
            denoise, torch.ones(2, 3), path=path, output=output, sampler=sampler, steps=steps
        )
        assert len(seen) == steps
        assert got.shape == (2, 3)
        assert got.dtype == torch.float32
        assert seen == sorted(seen, reverse=True)
        assert seen[0] == 1 if output != "eps" else seen[0] > 0.8
        if sampler != "heun":
            assert len(set(seen)) == steps


def test_an_even_heun_takes_one_euler_step_more() -> None:
    path = make_path("straight")
    exact = network("straight", path, "x0", gaussian(1.0, 0.5))
    for steps, expected in ((4, [0, 1, 2, 2]), (5, [0, 1, 1, 2, 2])):
        seen: list[float] = []

        def denoise(x: Tensor, t: float, seen: list[float] = seen) -> Tensor:
            seen.append(t)
            return exact(x, t)

        sample(denoise, tensor(0.3), path=path, output="x0", sampler="heun", steps=steps)
        times = path.times(steps // 2 + 1).tolist()
        assert seen == [times[i] for i in expected]


@every_path
@every_output
@every_sampler
def test_float32_is_enough(name: str, output: str, sampler: str) -> None:
    path = make_path(name)
    noise = torch.linspace(-2, 2, 9)
    denoise = network(name, path, output, gaussian(1.0, 0.5))
    options = {"path": path, "output": output, "sampler": sampler, "steps": 20}
    single, double = sample(denoise, noise, **options), sample(denoise, noise.double(), **options)
    assert torch.allclose(single.double(), double, atol=1e-3)


def test_given_times_are_used() -> None:
    path = make_path("cosine")
    seen: list[float] = []

    def denoise(x: Tensor, t: float) -> Tensor:
        seen.append(t)
        return x

    times = tensor(0.9, 0.5, 0)
    sample(denoise, tensor(1), path=path, output="eps", sampler="ddim", steps=2, times=times)
    assert seen == [0.9, 0.5]
    for bad in (tensor(0.9, 0), tensor(0.9, 0.5, 0.1), tensor(0.5, 0.9, 0)):
        with pytest.raises(ModelError, match="3 numbers falling to 0"):
            sample(denoise, tensor(1), path=path, output="eps", sampler="ddim", steps=2, times=bad)


def test_guidance() -> None:
    def never(x: Tensor, t: float) -> Tensor:
        raise AssertionError("the unconditional network was evaluated")

    assert float(guided(lambda x, t: x + 1, never, 1)(tensor(2), 0.5)) == 3
    doubled = guided(lambda x, t: x + 1, lambda x, t: x * t, 3.0)
    assert float(doubled(tensor(2), 0.5)) == 1 + 3 * (3 - 1)


# --- what goes wrong is said --------------------------------------------------------------------


def run(denoise: Callable | None = None, noise: Tensor | None = None, **changes: object) -> Tensor:
    options = {"path": make_path("cosine"), "output": "x0", "sampler": "ddim", "steps": 5}
    return sample(
        denoise or (lambda x, t: x), tensor(1) if noise is None else noise, **(options | changes)
    )


@every_sampler
def test_a_network_that_is_not_finite_is_named(sampler: str) -> None:
    calls = []

    def denoise(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return x * (math.nan if len(calls) == 3 else 1)

    with pytest.raises(ModelError, match="network's output at evaluation 3 of 5"):
        run(denoise, sampler=sampler)
    assert len(calls) == 3


def test_a_state_that_is_not_finite_is_named() -> None:
    with pytest.raises(ModelError, match="state x_t before evaluation 1 of 5"):
        run(noise=tensor(math.inf))
    with pytest.raises(ModelError, match="state x_t before evaluation 3 of 5"):
        run(eta=1, noise_fn=lambda i: tensor(math.nan if i == 1 else 0))
    with pytest.raises(ModelError, match="sample after 1 steps"):  # overflows
        run(lambda x, t: -x, tensor(1e308), output="eps", steps=1)


def test_bad_arguments_are_named() -> None:
    for call, message in (
        (lambda: make_path("cosin"), "'straight', 'cosine', 'linear'"),
        (lambda: make_path("linear", 0), "timesteps = 0"),
        (lambda: to_x0(make_path("linear"), "noise", tensor(1), tensor(1), 0.5), "'eps', 'x0'"),
        (lambda: to_prediction(make_path("linear"), "w", tensor(1), tensor(1), 0.5), "'v'"),
        (lambda: run(output="score"), "unknown output 'score'"),
        (lambda: run(sampler="euler"), "'ddim', 'dpmpp_2m', 'heun'"),
        (lambda: run(steps=0), "steps = 0"),
        (lambda: run(steps=1001), "1 to 1000 on this cosine path"),
        (lambda: run(steps=1001, sampler="heun"), "1 to 1000 on this cosine path"),
        (lambda: run(steps=0, path=make_path("straight")), "from 1 up"),
        (lambda: run(eta=0.5), "noise_fn"),
        (lambda: run(eta=1.5, noise_fn=lambda i: tensor(0)), "eta = 1.5"),
        (lambda: run(eta=1, noise_fn=lambda i: tensor(0), sampler="heun"), "'ddim'"),
    ):
        with pytest.raises(ModelError, match=message):
            call()
