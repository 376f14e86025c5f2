"""The Hugging Face hub: models by ``OWNER/NAME`` and ``OWNER/NAME@REVISION``, fetched and checked.

Only huggingface_hub talks to the network and keeps the cache, so its settings (``HF_TOKEN``,
``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, proxies) mean here what they mean there.

That library does not compare what it gets with what the hub says it is. Here every file is, each
time it is used: the cache keeps a file under its ETag, which is the sha256 of a large file and the
git hash of a small one.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils.tqdm import tqdm

from phenoseq._version import __version__
from phenoseq.disk import is_full
from phenoseq.errors import ModelError
from phenoseq.models.files import CONFIG, WEIGHTS, about_pickles, config_text
from phenoseq.models.load import read_any_config
from phenoseq.zoo.cards import CARD, METRICS
from phenoseq.zoo.resume import fetch_blob

TRAINING = "training.yaml"
#: What is read of a repository besides the weights; nothing else in it is ever fetched.
SMALL = (CONFIG, CARD, METRICS, TRAINING)

_REFERENCE = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_HASHES = {40: "git", 64: "sha256"}


@dataclass(frozen=True)
class Reference:
    """A repository of the hub, at a branch, tag or commit; by default its main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_reference(text: str) -> Reference | None:
    """Read ``OWNER/NAME`` or ``OWNER/NAME@REVISION``; None where it is neither."""
    match = _REFERENCE.fullmatch(text)
    if match is None or ".." in text or "--" in text:
        return None
    return Reference(match["repo"], match["revision"])


def fetch(reference: Reference, *, weights: bool = True, known: Sequence[str] = ()) -> Path:
    """Return the folder in the cache with the files of a model, fetched where they are not there.

    Its configuration is read before its weights are fetched. A branch is looked up each time, and
    where the hub cannot be reached, is what it was at the last time; a commit that is in the cache
    needs no network.

    Parameters
    ----------
    reference
        Which.
    weights
        Fetch the weights too, and not only configuration, card, scores and settings.
    known
        Repositories, of which the nearest is named where there is none of that name.

    Raises
    ------
    ModelError
        Where it cannot be had, is no model of phenoseq, or is not what the hub says it is.
    """
    folder = snapshot(reference, SMALL, known=known)
    if (folder / CONFIG).is_file():
        read_any_config(*config_text(folder))
        if not weights:
            return folder
        folder = snapshot(Reference(reference.repo, folder.name), (WEIGHTS,))  # the same commit
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            hint = _about_pickles(Reference(reference.repo, folder.name))
            raise ModelError(f"{reference}: no {name} there, so it is no phenoseq model{hint}")
    return folder


def snapshot(
    reference: Reference, names: Sequence[str], *, local: bool = False, known: Sequence[str] = ()
) -> Path:
    """Return the folder in the cache with those of some files that a repository has, each checked.

    It is named by the commit. ``local`` keeps away from the network; else as :func:`fetch`.
    """
    try:
        for name in () if local else names:
            if name not in SMALL:
                fetch_blob(reference.repo, name, reference.revision)
        folder = huggingface_hub.snapshot_download(
            reference.repo,
            revision=reference.revision,
            allow_patterns=list(names),
            local_files_only=local,
            tqdm_class=_Bar,
            library_name="phenoseq",
            library_version=__version__,
        )
    except Exception as error:  # those of whichever HTTP library the client uses
        cached = [repo.repo_id for repo in _cached_repos()]
        raise explain(error, str(reference), known=[*known, *cached]) from error
    for name in names:
        path = Path(folder) / name
        if path.is_file() and (problem := digest_problem(path)):
            remove(path)
            raise ModelError(
                f"{path}: is not the file that the hub has ({problem}), and was removed: it was "
                "changed on the way or on this disk; fetch it again"
            )
    return Path(folder)


def remove(path: Path) -> None:
    """Remove a file of the cache, so that it is fetched again."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def digest_problem(path: Path) -> str | None:
    """Compare a file of the cache with its ETag, by whose name it is kept.

    Returns
    -------
    What is wrong; None where nothing is, or where the cache is on a disk without links, which keeps
    no ETag.
    """
    blob = path.resolve()
    kind = _HASHES.get(len(blob.name))
    if blob == path.absolute() or blob.parent.name != "blobs" or kind is None:
        return None
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git":
        digest.update(f"blob {blob.stat().st_size}\0".encode())
    with blob.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() == blob.name:
        return None
    return f"{kind} hash {digest.hexdigest()[:12]}..., the hub said {blob.name[:12]}..."


def cached_models() -> Iterator[tuple[Reference, Path]]:
    """Go through the models of phenoseq in the cache: what they are, and their folder."""
    for repo in _cached_repos():
        for revision in sorted(repo.revisions, key=lambda r: r.commit_hash):
            folder = revision.snapshot_path
            if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
                continue
            try:
                read_any_config(*config_text(folder))
            except ModelError:
                continue  # of another library
            yield Reference(repo.repo_id, revision.commit_hash), folder


def explain(error: Exception, what: str, *, known: Sequence[str] = ()) -> ModelError:
    """Turn an error of huggingface_hub, or of what it stands on, into one that says what to do.

    Parameters
    ----------
    error
        What it raised.
    what
        Was asked for: ``OWNER/NAME``, perhaps with a revision.
    known
        Repositories, of which the nearest is named where there is none of that name.
    """
    endpoint = constants.ENDPOINT
    first = str(error).strip().partition("\n")[0][:300]
    if is_full(error):
        say = f"the disk is full; free some space, or set HF_HOME (now {constants.HF_HOME})"
    elif isinstance(error, errors.GatedRepoError):
        say = (
            f"is gated: open {endpoint}/{what.partition('@')[0]}, ask for access, and say who you "
            "are with 'hf auth login' or the variable HF_TOKEN"
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        others = [name for name in known if name != what.partition("@")[0]]
        near = difflib.get_close_matches(what.partition("@")[0], others, n=1, cutoff=0.6)
        say = (
            f"{endpoint} has no such repository, or it is private, and no folder here is named so"
            + (f"; did you mean {near[0]!r}? " if near else ". Look at the name; ")
            + "For a private one say who you are with 'hf auth login' or the variable HF_TOKEN"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        repo, _, revision = what.partition("@")
        say = (
            f"{repo} has no revision {revision or 'main'!r}, or not any longer; leave it out for "
            f"the newest, or choose one from {endpoint}/{repo}/commits/main"
        )
    elif isinstance(error, errors.EntryNotFoundError) and not isinstance(
        error, errors.LocalEntryNotFoundError
    ):
        say = f"lacks a file that was asked for ({first})"
    elif isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        say = (
            f"{endpoint} refuses ({first}). Is the token right, and allowed to do this? Say who "
            "you are with 'hf auth login' or the variable HF_TOKEN"
        )
    elif isinstance(error, errors.HFValidationError):
        say = f"is no name of a repository ({first})"
    elif _caused_by(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        say = (
            "is not in the cache, and HF_HUB_OFFLINE says not to use the network; unset it, or "
            "fetch the model elsewhere with 'phenoseq models download' and copy its cache "
            f"to {constants.HF_HOME}"
        )
    elif "Consistency check failed" in str(error):
        say = f"the connection broke ({first}); try again, and it goes on from there"
    else:
        say = (
            f"cannot be had from {endpoint} ({type(error).__name__}: {first}). Check the network "
            "and its proxy; or fetch the model on another machine with 'phenoseq models download' "
            f"and copy its cache to {constants.HF_HOME}"
        )
    return ModelError(f"{what}: {say}")


class _Bar(tqdm):
    """The client's progress bar, on a terminal only."""

    def __init__(self, *args: Any, **how: Any) -> None:
        how["disable"] = how.get("disable") or not sys.stderr.isatty()
        super().__init__(*args, **how)  # type: ignore[no-untyped-call]


def _about_pickles(reference: Reference) -> str:
    """Say what to do where there are pickles instead."""
    try:
        api = huggingface_hub.HfApi(library_name="phenoseq", library_version=__version__)
        names = api.list_repo_files(reference.repo, revision=reference.revision)
    except Exception:  # then there is nothing to add
        return ""
    return about_pickles(names)


def _cached_repos() -> list[huggingface_hub.CachedRepoInfo]:
    if not Path(constants.HF_HUB_CACHE).is_dir():
        return []
    found = huggingface_hub.scan_cache_dir().repos
    return sorted((r for r in found if r.repo_type == "model"), key=lambda r: r.repo_id)


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False
