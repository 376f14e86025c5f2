"""A store of a simulated plate, and the arguments of a small training on it."""

from __future__ import annotations

import pytest

from phenoseq.data.simulate import PIXEL_SIZE, simulate_plate
from phenoseq.data.store import Store
from phenoseq.data.storewriter import write_store


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Store:
    """About 500 cells in 24 wells."""
    plate = simulate_plate(seed=4, wells_per_treatment=6, sites_per_well=1, cells_per_site=25)
    path = tmp_path_factory.mktemp("training") / "plate.zarr"
    return write_store(plate.source, path, pixel_size=PIXEL_SIZE, crop_px=32)


@pytest.fixture
def arguments(store, tmp_path):
    """Give a function that makes the arguments of ``phenoseq train``."""

    def make(root: str = "run", epochs: int = 2, **more: object) -> list[str]:
        settings = {
            "data.store": store.path,
            "data.split.by": "Metadata_Well",
            "data.split.block": "null",
            "data.split.test": 0.2,
            "data.batch_size": 32,
            "model.encoder.backbone": "test_resnet",
            "model.denoiser.dim": 32,
            "model.denoiser.depth": 2,
            "model.denoiser.heads": 2,
            "model.components": 6,
            "model.hidden": 16,
            "model.warmup_steps": 5,
            "trainer.max_epochs": epochs,
            "trainer.accelerator": "cpu",
            "trainer.enable_model_summary": "false",
            "trainer.default_root_dir": tmp_path / root,
            **more,
        }
        return [part for name, value in settings.items() for part in (f"--{name}", str(value))]

    return make
