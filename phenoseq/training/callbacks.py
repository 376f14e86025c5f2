"""Callbacks: averaged weights with warm-up."""

from __future__ import annotations

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class WarmEMA(WeightAveraging):
    """Moving average of the weights, validated, checkpointed and exported in their place.

    Parameters
    ----------
    decay
        Reached after a warm-up: after n steps it is ``min(decay, (1 + n) / (10 + n))``, so that the
        first, poor weights are soon forgotten.
    """

    def __init__(self, decay: float = 0.999) -> None:
        def average(mean: Tensor, current: Tensor, n: Tensor | int) -> Tensor:
            rate = min(decay, (1 + int(n)) / (10 + int(n)))
            return mean + (1 - rate) * (current - mean)

        super().__init__(avg_fn=average)
