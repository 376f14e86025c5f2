"""What a model was trained on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingRecord:
    """What a model was trained on.

    Attributes
    ----------
    source, identity
        Name and digest of the data.
    split, split_digest
        How its cells, or samples, were divided, and the digest of the outcome.
    n_cells
        Training cells (those with RNA, where others have images).
    seed
        Seed of the training.
    reliability
        For each gene the Pearson correlation of predicted and true expression over the validation
        cells, or samples; empty where it was not computed.
    version
        The phenoseq that trained it.
    """

    source: str
    identity: str
    split: dict[str, str | float | dict | None]  # type: ignore[type-arg]  # plain JSON
    split_digest: str
    n_cells: int
    seed: int
    version: str
    reliability: tuple[float, ...] = ()
