"""Loads whichever network a folder holds."""

from __future__ import annotations

from pathlib import Path

from phenoseq.errors import ModelError
from phenoseq.models.files import read_config
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.models.strict import NETWORK, parse

Model = PhenoSeq | PublishedPhenoSeq


def load_folder(folder: str | Path) -> Model:
    """Rebuild the model in a folder, in evaluation mode, on the CPU.

    Raises
    ------
    ModelError
        Where its configuration names no network that there is, or its files are broken.
    """
    text, where = read_config(folder)
    network = parse(text, where)[NETWORK]
    if network == "phenoseq":
        return PhenoSeq.load(folder)
    if network == "published":
        return PublishedPhenoSeq.load(folder)
    raise ModelError(
        f"{where}: is of the network {network!r}, this phenoseq knows 'phenoseq' and 'published'; "
        "install a newer phenoseq"
    )
