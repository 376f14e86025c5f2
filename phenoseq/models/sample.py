"""The model of samples: a bag of image cells -> the expression of RNA cells of the same sample."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from einops import rearrange
from torch import Tensor

from phenoseq.models.config import ImageConfig, SampleConfig
from phenoseq.models.embedding import EmbeddingConfig, EmbeddingSpace
from phenoseq.models.encoder import Encoder
from phenoseq.models.expression import ExpressionSpace
from phenoseq.models.files import read_config, rebuild
from phenoseq.models.givenfeatures import FeatureEncoder
from phenoseq.models.phenoseq import ContextDiffusion, pool


class SamplePhenoSeq(ContextDiffusion):
    """Predicts the expression of RNA cells of a sample from a bag of its image cells.

    Each image cell is encoded by itself; the context is the tokens of all cells of the bag. What
    is predicted is the expression of a cell of the sample, and not that of any one imaged cell.

    Parameters
    ----------
    config
        Everything besides the weights.
    expression
        A fitted space of genes or embeddings; by default an empty one, to load weights into.
    """

    config: SampleConfig

    def __init__(
        self, config: SampleConfig, expression: ExpressionSpace | EmbeddingSpace | None = None
    ) -> None:
        super().__init__()
        self.config = config
        if isinstance(config.cells, ImageConfig):
            assert config.encoder is not None
            self._read_crops(config.encoder, config.cells)
        else:
            self.encoder = FeatureEncoder(config.cells, config.denoiser.dim)
        self._compose(expression or _empty(config))

    @property
    def n_stains(self) -> int:
        """Stains that are told apart; 1 where features are not of one stain each."""
        return max(len(self.config.cells.channels), 1)

    def encode(
        self, cells: Tensor, present: Tensor | None = None, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode bags of cells to context tokens.

        Parameters
        ----------
        cells
            N cells of each of B bags: raw pixels ``(B, N, C, H, W)``, or features ``(B, N, F)``.
        present
            Which stains each bag has, bool ``(B, C)``; all by default.
        keep
            Which cells count, bool ``(B, N)``, at least one a bag; all by default.

        Returns
        -------
        Tokens ``(B, N * n, dim)``, n of each cell, and which of them to attend to, bool.
        """
        bags, n = cells.shape[:2]
        if present is None:
            present = torch.ones(bags, self.n_stains, dtype=torch.bool, device=cells.device)
        each = present.repeat_interleave(n, dim=0)
        if isinstance(self.encoder, Encoder):
            tokens, seen = self._encode_crops(cells.flatten(0, 1), each)
        else:
            tokens, seen = self.encoder(cells.flatten(0, 1), each)
        seen = rearrange(seen, "(b n) t -> b n t", n=n)
        if keep is not None:
            seen = seen & keep[:, :, None]
        return rearrange(tokens, "(b n) t d -> b (n t) d", n=n), seen.flatten(1)

    def pooled(self, context: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the pooled tokens of cells, ``(B, N, dim)``, and which cells count, ``(B, N)``."""
        keep = rearrange(context[1], "b (n t) -> b n t", t=self.encoder.n_tokens)
        tokens = rearrange(context[0], "b (n t) d -> (b n) t d", t=self.encoder.n_tokens)
        cells = pool(tokens, keep.flatten(0, 1))
        return rearrange(cells, "(b n) d -> b n d", n=keep.shape[1]), keep.any(dim=2)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Rebuild a model from its folder, in evaluation mode, on the CPU.

        Raises
        ------
        ModelError
            Where a file is missing, broken, or holds other tensors than the configuration asks for.
        """
        config = SampleConfig.from_json(*read_config(folder))
        return rebuild(lambda: cls(config), folder)


def _empty(config: SampleConfig) -> ExpressionSpace | EmbeddingSpace:
    if isinstance(config.expression, EmbeddingConfig):
        return EmbeddingSpace(config.expression)
    return ExpressionSpace(config.expression)
