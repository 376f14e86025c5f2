"""Models that can be had by name. An entry is data; a test checks it against the files."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from phenoseq.errors import ModelError
from phenoseq.models.files import WEIGHTS
from phenoseq.models.phenoseq import PhenoSeq


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


_ENTRIES = (
    ModelEntry(
        name="xenium-pancreas",
        summary="377 genes from DNA, Boundary, 18S and InteriorProtein, 27 um crops",
        data="10x Genomics, Xenium V1 Human Pancreas FFPE (CC BY 4.0)",
        sha256="",
    ),
    ModelEntry(
        name="simulated-plate",
        summary="60 invented genes from simulated Cell Painting, for demos and tests",
        data="phenoseq.data.simulate (no real cells)",
        sha256="",
    ),
)


def list_models() -> tuple[ModelEntry, ...]:
    """Return the models that can be loaded by name."""
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
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    raise ModelError(
        f"no model {name!r}: neither a folder nor one of the zoo, which has {known}{guess}"
    )


def load_model(model: str | Path) -> PhenoSeq:
    """Load a model by its name in the zoo or from its folder, in evaluation mode, on the CPU.

    Parameters
    ----------
    model
        A name that :func:`list_models` lists, or a folder with ``config.json`` and
        ``model.safetensors``.

    Raises
    ------
    ModelError
        Where there is no such model, or its files are broken.
    """
    if Path(model).is_dir():
        return PhenoSeq.load(model)
    entry = find(str(model))
    weights = entry.folder / WEIGHTS
    if not weights.exists():
        raise ModelError(f"{weights}: missing; install phenoseq again")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != entry.sha256:
        raise ModelError(f"{weights}: is not the file that was released; install phenoseq again")
    return PhenoSeq.load(entry.folder)
