"""Networks of timm with their weights, and the frozen image features that they make."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from phenoseq.errors import ModelError
from phenoseq.models.features import Extractor, read_weights

#: Letters of what does not fit that are passed on, of each kind; torch lists every weight.
_TOLD = 160
#: How the arguments that name a file of weights are called by default.
_SETTING = "weights= or --weights"


def load_timm(
    name: str,
    channels: tuple[str, ...],
    *,
    image_size: int | None = None,
    weights: str | Path | None = None,
    yes: bool = False,
) -> Extractor:
    """Load a network of timm as an extractor of features, on the CPU.

    Parameters
    ----------
    name
        Of the network, as timm knows it, with or without the tag of its weights:
        ``"tf_efficientnet_lite0"``, ``"vit_small_patch14_dinov2.lvd142m"``.
    channels
        Canonical stain names, in the order of the features.
    image_size
        Side of the crops in pixels; by default that of the images that it was trained on.
    weights
        File of its weights, ``.pth`` or ``.safetensors``, as timm or its authors publish it. By
        default those on the Hugging Face hub, or in the hub's cache.
    yes
        Download them where they are not there.

    Raises
    ------
    ModelError
        Where timm knows no such network, or its weights are missing, broken, of another network,
        or may not or cannot be downloaded.
    """
    about = about_weights(name)
    side = about.input_size[-1] if image_size is None else image_size
    network, sha256 = load_network(name, side, weights, yes=yes)
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", (1,))[0]
    if side < 1 or side % patch:
        raise ModelError(
            f"{name}: crops of {side} pixels; it takes multiples of {patch} (--crop-px)"
        )
    network.reset_classifier(0)  # type: ignore[operator]
    with torch.inference_mode():
        width = network.eval()(torch.zeros(1, 3, side, side)).shape[-1]
    return Extractor(
        network,
        name=f"timm {about.architecture}.{about.tag}",
        channels=channels,
        image_size=side,
        width=width,
        sha256=sha256,
        mean=about.mean,
        std=about.std,
    )


def about_weights(name: str) -> Any:
    """Return what timm knows of the weights of a network, its ``PretrainedCfg``.

    Raises
    ------
    ModelError
        Where timm knows no such network, or nothing of its weights.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ModelError(f"timm has no network {name!r}; near it are {near}")
    try:
        about = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ModelError(f"timm has no weights {name!r} ({error})") from error
    if about is None:
        raise ModelError(f"timm knows nothing of the weights of {name}; take another network")
    return about


def load_network(
    name: str, side: int, weights: str | Path | None, *, yes: bool, setting: str = _SETTING
) -> tuple[nn.Module, str]:
    """Return a network of timm with all of its weights, for images of three colours.

    Parameters
    ----------
    name, weights, yes
        See :func:`load_timm`.
    side
        Of the images in pixels; where a network has positions, they are resampled.
    setting
        What the user calls ``weights``, for messages.

    Returns
    -------
    The network, its classifier included, and the sha256 of the file of weights where one was
    named, else an empty text.

    Raises
    ------
    ModelError
        See :func:`load_timm`.
    """
    about = about_weights(name)
    how: dict[str, Any] = {"img_size": side} if about.fixed_input_size else {}
    if weights is not None:
        state, sha256 = read_weights(Path(weights))
        blank = timm.create_model(name, **how)
        _add_head(state, blank, about.classifier)
        try:
            overlay = {"state_dict": state}
            return timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, **how
            ), sha256
        except (RuntimeError, KeyError, AttributeError, ValueError) as error:
            raise ModelError(f"{weights}: not the weights of {name}: {_misfits(error)}") from error
    if not (about.hf_hub_id or about.url):
        raise ModelError(f"timm publishes no weights of {name}; name a file of them ({setting})")
    where = f"{about.hf_hub_filename or 'model.safetensors'} of https://hf.co/{about.hf_hub_id}"
    where = where if about.hf_hub_id else about.url
    if not yes:
        raise ModelError(
            f"{name}: its weights come from the Hugging Face hub, where they are not in its cache: "
            f"{where} (licence: {about.license or 'not stated'}). Allow it with yes=True or --yes, "
            f"or name a copy of the file with {setting}"
        )
    try:
        return timm.create_model(name, pretrained=True, **how), ""
    except Exception as error:  # of the hub's client, of requests, of timm
        raise ModelError(
            f"{name}: its weights cannot be had ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). On a machine without network, bring the file {where} "
            f"and name it with {setting}"
        ) from error


def _misfits(error: Exception) -> str:
    """Return what of a file does not fit a network: the first weights of each kind of misfit."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    first, rest = (lines[1:] or lines)[:3], lines[4:]
    cut = [f"{line[:_TOLD]}..." if len(line) > _TOLD else line for line in first]
    return "; ".join(cut) + (f"; and {len(rest)} more" if rest else "")


def _add_head(state: dict[str, Tensor], blank: nn.Module, heads: str | tuple[str, ...]) -> None:
    """Fill in the classifier, which is not used, where a file of weights is without."""
    names = (heads,) if isinstance(heads, str) else heads or ()
    for key, value in blank.state_dict().items():
        if any(key.startswith(f"{head}.") for head in names):
            state.setdefault(key, value)
