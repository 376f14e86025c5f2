"""Augmentation of crops, per cell: the symmetries of the square, and the gain of each stain."""

from __future__ import annotations

import torch
from torch import Tensor

#: Standard deviation of the log gain.
GAIN = 0.1


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, mirror and scale the intensity of each crop at random.

    Parameters
    ----------
    images
        Raw pixels, float ``(B, C, H, H)``.
    generator
        On the CPU.
    """
    which = torch.randint(8, (len(images),), generator=generator).to(images.device)
    out = images.clone()
    for symmetry in range(1, 8):
        some = which == symmetry
        turned = torch.rot90(images[some], symmetry % 4, (2, 3))
        out[some] = turned.flip(3) if symmetry >= 4 else turned
    gain = torch.randn(*images.shape[:2], 1, 1, generator=generator).to(images.device)
    return out * torch.exp(GAIN * gain)
