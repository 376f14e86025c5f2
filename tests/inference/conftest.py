"""A simulated plate, a store of it, and a small model that knows nothing but does something."""

from __future__ import annotations

from collections.abc import Callable

import anndata as ad
import numpy as np
import pytest
import torch

import phenoseq
from phenoseq.data.crops import iter_crops
from phenoseq.data.simulate import CHANNELS, PIXEL_SIZE, SimulatedPlate, simulate_plate
from phenoseq.data.store import Store
from phenoseq.data.storewriter import write_store
from phenoseq.models.config import ImageConfig, PhenoSeqConfig, TrainingRecord
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.expression import fit_expression_space
from phenoseq.models.phenoseq import PhenoSeq, pool

CROP_PX = 32


@pytest.fixture(scope="session")
def plate() -> SimulatedPlate:
    """Four fields of 20 cells."""
    return simulate_plate(seed=3, wells_per_treatment=1, sites_per_well=1, cells_per_site=20)


@pytest.fixture(scope="session")
def crops(plate) -> np.ndarray:
    """Crops of all cells of the plate, in the order of its ``obs``, at its own pixel size."""
    out = np.empty((len(plate.source.obs), len(CHANNELS), CROP_PX, CROP_PX), dtype=np.uint16)
    for batch in iter_crops(plate.source, PIXEL_SIZE, CROP_PX):
        out[batch.rows] = batch.images
    return out


@pytest.fixture(scope="session")
def store(plate, tmp_path_factory) -> Store:
    """The plate in a store, without the cells cut by the border."""
    path = tmp_path_factory.mktemp("store") / "plate.zarr"
    return write_store(plate.source, path, pixel_size=PIXEL_SIZE, crop_px=CROP_PX)


@pytest.fixture(scope="session")
def make_model(plate, crops) -> Callable[..., PhenoSeq]:
    """Give a function that makes a model of random weights, by default one of this plate.

    Its expression space is fitted to the plate, and its strangeness to the crops.
    """
    source = plate.source

    def make(channels: tuple[str, ...] = CHANNELS, *, seed: int = 0, **image) -> PhenoSeq:
        places = [CHANNELS.index(c) if c in CHANNELS else 0 for c in channels]
        pixels = crops[:, places].astype(np.float32)
        space = fit_expression_space(
            source.counts, tuple(source.var.index), tuple(source.var["symbol"]),
            components=6, hidden=16,
        )  # fmt: skip
        statistics = {
            "mean": tuple(pixels.mean(axis=(0, 2, 3)).tolist()),
            "std": tuple(pixels.std(axis=(0, 2, 3)).tolist()),
            "p999": tuple(np.quantile(pixels, 0.999, axis=(0, 2, 3)).tolist()),
        }
        config = PhenoSeqConfig(
            image=ImageConfig(
                channels=channels,
                **{
                    "pixel_size": PIXEL_SIZE,
                    "crop_px": CROP_PX,
                    "dtype": "uint16",
                    **statistics,
                    **image,
                },
            ),
            expression=space.config,
            training=TrainingRecord(
                source="simulated plate3",
                identity=source.identity,
                split={"by": "Metadata_Well", "block": None, "test": 0.3, "val": 0.3, "cal": 0.0},
                split_digest="",
                n_cells=80,
                seed=seed,
                version="0",
                reliability=tuple(np.linspace(0, 0.59, 60).tolist()),
                reliability_interval=((-0.1, 0.7),) * 60,
            ),
            encoder=EncoderConfig(backbone="test_resnet", channel_mode="separate"),
            denoiser=DenoiserConfig(dim=32, depth=2, heads=2),
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = PhenoSeq(config, space).eval()
            for parameter in model.denoiser.parameters():  # those that start at zero
                if not parameter.any():
                    parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
            if channels == CHANNELS and model.config.image.crop_px == CROP_PX:
                context = pool(*model.encode(torch.from_numpy(pixels)))
                model.context_mean.copy_(context.mean(dim=0))
                model.context_whiten.copy_(torch.diag(1 / context.std(dim=0)))
        return model

    return make


@pytest.fixture(scope="session")
def model(make_model) -> PhenoSeq:
    """A model that no test may change."""
    return make_model()


@pytest.fixture(scope="session")
def model_folder(model, tmp_path_factory):
    return model.save(tmp_path_factory.mktemp("model") / "random-plate")


@pytest.fixture(scope="session")
def predicted(model, plate) -> ad.AnnData:
    """The plate's prediction, of four draws a cell, that no test may change."""
    return phenoseq.predict(plate.source, model=model, n_samples=4, seed=11, device="cpu")
