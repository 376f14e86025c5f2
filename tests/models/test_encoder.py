"""The encoder: shapes for every kind of backbone, missing stains, and nothing shared in a batch."""

from __future__ import annotations

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from phenoseq.errors import ModelError
from phenoseq.models.encoder import Encoder, EncoderConfig

C, PX, DIM = 3, 32, 24
CONVOLUTIONAL = ("test_resnet", "test_efficientnet", "regnetx_002", "mobilenetv4_conv_small_050")
BACKBONES = (*CONVOLUTIONAL, "test_vit", "swin_tiny_patch4_window7_224")
modes = pytest.mark.parametrize("mode", ["joint", "separate"])


def make(backbone="test_resnet", mode="joint", *, px=PX, seed=0, norm="group") -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = EncoderConfig(backbone=backbone, channel_mode=mode, norm=norm)
        return Encoder(config, C, px, DIM).eval()


@pytest.fixture
def images(rng):
    return torch.randn(5, C, PX, PX, generator=rng)


def everything(images):
    return torch.ones(images.shape[:2], dtype=torch.bool)


@modes
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "mobilenetv4_conv_small_050"])
@pytest.mark.parametrize("px", [32, 64])
def test_tokens(backbone, mode, px):
    encoder = make(backbone, mode, px=px)
    with torch.inference_mode():
        tokens, keep = encoder(torch.zeros(2, C, px, px), torch.ones(2, C, dtype=torch.bool))
    places = {"test_resnet": (px // 32) ** 2, "mobilenetv4_conv_small_050": (px // 32) ** 2}
    places |= {"test_vit": (px // 16) ** 2 + 1}  # and the class token
    n = places[backbone] * (C if mode == "separate" else 1)
    assert tokens.shape == (2, n, DIM)
    assert keep.shape == (2, n)
    assert keep.dtype == torch.bool
    assert keep.all()


def test_a_backbone_with_channels_last_features():
    encoder = make("swin_tiny_patch4_window7_224", px=64)
    with torch.inference_mode():
        tokens, _ = encoder(torch.zeros(1, C, 64, 64), torch.ones(1, C, dtype=torch.bool))
    assert tokens.shape == (1, 4, DIM)


@modes
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_pixels_of_an_absent_stain_do_not_matter(images, mode, backbone):
    encoder = make(backbone, mode)
    present = everything(images)
    present[:, 1] = False
    other = images.clone()
    other[:, 1] = 1e4
    (tokens, keep), (changed, _) = encoder(images, present), encoder(other, present)
    torch.testing.assert_close(tokens[keep], changed[keep], atol=1e-5, rtol=0)
    whole, _ = encoder(images, everything(images))
    if mode == "separate":
        n = keep.shape[1] // C
        assert keep.view(5, C, n).all(dim=2).equal(present)
        torch.testing.assert_close(tokens[keep], whole[keep], atol=1e-5, rtol=0)
    else:
        assert (tokens - whole).abs().max() > 1e-3


def test_joint_tells_an_absent_stain_from_a_black_one(images):
    """A standardised crop of mean intensity is zeros too."""
    encoder, black = make(), images.clone()
    black[:, 1] = 0
    present = everything(images)
    present[:, 1] = False
    there, absent = encoder(black, everything(images))[0], encoder(black, present)[0]
    assert (there - absent).abs().max() > 1e-3


@modes
def test_stains_are_told_apart(images, mode):
    encoder = make(mode=mode)
    swapped = images[:, [1, 0, 2]]
    tokens, _ = encoder(images, everything(images))
    other, _ = encoder(swapped, everything(images))
    n = tokens.shape[1] // (C if mode == "separate" else 1)
    difference = tokens - other
    assert difference[:, : 2 * n].abs().max() > 1e-3
    if mode == "separate":
        torch.testing.assert_close(tokens[:, 2 * n :], other[:, 2 * n :])


@modes
@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_vit"])
def test_a_crop_is_encoded_alike_alone_and_in_any_batch(images, mode, backbone):
    for encoder in (make(backbone, mode), make(backbone, mode).train()):
        whole, _ = encoder(images, everything(images))
        alone, _ = encoder(images[2:3], everything(images)[2:3])
        torch.testing.assert_close(alone[0], whole[2], atol=2e-5, rtol=1e-4)


def norms(module: nn.Module, kind: type) -> int:
    return sum(isinstance(m, kind) for m in module.modules())


@pytest.mark.parametrize("backbone", CONVOLUTIONAL)
def test_group_norm_leaves_no_batch_norm(backbone):
    before = make(backbone, norm="batch").backbone
    after = make(backbone, norm="group").backbone
    assert norms(before, nn.BatchNorm2d) > 3
    assert norms(after, nn.BatchNorm2d) == norms(after, BatchNormAct2d) == 0
    assert norms(after, nn.GroupNorm) == norms(before, nn.BatchNorm2d)
    assert norms(after, nn.ReLU) == norms(before, nn.ReLU)  # activations inside norms are kept


@pytest.mark.parametrize("mode", ["joint", "separate"])
@pytest.mark.parametrize("px", [32, 64])
def test_batch_norm_kept_has_seen_no_data_yet(mode, px):
    backbone = make(mode=mode, px=px, norm="batch").backbone
    kept = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert kept
    assert all(not m.running_mean.any() and (m.running_var == 1).all() for m in kept)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_trained_weight_has_a_gradient(backbone):
    """Several devices wait forever, or refuse to train, for weights that no output uses."""
    encoder = make(backbone, px=64).train()
    images = torch.randn(2, C, 64, 64, generator=torch.Generator().manual_seed(1))
    encoder(images, everything(images))[0].square().sum().backward()
    unused = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


def test_an_unknown_backbone_names_the_nearest():
    with pytest.raises(ModelError, match=r"'regnetx_02'.*regnetx_002"):
        make("regnetx_02")


def test_an_encoder_can_be_made_where_gradients_are_off():
    with torch.inference_mode():
        assert make("mobilenetv4_conv_small_050").project is not None
    with torch.no_grad():
        frozen = [p for p in make("mobilenetv4_conv_small_050").parameters() if not p.requires_grad]
    assert len(frozen) == 3


def test_equal_seeds_give_equal_encoders(images):
    first, again, other = (make(seed=s)(images, everything(images))[0] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3
