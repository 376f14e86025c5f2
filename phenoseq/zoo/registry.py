"""Models that can be had by name. An entry is data; a test checks it against the files."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from phenoseq.errors import ModelError
from phenoseq.models.files import WEIGHTS
from phenoseq.models.load import Model, load_folder
from phenoseq.zoo.hub import HubFiles, is_here, obtain


@dataclass(frozen=True)
class ModelEntry:
    """A model of the zoo, embedded in the package.

    Attributes
    ----------
    name
        What to call it.
    summary
        What it predicts, from what, in a line.
    data
        Training data, with its licence.
    sha256
        Of its ``model.safetensors``.
    """

    name: str
    summary: str
    data: str
    sha256: str

    @property
    def folder(self) -> Path:
        """Folder of its ``config.json`` and ``model.safetensors``."""
        return Path(str(files("phenoseq.zoo"))) / "weights" / self.name


@dataclass(frozen=True)
class HubEntry:
    """A model of the zoo whose weights are fetched from the Hugging Face hub when first used.

    Attributes
    ----------
    name, summary, data
        As for :class:`ModelEntry`.
    files
        Where its weights are.
    """

    name: str
    summary: str
    data: str
    files: HubFiles


_ENTRIES: tuple[ModelEntry | HubEntry, ...] = (
    ModelEntry(
        name="xenium-pancreas",
        summary="377 genes from DNA, Boundary, 18S and InteriorProtein, 27 um crops",
        data="10x Genomics, Xenium V1 Human Pancreas FFPE (CC BY 4.0)",
        sha256="dde258d73f82985826bccccb5e0276fed66000b7eaf6e13a37c6562fa93593fa",
    ),
    ModelEntry(
        name="simulated-plate",
        summary="60 invented genes from simulated Cell Painting, for demos and tests",
        data="phenoseq.data.simulate (no real cells)",
        sha256="72e6c59bff15d9fbc74b7b95c3166559f71ca4bec7db406856049fb9ae59b879",
    ),
    HubEntry(
        name="scgenescope-scgpt",
        summary="scGPT embeddings of a sample from ViT-L features of Cell Painting (DNA, RNA, ...)",
        data="scGeneScope (CC BY-NC 4.0); weights Apache-2.0, 2.7 GB fetched at the first use",
        files=HubFiles(
            repo="Sentinal4D/PhenoSeq",
            checkpoint="best_model.pt",
            statistics="img_norm.npz",
            download="2.7 GB",
            kept="0.7 GB",
        ),
    ),
)


def list_models() -> tuple[ModelEntry | HubEntry, ...]:
    """Return the models that can be loaded by name."""
    return _ENTRIES


def find(name: str) -> ModelEntry | HubEntry:
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
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    raise ModelError(
        f"no model {name!r}: neither a folder nor one of the zoo, which has {known}{guess}"
    )


def to_download(model: str | Path) -> HubEntry | None:
    """Return the model's entry where loading it needs a download, else None.

    Raises
    ------
    ModelError
        Where there is no such model.
    """
    entry = None if Path(model).is_dir() else find(str(model))
    return entry if isinstance(entry, HubEntry) and not is_here(entry.name, entry.files) else None


def load_model(model: str | Path, *, download: bool = False) -> Model:
    """Load a model by its name in the zoo or from its folder, in evaluation mode, on the CPU.

    Parameters
    ----------
    model
        A name that :func:`list_models` lists, or a folder with ``config.json`` and
        ``model.safetensors``.
    download
        Allow the download of a model that is not in the package and not on this machine yet.

    Raises
    ------
    ModelError
        Where there is no such model, its files are broken, or it would have to be downloaded.
    """
    if Path(model).is_dir():
        return load_folder(model)
    entry = find(str(model))
    if isinstance(entry, HubEntry):
        return load_folder(obtain(entry.name, entry.files, download=download))
    weights = entry.folder / WEIGHTS
    if not weights.exists():
        raise ModelError(f"{weights}: missing; install phenoseq again")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != entry.sha256:
        raise ModelError(f"{weights}: is not the file that was released; install phenoseq again")
    return load_folder(entry.folder)
