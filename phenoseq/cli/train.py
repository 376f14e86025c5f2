"""``phenoseq train``, handed to LightningCLI as it is, ``finetune`` and ``calibrate``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from phenoseq.cli.options import Commands


def add_train(commands: Commands) -> None:
    """Add ``phenoseq train``, for the list of commands."""
    commands.add_parser("train", help="train a model: phenoseq train --config CONFIG.yaml")


def run_train(args: Sequence[str]) -> int:
    """Train as LightningCLI's arguments say; return the exit status."""
    from phenoseq.training.train import train

    train(args)
    return 0


def add_finetune(commands: Commands) -> None:
    """Add ``phenoseq finetune``."""
    finetune = commands.add_parser("finetune", help="train a model on, on your own data")
    finetune.add_argument("model", help="name in the zoo, or folder, of the model to start from")
    finetune.add_argument("store", help="prepared store, paired as the model is")
    finetune.add_argument("-o", "--out", required=True, help="folder of the new model")
    finetune.add_argument(
        "--freeze",
        choices=["encoder", "none", "all-but-head"],
        default="encoder",
        help="what is not trained (%(default)s)",
    )
    finetune.add_argument("--genes", help="text file of the genes to predict, one a line (all)")
    finetune.add_argument("--channels", help="stains to read, A,B (all)")
    finetune.add_argument(
        "--split-by", help="column of obs by whose groups cells are divided (as the base model's)"
    )
    finetune.add_argument("--block", type=float, help="um, side of the blocks they are divided by")
    finetune.add_argument("--epochs", type=int, default=30, help="at most (%(default)s)")
    finetune.add_argument("--lr", type=float, help="highest learning rate (by what is frozen)")
    finetune.add_argument("--no-cache", action="store_true", help="encode crops in every epoch")
    finetune.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    finetune.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    finetune.set_defaults(run=_finetune)


def _finetune(options: argparse.Namespace) -> int:
    from phenoseq.data.splits import SplitConfig
    from phenoseq.errors import DataError
    from phenoseq.genes import read_gene_list
    from phenoseq.tuning import finetune

    split = None
    if options.split_by and options.block:
        raise DataError("--split-by takes the groups of a column, --block squares; give one")
    if options.split_by:
        split = SplitConfig(by=options.split_by, block=None)
    elif options.block:
        split = SplitConfig(block=options.block)
    model = finetune(
        options.model,
        options.store,
        freeze=options.freeze,
        genes=list(read_gene_list(options.genes).index) if options.genes else None,
        channels=options.channels.split(",") if options.channels else None,
        split=split,
        epochs=options.epochs,
        lr=options.lr,
        cache=not options.no_cache,
        seed=options.seed,
        device=options.device,
        out=options.out,
        report=print,
    )
    then = f"phenoseq evaluate --model {options.out} --store {options.store}"
    if model.config.pairing == "sample":
        then = f"phenoseq predict SOURCE --model {options.out} --sample COLUMN -o PREDICTION.zarr"
    print(f"model in {options.out}; try: {then}")
    return 0


def add_calibrate(commands: Commands) -> None:
    """Add ``phenoseq calibrate``."""
    calibrate = commands.add_parser(
        "calibrate",
        help="recalibrate a trained model",
        description="Recalibrate a trained model on the calibration part of a store, as training "
        "does at its end.",
    )
    calibrate.add_argument("model", help="name in the zoo, or folder, of the model")
    calibrate.add_argument("store", help="prepared store")
    calibrate.add_argument("-o", "--out", required=True, help="folder of the new model")
    calibrate.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    calibrate.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    calibrate.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    from phenoseq.tuning import calibrate

    how = {"seed": options.seed, "device": options.device, "out": options.out}
    calibrate(options.model, options.store, **how)
    print(f"model in {options.out}")
    return 0
