"""The configuration of a model: frozen dataclasses that round-trip through JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal, Self

from phenoseq.errors import ModelError
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.diffusion import Output, Sampler
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.expression import ExpressionConfig
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
    """

    channels: tuple[str, ...]
    pixel_size: float
    crop_px: int
    dtype: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    p999: tuple[float, ...]


@dataclass(frozen=True)
class DiffusionConfig:
    """Noise path, what the network predicts, and how to sample by default."""

    path: str = "straight"
    output: Output = "x0"
    sampler: Sampler = "dpmpp_2m"
    steps: int = 8


@dataclass(frozen=True)
class TrainingRecord:
    """What a model was trained on.

    Attributes
    ----------
    source, identity
        Name and digest of the data.
    split, split_digest
        How its cells were divided, and the digest of the outcome.
    n_cells
        Training cells.
    seed
        Seed of the training.
    reliability
        For each gene the Pearson correlation of predicted and true expression over the validation
        cells; empty where it was not computed.
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


@dataclass(frozen=True)
class PhenoSeqConfig:
    """Everything besides the weights that rebuilds a model.

    Attributes
    ----------
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
        image, genes = built.image, built.expression.genes
        for name, values, of in (
            ("image: mean", image.mean, image.channels),
            ("image: std", image.std, image.channels),
            ("image: p999", image.p999, image.channels),
            ("expression: symbols", built.expression.symbols, genes),
            ("training: reliability", built.training.reliability or genes, genes),
        ):
            if len(values) != len(of):
                raise ModelError(f"{where}: {name} has {len(values)} entries, not {len(of)}")
        sizes = built.denoiser
        check_between(
            where,
            {
                "image: pixel_size": (image.pixel_size, 1e-6, 1e3),
                "image: crop_px": (image.crop_px, 1, 1 << 11),  # the encoder is tried on one
                "image: channels": (len(image.channels), 1, 64),
                "image: std": (min(image.std, default=0), 1e-9, 1e9),
                "expression: median_library": (built.expression.median_library, 1e-6, 1e12),
                "expression: components": (built.expression.components, 1, 1 << 16),
                "expression: hidden": (built.expression.hidden, 1, 1 << 16),
                "denoiser: dim": (sizes.dim, 2, 1 << 16),
                "denoiser: depth": (sizes.depth, 1, 1 << 10),
                "denoiser: heads": (sizes.heads, 1, sizes.dim),
                "denoiser: tokens": (sizes.tokens, 1, 1 << 12),
                "diffusion: steps": (built.diffusion.steps, 1, 1 << 16),
            },
        )
        check_divides(where, "heads", sizes.heads, "dim", sizes.dim)
        return built
