"""A checkpoint of the published project, from the hub: fetched and converted once, checked after.

What is converted is kept in huggingface_hub's cache for assets, in
``HF_HOME/assets/phenoseq/OWNER--REPO/NAME`` (``HF_ASSETS_CACHE`` moves it).

No digest of these files is known beforehand. The first download is trusted, and its commit and
sha256 are written down in ``record.json`` there; later ones take that commit and must give the same
bytes. To trust anew, delete that folder.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from phenoseq.errors import ModelError
from phenoseq.models.files import CONFIG, WEIGHTS
from phenoseq.zoo.convert import convert_checkpoint, sha256_of
from phenoseq.zoo.hub import Reference, remove, snapshot


@dataclass(frozen=True)
class HubCheckpoint:
    """A checkpoint of the published project on the hub.

    Attributes
    ----------
    repo
        Repository, ``OWNER/NAME``.
    checkpoint, statistics
        Its files with the weights, and with mean and std of the image features.
    """

    repo: str
    checkpoint: str
    statistics: str


def is_here(name: str, files: HubCheckpoint) -> bool:
    """Tell whether a model can be had without the network."""
    home = home_of(name, files)
    record = _read(home)
    if "converted" in record and (home / "model").is_dir():
        return True
    cached = (
        huggingface_hub.try_to_load_from_cache(files.repo, file, revision=record.get("commit"))
        for file in (files.statistics, files.checkpoint)
    )
    return all(isinstance(path, str) for path in cached)


def obtain(name: str, files: HubCheckpoint, *, download: bool) -> Path:
    """Return the folder of a converted model, made where it is not there yet.

    Parameters
    ----------
    name, files
        What it is called in the zoo, and where it is.
    download
        Whether it may be downloaded.

    Raises
    ------
    ModelError
        Where it would have to be downloaded and may not, cannot be fetched, or is not what the
        first download gave.
    """
    home = home_of(name, files)
    record, model = _read(home), home / "model"
    if "converted" in record and model.is_dir():
        verify(name, files)
        return model
    names = (files.statistics, files.checkpoint)
    folder = snapshot(Reference(files.repo, record.get("commit")), names, local=not download)
    statistics, checkpoint = (folder / file for file in names)
    commit = folder.name  # the cache has a folder for each commit
    for path in (statistics, checkpoint):
        if not path.is_file():
            raise ModelError(f"{files.repo}: has no {path.name} at commit {commit}")
    found = {path.name: sha256_of(path) for path in (statistics, checkpoint)}
    if record and record["files"] != found:
        changed = [file for file in found if record["files"].get(file) != found[file]]
        for file in changed:
            remove(folder / file)
        raise ModelError(
            f"{files.repo}: {changed} at commit {commit} are not the files that were trusted at "
            "the first download, and were removed; someone has changed them. If you know why, "
            f"delete {home} to trust what is there now"
        )
    record = {"repo": files.repo, "commit": commit, "files": found}
    _write(home, record)
    shutil.rmtree(model, ignore_errors=True)
    convert_checkpoint(checkpoint, model, features=statistics, repo=files.repo, commit=commit)
    _write(home, {**record, "converted": _digests(model)})
    return model


def verify(name: str, files: HubCheckpoint) -> None:
    """Check that what was converted is as it was.

    Raises
    ------
    ModelError
        Where it is not.
    """
    home = home_of(name, files)
    if _read(home).get("converted") != _digests(home / "model"):
        raise ModelError(
            f"{home / 'model'}: is not what was converted there; delete that folder, and the next "
            "use makes it again"
        )


def home_of(name: str, files: HubCheckpoint) -> Path:
    """Return the folder with what was converted, and the record of it."""
    folder = Path(constants.HF_ASSETS_CACHE).expanduser() / "phenoseq"
    return folder / files.repo.replace("/", "--") / name


def _digests(folder: Path) -> dict[str, str]:
    return {
        file: sha256_of(folder / file) for file in (CONFIG, WEIGHTS) if (folder / file).exists()
    }


def _read(home: Path) -> dict[str, Any]:
    path = home / "record.json"
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        return {**record, "commit": str(record["commit"]), "files": dict(record["files"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: broken, so that nothing there can be checked; delete {home}"
        ) from error


def _write(home: Path, record: dict[str, Any]) -> None:
    home.mkdir(parents=True, exist_ok=True)
    partial = home / "record.json.partial"
    partial.write_text(json.dumps(record, indent=1))
    os.replace(partial, home / "record.json")
