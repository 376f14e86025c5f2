"""Pretrained weights of timm as the start of an encoder's training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from phenoseq.errors import ModelError
from phenoseq.models.encoder import Encoder, EncoderConfig
from phenoseq.models.timm_features import about_weights, load_network

#: In place of a file: the weights that timm knows, from the Hugging Face hub or its cache.
HUB = "hub"
_SETTING = "encoder_weights"
_COLOURS = 3


@dataclass(frozen=True)
class Pretrained:
    """Weights of a backbone that reads images of three colours.

    Attributes
    ----------
    state
        By name, without the classifier.
    stems
        Those over colours, of the first convolution.
    origin
        Where they came from, see :class:`~phenoseq.models.record.TrainingRecord`.
    """

    state: dict[str, Tensor]
    stems: tuple[str, ...]
    origin: dict[str, str]

    @torch.no_grad()
    def put_into(self, encoder: Encoder) -> None:
        """Replace the weights of an encoder's backbone.

        Stains are no colours: each gets the mean over the three, times three by the number of
        stains, so that equal stains give what a grey image gave.

        Raises
        ------
        ModelError
            Where the backbone is another.
        """
        own = encoder.backbone.state_dict()
        state = dict(self.state)
        for name in self.stems:
            n_stains = own[name].shape[1]
            grey = state[name].mean(dim=1, keepdim=True) * (_COLOURS / n_stains)
            state[name] = grey.expand_as(own[name])
        try:
            encoder.backbone.load_state_dict(state)
        except RuntimeError as error:
            raise ModelError(f"{encoder.config.backbone}: {error}") from error


def read_pretrained(config: EncoderConfig, side: int, weights: str | Path) -> Pretrained:
    """Read the weights that a backbone is to start from.

    Parameters
    ----------
    config
        Of the encoder.
    side
        Of the images that its backbone reads, in pixels.
    weights
        :data:`HUB`, or a file ``.pth`` or ``.safetensors`` as timm or its authors publish it.

    Raises
    ------
    ModelError
        Where timm knows no weights of the backbone, or they cannot be downloaded; where the file
        is missing, broken or of another network, with the weights that do not fit; where group
        norms were to replace the batch norms that the weights were trained with.
    """
    about = about_weights(config.backbone)
    file = None if weights == HUB else Path(weights)
    network, sha256 = load_network(config.backbone, side, file, yes=True, setting=_SETTING)
    if config.norm == "group" and any(isinstance(m, nn.BatchNorm2d) for m in network.modules()):
        raise ModelError(
            f"{config.backbone}: its weights were trained with batch norms, and are worth little "
            "with the group norms that replace them; set the encoder's norm to batch, or leave out "
            f"{_SETTING}"
        )
    network.reset_classifier(0)  # type: ignore[operator]
    stems = (about.first_conv,) if isinstance(about.first_conv, str) else about.first_conv
    if file is None:
        name = f"{about.architecture}.{about.tag}"
        origin = {"name": f"timm/{name}", "licence": about.license or "not stated"}
    else:
        origin = {"file": file.name, "sha256": sha256}
    return Pretrained(network.state_dict(), tuple(f"{stem}.weight" for stem in stems), origin)
