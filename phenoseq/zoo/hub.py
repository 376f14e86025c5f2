"""Weights from the Hugging Face hub: fetched and converted once, checked ever after.

Only huggingface_hub talks to the network, so its environment variables (``HF_HOME``,
``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ...) mean here what they mean there. What is converted is kept
in that library's cache for assets, in
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

from phenoseq._version import __version__
from phenoseq.errors import ModelError
from phenoseq.models.files import CONFIG, WEIGHTS
from phenoseq.zoo.convert import convert_checkpoint, sha256_of


@dataclass(frozen=True)
class HubFiles:
    """A checkpoint of the published project on the hub.

    Attributes
    ----------
    repo
        Repository, ``OWNER/NAME``.
    checkpoint, statistics
        Its files with the weights, and with mean and std of the image features.
    download, kept
        How much is fetched, and how much is kept after the conversion, for a person to read.
    """

    repo: str
    checkpoint: str
    statistics: str
    download: str
    kept: str


def is_here(name: str, files: HubFiles) -> bool:
    """Tell whether a model can be had without the network."""
    home = _home(name, files)
    record = _read(home)
    if "converted" in record and (home / "model").is_dir():
        return True
    cached = (
        huggingface_hub.try_to_load_from_cache(files.repo, file, revision=record.get("commit"))
        for file in (files.statistics, files.checkpoint)
    )
    return all(isinstance(path, str) for path in cached)


def obtain(name: str, files: HubFiles, *, download: bool) -> Path:
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
    home = _home(name, files)
    record, model = _read(home), home / "model"
    if "converted" in record and model.is_dir():
        if record["converted"] != _digests(model):
            raise ModelError(
                f"{model}: is not what was converted there; delete that folder, and the next use "
                "makes it again"
            )
        return model
    if not download and not is_here(name, files):
        raise ModelError(
            f"{name}: is not on this machine yet, and takes {files.download} to download; allow "
            f"that with phenoseq.load_model({name!r}, download=True), or on the command line with "
            "--yes"
        )
    statistics = _fetch(files.repo, files.statistics, record.get("commit"), download)
    commit = statistics.parent.name  # the cache has a folder for each commit
    checkpoint = _fetch(files.repo, files.checkpoint, commit, download)
    found = {path.name: sha256_of(path) for path in (statistics, checkpoint)}
    if record and record["files"] != found:
        changed = [file for file in found if record["files"].get(file) != found[file]]
        raise ModelError(
            f"{files.repo}: {changed} at commit {commit} are not the files that were trusted at "
            f"the first download; someone has changed them. If you know why, delete {home} to "
            "trust what is there now"
        )
    record = {"repo": files.repo, "commit": commit, "files": found}
    _write(home, record)
    shutil.rmtree(model, ignore_errors=True)
    convert_checkpoint(checkpoint, model, features=statistics, repo=files.repo, commit=commit)
    _write(home, {**record, "converted": _digests(model)})
    return model


def _home(name: str, files: HubFiles) -> Path:
    return huggingface_hub.cached_assets_path("phenoseq", files.repo, name)


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
    partial = home / "record.json.partial"
    partial.write_text(json.dumps(record, indent=1))
    os.replace(partial, home / "record.json")


def _fetch(repo: str, file: str, revision: str | None, download: bool) -> Path:
    try:
        path = huggingface_hub.hf_hub_download(
            repo,
            file,
            revision=revision,
            local_files_only=not download,
            library_name="phenoseq",
            library_version=__version__,
        )
    except Exception as error:  # those of whichever HTTP library the client uses
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{repo}: cannot fetch {file} from {constants.ENDPOINT} ({type(error).__name__}: "
            f"{first}). Check the network; or fetch it on another machine and copy its cache, "
            f"{constants.HF_HOME}"
        ) from error
    return Path(path)
