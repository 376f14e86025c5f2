"""Augmentation of crops, per cell: the symmetries of the square, and the gain of each stain."""

from __future__ import annotations

import torch
from torch import Tensor

#: Standard deviation of the log gain.
GAIN = 0.1
#: Turns and mirrorings of a square.
SYMMETRIES = 8


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, mirror and scale the intensity of each crop at random.

    Parameters
    ----------
    images
        Raw pixels, float ``(B, C, H, H)``.
    generator
        On the CPU.
    """
    which = torch.randint(SYMMETRIES, (len(images),), generator=generator).to(images.device)
    out = images.clone()
    for symmetry in range(1, SYMMETRIES):
        some = which == symmetry
        out[some] = turn(images[some], symmetry)
    gain = torch.randn(*images.shape[:2], 1, 1, generator=generator).to(images.device)
    return out * torch.exp(GAIN * gain)


def turn(images: Tensor, symmetry: int) -> Tensor:
    """Turn images ``(B, C, H, H)`` by one of the eight symmetries; 0 leaves them as they are."""
    turned = torch.rot90(images, symmetry % 4, (2, 3))
    return turned.flip(3) if symmetry >= SYMMETRIES // 2 else turned
