"""Counts with structure, and small models with weights that do something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import sparse

from phenoseq.models.config import ImageConfig, PhenoSeqConfig, TrainingRecord
from phenoseq.models.denoiser import Denoiser, DenoiserConfig
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.expression import ExpressionSpace, fit_expression_space
from phenoseq.models.phenoseq import PhenoSeq

CHANNELS = ("DNA", "RNA", "Mito")


@dataclass(frozen=True)
class Cells:
    """Counts of cells whose rates move along three hidden dimensions."""

    counts: sparse.csr_matrix
    rates: np.ndarray  # rows sum to 1
    genes: tuple[str, ...]
    symbols: tuple[str, ...]

    def split(self, n: int) -> tuple[Cells, Cells]:
        return tuple(
            Cells(self.counts[rows], self.rates[rows], self.genes, self.symbols)
            for rows in (slice(None, n), slice(n, None))
        )


def make_cells(n: int, n_genes: int = 40, seed: int = 0) -> Cells:
    rng = np.random.default_rng(seed)
    biology = np.random.default_rng(1)
    base, weights = biology.normal(0, 1, n_genes), biology.normal(0, 0.6, (3, n_genes))
    logits = base + rng.normal(size=(n, 3)) @ weights
    rates = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    library = np.exp(rng.normal(5, 0.4, n))
    mean = rates * library[:, None]
    counts = rng.poisson(rng.gamma(6.0, mean / 6.0)).astype(np.float32)
    genes = tuple(f"ENSG{g:011d}" for g in range(n_genes))
    return Cells(sparse.csr_matrix(counts), rates, genes, tuple(f"S{g}" for g in range(n_genes)))


def awaken(module: torch.nn.Module, seed: int = 0) -> None:
    """Replace weights that start at zero, so that an untrained network does not return zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def cells() -> Cells:
    return make_cells(1400)


@pytest.fixture(scope="session")
def space(cells) -> ExpressionSpace:
    """Fit to the first 1,000 cells."""
    train, _ = cells.split(1000)
    return fit_expression_space(
        train.counts, train.genes, train.symbols, components=6, hidden=32, epochs=40
    )


@pytest.fixture(scope="session")
def make_model(space) -> Callable[..., PhenoSeq]:
    """Give a function that makes an untrained model, the same for the same arguments."""

    def make(seed: int = 0, *, pixels: str = "uint8", crop_px: int = 32, **encoder) -> PhenoSeq:
        n = len(CHANNELS)
        config = PhenoSeqConfig(
            image=ImageConfig(
                channels=CHANNELS,
                pixel_size=0.5,
                crop_px=crop_px,
                dtype=pixels,
                mean=(40.0,) * n,
                std=(20.0,) * n,
                p999=(200.0,) * n,
            ),
            expression=space.config,
            training=TrainingRecord(
                source="drawn",
                identity="0" * 64,
                split={"by": "block", "block": 100.0, "test": 0.2},
                split_digest="1" * 64,
                n_cells=1000,
                seed=seed,
                version="0",
            ),
            encoder=EncoderConfig(**{"backbone": "test_resnet", **encoder}),
            denoiser=DenoiserConfig(dim=32, depth=2, heads=2, tokens=2),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = PhenoSeq(config, space).eval()
        awaken(model.denoiser, seed)
        return model

    return make


@pytest.fixture
def denoiser() -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = Denoiser(DenoiserConfig(dim=32, depth=2, heads=2, tokens=2), latent_dim=7).eval()
    awaken(out)
    return out


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
