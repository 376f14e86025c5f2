"""``phenoseq train``: LightningCLI over the module and the datamodule, and the model it leaves."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from phenoseq.data.datamodule import StoreDataModule, StreamDataModule
from phenoseq.data.samplemodule import SampleDataModule
from phenoseq.errors import ModelError
from phenoseq.training.base import TrainingModule
from phenoseq.training.callbacks import WarmEMA
from phenoseq.training.module import PhenoSeqModule
from phenoseq.training.published import PublishedModule

#: What ``class_path`` of ``model`` and ``data`` names; the first of each where it is left out.
MODULES = (PhenoSeqModule, PublishedModule)
DATA = (StoreDataModule, SampleDataModule)


class _CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--out", type=str | None, default=None, help="folder of the trained model"
        )
        parser.add_argument("--ema", type=float, default=0.999, help="decay of the mean weights")
        for part, kinds in (("model", MODULES), ("data", DATA)):
            parser.link_arguments("seed_everything", f"{part}.init_args.seed")
            first = f"{kinds[0].__module__}.{kinds[0].__qualname__}"
            parser.set_defaults({part: {"class_path": first}})
        parser.set_defaults({"trainer.enable_progress_bar": sys.stderr.isatty()})

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        root = Path(self._get(self.config_init, "trainer.default_root_dir") or "runs")
        kwargs["default_root_dir"] = root
        kwargs.setdefault("logger", CSVLogger(root, name="", version=""))
        kwargs["callbacks"] = [
            *(self._get(self.config_init, "trainer.callbacks") or []),
            WarmEMA(self._get(self.config_init, "ema")),
            ModelCheckpoint(root / "checkpoints", filename="last", enable_version_counter=False),
        ]
        return super().instantiate_trainer(**kwargs)


def train(args: Sequence[str]) -> Path:
    """Train as the arguments of ``phenoseq train`` say, continuing where a killed run stopped.

    Returns
    -------
    The folder of the trained model, which
    :func:`~phenoseq.zoo.registry.load_model` reads.
    """
    warnings.filterwarnings("ignore", message=".*configure_model.*WeightAveraging.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    cli = _CLI(
        TrainingModule,
        StreamDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=list(args),
        run=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
    )
    root = Path(cli.trainer.default_root_dir)
    last = root / "checkpoints" / "last.ckpt"
    if last.exists():
        _same_settings(cli, root / "config.yaml")
        print(f"continuing from {last}")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last if last.exists() else None)
    out = Path(cli.config.out or root / "model")
    if cli.trainer.is_global_zero:
        cli.model.finish(cli.datamodule).save(out)
    return out


def _same_settings(cli: _CLI, stored: Path) -> None:
    """Refuse to continue a run under other settings than it was started with."""
    now = cli.parser.dump(cli.config, skip_none=False)
    if stored.exists() and _settings(stored.read_text()) != _settings(now):
        raise ModelError(
            f"{stored.parent}: holds a run with other settings (see {stored.name}); give this one "
            "its own trainer.default_root_dir, or remove that folder"
        )


def _settings(text: str) -> Any:
    settings = yaml.safe_load(text)
    settings.get("trainer", {}).pop("enable_progress_bar", None)
    return settings
