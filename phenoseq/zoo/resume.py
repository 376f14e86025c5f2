"""Large files of the hub, whose download goes on where a run that broke off has stopped.

huggingface_hub goes on after a lost connection within one run, and throws away what it has where
that run ends. Here the part is kept beside the blobs of its cache, under a name of our own, and
moved among them once it is whole: from then on it is a file of that cache as any other.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from phenoseq._version import __version__

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def fetch_blob(repo: str, name: str, revision: str | None) -> None:
    """Put a file among the blobs of the cache, where it is not there yet; its hash is not checked.

    Whoever asks for the same file at the same time waits. Where the hub does not say what the file
    is (no network, no such file, no access), nothing is done: huggingface_hub says what is wrong.

    Parameters
    ----------
    repo, name
        Repository, ``OWNER/NAME``, and the file in it.
    revision
        Branch, tag or commit; by default the main branch.

    Raises
    ------
    Exception
        Of huggingface_hub or its HTTP library, where the download breaks off; the part is kept.
    """
    if isinstance(try_to_load_from_cache(repo, name, revision=revision), str):
        return
    url = hf_hub_url(repo, name, revision=revision)
    headers = build_hf_headers(library_name="phenoseq", library_version=__version__)
    try:
        about = get_hf_file_metadata(url, headers=headers)
    except Exception:  # it is asked for again by the one who calls, and told there
        return
    etag = about.etag or ""  # becomes a file's name
    if about.size is None or not _HASH.fullmatch(etag):
        return
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    blobs = folder / "blobs"
    blob, partial = blobs / etag, blobs / f"{etag}.phenoseq.incomplete"
    if blob.exists():
        return
    blobs.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until this process ends, however
        if blob.exists():
            return
        size = file.seek(0, os.SEEK_END)
        if size > about.size:
            size = file.truncate(0)
        http_get(
            url,
            file,
            resume_size=size,
            headers=headers,
            expected_size=about.size,
            displayed_filename=name,
        )
        file.flush()
        os.replace(partial, blob)
