"""Transformer that removes noise from an expression latent, reading context tokens.

Adaptive layer norm for time (Peebles and Xie 2023, DiT) and cross-attention to the context. The
draws of one cell share its context: their tokens are the queries of one attention call, over keys
and values that are computed once a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of the denoiser.

    Attributes
    ----------
    dim
        Width of the tokens, of the context too.
    depth, heads
        Transformer blocks, and attention heads in each.
    tokens
        Tokens into which the latent is folded.
    """

    dim: int = 128
    depth: int = 3
    heads: int = 4
    tokens: int = 2


@dataclass(frozen=True)
class Memory:
    """Every block's keys and values ``(B, heads, N, dim / heads)``; the mask ``(B, 1, 1, N)``."""

    keys_values: list[tuple[Tensor, Tensor]]
    mask: Tensor | None


class Denoiser(nn.Module):
    """Predicts the clean latent (or noise, or velocity) of K draws a cell.

    Parameters
    ----------
    config
        Sizes.
    latent_dim
        Numbers in the latent.
    """

    def __init__(self, config: DenoiserConfig, latent_dim: int) -> None:
        super().__init__()
        self.config = config
        dim, tokens = config.dim, config.tokens
        self.inward = nn.Linear(latent_dim, tokens * dim)
        self.token = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.null = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.blocks = nn.ModuleList(_Block(dim, config.heads) for _ in range(config.depth))
        self.last = nn.Linear(dim, 2 * dim)
        self.outward = nn.Linear(tokens * dim, latent_dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def remember(self, context: Tensor, keep: Tensor, drop: Tensor | None = None) -> Memory:
        """Compute every block's keys and values, once a sample.

        Parameters
        ----------
        context
            Tokens ``(B, N, dim)``.
        keep
            Which tokens count, bool ``(B, N)``.
        drop
            Cells whose context is replaced by the null token, bool ``(B,)``: classifier-free
            training (Ho and Salimans 2022).
        """
        if drop is not None:
            context = torch.where(drop[:, None, None], self.null.to(context.dtype), context)
            keep = keep | drop[:, None]
        pairs = [block.cross.keys_values(context) for block in self.blocks]  # type: ignore[union-attr,operator]
        mask = None if bool(keep.all()) else keep[:, None, None]
        return Memory(pairs, mask)

    def forward(self, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """Denoise.

        Parameters
        ----------
        x
            Noisy latents ``(B, K, D)``: K draws, or K noise levels, of each cell.
        t
            Times in [0, 1], ``()`` for one time for all, or ``(B, K)``.
        memory
            From :meth:`remember`.

        Returns
        -------
        The prediction, ``(B, K, D)``.
        """
        cells, draws = x.shape[:2]
        time = self.time(_sinusoid(t, self.config.dim).to(self.token.dtype))
        if time.ndim == 3:
            time = rearrange(time, "b k d -> (b k) 1 d")
        h = rearrange(self.inward(x), "b k (n d) -> (b k) n d", n=self.config.tokens) + self.token
        for block, pair in zip(self.blocks, memory.keys_values, strict=True):
            h = block(h, time, pair, memory.mask, cells)
        shift, scale = self.last(time).chunk(2, dim=-1)
        h = F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift
        return self.outward(rearrange(h, "(b k) n d -> b k (n d)", b=cells, k=draws))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.modulate = nn.Linear(dim, 9 * dim)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)
        self.own = _SelfAttention(dim, heads)
        self.cross = _CrossAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))

    def forward(
        self, h: Tensor, time: Tensor, pair: tuple[Tensor, Tensor], mask: Tensor | None, cells: int
    ) -> Tensor:
        parts = self.modulate(time).chunk(9, dim=-1)
        h = h + parts[2] * self.own(_norm(h, parts[0], parts[1]))
        h = h + parts[5] * self.cross(_norm(h, parts[3], parts[4]), pair, mask, cells)
        h = h + parts[8] * self.mlp(_norm(h, parts[6], parts[7]))
        return h


def _norm(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift


class _SelfAttention(nn.Module):
    """Attention among the few tokens of one draw, written out.

    With two tokens the fused kernel of torch takes five times as long on a CPU.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(h), "b n (three e d) -> three b n e d", three=3, e=self.heads)
        score = (q[:, :, None] * k[:, None]).sum(-1) / math.sqrt(q.shape[-1])
        mixed = (score.softmax(2)[..., None] * v[:, None]).sum(2)
        return self.out(rearrange(mixed, "b n e d -> b n (e d)"))  # type: ignore[no-any-return]


class _CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        k, v = rearrange(self.kv(context), "b n (two e d) -> two b e n d", two=2, e=self.heads)
        return k, v

    def forward(
        self, h: Tensor, pair: tuple[Tensor, Tensor], mask: Tensor | None, cells: int
    ) -> Tensor:
        q = rearrange(self.q(h), "(b k) n (e d) -> b e (k n) d", b=cells, e=self.heads)
        mixed = F.scaled_dot_product_attention(q, *pair, attn_mask=mask)
        draws = h.shape[0] // cells
        return self.out(rearrange(mixed, "b e (k n) d -> (b k) n (e d)", k=draws))  # type: ignore[no-any-return]


def _sinusoid(t: Tensor, dim: int) -> Tensor:
    """Embed times in [0, 1] as sines and cosines, ``(...,)`` -> ``(..., dim)``."""
    half = dim // 2
    rate = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angle = 1000 * t[..., None].float() * rate
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
