"""Features of cells: those of each crop by itself, in the order of the cells and of the stains."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
import timm
import torch

import phenoseq
from phenoseq.cli import main
from phenoseq.data.backed import Cells
from phenoseq.data.crops import iter_crops
from phenoseq.data.readers import open_source
from phenoseq.data.samplewriter import write_sample_store
from phenoseq.errors import DataError, ModelError, PhenoseqWarning
from phenoseq.inference.extract import feature_job
from phenoseq.inference.table import make_table, predict_table
from phenoseq.models.features import Extractor, FeatureConfig, FeatureExtractor

FIVE = ("DNA", "RNA", "AGP", "Mito", "ER")
SIDE, WIDTH = 32, 8
CONFIG = FeatureConfig(
    name="tiny five",
    channels=FIVE,
    image_size=SIDE,
    patch_size=16,
    num_layers=1,
    num_heads=2,
    hidden_dim=WIDTH,
    mlp_dim=16,
)
PLATE = (("P1", "B03", 1), ("P1", "B03", 2), ("P2", "B03", 1))
SIX = (*PLATE, ("P2", "C03", 1), ("P2", "C04", 1), ("P2", "C05", 1))
undocumented = pytest.mark.filterwarnings("ignore:.*how these were made is not documented")


def image_features(source, extractor, progress=None, **options):
    return predict_table(feature_job(source, extractor, **options), progress)


@pytest.fixture(scope="module")
def vit(draw_vit):
    return draw_vit(CONFIG)


@pytest.fixture(scope="module")
def extractor(vit) -> FeatureExtractor:
    return FeatureExtractor(CONFIG, vit.state_dict(), "ab" * 32)


@pytest.fixture
def noisy(cellprofiler_folder):
    """Give a function that makes a source of noise, and its folder."""

    def make(dtype="uint8", name="noisy", top=250, fields=PLATE, **options):
        fake = cellprofiler_folder(name, fields=fields, dtype=dtype, **options)
        rng = np.random.default_rng(5)
        for path in fake.images.values():
            coarse = np.kron(rng.random((12, 15)), np.ones((8, 8)))[:90]
            pixels = (0.8 * coarse + 0.2 * rng.random((90, 120))) * top
            tifffile.imwrite(path, pixels.astype(dtype), rowsperstrip=32, compression="deflate")
        return fake, open_source(fake.path, pixel_size=0.5)

    return make


def corner(pixels: np.ndarray) -> np.ndarray:
    """Return the first pixel of a crop: the centre less half a side, halves to the nearest even."""
    return np.round(pixels + 0.5 - SIDE / 2).astype(int)


def expected(vit, fake, source, convert=lambda stain, pixels: pixels):
    """Compute the features cell by cell and stain by stain from the files themselves."""
    out = np.zeros((len(source.obs), 5 * WIDTH), dtype=np.float32)
    planes = {
        (field, stain): np.pad(convert(stain, tifffile.imread(path)), SIDE, mode="symmetric")
        for (field, stain), path in fake.images.items()
    }
    for k, (at, field) in enumerate(zip(fake.pixels, source.obs["field"], strict=True)):
        y, x = corner(at) + SIDE
        for c, stain in enumerate(FIVE):
            crop = planes[field, stain][y : y + SIDE, x : x + SIDE].astype("f4")
            with torch.inference_mode():
                tokens = vit._process_input(torch.from_numpy(crop / 255).expand(1, 3, -1, -1))
                tokens = vit.encoder(torch.cat([vit.class_token, tokens], dim=1))
            out[k, WIDTH * c : WIDTH * (c + 1)] = tokens[0, 0]
    return out


def test_features_are_those_of_each_cell_alone(noisy, vit, extractor):
    fake, source = noisy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = image_features(source, extractor, device="cpu")

    assert made.shape == (12, 40)
    assert made.X.dtype == np.float32
    np.testing.assert_allclose(made.X, expected(vit, fake, source), rtol=1e-4, atol=1e-5)
    assert list(made.obs_names) == list(source.obs.index)
    assert list(made.var["channel"]) == [stain for stain in FIVE for _ in range(WIDTH)]
    assert made.var_names[WIDTH] == "RNA_0"
    np.testing.assert_array_equal(made.obsm["spatial"], source.obs[["x_centroid", "y_centroid"]])
    assert list(made.obs["Metadata_Well"]) == ["B03"] * 12
    assert list(made.obs["Metadata_Plate"]) == ["P1"] * 8 + ["P2"] * 4
    first = corner(fake.pixels)
    cut = ((first < 0) | (first + SIDE > [90, 120])).any(axis=1)
    np.testing.assert_array_equal(made.obs["cut_by_border"], cut)
    assert 0 < cut.sum() < 12
    spread = np.abs(made.X[:, None] - made.X[None]).max(axis=2) + np.eye(12)
    assert spread.min() > 0.05  # cells differ by far more than the tolerance


def test_features_do_not_depend_on_batches_or_order(noisy, extractor):
    _, source = noisy()
    made = image_features(source, extractor, device="cpu")
    back = replace(source, obs=source.obs.iloc[::-1])
    for other, size in ((source, 1), (source, 3), (back, 5)):
        again = image_features(other, extractor, device="cpu", batch_size=size)
        np.testing.assert_allclose(again[made.obs_names].X, made.X, rtol=1e-5, atol=1e-5)


@undocumented
def test_order_of_the_files_does_not_matter(noisy, extractor, vit):
    """Stains of the extractor are taken by name, whatever the order of the images'."""
    fake, source = noisy(stains=("ER", "AGP", "Mito", "RNA", "DNA"), name="other order")
    assert source.channels == ("ER", "AGP", "Mito", "RNA", "DNA")
    made = image_features(source, extractor, device="cpu")
    np.testing.assert_allclose(made.X, expected(vit, fake, source), rtol=1e-4, atol=1e-5)


def test_sixteen_bits_by_the_full_range(noisy, extractor, vit):
    fake, source = noisy("uint16", top=65536)
    with pytest.warns(PhenoseqWarning, match=r"65535, .*255 \(recorded.*not documented"):
        made = image_features(source, extractor, eight_bit="full", device="cpu")
    wanted = expected(vit, fake, source, lambda stain, pixels: np.rint(pixels / 257))
    np.testing.assert_allclose(made.X, wanted, rtol=1e-4, atol=1e-5)
    assert made.uns["phenoseq"]["eight_bit"] == "full"


@undocumented
def test_sixteen_bits_by_percentile(noisy, extractor, vit):
    fake, source = noisy("uint16", top=3000)
    made = image_features(source, extractor, eight_bit="percentile", device="cpu")
    record = made.uns["phenoseq"]
    tops = {}
    for stain in FIVE:
        pixels = [tifffile.imread(p) for (_, s), p in fake.images.items() if s == stain]
        tops[stain] = np.quantile(pixels, 0.999, method="inverted_cdf")
    assert record["eight_bit_top"] == [tops[stain] for stain in FIVE]
    assert len(set(tops.values())) > 1

    def convert(stain, pixels):
        return np.rint(np.minimum(pixels * 255.0 / tops.get(stain, 1), 255))

    np.testing.assert_allclose(made.X, expected(vit, fake, source, convert), rtol=1e-4, atol=1e-5)


def test_record(noisy, extractor):
    fake, source = noisy()
    record = image_features(source, extractor, device="cpu").uns["phenoseq"]
    assert record["channels"] == list(FIVE)
    assert record["extractor"] == "tiny five"
    assert record["weights_sha256"] == "ab" * 32
    assert record["crop_px"] == SIDE
    assert record["crop_pixel_size"] == record["source_pixel_size"] == 0.5
    assert record["pixel_type"] == "uint8"
    assert record["eight_bit"] == "none"
    assert record["source"] == str(fake.path)
    assert record["source_identity"] == source.identity
    assert record["skipped_cells"] == record["problems"] == []


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_what_comes_out_can_be_written(noisy, extractor, tmp_path, suffix):
    made = image_features(noisy()[1], extractor, device="cpu")
    job = feature_job(noisy(name="again")[1], extractor, device="cpu")
    back = make_table(job, tmp_path / f"out{suffix}", "making features").to_memory()
    np.testing.assert_array_equal(back.X, made.X)
    assert list(back.uns["phenoseq"]["channels"]) == list(FIVE)
    assert list(back.obs["Metadata_Site"]) == list(made.obs["Metadata_Site"])


def test_crops_of_another_pixel_size(noisy, extractor):
    """Half as fine: the crop shows twice as much, so that more are cut."""
    _, source = noisy()
    fine = image_features(source, extractor, device="cpu")
    coarse = image_features(source, extractor, pixel_size=1.0, device="cpu")
    assert coarse.uns["phenoseq"]["crop_pixel_size"] == 1.0
    assert coarse.obs["cut_by_border"].sum() > fine.obs["cut_by_border"].sum()
    assert np.abs(coarse.X - fine.X).max() > 0.1


# -------------------------------------------------------------------------------------- bad input


def test_missing_stain(noisy, extractor):
    fake, _ = noisy()
    for (_, stain), path in fake.images.items():
        if stain == "RNA":
            path.unlink()
    with pytest.warns(PhenoseqWarning, match="RNA"):
        source = open_source(fake.path, pixel_size=0.5)
    with pytest.raises(DataError, match=r"lacks the stain\(s\) \['RNA'\].*'DNA', 'RNA', 'AGP'"):
        image_features(source, extractor, device="cpu")


def test_sixteen_bits_without_a_choice(noisy, extractor):
    _, source = noisy("uint16")
    with pytest.raises(DataError, match=r"pixels are uint16.*eight_bit='full'"):
        image_features(source, extractor, device="cpu")


def test_absent_sample(noisy, extractor):
    _, source = noisy()
    with pytest.raises(DataError, match=r"no 'Metadata_Compound'; they have \['field'"):
        image_features(source, extractor, sample="Metadata_Compound", device="cpu")
    labelled = replace(source, obs=source.obs.assign(dose=[str(k) for k in range(12)]))
    kept = image_features(labelled, extractor, sample="dose", device="cpu")
    assert list(kept.obs["dose"]) == [str(k) for k in range(12)]


def test_zero_cells_and_impossible_sizes(noisy, extractor):
    _, source = noisy()
    with pytest.raises(DataError, match="zero cells"):
        image_features(replace(source, obs=source.obs.iloc[:0]), extractor, device="cpu")
    with pytest.raises(DataError, match="pixel size of -1 micrometres cannot be right"):
        image_features(source, extractor, pixel_size=-1, device="cpu")


def test_cells_outside_are_left_out_and_recorded(noisy, extractor):
    _, source = noisy()
    obs = source.obs.copy()
    obs.iloc[2, obs.columns.get_loc("x_centroid")] = 61.0
    with pytest.warns(PhenoseqWarning, match="1 cells lie outside the image"):
        made = image_features(replace(source, obs=obs), extractor, device="cpu")
    assert made.n_obs == 11
    assert made.uns["phenoseq"]["skipped_cells"] == [obs.index[2]]


@pytest.mark.parametrize("eight_bit", [None, "percentile"])
@undocumented
def test_field_damaged_inside_is_left_out_and_recorded(noisy, extractor, eight_bit):
    fake, source = noisy(fields=SIX)
    whole = image_features(source, extractor, device="cpu")
    path = fake.images["P1_B03_2", "Mito"]
    with tifffile.TiffFile(path) as tif:
        start, n = tif.pages[0].dataoffsets[0], tif.pages[0].databytecounts[0]
    data = bytearray(path.read_bytes())
    data[start : start + n] = bytes(n)
    path.write_bytes(data)
    with pytest.warns(PhenoseqWarning, match=rf"4 rows are left out.*{path.name}"):
        made = image_features(source, extractor, eight_bit=eight_bit, device="cpu")
    kept = source.obs.index[source.obs["field"] != "P1_B03_2"]
    assert list(made.obs_names) == list(kept)
    if eight_bit is None:
        np.testing.assert_array_equal(made.X, whole[kept].X)
        np.testing.assert_array_equal(made.obs["cut_by_border"], whole[kept].obs["cut_by_border"])
    (why,) = made.uns["phenoseq"]["problems"]
    assert why.startswith("P1_B03_2: ")
    fake.images["P2_B03_1", "DNA"].write_bytes(bytes(10))
    with pytest.raises(DataError, match=r"8 of 24 rows cannot be predicted, and at most 20%"):
        image_features(source, extractor, eight_bit=eight_bit, device="cpu")


def test_fields_that_the_reader_left_out_stay_recorded(noisy, extractor):
    fake, _ = noisy(fields=(*PLATE, ("P2", "C03", 1), ("P2", "C04", 1)))
    fake.images["P1_B03_2", "ER"].unlink()
    with pytest.warns(PhenoseqWarning, match="1 of 5 fields"):
        source = open_source(fake.path, pixel_size=0.5)
    (why,) = image_features(source, extractor, device="cpu").uns["phenoseq"]["problems"]
    assert why.startswith("P1_B03_2: ")


def test_constant_stain_is_told(noisy, extractor):
    fake, source = noisy()
    for (_, stain), path in fake.images.items():
        if stain == "AGP":
            tifffile.imwrite(path, np.full((90, 120), 7, np.uint8))
    with pytest.warns(PhenoseqWarning, match=r"stain\(s\) \['AGP'\] have one value everywhere"):
        made = image_features(source, extractor, device="cpu")
    assert np.isfinite(made.X).all()


@undocumented
def test_pixels_that_are_not_numbers(noisy, extractor):
    fake, source = noisy("float32", fields=SIX)
    pixels = tifffile.imread(fake.images["P2_B03_1", "DNA"])
    pixels[3, 4] = np.nan
    tifffile.imwrite(fake.images["P2_B03_1", "DNA"], pixels)
    with pytest.warns(PhenoseqWarning, match="P2_B03_1: .*1 pixels are not numbers"):
        made = image_features(source, extractor, eight_bit="percentile", device="cpu")
    assert made.n_obs == 20
    assert np.isfinite(made.X).all()


def test_progress_counts_cells(noisy, extractor):
    seen = []
    image_features(
        noisy()[1], extractor, device="cpu", batch_size=3, progress=lambda *n: seen.append(n)
    )
    assert seen[-1] == (12, 12)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


# ------------------------------------------------------------------------------------ command line


@pytest.fixture
def small_model(monkeypatch, tmp_path, vit):
    """Let the command take the small architecture, and give a file of its weights."""
    monkeypatch.setattr("phenoseq.inference.extract.VIT_L_16", CONFIG)
    monkeypatch.setattr("phenoseq.models.features.load_extractor.__defaults__", (CONFIG,))
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


def test_command(noisy, extractor, small_model, tmp_path, capsys):
    fake, source = noisy("uint16")
    out = tmp_path / "features.h5ad"
    args = ["embed", str(fake.path), "-o", str(out), "--pixel-size", "0.5", "--device", "cpu"]
    args += ["--backbone", "vit_l_16", "--weights", str(small_model)]
    assert main(args) == 1
    assert "--eight-bit full" in capsys.readouterr().err
    assert not out.exists()
    assert main([*args, "--eight-bit", "full"]) == 0
    assert "12 cells, 5 channels, 8 numbers each" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = image_features(source, extractor, eight_bit="full", device="cpu")
    back = ad.read_h5ad(out)
    np.testing.assert_array_equal(back.X, made.X)
    assert json.dumps(back.obs["Metadata_Well"].tolist()) == json.dumps(["B03"] * 12)


def test_command_says_what_it_would_download(noisy, tmp_path, monkeypatch, capsys):
    fake, _ = noisy()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    args = ["embed", str(fake.path), "-o", str(tmp_path / "out.h5ad"), "--pixel-size", "0.5"]
    args += ["--backbone", "vit_l_16"]
    assert main(args) == 1
    assert "1.2 GB" in capsys.readouterr().err


# ------------------------------------------------------------------------------- networks of timm


@pytest.fixture
def resnet(tmp_path):
    """A file of weights of timm's smallest network, and the network."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet").eval()
    torch.save(network.state_dict(), tmp_path / "resnet.pth")
    return tmp_path / "resnet.pth", network


def test_embed_by_a_network_of_timm(noisy, resnet, tmp_path, capsys):
    """All stains of the source, in its order; the pooled feature of each, at the size asked for."""
    fake, source = noisy(stains=("ER", "DNA"), name="two")
    weights, network = resnet
    args = ["embed", str(fake.path), "--backbone", "test_resnet", "--pixel-size", "0.5"]
    args += ["--weights", str(weights), "--crop-px", str(SIDE), "--device", "cpu"]
    assert main([*args, "-o", str(tmp_path / "f.zarr")]) == 0
    assert "12 cells, 2 channels, 96 numbers each" in capsys.readouterr().out
    made = phenoseq.embed(
        source, backbone="test_resnet", weights=weights, image_size=SIDE, device="cpu"
    )
    np.testing.assert_allclose(ad.read_zarr(tmp_path / "f.zarr").X, made.X, atol=1e-5)
    assert made.uns["phenoseq"]["channels"] == ["ER", "DNA"]
    tokens = made.X.reshape(12, 2, 96)
    assert (made.var["channel"].to_numpy().reshape(2, 96) == [["ER"], ["DNA"]]).all()
    batch = next(iter_crops(source, 0.5, SIDE))
    grey = torch.from_numpy(batch.images[0].astype("f4") / 255)[:, None].expand(-1, 3, -1, -1)
    with torch.inference_mode():
        network.reset_classifier(0)
        want = network((grey - 0.5) / 0.5).numpy()  # timm's mean and deviation of this network
    np.testing.assert_allclose(tokens[batch.rows[0]], want, rtol=1e-4, atol=1e-4)
    assert np.abs(tokens[:, 0] - tokens[:, 1]).max() > 0.01  # far above the tolerance


def test_features_make_a_store_of_samples(noisy, resnet, tmp_path):
    """What `embed` writes is what `prepare --pair-by sample` takes, streamed in bags."""
    out = tmp_path / "f.h5ad"
    phenoseq.embed(noisy()[1], backbone="test_resnet", weights=resnet[0], image_size=SIDE,
                   device="cpu", out=out)  # fmt: skip
    rna = ad.AnnData(
        np.random.default_rng(0).poisson(9.0, (30, 6)).astype("f4"),
        obs=pd.DataFrame({"Metadata_Plate": ["P1", "P2"] * 15}, index=[f"r{k}" for k in range(30)]),
        var=pd.DataFrame(index=[f"ENSG{k:011d}" for k in range(6)]),
    )
    store, _ = write_sample_store(
        Cells(out), Cells(rna), tmp_path / "s.zarr", columns=["Metadata_Plate"]
    )
    assert store.manifest.images == "features"
    assert len(store.image_obs()) == 12
    read = store.images.read(0, 12)
    names = store.image_obs().index
    np.testing.assert_array_equal(read, ad.read_h5ad(out)[names].X)


def test_embed_goes_on_where_it_was_stopped(noisy, resnet, tmp_path, monkeypatch):
    _, source = noisy()
    how = {"backbone": "test_resnet", "weights": resnet[0], "image_size": SIDE, "device": "cpu"}
    whole = phenoseq.embed(source, **how)
    monkeypatch.setattr("phenoseq.inference.extract._BLOCK", 1)
    monkeypatch.setitem(feature_job.__kwdefaults__, "batch_size", 4)
    seen, forward = [], Extractor.forward

    def stop(self, crops):
        seen.append(len(crops))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return forward(self, crops)

    monkeypatch.setattr(Extractor, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        phenoseq.embed(source, out=tmp_path / "f.h5ad", **how)
    again = phenoseq.embed(source, out=tmp_path / "f.h5ad", **how)
    assert len(seen) == 4
    np.testing.assert_allclose(again.X[:], whole.X, atol=1e-5)


def test_what_embed_refuses(noisy, resnet, tmp_path, capsys):
    fake, source = noisy()
    with pytest.raises(ModelError, match="vit_l_16: takes crops of 224 pixels, no others"):
        phenoseq.embed(source, backbone="vit_l_16", image_size=64)
    args = ["embed", str(fake.path), "--pixel-size", "0.5", "-o", str(tmp_path / "f.h5ad")]
    assert main([*args, "--backbone", "test_resnet"]) == 1
    told = capsys.readouterr().err
    assert "model.safetensors of https://hf.co/timm/test_resnet.r160_in1k" in told
    assert "--weights" in told
    assert main([*args, "--backbone", "resnet_test"]) == 1
    assert "no network 'resnet_test'" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- real data


@undocumented
def test_real_field(shared_data, extractor):
    source = open_source(shared_data / "cell_painting" / "pediatric", pixel_size=0.598)
    wide = FeatureConfig(**{**vars(CONFIG), "image_size": 224, "patch_size": 32})
    state = {**extractor.network.state_dict()}
    generator = torch.Generator().manual_seed(0)
    state["conv_proj.weight"] = torch.randn(WIDTH, 3, 32, 32, generator=generator)
    state["encoder.pos_embedding"] = torch.randn(1, 50, WIDTH, generator=generator)
    made = image_features(
        source, FeatureExtractor(wide, state, ""), eight_bit="percentile", device="cpu"
    )
    assert made.shape == (5, 40)
    assert made.obs["cut_by_border"].all()  # all five lie near the upper border
    assert np.isfinite(made.X).all()
    assert made.X.std(axis=0).min() > 0
    assert made.uns["phenoseq"]["channels"] == list(FIVE)
    tops = made.uns["phenoseq"]["eight_bit_top"]
    assert all(1000 < top < 65535 for top in tops)
