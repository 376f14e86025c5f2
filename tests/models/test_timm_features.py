"""Any network of timm as an extractor: its own pooled feature, weights complete or refused."""

from __future__ import annotations

import pytest
import safetensors.torch
import timm
import torch

from phenoseq.errors import ModelError
from phenoseq.models.timm_features import load_timm

NAMES = ["test_resnet", "test_vit"]


@pytest.fixture
def published(tmp_path):
    """Give a function that makes a network of timm, with a file of its weights."""

    def make(name: str, suffix: str = ".pth", drop: str | None = None, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = timm.create_model(name, **options).eval()
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        state = {k: v for k, v in network.state_dict().items() if not drop or drop not in k}
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".pth":
            torch.save(state, path)
        else:
            safetensors.torch.save_file(state, path)
        return network, path

    return make


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_tokens_are_the_networks_pooled_features_stain_by_stain(published, name, suffix):
    network, path = published(name, suffix)
    extractor = load_timm(name, ("DNA", "ER"), weights=path)
    about = network.pretrained_cfg
    side = about["input_size"][-1]
    assert (extractor.image_size, extractor.channels) == (side, ("DNA", "ER"))
    crops = torch.randint(0, 256, (2, 2, side, side), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(1))  # fmt: skip
    found = extractor(crops)
    assert found.shape == (2, 2 * extractor.width)
    for cell in range(2):
        for c in range(2):
            colours = [(crops[cell, c] / 255 - m) / s
                       for m, s in zip(about["mean"], about["std"], strict=True)]  # fmt: skip
            pooled = network.forward_head(
                network.forward_features(torch.stack(colours)[None]), pre_logits=True
            )
            some = found[cell, extractor.width * c : extractor.width * (c + 1)]
            torch.testing.assert_close(some, pooled[0], rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert not any(p.requires_grad for p in extractor.parameters())
    assert len(extractor.sha256) == 64


@torch.inference_mode()
def test_other_crops_than_it_was_trained_on(published):
    """A transformer's positions are resampled; a size that its patches do not fill is refused."""
    _, path = published("test_vit")
    extractor = load_timm("test_vit", ("DNA",), image_size=64, weights=path)
    assert extractor(torch.zeros(3, 1, 64, 64, dtype=torch.uint8)).shape == (3, extractor.width)
    with pytest.raises(ModelError, match=r"crops of 70 pixels; it takes multiples of 16"):
        load_timm("test_vit", ("DNA",), image_size=70, weights=path)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_without_the_classifier(published, name):
    head = {"test_resnet": "fc.", "test_vit": "head."}[name]
    _, whole = published(name)
    before = load_timm(name, ("DNA",), weights=whole).digest()
    _, path = published(name, drop=head)
    assert load_timm(name, ("DNA",), weights=path).digest() == before


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_lacks_weights_or_is_of_another_network(published, name):
    lacking = {"test_resnet": "layer2.0.conv1", "test_vit": "blocks.1.mlp.fc2"}[name]
    _, path = published(name, drop=lacking)
    with pytest.raises(ModelError, match=rf"{path.name}: not the weights of {name}: .*Missing key"):
        load_timm(name, ("DNA",), weights=path)
    other = "test_vit" if name == "test_resnet" else "test_resnet"
    _, path = published(other)
    with pytest.raises(ModelError, match=f"not the weights of {name}"):
        load_timm(name, ("DNA",), weights=path)


def test_names_that_timm_does_not_know():
    with pytest.raises(ModelError, match=r"no network 'test_resnt'; near it are .*test_resnet"):
        load_timm("test_resnt", ("DNA",))
    with pytest.raises(ModelError, match=r"no weights 'test_vit\.nonsense'"):
        load_timm("test_vit.nonsense", ("DNA",))


def test_weights_that_must_be_downloaded(monkeypatch):
    wanted = r"model\.safetensors of https://hf\.co/timm/test_vit\.r160_in1k"
    with pytest.raises(ModelError, match=rf"{wanted} \(licence: apache-2\.0\).*--yes.*--weights"):
        load_timm("test_vit", ("DNA",))

    def offline(*args, **options):
        raise OSError("no route to host\nand so on")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(
        ModelError, match=rf"OSError: no route to host\)\. On a.*{wanted}.*--weights"
    ):
        load_timm("test_vit", ("DNA",), yes=True)
