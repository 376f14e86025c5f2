"""``phenoseq train``: handed to LightningCLI as it is."""

from __future__ import annotations

from collections.abc import Sequence

from phenoseq.cli.options import Commands


def add_train(commands: Commands) -> None:
    """Add ``phenoseq train``, for the list of commands."""
    commands.add_parser("train", help="train a model: phenoseq train --config CONFIG.yaml")


def run_train(args: Sequence[str]) -> int:
    """Train as LightningCLI's arguments say; return the exit status."""
    from phenoseq.training.train import train

    out = train(args)
    print(f"model in {out}; try: phenoseq evaluate --model {out} --store STORE")
    return 0
