"""Which latent, noise path, output and size of the denoiser predict a section best?

    phenoseq prepare XENIUM_FOLDER section.zarr
    python examples/diffusion_study.py section.zarr OUT

The encoder is that of a trained model, frozen, and each crop is encoded once. On its tokens a
denoiser, and the regression of the mean, are trained from scratch for each arm alike; an arm
differs in one choice from what the model is. Up to 4,096 validation cells score it: the mean, one
draw of each cell, and 8 draws of 2,048 cells; nothing is recalibrated. The mean is read out in two
ways from the mean latent: linearly, as ``X`` is (of an autoencoder by least squares, which for
principal components is the same), and as log1p of its rates. results.csv is written to OUT, and a
run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import phenoseq
from phenoseq.data.datamodule import StoreDataModule
from phenoseq.evaluation.metrics import coexpression_error, e_distance, pcc_gene, variance_ratio
from phenoseq.evaluation.probabilistic import crps, energy_score
from phenoseq.evaluation.report import scored_genes
from phenoseq.models.config import DiffusionConfig
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.expression import ExpressionSpace, decoding_loss, fit_expression_space
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.training.finetune import FinetuneModule, fit
from phenoseq.training.finetunedata import open_data, with_tokens

CELLS, DRAWS, BATCH = 2048, 8, 256


@dataclass(frozen=True)
class Arm:
    """What is tried; None as the model has it. ``latent`` is ``pca`` or ``autoencoder``."""

    name: str
    latent: str = "pca"
    components: int | None = None
    denoiser: DenoiserConfig | None = None
    diffusion: DiffusionConfig | None = None
    seed: int = 0


def arms(how: DiffusionConfig, size: DenoiserConfig) -> list[Arm]:
    """Return all that is tried, from the choices of a model."""
    paths = (("straight", "v"), ("straight", "eps"), ("cosine", "x0"), ("linear", "eps"))
    sizes = [
        replace(size, depth=depth, tokens=tokens) for depth, tokens in ((1, 1), (3, 2), (4, 4))
    ]
    return [
        Arm("as released"),
        Arm("as released, another seed", seed=1),
        Arm("mean by diffusion too", diffusion=replace(how, centred=False)),
        *(
            Arm(f"{path} path, {output}", diffusion=replace(how, path=path, output=output))
            for path, output in paths
        ),
        *(Arm(f"{n} principal components", components=n) for n in (16, 32, 128)),
        *(Arm(f"autoencoder of {n}", "autoencoder", n) for n in (16, 64)),
        *(Arm(f"depth {new.depth}, tokens {new.tokens}", denoiser=new) for new in sizes),
    ]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="xenium-pancreas", help="(%(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="of each arm (%(default)s)")
    options = parser.parse_args(args)
    options.out.mkdir(parents=True, exist_ok=True)
    model = phenoseq.load_model(options.model)
    opened = open_data(options.store, model, None, channels=None, genes=None, seed=0)
    data = with_tokens(opened, model, options.out / "tokens")
    assert isinstance(data, StoreDataModule)
    file = options.out / "results.csv"
    rows = pd.read_csv(file).to_dict("records") if file.exists() else []
    for arm in arms(model.config.diffusion, model.config.denoiser):
        if any(row["arm"] == arm.name for row in rows):
            continue
        start = time.perf_counter()
        new = untrained(model, arm, data)
        module = FinetuneModule(new, freeze="encoder", new_stains=False, lr=1e-3, seed=arm.seed)
        root = options.out / "runs" / arm.name.replace(" ", "-").replace(",", "")
        fit(module, data, root, {"epochs": options.epochs}, epochs=options.epochs, device="cpu")
        found = score(new.eval(), data) | {"minutes": (time.perf_counter() - start) / 60}
        rows.append({"arm": arm.name, "M weights": n_weights(new) / 1e6} | found)
        pd.DataFrame(rows).round(5).to_csv(file, index=False)
        print(pd.DataFrame(rows[-1:]).to_string(header=len(rows) == 1, index=False), flush=True)
    print(markdown(pd.DataFrame(rows)))


def untrained(model: PhenoSeq, arm: Arm, data: StoreDataModule) -> PhenoSeq:
    """Return the model with a new denoiser, and where the arm wants it a new space."""
    space = deepcopy(model.expression)
    if arm.components is not None:
        counts, config = data.rna_sample("train", data.n_cells("train")), space.config
        how = {"components": arm.components, "hidden": config.hidden, "seed": arm.seed}
        space = fit_expression_space(counts, config.genes, config.symbols, **how)
        if arm.latent == "autoencoder":
            space = Autoencoder.fitted(space, counts, arm.seed)
    config = replace(
        model.config,
        expression=space.config,
        denoiser=arm.denoiser or model.config.denoiser,
        diffusion=arm.diffusion or model.config.diffusion,
        recalibration=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arm.seed)
        new = PhenoSeq(config, space)
    new.encoder.load_state_dict(model.encoder.state_dict())
    return new


class Autoencoder(ExpressionSpace):
    """A latent of a network from counts, learned with the decoder by the same likelihood."""

    @classmethod
    def fitted(cls, like: ExpressionSpace, counts, seed: int, epochs: int = 20) -> Autoencoder:
        """Fit to training cells, from where a space of principal components is."""
        genes, config = len(like.config.genes), like.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            space = cls(config)
            space.inward = nn.Sequential(
                nn.Linear(genes, config.hidden), nn.SiLU(), nn.Linear(config.hidden, genes)
            )
        nn.init.zeros_(space.inward[2].weight)
        nn.init.zeros_(space.inward[2].bias)
        space.load_state_dict(like.state_dict(), strict=False)
        rng = np.random.default_rng(seed)
        steps = epochs * counts.shape[0] // BATCH
        space.requires_grad_(True)
        optimiser = torch.optim.Adam(space.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
        for _ in range(steps):
            some = counts[rng.integers(counts.shape[0], size=BATCH)]
            optimiser.zero_grad()
            decoding_loss(space, some, rng).backward()
            optimiser.step()
            schedule.step()
        space.requires_grad_(False)
        dense = torch.from_numpy(counts.toarray()).float()
        codes = space.encode(dense)[:, :-1]
        space.shift, space.scale = codes.mean(dim=0), codes.std(dim=0)
        codes = (codes - space.shift) / space.scale
        space.linear = torch.linalg.lstsq(codes, space.scaled(dense) - space.mean).solution
        return space

    shift: Tensor | float = 0.0
    scale: Tensor | float = 1.0

    def encode(self, counts: Tensor) -> Tensor:
        """Turn raw counts into latents: principal components of what a network adds to log1p."""
        linear = super().encode(counts)
        scaled = self.scaled(counts) - self.mean
        codes = linear[..., :-1] + self.inward(scaled) @ self.axes.T / self.spread
        return torch.cat([(codes - self.shift) / self.scale, linear[..., -1:]], dim=-1)

    def decode(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Turn latents into rates and library sizes."""
        codes = latent[..., :-1] * self.scale + self.shift
        return super().decode(torch.cat([codes, latent[..., -1:]], dim=-1))

    def expected(self, latent: Tensor) -> Tensor:
        """Return what a linear map tells of the expression from mean latents."""
        return (self.mean + latent[..., :-1] @ self.linear).clamp(min=0)


@torch.inference_mode()
def score(model: PhenoSeq, data: StoreDataModule) -> dict[str, float]:
    """Score on validation cells: the mean, a draw of each, and draws of the first."""
    space, generator = model.expression, torch.Generator().manual_seed(0)
    truth, linear, level, draws, seconds = [], [], [], [], []
    for batch in data.fixed("val", data.max_val):
        tokens, counts = batch["tokens"].float(), batch["counts"]
        context = (tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))
        shape = (len(counts), DRAWS, space.config.latent_dim)
        start = time.perf_counter()
        latent = model.generate(context, torch.randn(shape, generator=generator))
        seconds.append((time.perf_counter() - start) / len(counts) / DRAWS)
        rates, library = space.decode(latent)
        n = DRAWS if sum(map(len, truth)) < CELLS else 1
        uniform = torch.rand(len(counts), n, counts.shape[1], generator=generator)
        truth.append(space.scaled(counts))
        mean = model.expected(context, latent)
        linear.append(space.expected(mean))
        level.append(space.level(space.decode(mean[:, None])[0]))
        draws.append(space.scaled(space.draw(rates, library, uniform)))
    genes = scored_genes(data.rna_sample("train", data.n_cells("train")))
    true, expected, rates, one = (
        torch.cat(parts)[:, genes].numpy()
        for parts in (truth, linear, level, [d[:, 0] for d in draws])
    )
    several = torch.cat([d for d in draws if d.shape[1] == DRAWS])[:, :, genes]
    several = np.ascontiguousarray(several.transpose(0, 1).numpy())
    some = true[: several.shape[1]]
    return {
        "pcc_gene": float(np.median(pcc_gene(true, expected))),
        "of rates": float(np.median(pcc_gene(true, rates))),
        "crps": float(crps(some, several).mean()),
        "energy_score": float(energy_score(some, several).mean()),
        "e_distance": e_distance(true, one)[0],
        "variance_ratio": variance_ratio(true, one),
        "coexpression_error": coexpression_error(true, one),
        "ms a draw": float(np.median(seconds)) * 1e3,
    }


def n_weights(model: PhenoSeq) -> int:
    """Return the number of weights of the denoiser."""
    return sum(weights.numel() for weights in model.denoiser.parameters())


def markdown(table: pd.DataFrame) -> str:
    """Return the table that docs/model.md shows."""
    digits = {"M weights": 2, "pcc_gene": 4, "of rates": 4, "crps": 5, "energy_score": 4,
              "e_distance": 4, "variance_ratio": 2, "coexpression_error": 4,
              "ms a draw": 3}  # fmt: skip
    lines = ["| | " + " | ".join(digits) + " |", "|---|" + "---|" * len(digits)]
    for _, row in table.iterrows():
        values = (f"{row[name]:.{n}f}" for name, n in digits.items())
        lines.append(f"| {row['arm']} | " + " | ".join(values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
