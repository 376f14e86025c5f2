"""The published network at full size: this package's way of running it against the plain one.

    python tests/benchmarks/published.py

Random weights, bags of 16 cells, batches of 32. The plain way evaluates the whole network, image
encoder included, for each draw at each step, in batches of 32 bags, one draw of each; that all
draws of all bags are one batch is shown too. Its time is proportional to its evaluations, so that
one is timed, and ours whole; they alternate, and medians are compared.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusion_accuracy import accuracy, published_times
from torch import Tensor

from phenoseq.models.diffusion import make_path, sample
from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.models.published_config import Origin, PublishedConfig

BAGS, CELLS, THREADS = 32, 16, 2


class Plain:
    """The network as its description reads, on the same weights."""

    def __init__(self, model: PublishedPhenoSeq) -> None:
        self.weights = dict(model.denoiser.state_dict())
        self.sizes, self.model = model.config.sizes, model

    def __call__(self, x: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        """Predict the noise in ``(B, D)`` at ``(B,)`` from ``(B, N, F)`` scaled features."""
        context = self.encode(features)
        half = self.sizes.time_dim // 2
        angle = timestep[:, None] * torch.exp(-math.log(1e4) * torch.arange(half) / half)
        embedded = torch.cat([angle.sin(), angle.cos()], dim=-1)
        embedded = self.linear("time_embed.3", F.mish(self.linear("time_embed.1", embedded)))
        h = self.norm("rna_proj.2", F.mish(self.linear("rna_proj.0", x)))[:, None]

        def modulated(name: str) -> Tensor:
            scale, shift = self.linear(f"{name}.proj.1", F.mish(embedded))[:, None].chunk(2, -1)
            return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift

        for i in range(self.sizes.layers):
            name, heads = f"layers.{i}", self.sizes.heads
            seen = self.norm(f"{name}.norm_ctx", context)
            query = modulated(f"{name}.norm_rna")
            h = h + self.attention(f"{name}.cross_attn", query, seen, heads)
            own = modulated(f"{name}.self_attn_norm")
            h = h + self.attention(f"{name}.self_attn", own, own, heads)
            wide = self.norm(f"{name}.ff.net.0", modulated(f"{name}.norm_ff"))
            value, gate = self.linear(f"{name}.ff.net.1", wide).chunk(2, dim=-1)
            h = h + self.linear(f"{name}.ff.net.4", value * F.gelu(gate))
        out = F.mish(self.linear("out_proj.0", self.norm("out_norm", h)))
        return self.linear("out_proj.2", out)[:, 0]

    def encode(self, features: Tensor) -> Tensor:
        x = F.mish(self.linear("img_encoder.proj.0", features))
        x = self.norm("img_encoder.proj.2", x)
        for i in range(self.sizes.encoder_layers):
            name = f"img_encoder.encoder.layers.{i}"
            y = self.norm(f"{name}.norm1", x)
            x = x + self.attention(f"{name}.self_attn", y, y, self.sizes.encoder_heads)
            y = F.gelu(self.linear(f"{name}.linear1", self.norm(f"{name}.norm2", x)))
            x = x + self.linear(f"{name}.linear2", y)
        return x

    def attention(self, name: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
        dim = x.shape[-1]
        weight = self.weights[f"{name}.in_proj_weight"].split(dim)
        bias = self.weights[f"{name}.in_proj_bias"].split(dim)
        q, k, v = (
            F.linear(y, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
            for y, w, b in zip((x, context, context), weight, bias, strict=True)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.linear(f"{name}.out_proj", mixed.transpose(1, 2).flatten(2))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    def evaluate(self, features: Tensor, x: Tensor, t: float, *, at_once: bool = False) -> Tensor:
        """Predict the noise of K draws a bag, ``(B, K, D)``, each with its own pass.

        In batches of the B bags, one for each draw, or of all B * K ``at_once``.
        """
        if not at_once and x.shape[1] > 1:
            parts = [self.evaluate(features, part, t) for part in x.split(1, dim=1)]
            return torch.cat(parts, dim=1)
        draws = x.shape[1]
        scaled = (features - self.model.features_mean) / self.model.features_std
        many = scaled.repeat_interleave(draws, dim=0)
        timestep = torch.full((len(many),), t * self.model.config.noise.timesteps - 1)
        return self(x.flatten(0, 1), timestep, many).view_as(x)


def multiplications(draws: int, steps: int, *, plain: bool, fold: bool = False) -> float:
    """Count the multiplications of a bag's draws, those of attention scores included."""
    s = PublishedConfig(Origin("", "", "raw")).sizes
    d, n = s.dim, CELLS
    encoder = n * (s.features * d + s.encoder_layers * (12 * d * d + 2 * n * d))
    pairs = s.layers * 2 * n * d * d
    times = 4 * 2 * s.time_dim**2 + s.layers * 3 * s.time_dim * 2 * d
    ends = 2 * s.embedding * d + d * d
    gated = 3 * s.ff_mult * d * d
    if plain:
        token = s.layers * (6 * d * d + 2 * n * d + gated) + ends
        return draws * steps * (encoder + pairs + times + token)
    cross = 2 * s.heads * n * d if fold else 2 * d * d + 2 * n * d
    token = s.layers * (cross + d * d + gated) + ends
    once = encoder + pairs * (2 if fold else 1)
    return once + steps * (times / BAGS + draws * token)


def alternate(*calls: Callable[[], object], runs: int) -> list[float]:
    """Return the median seconds of some calls, which take turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for run in range(runs + 1):
        for spent, call in zip(seconds, calls, strict=True):
            start = time.perf_counter()
            call()
            if run:  # the first warms up
                spent.append(time.perf_counter() - start)
    return [statistics.median(spent) for spent in seconds]


def make_model() -> PublishedPhenoSeq:
    torch.manual_seed(0)
    return PublishedPhenoSeq(PublishedConfig(Origin("", "", "raw"))).eval()


def check_equal(model: PublishedPhenoSeq, plain: Plain, features: Tensor) -> float:
    """Return the largest relative difference of samples of 3 steps, one and 8 draws a bag."""
    worst = 0.0
    for draws in (1, 8):
        noise = torch.randn(4, draws, model.config.sizes.embedding)
        some = features[:4]
        ours = model.generate(model.encode(some), noise, steps=3)
        theirs = sample(
            lambda x, t, some=some: plain.evaluate(some, x, t),
            noise,
            path=model.path,
            output="eps",
            sampler="dpmpp_2m",
            steps=3,
        )
        theirs = theirs * model.rna_std + model.rna_mean
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return worst


def equal_steps() -> tuple[int, int]:
    """Return the fewest steps of our sampler, and of DDIM, as accurate as 50 published ones.

    In the error of the mean and in that of the spread, over the closed-form grid.
    """
    path = make_path("cosine")
    error, low, high = accuracy(path, "eps", "ddim", 50, published_times(path, 50))
    spread = max(1 - low, high - 1)

    def fewest(sampler: str) -> int:
        for steps in range(2, 400):
            e, a, b = accuracy(path, "eps", sampler, steps)
            if e <= error and max(1 - a, b - 1) <= spread:
                return steps
        raise SystemExit(f"{sampler} is never as accurate")

    return fewest("dpmpp_2m"), fewest("ddim")


def sampling(model: PublishedPhenoSeq, plain: Plain, features: Tensor, runs: int) -> None:
    few, ddim = equal_steps()
    print(f"largest relative difference: {check_equal(model, plain, features):.1e} (at most 1e-4)")
    print(
        f"as accurate as 50 published DDIM steps: {few} steps of DPM-Solver++ 2M, {ddim} of DDIM\n"
    )
    print(
        "| draws a bag | plain, a step | ours, 20 steps | times faster | by multiplications | "
        "target | 50 published steps / ours at equal error | target | and with DDIM |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for draws, least, at_once in ((1, "4", False), (16, "9", False), (16, "", True)):
        noise = torch.randn(BAGS, draws, model.config.sizes.embedding)

        def ours(steps: int, sampler: str = "dpmpp_2m", noise: Tensor = noise) -> Tensor:
            return model.generate(model.encode(features), noise, steps=steps, sampler=sampler)

        one, whole, short, slow = alternate(
            lambda noise=noise, at_once=at_once: plain.evaluate(
                features, noise, 0.5, at_once=at_once
            ),
            lambda ours=ours: ours(20),
            lambda ours=ours: ours(few),
            lambda ours=ours: ours(ddim, "ddim"),
            runs=runs,
        )
        fold = draws > 1
        count = multiplications(draws, 20, plain=True)
        count /= multiplications(draws, 20, plain=False, fold=fold)
        name = f"{draws} (plain: 512 bags at once)" if at_once else str(draws)
        print(
            f"| {name} | {one:.2f} s | {whole:.2f} s | {20 * one / whole:.1f} | {count:.1f} | "
            f"{least} | {50 * one / short:.1f} | 20 | {50 * one / slow:.1f} |",
            flush=True,
        )


def training(model: PublishedPhenoSeq, features: Tensor, runs: int) -> None:
    """Time gradients of one bag serving 8 targets against one."""
    dim = model.config.sizes.embedding
    model.train()

    def step(targets: int) -> None:
        t = torch.rand(BAGS, targets)
        clean, noise = torch.randn(2, BAGS, targets, dim)
        model.zero_grad()
        context = model.encode(features)
        model.denoising_loss(context, clean, t, noise).mean().backward()

    with torch.inference_mode(False), torch.enable_grad():
        one, eight = alternate(lambda: step(1), lambda: step(8), runs=runs)
    model.eval()
    print("\n| targets a bag | targets a second | ratio | target |\n|---|---|---|---|")
    print(f"| 1 | {BAGS / one:.1f} | 1 | |")
    print(f"| 8 | {8 * BAGS / eight:.1f} | {8 * one / eight:.2f} | 3 |")


def variants(model: PublishedPhenoSeq, features: Tensor, runs: int) -> None:
    """Time bfloat16 and torch.compile against plain float32, at 4 steps."""
    noise = torch.randn(BAGS, 4, model.config.sizes.embedding)

    def ours() -> Tensor:
        return model.generate(model.encode(features), noise, steps=4)

    def half() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ours()

    plain_forward = model.denoiser.forward
    calls = {"float32": ours, "bfloat16": half}
    try:
        compiled = torch.compile(plain_forward)

        def with_compile() -> Tensor:
            model.denoiser.forward = compiled
            try:
                return ours()
            finally:
                model.denoiser.forward = plain_forward

        with_compile()
        calls["torch.compile"] = with_compile
    except Exception as error:  # it needs a C++ compiler
        print(f"\ntorch.compile does not work here: {type(error).__name__}")
    base, *others = alternate(*calls.values(), runs=runs)
    print("\n| 4 draws of 4 steps | float32 / this |\n|---|---|")
    for name, seconds in zip(list(calls)[1:], others, strict=True):
        print(f"| {name} | {base / seconds:.2f} |")


def main(runs: int) -> None:
    torch.set_num_threads(THREADS)
    model = make_model()
    plain = Plain(model)
    features = torch.randn(BAGS, CELLS, model.config.sizes.features)
    n = sum(p.numel() for p in model.parameters())
    print(f"{n / 1e6:.1f} M parameters, {BAGS} bags of {CELLS} cells, {THREADS} threads")
    with torch.inference_mode():
        sampling(model, plain, features, runs)
        variants(model, features, runs)
    training(model, features, runs)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
