"""The configuration of a model: frozen dataclasses that round-trip through JSON."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Self

from phenoseq.errors import ModelError
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.diffusion import Output, Sampler
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.expression import ExpressionConfig

SCHEMA_VERSION = 1


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
    """

    image: ImageConfig
    expression: ExpressionConfig
    training: TrainingRecord
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    pairing: Literal["cell"] = "cell"
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
            Where the text is not JSON, of another schema version, has a field that is unknown,
            missing or of the wrong type, or lists that do not go together.
        """
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise ModelError(f"{where}: not JSON ({error}); download or save it again") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise ModelError(
                f"{where}: schema version {version}, this phenoseq reads {SCHEMA_VERSION}; "
                "install the phenoseq that wrote it, or a newer one"
            )
        built: Self = _build(cls, raw, where)
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
        return built


def _build(kind: Any, raw: Any, where: str) -> Any:
    """Build a value of the annotated type from plain JSON, strictly."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(raw, dict):
            raise ModelError(f"{where}: should be an object, is {raw!r}")
        hints = typing.get_type_hints(kind)
        names = {f.name for f in fields(kind)}
        if set(raw) != names:
            raise ModelError(
                f"{where}: missing {sorted(names - set(raw))}, unknown {sorted(set(raw) - names)}"
            )
        return kind(**{n: _build(hints[n], raw[n], f"{where}: {n}") for n in sorted(names)})
    if origin is tuple and isinstance(raw, list):
        return tuple(_build(args[0], item, where) for item in raw)
    if origin is dict and isinstance(raw, dict):
        return {str(k): _build(args[1], v, f"{where}: {k}") for k, v in raw.items()}
    if origin is Literal and raw in args:
        return raw
    if origin is types.UnionType:
        for option in args:
            if option is type(None) and raw is None:
                return None
            if option is not type(None) and _is(raw, option):
                return raw
    if kind is float and _is(raw, float):
        return float(raw)
    if isinstance(kind, type) and origin is None and _is(raw, kind):
        return raw
    raise ModelError(f"{where}: {raw!r} is not {kind}")


def _is(raw: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(raw, int | float) and not isinstance(raw, bool)
    return isinstance(raw, kind) and (kind is bool or not isinstance(raw, bool))
