"""Loads whichever network a folder holds."""

from __future__ import annotations

from pathlib import Path

from phenoseq.errors import ModelError
from phenoseq.models.files import read_config
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.models.sample import SamplePhenoSeq
from phenoseq.models.strict import NETWORK, parse

Model = PhenoSeq | SamplePhenoSeq | PublishedPhenoSeq
_NETWORKS: dict[str, type[Model]] = {
    "phenoseq": PhenoSeq,
    "sample": SamplePhenoSeq,
    "published": PublishedPhenoSeq,
}


def load_folder(folder: str | Path) -> Model:
    """Rebuild the model in a folder, in evaluation mode, on the CPU.

    Raises
    ------
    ModelError
        Where its configuration names no network that there is, or its files are broken.
    """
    text, where = read_config(folder)
    network = parse(text, where)[NETWORK]
    if network not in _NETWORKS:
        raise ModelError(
            f"{where}: is of the network {network!r}, this phenoseq knows {list(_NETWORKS)}; "
            "install a newer phenoseq"
        )
    return _NETWORKS[network].load(folder)
