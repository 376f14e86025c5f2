"""The configuration of the published PhenoSeq network: sizes, noise, features, and their origin."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal, Self

from phenoseq.errors import ModelError
from phenoseq.models.diffusion import DiscretePath, Sampler, make_path
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
class PublishedSizes:
    """Sizes of the network.

    Attributes
    ----------
    features, embedding
        Numbers in the image features of a cell, F, and in an embedding of RNA, D.
    dim, heads, layers
        Width of the tokens, and attention heads and number of the denoiser's blocks.
    encoder_layers
        Transformer layers over the cells of a bag; they have at most 4 heads.
    time_dim, ff_mult
        Width of the embedded time, and of the feed-forward layers in multiples of ``dim``.
    dropout
        Share of numbers dropped in training.
    """

    features: int = 5120
    embedding: int = 512
    dim: int = 1024
    heads: int = 8
    layers: int = 6
    encoder_layers: int = 2
    time_dim: int = 256
    ff_mult: int = 4
    dropout: float = 0.1

    @property
    def encoder_heads(self) -> int:
        """Attention heads of the encoder's layers."""
        return min(4, self.heads)


@dataclass(frozen=True)
class PublishedNoise:
    """Noise schedule that the network was trained with, and how to sample by default.

    Attributes
    ----------
    schedule, timesteps
        Name of the schedule and its number of steps, T.
    beta_start, beta_end
        First and last variance of the linear schedule; the cosine one does not use them.
    sampler, steps
        Sampler, and evaluations of the network a draw.
    """

    schedule: Literal["cosine", "linear"] = "cosine"
    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    sampler: Sampler = "dpmpp_2m"
    steps: int = 20

    def path(self) -> DiscretePath:
        """Build the noise path."""
        path = make_path(self.schedule, self.timesteps, (self.beta_start, self.beta_end))
        assert isinstance(path, DiscretePath)
        return path


@dataclass(frozen=True)
class FeatureConfig:
    """The image features of a cell that the network reads.

    Attributes
    ----------
    extractor
        torchvision's name of the network that makes them, with its default weights.
    channels
        Stains, in the order in which their features are concatenated.
    crop_px
        Side of a cell's crop in pixels.
    """

    extractor: str = "vit_l_16"
    channels: tuple[str, ...] = ("DNA", "RNA", "AGP", "Mito", "ER")
    crop_px: int = 224


@dataclass(frozen=True)
class Origin:
    """Where weights were converted from.

    Attributes
    ----------
    repo, commit
        Repository on the Hugging Face hub, and its commit; empty for a file at hand.
    checkpoint, statistics
        sha256 of the checkpoint, and of the file with mean and std of the features.
    weights
        ``"ema"``: their moving average over training; ``"raw"``: the last ones.
    """

    checkpoint: str
    statistics: str
    weights: Literal["ema", "raw"]
    repo: str = ""
    commit: str = ""


@dataclass(frozen=True)
class PublishedConfig:
    """Everything besides the weights that rebuilds a published network.

    Attributes
    ----------
    origin
        Where the weights were converted from, or what they were trained on.
    embedding
        What the embeddings are of.
    bag_size
        Cells of a sample that the network reads at once.
    pairing
        ``"sample"``: trained on image and RNA of different cells of one sample.
    network
        Tells the configurations of different networks apart.
    """

    origin: Origin | TrainingRecord
    sizes: PublishedSizes = field(default_factory=PublishedSizes)
    noise: PublishedNoise = field(default_factory=PublishedNoise)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    embedding: str = "scGPT"
    bag_size: int = 16
    pairing: Literal["sample"] = "sample"
    network: Literal["published"] = "published"
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
            Where the text is not JSON, of another schema version or network, or has a field that is
            unknown, missing, of the wrong type or out of range.
        """
        raw = parse(text, where)
        if raw.get(NETWORK) != "published":
            raise ModelError(
                f"{where}: is of the network {raw.get(NETWORK)!r}; load it with phenoseq.load_model"
            )
        built: Self = build(cls, raw, where)
        built.check(where)
        return built

    def check(self, where: str) -> None:
        """Check that every number is one that a network can have.

        Raises
        ------
        ModelError
            Where one is out of range, or does not go with another; ``where`` says of what.
        """
        sizes, noise = self.sizes, self.noise
        check_between(
            where,
            {
                "features": (sizes.features, 1, 1 << 20),
                "embedding": (sizes.embedding, 1, 1 << 16),
                "dim": (sizes.dim, 1, 1 << 14),
                "heads": (sizes.heads, 1, sizes.dim),
                "layers": (sizes.layers, 1, 1 << 10),
                "encoder_layers": (sizes.encoder_layers, 0, 1 << 10),
                "time_dim": (sizes.time_dim, 2, 1 << 14),
                "ff_mult": (sizes.ff_mult, 1, 64),
                "dropout": (sizes.dropout, 0, 1),
                "timesteps": (noise.timesteps, 1, 1 << 17),
                "beta_start": (noise.beta_start, 1e-12, 0.999),
                "beta_end": (noise.beta_end, noise.beta_start, 0.999),
                "steps": (noise.steps, 1, noise.timesteps),
                "crop_px": (self.features.crop_px, 1, 1 << 14),
                "bag_size": (self.bag_size, 1, 1 << 12),
            },
        )
        check_divides(where, "heads", sizes.heads, "dim", sizes.dim)
        check_divides(where, "heads of the encoder", sizes.encoder_heads, "dim", sizes.dim)
        check_divides(where, "halves", 2, "time_dim", sizes.time_dim)
        if not self.features.channels:
            raise ModelError(f"{where}: the features are of no channel")
