"""AdamW with weight decay on matrices alone, linear warm-up and cosine decay, by step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def decayed_groups(parameters: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Return groups of the trained parameters: matrices, and the rest without weight decay."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def adamw(
    groups: list[dict[str, Any]],
    *,
    lr: float,
    weight_decay: float,
    warmup_steps: int,
    total_steps: int,
) -> dict[str, Any]:
    """Return optimiser and schedule as Lightning takes them.

    Parameters
    ----------
    groups
        Of parameters, each with options of its own.
    lr
        Highest learning rate, reached after ``warmup_steps`` (half of all steps at most), and then
        lowered along a cosine to zero.
    weight_decay
        Where a group has none of its own.
    """
    optimiser = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    warm = min(warmup_steps, max(total_steps // 2, 1))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimiser,
        [
            torch.optim.lr_scheduler.LinearLR(optimiser, 0.01, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(total_steps - warm, 1)),
        ],
        milestones=[warm],
    )
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
