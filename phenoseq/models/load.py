"""Loads whichever network a folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from phenoseq.errors import ModelError
from phenoseq.models.config import PhenoSeqConfig, SampleConfig
from phenoseq.models.files import read_config
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.models.published_config import PublishedConfig
from phenoseq.models.sample import SamplePhenoSeq
from phenoseq.models.strict import NETWORK, parse

Model = PhenoSeq | SamplePhenoSeq | PublishedPhenoSeq
Config = PhenoSeqConfig | SampleConfig | PublishedConfig

#: The class and the configuration of each network.
NETWORKS: Mapping[str, type[Model]] = {
    "phenoseq": PhenoSeq,
    "sample": SamplePhenoSeq,
    "published": PublishedPhenoSeq,
}
CONFIGS: Mapping[str, type[Config]] = {
    "phenoseq": PhenoSeqConfig,
    "sample": SampleConfig,
    "published": PublishedConfig,
}


def load_folder(folder: str | Path, networks: Mapping[str, type[Model]] = NETWORKS) -> Model:
    """Rebuild the model in a folder, in evaluation mode, on the CPU.

    Parameters
    ----------
    folder
        With ``config.json`` and ``model.safetensors``.
    networks
        The class of each network.

    Raises
    ------
    ModelError
        Where its configuration names no network that there is, or its files are broken.
    """
    return networks[_network(*read_config(folder))].load(folder)


def read_any_config(text: str, where: str) -> Config:
    """Rebuild the configuration of whichever network it is of.

    Raises
    ------
    ModelError
        Where it names no network that there is, or cannot be a configuration.
    """
    return CONFIGS[_network(text, where)].from_json(text, where)


def _network(text: str, where: str) -> str:
    network = parse(text, where).get(NETWORK)
    if isinstance(network, str) and network in NETWORKS:
        return network
    raise ModelError(
        f"{where}: is of the network {network!r}, this phenoseq knows {list(NETWORKS)}; "
        "install a newer phenoseq"
    )
