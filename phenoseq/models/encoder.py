"""Morphology encoder: crops with named stains -> context tokens, on a timm backbone."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal, Self

import timm
import torch
from einops import rearrange
from timm.layers.norm_act import BatchNormAct2d
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # of any dimension, and SyncBatchNorm

from phenoseq.errors import ModelError


@dataclass(frozen=True)
class EncoderConfig:
    """A timm backbone and how stains enter it.

    Attributes
    ----------
    backbone
        Name of a timm architecture.
    channel_mode
        ``"joint"``: one stem over all stains (cheapest). ``"separate"``: one stain at a time
        through a shared stem, with a learned stain embedding; a missing stain then has no tokens.
    norm
        ``"group"``: batch norms of the backbone become group norms, which do not depend on the
        batch or the number of devices. ``"batch"`` keeps them, for pretrained weights.
    """

    backbone: str = "regnetx_002"
    channel_mode: Literal["joint", "separate"] = "joint"
    norm: Literal["group", "batch"] = "group"


class Encoder(nn.Module):
    """Crops to context tokens.

    Parameters
    ----------
    config
        Backbone and channel mode.
    n_channels
        Stains of the model.
    crop_px
        Side of its crops in pixels.
    dim
        Width of the tokens.

    Raises
    ------
    ModelError
        Where timm knows no such backbone.
    """

    def __init__(self, config: EncoderConfig, n_channels: int, crop_px: int, dim: int) -> None:
        super().__init__()
        self.config = config
        self.separate = config.channel_mode == "separate"
        self._norms_held = False
        self.backbone = _backbone(config, 1 if self.separate else n_channels, crop_px)
        probe = torch.zeros(1, 1 if self.separate else n_channels, crop_px, crop_px)
        self.backbone.eval()  # so that batch norms do not take the probe for data
        with torch.enable_grad():
            tokens = self._tokens(probe)
            _freeze_unused(self.backbone, tokens)
        self.backbone.train()
        n_tokens, width = tokens.shape[1:]
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
        self.position = nn.Parameter(torch.randn(n_tokens, dim) * 0.02)
        self.stain = nn.Parameter(torch.randn(n_channels, dim) * 0.02)
        self.norm = nn.LayerNorm(dim)

    @property
    def n_tokens(self) -> int:
        """Tokens a crop."""
        return len(self.position) * (len(self.stain) if self.separate else 1)

    def freeze(self, stages: int | Literal["all"]) -> None:
        """Freeze the backbone, or its first stages from the image on; the norms in them too.

        Raises
        ------
        ModelError
            Where timm does not say what stages the backbone has, or it has fewer.
        """
        if stages == "all":
            self.backbone.requires_grad_(False)
        elif stages:
            for name in self._first(stages):
                self.backbone.get_parameter(name).requires_grad_(False)
        self.train(self.training)

    def _first(self, stages: int) -> list[str]:
        name = self.config.backbone
        if not hasattr(self.backbone, "group_matcher"):
            raise ModelError(f"timm does not say what stages {name} has; freeze 'all' of it or 0")
        matcher = self.backbone.group_matcher(coarse=True)  # type: ignore[operator]
        groups = group_parameters(self.backbone, matcher)
        if not 0 <= stages < len(groups):
            raise ModelError(f"{name} has {len(groups)} stages; freeze fewer than that, or 'all'")
        return [parameter for stage in sorted(groups)[:stages] for parameter in groups[stage]]

    def recompute(self) -> None:
        """Keep less for the backward pass, and compute it again there.

        Gradient checkpointing (Chen et al. 2016), by the backbone's stages.

        Raises
        ------
        ModelError
            Where the backbone cannot.
        """
        try:
            self.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AssertionError, AttributeError) as error:
            raise ModelError(
                f"{self.config.backbone}: timm has no gradient checkpointing for it; train "
                "without, on smaller batches, or choose another backbone"
            ) from error

    def hold_norms(self) -> None:
        """Let batch norms keep the statistics that they have, whatever is trained."""
        self._norms_held = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what is frozen or held stays in evaluation, so that norms do not move."""
        super().train(mode)
        for module in self.backbone.modules():
            own = list(module.parameters(recurse=False))
            frozen = own and not any(parameter.requires_grad for parameter in own)
            if frozen or (self._norms_held and isinstance(module, _BatchNorm)):
                module.eval()
        return self

    def forward(self, images: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Encode crops.

        Parameters
        ----------
        images
            Standardised crops, float ``(B, C, H, W)``.
        present
            Which stains each crop has, bool ``(B, C)``; the others are ignored.

        Returns
        -------
        Tokens ``(B, N, dim)`` and which of them to attend to, bool ``(B, N)``.
        """
        images = images * present[:, :, None, None]
        if not self.separate:
            marks = (present.to(self.stain.dtype) @ self.stain)[:, None]
            tokens = self.project(self._tokens(images)) + self.position + marks
            keep = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            return self.norm(tokens), keep
        n_channels = images.shape[1]
        flat = self.project(self._tokens(rearrange(images, "b c h w -> (b c) 1 h w")))
        tokens = rearrange(flat + self.position, "(b c) n d -> b c n d", c=n_channels)
        tokens = rearrange(tokens + self.stain[:, None], "b c n d -> b (c n) d")
        return self.norm(tokens), present.repeat_interleave(len(self.position), dim=1)

    def _tokens(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone.forward_features(  # type: ignore[operator]
            images.contiguous(memory_format=torch.channels_last)
        )
        if features.ndim == 3:
            return features
        if getattr(self.backbone, "output_fmt", "NCHW") == "NHWC":
            return rearrange(features, "b h w f -> b (h w) f")
        return rearrange(features, "b f h w -> b (h w) f")


def _backbone(config: EncoderConfig, in_chans: int, crop_px: int) -> nn.Module:
    if not timm.is_model(config.backbone):
        near = difflib.get_close_matches(config.backbone, timm.list_models(), n=3)
        raise ModelError(f"timm has no model {config.backbone!r}; near it are {near}")
    defaults = timm.get_pretrained_cfg(config.backbone)
    fixed: dict[str, Any] = {"img_size": crop_px} if defaults and defaults.fixed_input_size else {}
    backbone = timm.create_model(config.backbone, in_chans=in_chans, num_classes=0, **fixed)
    if config.norm == "group":
        _use_group_norm(backbone)
    return backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _freeze_unused(backbone: nn.Module, tokens: Tensor) -> None:
    """Freeze weights that no token passes through, such as those of a classification head.

    Several devices would wait for their gradients.
    """
    if tokens.requires_grad:  # not in inference mode, where nothing is trained
        weights = list(backbone.parameters())
        gradients = torch.autograd.grad(tokens.sum(), weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.requires_grad_(gradient is not None)


def _use_group_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = max(child.num_features // 8, 1)
            while child.num_features % groups:
                groups -= 1
            norm: nn.Module = nn.GroupNorm(groups, child.num_features)
            if isinstance(child, BatchNormAct2d):
                norm = nn.Sequential(norm, child.drop, child.act)
            setattr(module, name, norm)
        else:
            _use_group_norm(child)
