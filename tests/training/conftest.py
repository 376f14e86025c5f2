"""A store of a simulated plate, and the arguments of a small training on it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import anndata as ad
import pytest

from phenoseq.data.backed import Cells
from phenoseq.data.samplestore import SampleStore
from phenoseq.data.samplewriter import RnaConfig, write_sample_store
from phenoseq.data.simulate import PIXEL_SIZE, simulate_plate
from phenoseq.data.store import Store
from phenoseq.data.storewriter import write_store


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Draw no learning curves and samples, half of a small run; test_logs.py and others do."""
    monkeypatch.setattr("phenoseq.training.logs.draw_curves", lambda root: None)
    for name in ("draw_samples", "log_figure"):
        monkeypatch.setattr(f"phenoseq.training.figures.{name}", lambda *_: None)


@pytest.fixture
def quick(monkeypatch):
    """Fit the decoder in few steps, and what a model learns about itself to few cells."""
    monkeypatch.setattr("phenoseq.models.expression._MIN_STEPS", 20)
    monkeypatch.setattr("phenoseq.training.finalise._CELLS", 64)


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
            "data.split": "{by: Metadata_Well, block: null, test: 0.2}",
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


@pytest.fixture(scope="session")
def example() -> Callable[[str], ModuleType]:
    """Give a function that imports a script of ``examples/``."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).parents[2] / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # for its dataclasses
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def scgenescope(tmp_path_factory, example) -> Path:
    """Give a simulated miniature of scGeneScope, 12 samples of 5 replicates; 6 numbers a cell."""
    folder = tmp_path_factory.mktemp("scgenescope")
    example("simulate_scgenescope").main(folder, cells_per_site=10, treatments=3, width=6, seed=1)
    return folder


@pytest.fixture(scope="session")
def embedded(scgenescope) -> SampleStore:
    """Give a store of features and embeddings."""
    return write_sample_store(
        Cells(scgenescope / "features/imaging/imagenet/vit-l"),
        Cells(scgenescope / "features/rnaseq/scgpt"),
        scgenescope / "store.zarr",
        columns=["Treatment", "Replicate"],
        config=RnaConfig(embedding="scGPT"),
    )[0]


@pytest.fixture(scope="session")
def plate():
    """Give a plate of 15 wells."""
    return simulate_plate(
        seed=4,
        treatments=("DMSO", "drugA", "drugB"),
        wells_per_treatment=5,
        sites_per_well=1,
        cells_per_site=10,
    )


@pytest.fixture(scope="session")
def counted(plate, tmp_path_factory) -> SampleStore:
    """Give a store of crops and counts, both of all cells of each well."""
    source = plate.source
    rna = ad.AnnData(source.counts, obs=source.obs, var=source.var.rename_axis(None))
    return write_sample_store(
        source,
        Cells(rna),
        tmp_path_factory.mktemp("counted") / "store.zarr",
        columns=["Metadata_Treatment", "Metadata_Replicate"],
        pixel_size=PIXEL_SIZE,
        crop_px=32,
    )[0]
