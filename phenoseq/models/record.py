"""What a model was trained on."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    reliability_interval
        The 95% interval of each, by resampling the groups of those cells; empty where there is
        one group, or it was not computed.
    version
        The phenoseq that trained it.
    base
        Of a model that was fine-tuned, what it came from: ``model`` (its name, where it had one),
        ``digest`` (of its configuration and weights), ``source`` and ``identity`` of its training
        data, and ``freeze``, what of it was not trained. Else empty.
    encoder_weights
        Of an encoder that started from pretrained weights, where those came from: ``name`` and
        ``licence``, as timm gives them, or ``file`` (its name) and ``sha256``. Else empty.
    """

    source: str
    identity: str
    split: dict[str, str | float | dict | None]  # type: ignore[type-arg]  # plain JSON
    split_digest: str
    n_cells: int
    seed: int
    version: str
    reliability: tuple[float, ...] = ()
    reliability_interval: tuple[tuple[float, ...], ...] = ()
    base: dict[str, str] = field(default_factory=dict)
    encoder_weights: dict[str, str] = field(default_factory=dict)
