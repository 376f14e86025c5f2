"""Frozen image features, one token a stain: by the network of the published PhenoSeq, or any other.

:mod:`phenoseq.models.timm_features` makes an extractor of any network of timm.
"""

from __future__ import annotations

import hashlib
import pickle
import urllib.error
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from phenoseq.errors import ModelError, PhenoseqWarning


@dataclass(frozen=True)
class FeatureConfig:
    """A vision transformer of torchvision, its weights, and the stains that it looks at.

    Attributes
    ----------
    name
        What to call it.
    channels
        Canonical stain names, in the order of the features.
    image_size, patch_size, num_layers, num_heads, hidden_dim, mlp_dim
        As ``torchvision.models.VisionTransformer`` takes them.
    url
        Where its weights are published; empty where they are not. The file's name ends in the
        first digits of its sha256, as torchvision's do.
    n_bytes
        Size of that file, about.
    """

    name: str
    channels: tuple[str, ...]
    image_size: int
    patch_size: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    mlp_dim: int
    url: str = ""
    n_bytes: int = 0

    @property
    def n_features(self) -> int:
        """Features a cell."""
        return len(self.channels) * self.hidden_dim

    @property
    def file(self) -> str:
        """Name of the file of weights."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def sha256_prefix(self) -> str:
        """First digits of that file's sha256, as its name states them."""
        return self.file.removesuffix(".pth").rsplit("-", 1)[-1]


#: ViT-L/16 with torchvision's DEFAULT weights (ImageNet-1K, 224 pixels), stains in the order in
#: which the published PhenoSeq takes them. Dosovitskiy et al., 2021, arXiv:2010.11929.
VIT_L_16 = FeatureConfig(
    name="torchvision vit_l_16 IMAGENET1K_V1",
    channels=("DNA", "RNA", "AGP", "Mito", "ER"),
    image_size=224,
    patch_size=16,
    num_layers=24,
    num_heads=16,
    hidden_dim=1024,
    mlp_dim=4096,
    url="https://download.pytorch.org/models/vit_l_16-852ce7e3.pth",
    n_bytes=1_217_000_000,
)


class Extractor(nn.Module):
    """A frozen network that turns 8-bit crops into features, one token a stain.

    Each stain is seen by itself, as a grey image: three equal channels, so that pretrained weights
    fit as they are. Its token is the pooled feature of the network.

    Parameters
    ----------
    network
        Takes images ``(n, 3, image_size, image_size)`` and returns features ``(n, width)``.
    name
        What to call it.
    channels
        Canonical stain names, in the order of the features.
    image_size
        Side of the crops in pixels.
    width
        Numbers in a token.
    sha256
        Of the file that the weights come from; empty where that is not known.
    mean, std
        What is taken from pixels of 0..1, and what they are divided by then, a colour each.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        channels: tuple[str, ...],
        image_size: int,
        width: int,
        sha256: str,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.network = network
        self.name, self.channels, self.sha256 = name, channels, sha256
        self.image_size, self.width = image_size, width
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.requires_grad_(False).eval()

    @property
    def n_features(self) -> int:
        """Features a cell."""
        return len(self.channels) * self.width

    def forward(self, crops: Tensor) -> Tensor:
        """Return the features of some cells.

        Parameters
        ----------
        crops
            8-bit crops of ``channels``, uint8 ``(B, C, image_size, image_size)``.

        Returns
        -------
        The tokens of each stain in turn, float32 ``(B, C * width)``.

        Raises
        ------
        ModelError
            Where the crops are not of that shape and type.
        """
        wanted = (len(self.channels), self.image_size, self.image_size)
        if crops.shape[1:] != wanted or crops.dtype != torch.uint8:
            raise ModelError(
                f"crops of shape {tuple(crops.shape)} and type {crops.dtype}; {self.name} "
                f"takes uint8 (B, {', '.join(map(str, wanted))})"
            )
        grey = (crops.float() / 255).flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
        tokens: Tensor = self.network((grey - self.mean) / self.std)
        return tokens.float().reshape(len(crops), self.n_features)

    def digest(self) -> str:
        """Return the sha256 of what the features follow from, in hex."""
        digest = hashlib.sha256(f"{self.channels} {self.image_size}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class FeatureExtractor(Extractor):
    """The vision transformer of torchvision, whose token is the class token after the encoder.

    Pixels are divided by 255, and nothing else.

    Parameters
    ----------
    config
        Architecture and stains.
    state
        Weights, under torchvision's names; those of the classification head are not used.
    sha256
        Of the file that the weights come from.

    Raises
    ------
    ModelError
        Where the weights are not of this architecture.
    """

    def __init__(self, config: FeatureConfig, state: dict[str, Tensor], sha256: str) -> None:
        with torch.device("meta"):  # weights come from the state, so none are drawn
            vit = VisionTransformer(
                config.image_size,
                config.patch_size,
                config.num_layers,
                config.num_heads,
                config.hidden_dim,
                config.mlp_dim,
            )
        vit.heads = nn.Sequential()  # so that its output is the class token after the encoder
        body = {k: v.float() for k, v in state.items() if not k.startswith("heads.")}
        try:
            vit.load_state_dict(body, assign=True)
        except RuntimeError as error:
            first, *more = str(error).splitlines()[1:]
            raise ModelError(
                f"not the weights of {config.name}: {first.strip()} (and {len(more)} more)"
            ) from error
        super().__init__(
            vit,
            name=config.name,
            channels=config.channels,
            image_size=config.image_size,
            width=config.hidden_dim,
            sha256=sha256,
        )


def load_extractor(
    config: FeatureConfig = VIT_L_16, *, weights: str | Path | None = None, yes: bool = False
) -> FeatureExtractor:
    """Load a feature extractor, in evaluation mode, on the CPU.

    Parameters
    ----------
    config
        Which one.
    weights
        File of its weights, ``.pth`` or ``.safetensors``, under torchvision's names. By default
        torchvision's own, from the cache of ``torch.hub``.
    yes
        Download the weights where they are not in the cache.

    Raises
    ------
    ModelError
        Where the weights are missing or broken, may not or cannot be downloaded, or are of
        another architecture.
    """
    path = Path(weights) if weights is not None else _cached(config, yes)
    state, sha256 = read_weights(path)
    if not sha256.startswith(config.sha256_prefix):
        if weights is None:
            raise ModelError(
                f"{path}: is not the file that was published (sha256 {sha256}); delete it and "
                "download it again"
            )
        warnings.warn(
            f"{path}: is not the file {config.file} that was published (its sha256 is {sha256}); "
            "unless it holds the same weights in another form, the features will be others",
            PhenoseqWarning,
            stacklevel=2,
        )
    try:
        return FeatureExtractor(config, state, sha256)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _cached(config: FeatureConfig, yes: bool) -> Path:
    """Return the file of published weights, downloaded where it must and may be."""
    if not config.url:
        raise ModelError(f"{config.name}: no weights of it are published; name a file of them")
    path = Path(torch.hub.get_dir()) / "checkpoints" / config.file
    if path.exists():
        return path
    size = f"{config.n_bytes / 1e9:.1f} GB"
    if not yes:
        raise ModelError(
            f"{config.name}: its weights must be downloaded first: {size} from {config.url}. "
            "Allow it with yes=True or --yes, or, to use a copy, put that file at "
            f"{path} or name it with weights= or --weights"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(config.url, str(path), hash_prefix=config.sha256_prefix)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise ModelError(
            f"{config.url}: cannot be downloaded ({error}). On a machine without network, bring "
            f"that file ({size}) and put it at {path}, or name it with weights= or --weights"
        ) from error
    return path


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read a file of weights, which is never unpickled beyond tensors, and its sha256.

    Raises
    ------
    ModelError
        Where it is missing, broken, or holds anything but tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file of weights") from error
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: holds more than tensors, or is broken, and is not unpickled; take the file "
            "that was published, or a .safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path}: not a readable file of weights ({error})") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{path}: holds no table of weights by name")
    with path.open("rb") as file:
        return state, hashlib.file_digest(file, "sha256").hexdigest()
