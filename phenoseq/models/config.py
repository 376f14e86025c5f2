"""The configuration of a model: frozen dataclasses that round-trip through JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from phenoseq.errors import ModelError
from phenoseq.models.appearance import Appearance
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.diffusion import Output, Sampler
from phenoseq.models.embedding import EmbeddingConfig
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.expression import ExpressionConfig
from phenoseq.models.givenfeatures import GivenFeatures
from phenoseq.models.recalibration import Recalibration
from phenoseq.models.record import TrainingRecord
from phenoseq.models.strict import (
    NETWORK,
    SCHEMA_VERSION,
    build,
    check_between,
    check_divides,
    parse,
)


@dataclass(frozen=True)
class ImageConfig:
    """The crops that a model reads.

    Attributes
    ----------
    channels
        Canonical stain names, in order.
    pixel_size, crop_px
        Micrometres a pixel, and side in pixels.
    dtype
        Pixel type of the training images.
    mean, std, p999
        For each channel the mean, deviation and 99.9th percentile of training pixels.
    appearance
        Where the pixel statistics of training crops lie; None where it was never fitted.
    """

    channels: tuple[str, ...]
    pixel_size: float
    crop_px: int
    dtype: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    p999: tuple[float, ...]
    appearance: Appearance | None = None


@dataclass(frozen=True)
class DiffusionConfig:
    """Noise path, what the network predicts, and how to sample by default.

    Attributes
    ----------
    path, output, sampler, steps
        See :mod:`~phenoseq.models.diffusion`.
    centred
        A regression gives each cell's mean, and the diffusion what is left of it; else the
        diffusion gives all.
    """

    path: str = "straight"
    output: Output = "x0"
    sampler: Sampler = "dpmpp_2m"
    steps: int = 8
    centred: bool = True


@dataclass(frozen=True)
class PhenoSeqConfig:
    """Everything besides the weights that rebuilds a model.

    Attributes
    ----------
    recalibration
        Of the predicted distributions; None leaves them as they are.
    pairing
        ``"cell"``: trained on image and counts of the same cell.
    network
        Tells the configurations of different networks apart.
    """

    image: ImageConfig
    expression: ExpressionConfig
    training: TrainingRecord
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    recalibration: Recalibration | None = None
    pairing: Literal["cell"] = "cell"
    network: Literal["phenoseq"] = "phenoseq"
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Return the configuration as JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Rebuild a configuration.

        Raises
        ------
        ModelError
            Where the text is not JSON, of another schema version or network, has a field that is
            unknown, missing, of the wrong type or out of range, or lists that do not go together.
        """
        raw = parse(text, where)
        if raw.get(NETWORK) != "phenoseq":
            raise ModelError(
                f"{where}: is of the network {raw.get(NETWORK)!r}; load it with phenoseq.load_model"
            )
        built: Self = build(cls, raw, where)
        _check_image(built.image, where)
        _check_genes(built.expression, built.training, where)
        _check_network(built.denoiser, built.diffusion, where)
        if built.recalibration is not None:
            built.recalibration.check(where)
        return built


@dataclass(frozen=True)
class SampleConfig:
    """Everything besides the weights that rebuilds a model of samples.

    Attributes
    ----------
    cells
        What the model reads of each image cell: a crop, or features.
    expression
        What it predicts of an RNA cell: genes, or an embedding.
    encoder
        Of crops; None where features are read.
    bag_size
        Image cells of a sample that are read at once.
    recalibration
        Of the predicted distributions of genes; None leaves them as they are.
    pairing
        ``"sample"``: trained on images and RNA of different cells of one sample.
    network
        Tells the configurations of different networks apart.
    """

    cells: ImageConfig | GivenFeatures
    expression: ExpressionConfig | EmbeddingConfig
    training: TrainingRecord
    encoder: EncoderConfig | None
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    bag_size: int = 16
    recalibration: Recalibration | None = None
    pairing: Literal["sample"] = "sample"
    network: Literal["sample"] = "sample"
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Return the configuration as JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Rebuild a configuration; raises as :meth:`PhenoSeqConfig.from_json`."""
        raw = parse(text, where)
        if raw.get(NETWORK) != "sample":
            raise ModelError(
                f"{where}: is of the network {raw.get(NETWORK)!r}; load it with phenoseq.load_model"
            )
        built: Self = build(cls, raw, where)
        check_between(where, {"bag_size": (built.bag_size, 1, 1 << 12)})
        if isinstance(built.cells, ImageConfig):
            _check_image(built.cells, where)
        else:
            built.cells.check(where)
        if (built.encoder is None) == isinstance(built.cells, ImageConfig):
            raise ModelError(f"{where}: crops need an encoder, and features have none")
        if isinstance(built.expression, ExpressionConfig):
            _check_genes(built.expression, built.training, where)
        else:
            check_between(where, {"expression: width": (built.expression.width, 1, 1 << 16)})
        _check_network(built.denoiser, built.diffusion, where)
        if built.recalibration is not None:
            built.recalibration.check(where)
        return built


def _check_lengths(where: str, *lists: tuple[str, tuple[Any, ...], tuple[Any, ...]]) -> None:
    for name, values, of in lists:
        if len(values) != len(of):
            raise ModelError(f"{where}: {name} has {len(values)} entries, not {len(of)}")


def _check_image(image: ImageConfig, where: str) -> None:
    _check_lengths(
        where,
        ("image: mean", image.mean, image.channels),
        ("image: std", image.std, image.channels),
        ("image: p999", image.p999, image.channels),
    )
    check_between(
        where,
        {
            "image: pixel_size": (image.pixel_size, 1e-6, 1e3),
            "image: crop_px": (image.crop_px, 1, 1 << 11),  # the encoder is tried on one
            "image: channels": (len(image.channels), 1, 64),
            "image: std": (min(image.std, default=0), 1e-9, 1e9),
        },
    )
    if image.appearance is not None:
        image.appearance.check(len(image.channels), where)


def _check_genes(space: ExpressionConfig, training: TrainingRecord, where: str) -> None:
    _check_lengths(
        where,
        ("expression: symbols", space.symbols, space.genes),
        ("training: reliability", training.reliability or space.genes, space.genes),
        (
            "training: reliability_interval",
            training.reliability_interval or space.genes,
            space.genes,
        ),
        *(
            ("training: reliability_interval: one", ends, ("low", "high"))
            for ends in training.reliability_interval
        ),
    )
    check_between(
        where,
        {
            "expression: median_library": (space.median_library, 1e-6, 1e12),
            "expression: components": (space.components, 1, 1 << 16),
            "expression: hidden": (space.hidden, 1, 1 << 16),
        },
    )


def _check_network(sizes: DenoiserConfig, how: DiffusionConfig, where: str) -> None:
    check_between(
        where,
        {
            "denoiser: dim": (sizes.dim, 2, 1 << 16),
            "denoiser: depth": (sizes.depth, 1, 1 << 10),
            "denoiser: heads": (sizes.heads, 1, sizes.dim),
            "denoiser: tokens": (sizes.tokens, 1, 1 << 12),
            "diffusion: steps": (how.steps, 1, 1 << 16),
        },
    )
    check_divides(where, "heads", sizes.heads, "dim", sizes.dim)
