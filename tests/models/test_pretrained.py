"""Pretrained weights in an encoder: equal stains give what a grey image gave; else refused."""

from __future__ import annotations

import hashlib

import pytest
import safetensors.torch
import timm
import torch

from phenoseq.errors import ModelError
from phenoseq.models.encoder import Encoder, EncoderConfig
from phenoseq.models.pretrained import HUB, read_pretrained


@pytest.fixture
def published(tmp_path):
    """Give a function that makes a network of timm, with a file of its weights."""

    def make(name: str, **how):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            network = timm.create_model(name, **how).eval()
            for key, value in network.state_dict().items():
                if "running_var" in key:
                    value.uniform_(0.5, 2)
                elif value.is_floating_point():
                    value.normal_(std=0.2)
        path = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file(network.state_dict(), path)
        return network, path

    return make


def started(name, mode, path, n_channels=4, px=64, norm="batch"):
    config = EncoderConfig(name, mode, norm)
    encoder = Encoder(config, n_channels, px, dim=8).eval()
    pretrained = read_pretrained(config, px, path)
    pretrained.put_into(encoder)
    return encoder, pretrained.origin


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
@pytest.mark.parametrize(("mode", "n_channels"), [("joint", 4), ("joint", 3), ("separate", 4)])
@torch.inference_mode()
def test_equal_stains_give_what_a_grey_image_gave(published, name, mode, n_channels):
    how = {"img_size": 64} if name == "test_vit" else {}
    network, path = published(name, **how)
    encoder, _ = started(name, mode, path, n_channels)
    stem = encoder.backbone.state_dict()[f"{network.pretrained_cfg['first_conv']}.weight"]
    assert stem.shape[1] == (n_channels if mode == "joint" else 1)
    grey = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    wanted = network.forward_features(grey.expand(-1, 3, -1, -1))
    found = encoder.backbone.forward_features(grey.expand(-1, stem.shape[1], -1, -1))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@torch.inference_mode()
def test_positions_are_resampled_to_the_crop(published):
    network, path = published("test_vit")  # 160 pixels, 16 a patch
    encoder, _ = started("test_vit", "joint", path, px=32)
    assert network.pos_embed.shape[1] > encoder.backbone.pos_embed.shape[1] == 1 + 2 * 2
    tokens, keep = encoder(torch.zeros(1, 4, 32, 32), torch.ones(1, 4, dtype=torch.bool))
    assert tokens.shape[1] == keep.sum() == 5


def test_group_norms_in_place_of_batch_norms_are_refused(published):
    _, path = published("test_resnet")
    with pytest.raises(ModelError, match=r"batch norms.*set the encoder's norm to batch"):
        started("test_resnet", "joint", path, norm="group")
    _, path = published("test_vit")  # has none
    assert started("test_vit", "joint", path, norm="group")


def test_where_the_weights_came_from_is_told(published):
    _, path = published("test_resnet")
    origin = started("test_resnet", "joint", path)[1]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert origin == {"file": "test_resnet.safetensors", "sha256": digest}


def test_a_file_of_another_network_is_refused_with_what_does_not_fit(published):
    _, path = published("test_efficientnet")
    config = EncoderConfig("test_resnet", norm="batch")
    with pytest.raises(ModelError) as error:
        read_pretrained(config, 64, path)
    text = str(error.value)
    assert text.startswith(f"{path}: not the weights of test_resnet: Missing key(s)")
    assert '"conv1.0.weight"' in text
    assert 'Unexpected key(s) in state_dict: "blocks.0.0.' in text
    assert len(text) < 800


def test_the_hub_and_a_machine_without_network(monkeypatch):
    config = EncoderConfig("test_resnet", norm="batch")
    asked = []

    def offline(*args, **options):
        asked.append(args)
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    wanted = r"bring the file model\.safetensors of https://hf\.co/timm/test_resnet\.r160_in1k"
    with pytest.raises(ModelError, match=rf"{wanted} and name it with encoder_weights"):
        read_pretrained(config, 64, HUB)
    with pytest.raises(ModelError, match=r"nowhere\.pth: no such file of weights"):
        read_pretrained(config, 64, "nowhere.pth")
    assert len(asked) == 1

    state = timm.create_model("test_resnet").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *a, **k: dict(state))
    origin = read_pretrained(config, 64, HUB).origin
    assert origin == {"name": "timm/test_resnet.r160_in1k", "licence": "apache-2.0"}
