"""``phenoseq models``: what there is to load, and conversion of foreign checkpoints."""

from __future__ import annotations

import argparse

from phenoseq.cli.options import Commands


def add_models(commands: Commands) -> None:
    """Add ``phenoseq models``."""
    models = commands.add_parser("models", help="list the models that can be loaded by name")
    models.set_defaults(run=_models)
    actions = models.add_subparsers(metavar="ACTION")
    convert = actions.add_parser(
        "import", help="convert a checkpoint of the published PhenoSeq project, safely"
    )
    convert.add_argument("checkpoint", help="CHECKPOINT.pt; nothing in it is run")
    convert.add_argument("out", help="folder to write")
    convert.add_argument(
        "--features-mean-std",
        required=True,
        metavar="FILE.npz",
        help="mean and std of the image features, which the checkpoint lacks",
    )
    convert.add_argument(
        "--weights",
        default="ema",
        choices=["ema", "raw"],
        help="their average over training, or the last ones (%(default)s)",
    )
    convert.set_defaults(run=_import)


def _models(options: argparse.Namespace) -> int:
    from phenoseq.zoo.registry import list_models

    for entry in list_models():
        print(f"{entry.name:20} {entry.summary}\n{'':20} {entry.data}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from phenoseq.zoo.convert import convert_checkpoint

    folder = convert_checkpoint(
        options.checkpoint,
        options.out,
        features=options.features_mean_std,
        weights=options.weights,
    )
    print(
        f"model in {folder}; try: phenoseq predict FEATURES.h5ad --model {folder} --sample COLUMN"
    )
    return 0
