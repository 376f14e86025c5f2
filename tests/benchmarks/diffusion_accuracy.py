"""Print how accurate each sampler is on Gaussian targets, whose exact denoiser is known.

    python tests/benchmarks/diffusion_accuracy.py

A Gaussian target makes a whole sample affine in its starting noise, so the mean and the spread of
the result follow from the samples of two numbers, 0 and 1, without Monte Carlo.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phenoseq.models.diffusion import (
    Denoise,
    Output,
    Path,
    Sampler,
    make_path,
    sample,
    to_prediction,
)

MEANS = (0.0, 1.0, 7.0)
STDS = (0.2, 0.5, 1.0, 2.0)
STEPS = (5, 10, 20, 50)
PATHS = ("straight", "cosine", "linear")
OUTPUTS: tuple[Output, ...] = ("eps", "x0", "v")
SAMPLERS: tuple[Sampler, ...] = ("ddim", "dpmpp_2m", "heun")


def gaussian_denoiser(path: Path, output: Output, mean: Tensor, std: Tensor) -> Denoise:
    """Return the exact network for x0 ~ Normal(mean, std^2)."""

    def denoise(x_t: Tensor, t: float) -> Tensor:
        alpha, sigma = path.scales(torch.tensor(t, dtype=torch.float64))
        score = (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return to_prediction(path, output, mean + alpha * std**2 * score, sigma * score, t)

    return denoise


def accuracy(
    path: Path, output: Output, sampler: Sampler, steps: int, times: Tensor | None = None
) -> tuple[float, float, float]:
    """Return the largest error of the mean, and the least and largest ratio of spreads.

    Over the grid of `MEANS` and `STDS`; errors are in units of the target's deviation.
    """
    mean, std = torch.cartesian_prod(torch.tensor(MEANS), torch.tensor(STDS)).double().T
    noise = torch.tensor([[0.0], [1.0]]).double().expand(2, len(mean))
    denoise = gaussian_denoiser(path, output, mean, std)
    low, high = sample(
        denoise, noise, path=path, output=output, sampler=sampler, steps=steps, times=times
    )
    ratio = (high - low) / std
    return float(((low - mean) / std).abs().max()), float(ratio.min()), float(ratio.max())


def published_times(path: Path, steps: int) -> Tensor:
    """Return the published DDIM's times, range(0, T, T // steps) reversed, and the end."""
    total = path.timesteps or 1000
    return torch.tensor([*((k + 1) / total for k in range(0, total, total // steps)[::-1]), 0.0])


def main() -> None:
    """Print the table in Markdown."""
    torch.set_num_threads(1)
    print("Largest error of the mean; least to largest spread, over true spread.\n")
    print("| path | output | sampler |" + "".join(f" {n} evaluations |" for n in STEPS))
    print("|---|---|---|" + "---|" * len(STEPS))

    def row(*names: str, cells: list[tuple[float, float, float]]) -> None:
        texts = [f"{error:.3f}; {low:.3f} to {high:.3f}" for error, low, high in cells]
        print("| " + " | ".join([*names, *texts]) + " |")

    for name in PATHS:
        path = make_path(name)
        for output in OUTPUTS:
            for sampler in SAMPLERS:
                cells = [accuracy(path, output, sampler, steps) for steps in STEPS]
                row(name, output, sampler, cells=cells)
    for name in ("cosine", "linear"):
        path = make_path(name)
        cells = [accuracy(path, "eps", "ddim", n, published_times(path, n)) for n in STEPS]
        row(name, "eps", "ddim, published times", cells=cells)


if __name__ == "__main__":
    main()
