"""What a configuration says of its model, for people: the same questions for every network."""

from __future__ import annotations

import json

from phenoseq.models.config import ImageConfig, PhenoSeqConfig
from phenoseq.models.expression import ExpressionConfig
from phenoseq.models.load import Config
from phenoseq.models.published_config import PublishedConfig
from phenoseq.models.record import TrainingRecord


def image_of(config: Config) -> ImageConfig | None:
    """Return the crops that a model reads; None where it reads features."""
    if isinstance(config, PhenoSeqConfig):
        return config.image
    if isinstance(config, PublishedConfig) or not isinstance(config.cells, ImageConfig):
        return None
    return config.cells


def genes_of(config: Config) -> ExpressionConfig | None:
    """Return the genes that a model predicts; None where it predicts an embedding."""
    if isinstance(config, PublishedConfig) or not isinstance(config.expression, ExpressionConfig):
        return None
    return config.expression


def record_of(config: Config) -> TrainingRecord | None:
    """Return what a model was trained on; None where it was converted."""
    record = config.origin if isinstance(config, PublishedConfig) else config.training
    return record if isinstance(record, TrainingRecord) else None


def stains_of(config: Config) -> tuple[str, ...]:
    """Return the stains that a model reads, in order."""
    if isinstance(config, PublishedConfig):
        return config.features.channels
    return (config.image if isinstance(config, PhenoSeqConfig) else config.cells).channels


def tell_inputs(config: Config) -> str:
    """Say what a model reads."""
    image = image_of(config)
    cells = f", of up to {config.bag_size} cells" if not isinstance(config, PhenoSeqConfig) else ""
    stains = ", ".join(stains_of(config))
    if image is not None:
        return f"{stains} in crops of {image.crop_px} pixels at {image.pixel_size:g} µm{cells}"
    return f"image features{' of ' if stains else ''}{stains}{cells}"


def tell_outputs(config: Config) -> str:
    """Say what a model predicts."""
    if (genes := genes_of(config)) is not None:
        return f"{len(genes.genes)} genes"
    if isinstance(config, PublishedConfig):
        return f"{config.embedding} embedding of {config.sizes.embedding} numbers"
    assert not isinstance(config.expression, ExpressionConfig)
    return f"{config.expression.name} embedding of {config.expression.width} numbers"


def tell_data(config: Config) -> str:
    """Say what a model was trained on."""
    if (record := record_of(config)) is not None:
        return (
            f"`{record.source}` (sha256 `{record.identity}`): {record.n_cells:,} training cells, "
            f"split `{json.dumps(record.split)}`"
        )
    assert isinstance(config, PublishedConfig)
    return f"converted from a checkpoint with the sha256 `{config.origin.checkpoint}`"  # type: ignore[union-attr]


def tell_start(config: Config) -> str:
    """Say which pretrained weights the encoder started from; empty where there were none."""
    record = record_of(config)
    start = record.encoder_weights if record is not None else {}
    if "sha256" in start:
        return f"`{start.get('file', '')}` (sha256 `{start['sha256']}`)"
    return f"`{start['name']}`, licence {start.get('licence', '')}" if "name" in start else ""
