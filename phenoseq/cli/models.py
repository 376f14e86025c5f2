"""``phenoseq models``: what there is to load, fetched, checked, shown and published."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from phenoseq.cli.options import Commands

if TYPE_CHECKING:
    from rich.console import Console

MODEL = "name in the zoo, folder, or OWNER/NAME[@REVISION] on the Hugging Face hub"


def add_models(commands: Commands) -> None:
    """Add ``phenoseq models``."""
    models = commands.add_parser(
        "models", help="list, show, fetch, check and publish models", description=__doc__
    )
    models.set_defaults(run=_list)
    actions = models.add_subparsers(metavar="ACTION")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], help: str, *arguments: str
    ) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=help, description=help)
        for argument in arguments:
            action.add_argument(argument, help=MODEL)
        action.set_defaults(run=run)
        return action

    add("list", _list, "list the models that can be loaded by name")
    add("show", _show, "show what a model is, with its card", "model")
    add("card", _card, "show a model's card; as Markdown where it goes to a file", "model")
    add("download", _download, "fill the cache, also for a machine without network", "model")
    verify = add("verify", _verify, "check the hashes of a model, or of all that are here")
    verify.add_argument("model", nargs="?", help=MODEL)
    add("where", _where, "say where models are kept")
    push = add("push", _push, "publish the model in a folder on the Hugging Face hub")
    push.add_argument("folder", help="with config.json and model.safetensors")
    push.add_argument("repo", help="OWNER/NAME; made where it is not there yet")
    push.add_argument("--private", action="store_true", help="for its owner alone")
    push.add_argument("--licence", metavar="ID", help="as the hub knows it: cc-by-4.0, mit, ...")
    push.add_argument(
        "--dataset", action="append", default=[], metavar="ID", help="of its training, for the card"
    )
    push.add_argument(
        "--training", metavar="FILE.yaml", help="settings of its training (those beside the model)"
    )
    convert = add(
        "import", _import, "convert a checkpoint of the published PhenoSeq project, safely"
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


def _console() -> Console:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 120
    return Console(width=width, markup=False, highlight=False)


def _list(options: argparse.Namespace) -> int:
    from rich import box
    from rich.table import Table

    from phenoseq.zoo.describe import told_size
    from phenoseq.zoo.registry import list_models

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "predicts", "stains", "pairing", "data", "licence", "size", "here"):
        table.add_column(column, no_wrap=column not in ("stains", "data"))
    for entry in list_models():
        table.add_row(
            entry.name,
            f"{entry.n_vars} {entry.unit}" if entry.unit == "genes" else entry.unit,
            ", ".join(entry.channels),
            entry.pairing,
            f"{entry.data} ({entry.data_licence})",
            entry.licence,
            told_size(entry.size),
            "yes" if entry.is_here else "no",
        )
    _console().print(table)
    print("'phenoseq models show NAME' says more; OWNER/NAME of the Hugging Face hub loads as well")
    return 0


def _show(options: argparse.Namespace) -> int:
    from rich.table import Table

    from phenoseq.zoo.cards import printable
    from phenoseq.zoo.describe import describe

    described = describe(options.model)
    table = Table.grid(padding=(0, 2))
    for name, value in described.facts.items():
        table.add_row(name, printable(value))
    for name, figure in described.figures.items():
        table.add_row(f"held out: {printable(name)}", f"{figure:.4g}")
    console = _console()
    console.print(table)
    if described.card is not None:
        _render(console, described.card)
    return 0


def _card(options: argparse.Namespace) -> int:
    from phenoseq.errors import ModelError
    from phenoseq.zoo.cards import printable
    from phenoseq.zoo.describe import describe

    card = describe(options.model).card
    if card is None:
        raise ModelError(f"{options.model}: has no card (README.md)")
    if sys.stdout.isatty():
        _render(_console(), card)
    else:
        print(printable(card), end="")
    return 0


def _render(console: Console, card: str) -> None:
    """Show a card as text: links as addresses; not its HTML, nor its metadata for the hub."""
    from rich.markdown import Markdown

    from phenoseq.zoo.cards import printable, split_front

    console.print(Markdown(split_front(printable(card))[1], hyperlinks=False))


def _download(options: argparse.Namespace) -> int:
    from huggingface_hub import constants

    from phenoseq.zoo.cards import weights_folder
    from phenoseq.zoo.describe import told_size
    from phenoseq.zoo.registry import folder_of, to_download

    if entry := to_download(options.model):
        print(f"{entry.name}: {told_size(entry.size)} from the Hugging Face hub")
    folder = folder_of(options.model, download=True)
    print(f"{options.model}: {folder}")
    if folder.is_relative_to(weights_folder(".")):
        print("it came with the package: there is nothing to fetch")
        return 0
    print(
        f"for a machine without network: copy {constants.HF_HOME} there, and set HF_HOME to that "
        "place and HF_HUB_OFFLINE=1"
    )
    return 0


def _verify(options: argparse.Namespace) -> int:
    from phenoseq.zoo.describe import verify

    failed = False
    for name, file, problem in verify(options.model):
        print(f"{'BAD' if problem else 'ok':4} {name} {file}{': ' if problem else ''}{problem}")
        failed |= bool(problem)
    return int(failed)


def _where(options: argparse.Namespace) -> int:
    from huggingface_hub import constants

    from phenoseq.zoo.cards import weights_folder
    from phenoseq.zoo.hub import cached_models

    print(f"in the package: {weights_folder('.').resolve()}")
    print(f"from the hub:   {constants.HF_HUB_CACHE} (HF_HUB_CACHE, HF_HOME)")
    print(f"converted:      {Path(constants.HF_ASSETS_CACHE) / 'phenoseq'} (HF_ASSETS_CACHE)")
    for reference, folder in cached_models():
        print(f"  {reference} {folder}")
    return 0


def _push(options: argparse.Namespace) -> int:
    from phenoseq.zoo.push import push_to_hub

    address = push_to_hub(
        Path(options.folder),
        options.repo,
        private=options.private,
        licence=options.licence,
        datasets=options.dataset,
        training=options.training,
    )
    print(f"published: {address}\nload it with phenoseq.load_model({options.repo!r})")
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
