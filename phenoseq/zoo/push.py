"""Publishes a model on the Hugging Face hub: configuration, weights, card, scores and settings."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml

from phenoseq._version import __version__
from phenoseq.errors import ModelError
from phenoseq.models.files import CONFIG, WEIGHTS, digest_of_model
from phenoseq.models.load import Model, load_folder
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.models.sample import SamplePhenoSeq
from phenoseq.zoo.cards import CARD, METRICS, card_beside, complete, make_card, read_metrics
from phenoseq.zoo.hub import TRAINING, explain, parse_reference


class Publishable:
    """What :func:`phenoseq.load_model` adds to a model: where it is from, and how to publish it.

    ``phenoseq.models`` knows of no hub, so that this stands here.
    """

    #: The folder that it was loaded from.
    folder: Path | None = None

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Publish this model; see :func:`phenoseq.push_to_hub`."""
        assert isinstance(self, PhenoSeq | SamplePhenoSeq | PublishedPhenoSeq)
        return push_to_hub(self, repo, **options)


class HubPhenoSeq(Publishable, PhenoSeq):
    """:class:`phenoseq.PhenoSeq` as it is loaded."""


class HubPublishedPhenoSeq(Publishable, PublishedPhenoSeq):
    """:class:`~phenoseq.models.published.PublishedPhenoSeq` as it is loaded."""


class HubSamplePhenoSeq(Publishable, SamplePhenoSeq):
    """:class:`~phenoseq.models.sample.SamplePhenoSeq` as it is loaded."""


LoadedModel = HubPhenoSeq | HubSamplePhenoSeq | HubPublishedPhenoSeq
NETWORKS: Mapping[str, type[Model]] = {
    "phenoseq": HubPhenoSeq,
    "sample": HubSamplePhenoSeq,
    "published": HubPublishedPhenoSeq,
}


def push_to_hub(
    model: Model | str | Path,
    repo: str,
    *,
    private: bool = False,
    licence: str | None = None,
    datasets: Sequence[str] = (),
    training: str | Path | None = None,
    message: str = "Model of phenoseq",
) -> str:
    """Publish a model on the Hugging Face hub, where ``phenoseq.load_model(repo)`` finds it.

    Uploaded are ``config.json``, ``model.safetensors``, the card ``README.md``; and where they are
    beside the weights of this very model, its ``metrics.json`` (by ``phenoseq evaluate``), whose
    figures stand in the card too, and the settings of its training. Paths in these are cut to
    their last part.

    Parameters
    ----------
    model
        A model, or the folder of one.
    repo
        ``"OWNER/NAME"``; made where it is not there yet.
    private
        Whether only its owner sees it; else it is made as is usual for the owner.
    licence
        Identifier that the hub knows, such as ``"cc-by-4.0"``; that of the folder's own card by
        default, else ``"unknown"``.
    datasets
        Identifiers of the training data, for the card.
    training
        YAML of its training; by default ``training.yaml`` in the folder, or the ``config.yaml``
        that ``phenoseq train`` leaves beside it.
    message
        Of the commit.

    Returns
    -------
    Address of the commit.

    Raises
    ------
    ModelError
        Where the hub cannot be reached, or does not let you.
    """
    if (reference := parse_reference(repo)) is None or reference.revision:
        raise ModelError(f"{repo!r}: give the repository as OWNER/NAME")
    if isinstance(model, str | Path):
        folder: Path | None = Path(model)
        loaded = load_folder(model)
    else:
        loaded, folder = model, _own_folder(model)
    with tempfile.TemporaryDirectory(prefix="phenoseq-push-") as some:
        files = loaded.save(Path(some) / "model")
        metrics = read_metrics(folder) if folder else {}
        if folder and metrics:
            shutil.copy(folder / METRICS, files / METRICS)
        if settings := _settings(folder, training):
            (files / TRAINING).write_text(settings, encoding="utf-8")
        name = repo.partition("/")[2]
        card = card_beside(folder) if folder else None
        card = card or make_card(name, repo, loaded.config, metrics)
        facts = {"license": licence, "datasets": list(datasets) or None}
        card = complete(card, name, metrics, facts, loaded.config)
        (files / CARD).write_text(card, encoding="utf-8")
        return _upload(files, repo, private, message)


def _upload(files: Path, repo: str, private: bool, message: str) -> str:
    api = huggingface_hub.HfApi(library_name="phenoseq", library_version=__version__)
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        public = private and api.model_info(repo).private is False
        if not public:
            done = api.upload_folder(repo_id=repo, folder_path=files, commit_message=message)
            return str(done.commit_url)
    except Exception as error:  # those of whichever HTTP library the client uses
        raise explain(error, repo) from error
    raise ModelError(
        f"{repo}: is there already, for everyone to see; make it private in its settings first, or "
        "choose another name. Nothing was uploaded"
    )


def _own_folder(model: Model) -> Path | None:
    """Return the folder that a model was loaded from, if it has not changed since."""
    folder = getattr(model, "folder", None)
    if folder is None or not all((folder / name).is_file() for name in (CONFIG, WEIGHTS)):
        return None
    same = digest_of_model(load_folder(folder)) == digest_of_model(model)
    return Path(folder) if same else None


def _settings(folder: Path | None, training: str | Path | None) -> str:
    """Return the settings of the training as YAML, without the paths of this machine."""
    found = [Path(training)] if training is not None else []
    if folder and training is None:
        found = [folder / TRAINING, folder.parent / "config.yaml"]
    for path in found:
        if path.is_file():
            try:
                settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ModelError(f"{path}: not YAML ({error})") from error
            return str(yaml.safe_dump(_without_paths(settings), sort_keys=False))
    if training is not None:
        raise ModelError(f"{training}: no such file")
    return ""


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value
