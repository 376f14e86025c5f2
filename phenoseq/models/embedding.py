"""The space of RNA embeddings (scGPT, scVI, PCA), taken as they are: standardised, and no more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class EmbeddingConfig:
    """An embedding of RNA.

    Attributes
    ----------
    name
        What it is, e.g. ``scGPT``.
    width
        Its numbers.
    """

    name: str
    width: int

    @property
    def latent_dim(self) -> int:
        """Numbers in the latent."""
        return self.width


class EmbeddingSpace(nn.Module):
    """Standardises embeddings, and turns latents back into their own scale."""

    mean: Tensor
    std: Tensor
    weight: Tensor

    def __init__(self, config: EmbeddingConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.width))
        self.register_buffer("std", torch.ones(config.width))
        #: Weights of the latent's errors: all alike.
        self.register_buffer("weight", torch.ones(config.width), persistent=False)

    def encode(self, embedding: Tensor) -> Tensor:
        """Turn embeddings ``(..., D)`` into latents ``(..., D)``."""
        return (embedding - self.mean) / self.std

    def decode(self, latent: Tensor) -> Tensor:
        """Turn latents ``(..., D)`` into embeddings ``(..., D)``."""
        return latent * self.std + self.mean


def fit_embedding_space(name: str, embeddings: NDArray[np.float32]) -> EmbeddingSpace:
    """Fit mean and deviation to embeddings of training cells, ``(n, D)``."""
    space = EmbeddingSpace(EmbeddingConfig(name, embeddings.shape[1]))
    mean, std = standardise(embeddings)
    space.mean.copy_(mean)
    space.std.copy_(std)
    return space


def standardise(values: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each column, float32; that of a constant is 1."""
    mean, std = values.mean(axis=0, dtype=np.float64), values.std(axis=0, dtype=np.float64)
    std = np.where(std > 1e-6 * np.maximum(np.abs(mean), 1e-6), std, 1.0)
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()
