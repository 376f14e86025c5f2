"""The layers of the published PhenoSeq network, named as in that project's checkpoints.

Written anew from its description: so that a checkpoint's tensors go by the same names here, modules
and their places in sequences are those of the checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from phenoseq.models.published_config import PublishedSizes

#: Draws a bag from which on it pays to fold the query and output maps into keys and values.
FOLD_DRAWS = 4


@dataclass(frozen=True)
class Memory:
    """What every block needs of the bags.

    Attributes
    ----------
    keys, values
        One of each a block. Plain: ``(B, heads, dim / heads, N)``, keys divided by the square root
        of dim / heads, and ``(B, heads, N, dim / heads)``. Folded: keys, whose scores are taken
        with the token itself, ``(B, dim, heads * N)``, and values, which are added to it,
        ``(B, heads * N, dim)``.
    offsets
        Folded: what the bias of the query adds to the scores, ``(B, 1, heads * N)``.
    mask
        0 for cells to attend to, minus infinity for others, ``(B, 1, 1, N)``; None for all.
    """

    keys: list[Tensor]
    values: list[Tensor]
    offsets: list[Tensor]
    mask: Tensor | None


@dataclass(frozen=True)
class Schedule:
    """Scale and shift of each of the three norms of every block, for one time or many.

    Attributes
    ----------
    parts
        For each block scale, shift of the norms before cross-attention, self-attention and
        feed-forward, in this order: six tensors ``(dim,)``, or ``(B, K, dim)``.
    """

    parts: list[tuple[Tensor, ...]]


class PublishedNetwork(nn.Module):
    """Predicts the noise in one token from its bag of cells.

    Parameters
    ----------
    sizes
        Sizes of the network.
    """

    def __init__(self, sizes: PublishedSizes) -> None:
        super().__init__()
        dim, time = sizes.dim, sizes.time_dim
        self.time_embed = nn.Sequential(
            _Sinusoid(time), nn.Linear(time, 4 * time), nn.Mish(), nn.Linear(4 * time, time)
        )
        self.img_encoder = _BagEncoder(sizes)
        self.rna_proj = nn.Sequential(nn.Linear(sizes.embedding, dim), nn.Mish(), nn.LayerNorm(dim))
        self.layers = nn.ModuleList(_Block(sizes) for _ in range(sizes.layers))
        self.out_norm = nn.LayerNorm(dim)
        self.out_proj = nn.Sequential(
            nn.Linear(dim, dim), nn.Mish(), nn.Linear(dim, sizes.embedding)
        )

    def forward(self, x: Tensor, schedule: Schedule, memory: Memory) -> Tensor:
        """Predict the noise in ``x``, ``(B, K, D)``, at the times of the schedule."""
        h = self.rna_proj(x)
        offsets: list[Tensor] | list[None] = memory.offsets or [None] * len(self.layers)
        bags = zip(memory.keys, memory.values, offsets, strict=True)
        for block, parts, bag in zip(self.layers, schedule.parts, bags, strict=True):
            h = block(h, parts, bag, memory.mask)
        return self.out_proj(self.out_norm(h))  # type: ignore[no-any-return]


class _Sinusoid(nn.Module):
    """Sines, then cosines, ``(...,)`` -> float32 ``(..., dim)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pairs = dim // 2

    def forward(self, timestep: Tensor) -> Tensor:
        place = torch.arange(self.pairs, dtype=torch.float32, device=timestep.device)
        rate = torch.exp(-math.log(10_000) / self.pairs * place)
        angle = timestep[..., None].float() * rate
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class _BagEncoder(nn.Module):
    """Transformer over the cells of a bag, ``(B, N, F)`` -> ``(B, N, dim)``."""

    def __init__(self, sizes: PublishedSizes) -> None:
        super().__init__()
        dim = sizes.dim
        self.proj = nn.Sequential(
            nn.Linear(sizes.features, dim), nn.Mish(), nn.LayerNorm(dim), nn.Dropout(sizes.dropout)
        )
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim,
                sizes.encoder_heads,
                4 * dim,
                sizes.dropout,
                "gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(sizes.encoder_layers)
        )

    def forward(self, features: Tensor, hidden: Tensor | None) -> Tensor:
        tokens: Tensor = self.proj(features)
        for layer in self.encoder.layers:  # type: ignore[union-attr]
            tokens = layer(tokens, src_key_padding_mask=hidden)
        return tokens


class _Block(nn.Module):
    def __init__(self, sizes: PublishedSizes) -> None:
        super().__init__()
        self.norm_rna = _TimeNorm(sizes)
        self.norm_ctx = nn.LayerNorm(sizes.dim)
        self.cross_attn = _CrossAttention(sizes.dim, sizes.heads)
        self.self_attn_norm = _TimeNorm(sizes)
        self.self_attn = _OneTokenAttention(sizes.dim)
        self.norm_ff = _TimeNorm(sizes)
        self.ff = _GatedFeedForward(sizes)

    def modulate(self, time: Tensor) -> tuple[Tensor, ...]:
        norms = (self.norm_rna, self.self_attn_norm, self.norm_ff)
        return tuple(part for norm in norms for part in norm.proj(time).chunk(2, dim=-1))

    def forward(
        self,
        h: Tensor,
        parts: tuple[Tensor, ...],
        bag: tuple[Tensor, Tensor, Tensor | None],
        mask: Tensor | None,
    ) -> Tensor:
        h = h + self.cross_attn(_norm(h, parts[0], parts[1]), bag, mask)
        h = h + self.self_attn(_norm(h, parts[2], parts[3]))
        return h + self.ff(_norm(h, parts[4], parts[5]))  # type: ignore[no-any-return]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear map to ``(..., in)``.

    Written as weight times columns, which for the few rows of a batch of single tokens takes CPUs
    about three quarters of the time of rows times weight.
    """
    rows = x.flatten(0, -2)
    return torch.addmm(bias[:, None], weight, rows.T).T.view(*x.shape[:-1], len(weight))


def _norm(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    if scale.ndim == 1:  # one time for all: in one kernel
        return F.layer_norm(h, h.shape[-1:], 1 + scale, shift)
    return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift


class _TimeNorm(nn.Module):
    """Holds the map from the embedded time to scale and shift of a norm."""

    def __init__(self, sizes: PublishedSizes) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Mish(), nn.Linear(sizes.time_dim, 2 * sizes.dim))


class _Attention(nn.Module):
    """Weights of an attention: query, key and value maps stacked, and the output map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)


class _CrossAttention(_Attention):
    """Attention from the tokens of the draws to the cells of their bag."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim)
        self.heads = heads

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        dim = context.shape[-1]
        kv = F.linear(context, self.in_proj_weight[dim:], self.in_proj_bias[dim:])
        k, v = kv.chunk(2, dim=-1)
        keys = rearrange(k, "b n (e d) -> b e d n", e=self.heads).contiguous()
        values = rearrange(v, "b n (e d) -> b e n d", e=self.heads).contiguous()
        return keys * (dim // self.heads) ** -0.5, values

    def fold(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fold the query map into the keys and the output map into the values; see `Memory`."""
        dim = self.out_proj.out_features
        query = rearrange(self.in_proj_weight[:dim], "(e d) i -> e d i", e=self.heads)
        bias = rearrange(self.in_proj_bias[:dim], "(e d) -> e d", e=self.heads)
        out = rearrange(self.out_proj.weight, "o (e d) -> o e d", e=self.heads)
        keys = torch.einsum("bedn,edi->bien", k, query).flatten(2)
        offsets = torch.einsum("bedn,ed->ben", k, bias).flatten(1)[:, None]
        values = torch.einsum("bend,oed->beno", v, out).flatten(1, 2)
        return keys, values, offsets

    def forward(
        self, h: Tensor, bag: tuple[Tensor, Tensor, Tensor | None], mask: Tensor | None
    ) -> Tensor:
        k, v, offsets = bag
        dim = h.shape[-1]
        if offsets is not None:
            score = rearrange(torch.baddbmm(offsets, h, k), "b k (e n) -> b k e n", e=self.heads)
            weight = (score if mask is None else score + mask).softmax(-1)
            return torch.baddbmm(self.out_proj.bias, weight.flatten(-2), v)
        q = _linear(h, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        q = rearrange(q, "b k (e d) -> b e k d", e=self.heads)
        score = q @ k
        weight = (score if mask is None else score + mask).softmax(-1)
        mixed = rearrange(weight @ v, "b e k d -> b k (e d)")
        return _linear(mixed, self.out_proj.weight, self.out_proj.bias)


class _OneTokenAttention(_Attention):
    """Attention of one token to itself: its weight is 1 whatever query and key say.

    What is left is one linear map, output times value. In evaluation it is merged, in double
    precision; the merged map is made anew when a weight has changed.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self._merged: tuple[list[Tensor], list[int], Tensor, Tensor] | None = None

    def forward(self, h: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and not self.training:
            return _linear(h, *self.merged())
        dim = h.shape[-1]
        value = F.linear(h, self.in_proj_weight[2 * dim :], self.in_proj_bias[2 * dim :])
        return self.out_proj(value)  # type: ignore[no-any-return]

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of output times value."""
        parts = (self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias)
        counted = not any(p.is_inference() for p in parts)  # whose changes are not counted
        versions = [p._version for p in parts] if counted else []
        if self._merged is not None and counted and self._merged[1] == versions:
            same = (
                p.data_ptr() == q.data_ptr() for p, q in zip(parts, self._merged[0], strict=True)
            )
            if all(same):  # the old ones are held, so that no others can be in their place
                return self._merged[2:]
        dim = self.out_proj.out_features
        maps, starts, out, last = (p.detach().cpu().double() for p in parts)
        weight = (out @ maps[2 * dim :]).to(self.in_proj_weight)
        bias = (out @ starts[2 * dim :] + last).to(self.in_proj_weight)
        self._merged = ([p.detach() for p in parts], versions, weight, bias)
        return weight, bias


class _GatedFeedForward(nn.Module):
    """Its own norm, one linear map to values and gates, value * GELU(gate), one linear map back."""

    def __init__(self, sizes: PublishedSizes) -> None:
        super().__init__()
        dim, wide = sizes.dim, sizes.ff_mult * sizes.dim
        self.net = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, 2 * wide),
            _Gate(),
            nn.Dropout(sizes.dropout),
            nn.Linear(wide, dim),
        )

    def forward(self, h: Tensor) -> Tensor:
        if torch.is_grad_enabled() or self.training:
            return self.net(h)  # type: ignore[no-any-return]
        norm, gate = self.net[0], self.net[2]
        wide: nn.Linear = self.net[1]  # type: ignore[assignment]
        back: nn.Linear = self.net[4]  # type: ignore[assignment]
        columns = norm(h).flatten(0, -2).T  # as in _linear, but gated before they are turned
        columns = torch.addmm(wide.bias[:, None], wide.weight, columns)
        columns = torch.addmm(back.bias[:, None], back.weight, gate(columns, 0))
        return columns.T.view(h.shape)


class _Gate(nn.Module):
    def forward(self, h: Tensor, dim: int = -1) -> Tensor:
        value, gate = h.chunk(2, dim=dim)
        return value * F.gelu(gate)
