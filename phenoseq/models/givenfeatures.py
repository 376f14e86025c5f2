"""Image features that were computed elsewhere -> context tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from phenoseq.errors import ModelError
from phenoseq.models.published_config import FeatureConfig
from phenoseq.models.strict import check_between


@dataclass(frozen=True)
class GivenFeatures(FeatureConfig):
    """Image features of a cell that a model reads.

    Attributes
    ----------
    width
        Numbers a cell.
    """

    width: int = 0

    def check(self, where: str) -> None:
        """Check that the width is one that features of these stains can have.

        Raises
        ------
        ModelError
            Where it is not.
        """
        check_between(where, {"features: width": (self.width, 1, 1 << 20)})
        if self.width % max(len(self.channels), 1):
            raise ModelError(
                f"{where}: {self.width} features a cell are not those of {len(self.channels)} "
                f"stains {list(self.channels)}, one after the other; name the stains in 'features: "
                "channels', or none ([]) where features are not of one stain each"
            )


class FeatureEncoder(nn.Module):
    """Features to tokens: one a stain, or one a cell where stains are not told apart.

    Parameters
    ----------
    config
        Features and their stains.
    dim
        Width of the tokens.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: GivenFeatures, dim: int) -> None:
        super().__init__()
        config.check("the features")
        self.stains = max(len(config.channels), 1)
        self.register_buffer("mean", torch.zeros(config.width))
        self.register_buffer("std", torch.ones(config.width))
        own = config.width // self.stains
        self.project = nn.Sequential(nn.Linear(own, dim), nn.GELU(), nn.Linear(dim, dim))
        self.stain = nn.Parameter(torch.randn(self.stains, dim) * 0.02)
        self.norm = nn.LayerNorm(dim)

    @property
    def n_tokens(self) -> int:
        """Tokens a cell."""
        return self.stains

    def forward(self, features: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Encode features.

        Parameters
        ----------
        features
            In their own scale, float ``(B, width)``.
        present
            Which stains each cell has, bool ``(B, stains)``; the others are ignored.

        Returns
        -------
        Tokens ``(B, stains, dim)`` and which of them to attend to, ``present``.
        """
        scaled = (features.float() - self.mean) / self.std
        tokens = self.project(rearrange(scaled, "b (c f) -> b c f", c=self.stains)) + self.stain
        return self.norm(tokens), present
