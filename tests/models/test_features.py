"""Frozen features: torchvision's own numbers, stains in order, weights from safe files only."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torchvision.models import VisionTransformer, ViT_L_16_Weights, vit_l_16

from phenoseq.errors import ModelError, PhenoseqWarning
from phenoseq.models.features import VIT_L_16, FeatureConfig, FeatureExtractor, load_extractor

TINY = FeatureConfig(
    name="tiny",
    channels=("DNA", "RNA", "AGP"),
    image_size=32,
    patch_size=16,
    num_layers=2,
    num_heads=2,
    hidden_dim=16,
    mlp_dim=24,
)


@pytest.fixture(scope="module")
def vit(draw_vit) -> VisionTransformer:
    return draw_vit(TINY)


@pytest.fixture(scope="module")
def extractor(vit) -> FeatureExtractor:
    return FeatureExtractor(TINY, vit.state_dict(), "0" * 64)


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (5, 3, 32, 32), generator=generator, dtype=torch.uint8)


def by_hand(vit: VisionTransformer, image: torch.Tensor) -> torch.Tensor:
    """Return the class token of one grey image ``(H, W)``, step by step."""
    grey = (image.float() / 255).repeat(3, 1, 1)[None]
    tokens = torch.cat([vit.class_token, vit._process_input(grey)], dim=1)
    return vit.encoder(tokens)[0, 0]


@torch.inference_mode()
def test_features_are_torchvisions_class_tokens_stain_by_stain(extractor, vit, crops):
    found = extractor(crops)
    assert found.shape == (5, TINY.n_features) == (5, 48)
    assert found.dtype == torch.float32
    for cell in range(5):
        for c in range(3):
            expected = by_hand(vit, crops[cell, c])
            torch.testing.assert_close(
                found[cell, 16 * c : 16 * (c + 1)], expected, rtol=1e-5, atol=1e-5
            )
    assert (found[:, :16] - found[:, 16:32]).abs().max() > 0.1  # stains look different


@torch.inference_mode()
def test_features_do_not_depend_on_the_batch(extractor, crops):
    whole = extractor(crops)
    single = torch.cat([extractor(crops[k : k + 1]) for k in range(5)])
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_pixels_are_divided_by_255_and_nothing_else(extractor, vit):
    """Black and white crops: no mean, no standard deviation, no percentile."""
    black, white = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.full((1, 3, 32, 32), 255)
    for crop, value in ((black, 0.0), (white.to(torch.uint8), 1.0)):
        image = torch.full((1, 3, 32, 32), value)
        tokens = torch.cat([vit.class_token, vit._process_input(image)], dim=1)
        expected = vit.encoder(tokens)[:, 0].repeat(1, 3)
        torch.testing.assert_close(extractor(crop), expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_trained(extractor, crops):
    assert not any(p.requires_grad for p in extractor.parameters())
    assert not extractor(crops).requires_grad
    assert not extractor.training


@pytest.mark.parametrize(
    "crops",
    [
        torch.zeros(2, 3, 32, 32),
        torch.zeros(2, 2, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
    ],
)
def test_other_crops_are_refused(extractor, crops):
    with pytest.raises(ModelError, match=r"takes uint8 \(B, 3, 32, 32\)"):
        extractor(crops)


# ---------------------------------------------------------------------------------------- weights


def test_published_configuration_is_torchvisions():
    """Facts of ViT-L/16 and of its DEFAULT weights, as torchvision states them."""
    weights = ViT_L_16_Weights.DEFAULT
    assert VIT_L_16.url == weights.url
    assert VIT_L_16.name.endswith(weights.name)
    assert VIT_L_16.sha256_prefix == "852ce7e3"
    assert VIT_L_16.n_bytes == pytest.approx(weights.meta["_file_size"] * 2**20, rel=1e-3)
    assert VIT_L_16.channels == ("DNA", "RNA", "AGP", "Mito", "ER")
    assert VIT_L_16.n_features == 5120
    c = VIT_L_16
    with torch.device("meta"):
        theirs = vit_l_16()
        ours = VisionTransformer(
            c.image_size, c.patch_size, c.num_layers, c.num_heads, c.hidden_dim, c.mlp_dim
        )
    assert str(ours) == str(theirs)
    for name, value in ours.state_dict().items():
        assert value.shape == theirs.state_dict()[name].shape
    assert ours.encoder.layers[0].num_heads == theirs.encoder.layers[0].num_heads


@pytest.fixture
def save(vit, tmp_path):
    def save(name: str) -> Path:
        path = tmp_path / name
        if name.endswith(".safetensors"):
            safetensors.torch.save_file(vit.state_dict(), path)
        else:
            torch.save(vit.state_dict(), path)
        return path

    return save


@pytest.mark.parametrize("name", ["vit.pth", "vit.safetensors"])
@torch.inference_mode()
def test_weights_from_a_file(extractor, crops, save, name):
    path = save(name)
    loaded = load_extractor(TINY, weights=path)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    torch.testing.assert_close(loaded(crops), extractor(crops), rtol=0, atol=0)


def test_published_weights_from_the_cache(save, tmp_path, monkeypatch):
    path = save("vit.pth")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    config = replace(TINY, url=f"https://example.invalid/tiny-{sha256[:8]}.pth", n_bytes=12)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    cached = tmp_path / "home" / "hub" / "checkpoints" / config.file
    cached.parent.mkdir(parents=True)
    cached.write_bytes(path.read_bytes())
    assert load_extractor(config).sha256 == sha256
    cached.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ModelError, match="not the file that was published"):
        load_extractor(config)


def test_another_file_than_the_published_one_is_told(save):
    config = replace(TINY, url="https://example.invalid/tiny-00000000.pth")
    with pytest.warns(PhenoseqWarning, match=r"vit\.pth: is not the file tiny-00000000\.pth"):
        load_extractor(config, weights=save("vit.pth"))


def test_a_download_must_be_allowed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("download"))
    with pytest.raises(ModelError, match=r"1\.2 GB from https://download\.pytorch\.org.*--yes"):
        load_extractor()
    assert not list(tmp_path.rglob("*.pth"))


def test_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = replace(TINY, url="http://127.0.0.1:9/tiny-852ce7e3.pth", n_bytes=1_217_000_000)
    with pytest.raises(ModelError, match=r"cannot be downloaded.*1\.2 GB.*hub/checkpoints/tiny-8"):
        load_extractor(config, yes=True)


def test_download(save, tmp_path, monkeypatch):
    """From a local file; a file of another sha256 does not enter the cache."""
    path = save("vit.pth")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    for prefix in ("00000000", sha256[:8]):
        served = tmp_path / f"tiny-{prefix}.pth"
        served.write_bytes(path.read_bytes())
        config = replace(TINY, url=served.as_uri())
        if prefix == "00000000":
            with pytest.raises(ModelError, match="cannot be downloaded"):
                load_extractor(config, yes=True)
            assert not list((tmp_path / "home").rglob("*.pth"))
        else:
            assert load_extractor(config, yes=True).sha256 == sha256


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_files_that_hold_no_weights(save, tmp_path, capsys, cut_file):
    path = tmp_path / "evil.pth"
    torch.save({"a": Evil()}, path)
    with pytest.raises(ModelError, match=r"evil\.pth: holds more than tensors"):
        load_extractor(TINY, weights=path)
    assert "unpickled" not in capsys.readouterr().out
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ModelError, match=r"list\.pth: holds no table"):
        load_extractor(TINY, weights=tmp_path / "list.pth")
    with pytest.raises(ModelError, match=r"nowhere\.pth: no such file"):
        load_extractor(TINY, weights=tmp_path / "nowhere.pth")
    for name in ("cut.pth", "cut.safetensors"):
        cut_file(save(name), 0.6)
        with pytest.raises(ModelError, match=rf"{name}: (not a readable file|holds more)"):
            load_extractor(TINY, weights=tmp_path / name)
    with pytest.raises(ModelError, match="no weights of it are published"):
        load_extractor(TINY)


def test_weights_of_another_architecture(vit, save):
    with pytest.raises(ModelError, match=r"not the weights of tiny: size mismatch.*and 27 more"):
        FeatureExtractor(replace(TINY, hidden_dim=32), vit.state_dict(), "")
    with pytest.raises(ModelError, match=r"vit\.pth: not the weights of tiny: Missing key"):
        load_extractor(replace(TINY, num_layers=3), weights=save("vit.pth"))
