"""Models that can be had by name. An entry is data; tests check it against the files."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from phenoseq.errors import ModelError
from phenoseq.models.files import WEIGHTS
from phenoseq.models.load import load_folder
from phenoseq.zoo import checkpoint
from phenoseq.zoo.cards import find_card, read_metrics, weights_folder
from phenoseq.zoo.checkpoint import HubCheckpoint
from phenoseq.zoo.convert import sha256_of
from phenoseq.zoo.hub import Reference, fetch, parse_reference, remove, snapshot
from phenoseq.zoo.push import NETWORKS, LoadedModel


@dataclass(frozen=True)
class Embedded:
    """Weights within the package."""


@dataclass(frozen=True)
class HubModel:
    """Weights in a repository of the hub, at one commit."""

    repo: str
    commit: str


@dataclass(frozen=True)
class ModelEntry:
    """A model of the zoo.

    Attributes
    ----------
    name
        What to call it.
    summary
        What it predicts, from what, in a line.
    source
        Where its weights are: in the package, on the hub at a pinned commit, or (a checkpoint of
        the published project) on the hub, trusted at the first download and checked ever after.
    sha256, size
        Of its ``model.safetensors``, and bytes to fetch or already here; no digest where none is
        known before the first download.
    pairing
        ``"cell"`` or ``"sample"``: whether image and counts of its training were of the same cell.
    channels, pixel_size
        Stains, in order, and micrometres a pixel; 0 where the network reads pixels as they come.
    n_vars, unit
        How many numbers it predicts, and of what.
    data, data_licence, licence
        Training data with its licence, and the licence of the weights.
    """

    name: str
    summary: str
    source: Embedded | HubModel | HubCheckpoint
    sha256: str
    size: int
    pairing: Literal["cell", "sample"]
    channels: tuple[str, ...]
    pixel_size: float
    n_vars: int
    unit: str
    data: str
    data_licence: str
    licence: str

    @property
    def folder(self) -> Path:
        """Folder in the package: of the weights, where they are embedded, and of the scores."""
        return weights_folder(self.name)

    @property
    def card(self) -> str:
        """Its card, Markdown."""
        return find_card(self.name)

    @property
    def metrics(self) -> dict[str, Any]:
        """What ``phenoseq evaluate`` measured on held-out groups; empty where it was not run."""
        return read_metrics(self.folder)

    @property
    def is_here(self) -> bool:
        """Whether it can be loaded without the network."""
        if isinstance(self.source, Embedded):
            return True
        if isinstance(self.source, HubCheckpoint):
            return checkpoint.is_here(self.name, self.source)
        try:
            here = snapshot(Reference(self.source.repo, self.source.commit), (WEIGHTS,), local=True)
        except ModelError:
            return False
        return (here / WEIGHTS).is_file()


_ENTRIES = (
    ModelEntry(
        name="xenium-pancreas",
        summary="377 genes from DNA, Boundary, 18S and InteriorProtein, 27 um crops",
        source=Embedded(),
        sha256="aeaa057effab16ed7ad9fc0dd0a63498d91b9e7aaede235cc5a54e6dbe2bad4c",
        size=18_813_468,
        pairing="cell",
        channels=("DNA", "Boundary", "18S", "InteriorProtein"),
        pixel_size=0.425,
        n_vars=377,
        unit="genes",
        data="10x Genomics, Xenium V1 Human Pancreas FFPE",
        data_licence="CC BY 4.0",
        licence="cc-by-4.0",
    ),
    ModelEntry(
        name="simulated-plate",
        summary="60 invented genes from simulated Cell Painting, for demos and tests",
        source=Embedded(),
        sha256="d6f7b41987c1ae81e3abdb5f96ab2ea2da09d593aee0ddc6bcb137d50367d08e",
        size=4_979_624,
        pairing="cell",
        channels=("DNA", "RNA", "AGP", "Mito", "ER"),
        pixel_size=0.65,
        n_vars=60,
        unit="genes",
        data="simulated cells",
        data_licence="BSD 3-Clause",
        licence="bsd-3-clause",
    ),
    ModelEntry(
        name="scgenescope-scgpt",
        summary="scGPT embeddings of a sample from ViT-L features of Cell Painting",
        source=HubCheckpoint(
            repo="Sentinal4D/PhenoSeq",
            checkpoint="best_model.pt",
            statistics="img_norm.npz",
        ),
        sha256="",
        size=2_700_000_000,
        pairing="sample",
        channels=("DNA", "RNA", "AGP", "Mito", "ER"),
        pixel_size=0,
        n_vars=512,
        unit="scGPT embedding",
        data="scGeneScope",
        data_licence="CC BY-NC 4.0",
        licence="apache-2.0",
    ),
)


def list_models() -> tuple[ModelEntry, ...]:
    """Return the models that can be loaded by name.

    Examples
    --------
    >>> import phenoseq
    >>> [model.name for model in phenoseq.list_models()]
    ['xenium-pancreas', 'simulated-plate', 'scgenescope-scgpt']
    """
    return _ENTRIES


def find(name: str) -> ModelEntry:
    """Return the entry of a model.

    Raises
    ------
    ModelError
        Where there is none; the message names the nearest.
    """
    for entry in _ENTRIES:
        if entry.name == name:
            return entry
    known = [entry.name for entry in _ENTRIES]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    raise ModelError(
        f"no model {name!r}: neither a folder, nor OWNER/NAME on the hub, nor one of the zoo, "
        f"which has {known}{guess}"
    )


def to_download(model: str | Path) -> ModelEntry | None:
    """Return the model's entry where loading it needs a download that has to be allowed, else None.

    Raises
    ------
    ModelError
        Where there is no such model.
    """
    if Path(model).is_dir() or parse_reference(str(model)):
        return None
    entry = find(str(model))
    return None if entry.is_here else entry


def load_model(model: str | Path, *, download: bool = False) -> LoadedModel:
    """Load a model, in evaluation mode, on the CPU.

    Parameters
    ----------
    model
        A name that :func:`list_models` lists; a folder with ``config.json`` and
        ``model.safetensors``; or a repository on the Hugging Face hub, ``"OWNER/NAME"`` or
        ``"OWNER/NAME@REVISION"`` (a branch, a tag or a commit), which is fetched where it is not in
        the cache.
    download
        Allow the download of a model of the zoo that is not in the package and not on this machine
        yet. Who names a repository has allowed it.

    Returns
    -------
    The model, with a method ``push_to_hub``, see :func:`phenoseq.push_to_hub`.

    Raises
    ------
    ModelError
        Where there is no such model, its files are broken or not those that they should be, or it
        would have to be downloaded and may not.

    Examples
    --------
    >>> import phenoseq
    >>> model = phenoseq.load_model("simulated-plate")
    >>> model.config.image.channels
    ('DNA', 'RNA', 'AGP', 'Mito', 'ER')
    """
    folder = folder_of(model, download=download)
    loaded = cast(LoadedModel, load_folder(folder, NETWORKS))
    loaded.folder = folder
    return loaded


def folder_of(model: str | Path, *, download: bool = False) -> Path:
    """Return the folder of a model's files, checked; see :func:`load_model`."""
    if Path(model).is_dir():
        return Path(model)
    if reference := parse_reference(str(model)):
        return _fetch_known(reference)
    entry = find(str(model))
    source, folder = entry.source, entry.folder
    if not download and not entry.is_here:
        raise ModelError(
            f"{entry.name}: is not on this machine yet, and takes {entry.size / 1e9:.1f} GB to "
            f"download; allow that with phenoseq.load_model({entry.name!r}, download=True), or on "
            "the command line with --yes"
        )
    if isinstance(source, HubCheckpoint):
        return checkpoint.obtain(entry.name, source, download=download)
    if isinstance(source, HubModel):
        folder = fetch(Reference(source.repo, source.commit))
    weights = folder / WEIGHTS
    if not weights.exists():
        raise ModelError(f"{weights}: missing; install phenoseq again")
    if sha256_of(weights) != entry.sha256:
        again = "install phenoseq again"
        if isinstance(source, HubModel):
            remove(weights)
            again = "it was removed; fetch it again"
        raise ModelError(f"{weights}: is not the file that was released; {again}")
    return folder


def _fetch_known(reference: Reference) -> Path:
    """Fetch a model of the hub; where it cannot be one of phenoseq, say if the zoo offers it."""
    entries = {e.source.repo: e.name for e in _ENTRIES if not isinstance(e.source, Embedded)}
    try:
        return fetch(reference, known=tuple(entries))
    except ModelError as error:
        if name := entries.get(reference.repo):
            raise ModelError(f"{error}. The zoo has it converted: {name!r}") from error
        raise
