"""``phenoseq train``: LightningCLI over the module and the datamodule, and the model it leaves."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from phenoseq.data.datamodule import StoreDataModule, StreamDataModule
from phenoseq.data.samplemodule import SampleDataModule
from phenoseq.errors import ModelError
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.training.base import TrainingModule
from phenoseq.training.callbacks import WarmEMA
from phenoseq.training.checkpoints import (
    BEST,
    LAST,
    AtomicCheckpointIO,
    Checkpoints,
    folder_of,
    resumable,
    steps_done,
)
from phenoseq.training.figures import SampleFigures
from phenoseq.training.logs import CsvLogger, LearningCurves
from phenoseq.training.memory import Fit, InPieces, free_memory, largest_batch, out_of_memory
from phenoseq.training.module import PhenoSeqModule
from phenoseq.training.published import PublishedModule
from phenoseq.training.settings import keep_settings, same_settings
from phenoseq.training.sharding import ShardedStrategy

#: What ``class_path`` of ``model`` and ``data`` names; the first of each where it is left out.
MODULES = (PhenoSeqModule, PublishedModule)
DATA = (StoreDataModule, SampleDataModule)
#: Settings of the trainer that count batches, and so count pieces where batches are cut.
_COUNTING = ("accumulate_grad_batches", "limit_train_batches", "val_check_interval")


class _CLI(LightningCLI):
    in_pieces: InPieces

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--out", type=str | None, default=None, help="folder of the trained model"
        )
        parser.add_argument(
            "--export",
            type=Literal["last", "best"],
            default="last",
            help="whose mean weights become the model: the last, or those of the least val_loss",
        )
        parser.add_argument("--ema", type=float, default=0.999, help="decay of the mean weights")
        parser.add_argument(
            "--auto_batch",
            "--auto-batch",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="find the largest batch that fits into the memory of the GPU",
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        for part, kinds in (("model", MODULES), ("data", DATA)):
            parser.link_arguments("seed_everything", f"{part}.init_args.seed")
            first = f"{kinds[0].__module__}.{kinds[0].__qualname__}"
            parser.set_defaults({part: {"class_path": first}})
        on_terminal = sys.stderr.isatty()
        parser.set_defaults(
            {
                "trainer.enable_progress_bar": on_terminal,
                "trainer.enable_model_summary": on_terminal,
            }
        )

    @property
    def root(self) -> Path:
        """Folder of the run."""
        return Path(self._get(self.config_init, "trainer.default_root_dir") or "runs")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Return the trainer, with what every run has."""
        settings = self._get(self.config_init, "trainer")
        fit = Fit.read(self.root)
        self.datamodule.batch_size = fit.batch_size or self.datamodule.batch_size
        for name in _COUNTING:
            if isinstance(settings[name], int) and fit.pieces > 1:
                kwargs[name] = settings[name] * fit.pieces
        if settings["strategy"] == "fsdp":
            kwargs["strategy"] = ShardedStrategy()
        done = steps_done(folder_of(self.root) / LAST)
        kwargs["default_root_dir"] = self.root
        kwargs["logger"] = [CsvLogger(self.root, done), *self._loggers(done)]
        kwargs["plugins"] = [*_listed(settings["plugins"]), AtomicCheckpointIO()]
        self.in_pieces = InPieces(self.datamodule, fit.pieces)
        kwargs["callbacks"] = [
            *_listed(settings["callbacks"]),
            SampleFigures(),
            WarmEMA(self._get(self.config_init, "ema")),
            self.in_pieces,
            LearningCurves(),
        ]
        return super().instantiate_trainer(**kwargs)

    def _loggers(self, done: int) -> list[Logger]:
        chosen = self._get(self.config_init, "trainer.logger")
        if chosen is None or chosen is True:
            return [
                TensorBoardLogger(
                    self.root,
                    name="tensorboard",
                    version="",
                    default_hp_metric=False,
                    purge_step=done or None,  # of events that are written again
                )
            ]
        return _listed(chosen or None)


def train(args: Sequence[str]) -> Path:
    """Train as the arguments of ``phenoseq train`` say, continuing where a killed run stopped.

    Where a batch does not fit into memory, the run goes on from its last checkpoint with each batch
    cut into two pieces, whose gradients are added up.

    Returns
    -------
    The folder of the trained model, which
    :func:`phenoseq.load_model` reads.

    Raises
    ------
    ModelError
        Where the folder holds a run with other settings, or memory is short on several devices,
        each of which would have to know: the same command then goes on with smaller pieces.
    """
    _be_quiet()
    cli = _prepared(args)
    while not _fitted(cli):
        free_memory()
        cli = _command_line(args)
    out = Path(cli.config.out or cli.root / "model")
    if cli.trainer.is_global_zero:
        _export(cli, out)
    cli.trainer.strategy.barrier()
    return out


def _command_line(args: Sequence[str]) -> _CLI:
    try:
        return _CLI(
            TrainingModule,
            StreamDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=list(args),
            run=False,
            seed_everything_default=0,
            save_config_callback=None,
        )
    except ValueError as error:  # jsonargparse tells all that the value could have been
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ModuleNotFoundError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise ModelError(f"the settings need a package that is not there: {cause}") from error


def _prepared(args: Sequence[str]) -> _CLI:
    """Return the run, its settings compared with those it had before, its batch found."""
    cli = _command_line(args)
    text = cli.parser.dump(cli.config, skip_none=False)
    last = folder_of(cli.root) / LAST
    if last.exists():
        same_settings(cli.root, text)
        _say(cli, f"continuing from {last}, step {steps_done(last)}")
    if cli.trainer.is_global_zero:
        keep_settings(cli.root, text)
    if cli.config.auto_batch and Fit.read(cli.root).batch_size is None:
        size = _find_batch(cli)
        Fit(batch_size=size).write(cli.root)
        _say(cli, f"the largest batch that fits has {size}")
        cli = _command_line(args)
    return cli


def _fitted(cli: _CLI) -> bool:
    """Train, and tell whether memory was enough; if not, the next time takes smaller pieces."""
    last = folder_of(cli.root) / LAST
    try:
        with resumable():
            cli.trainer.fit(
                cli.model, datamodule=cli.datamodule, ckpt_path=last if last.exists() else None
            )
        return True
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        _make_smaller(cli, error)
        return False


def _make_smaller(cli: _CLI, error: RuntimeError) -> None:
    size = cli.datamodule.batch_size
    if cli.in_pieces.validating:
        raise ModelError(
            f"out of memory in validation, with batches of {size}; set data.batch_size to "
            f"{size // 2} and trainer.accumulate_grad_batches to twice what it is"
        ) from error
    fit = Fit.read(cli.root).halved()
    fit.write(cli.root)
    how = (
        f"out of memory: each batch of {size} is computed in {fit.pieces} pieces of about "
        f"{-(-size // fit.pieces)}, with the same gradient"
    )
    if cli.trainer.world_size > 1:
        raise ModelError(f"{how}, when the same command is given again") from error
    _say(cli, how)


def _find_batch(cli: _CLI) -> int:
    """Return the largest batch that fits, by making a few steps."""
    if cli.trainer.world_size > 1 or not _tells_when_full(cli.trainer):
        raise ModelError(
            "auto_batch tries batches on one GPU; for several devices or the CPU, set "
            "data.batch_size (to what was found on one of the GPUs)"
        )
    data, settings = cli.datamodule, cli.config.trainer
    data.setup("fit")
    most = len(data.train_dataloader()) * data.batch_size

    def try_one(size: int) -> None:
        data.batch_size = size
        L.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            precision=settings.precision,
            max_steps=2,  # the second has the optimiser's state beside it
            limit_val_batches=0,
            callbacks=[WarmEMA(cli.config.ema)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(cli.model, datamodule=data)

    return largest_batch(try_one, data.batch_size, most)


def _tells_when_full(trainer: L.Trainer) -> bool:
    """Tell whether the device says that its memory is full; on a CPU the process is killed."""
    return not isinstance(trainer.accelerator, CPUAccelerator)


def _export(cli: _CLI, out: Path) -> None:
    """Save the mean weights of a checkpoint as a model; say of which, and what it is for."""
    file = folder_of(cli.root) / (BEST if cli.config.export == "best" else LAST)
    if not file.exists():
        raise ModelError(f"{file}: is not there, since nothing was validated; use --export last")
    checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    trained = cli.model.model  # maybe in shards
    model = type(trained)(trained.config)
    own = len("model.")
    model.load_state_dict({name[own:]: t for name, t in checkpoint["state_dict"].items()})
    cli.model.model = model
    cli.model.finish(cli.datamodule, cli.trainer.strategy.root_device).save(out)
    least = checkpoint["callbacks"][Checkpoints.__qualname__]
    print(
        f"mean weights of {file.name}, step {checkpoint['global_step']} "
        f"(val_loss was least, {least['least']:.4g}, at step {least['step']})"
    )
    if isinstance(model, PhenoSeq):
        use = f"evaluate --model {out} --store {cli.datamodule.store}"
    else:
        use = f"predict CELLS --model {out} --sample COLUMN --out PREDICTION.h5ad"
    print(f"model in {out}; try: phenoseq {use}")


def _say(cli: _CLI, text: str) -> None:
    if cli.trainer.is_global_zero:
        print(text, flush=True)


def _be_quiet() -> None:
    """Leave out Lightning's notes where nobody looks on, and warnings about what is meant so."""
    if not sys.stderr.isatty():
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
