"""A small server that answers as the Hugging Face hub does, for models alone.

It speaks what huggingface_hub's client asks for when it fetches a repository and commits to one. It
can also be as bad as a network is: break off, send other bytes, or be slow.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

TOKEN = "hf_of_the_owner"
#: What the hub keeps outside git, under its sha256.
LARGE = (".safetensors", ".pt", ".npz", ".bin")


@dataclass
class Repo:
    """A repository: a folder of files for each commit, and the commit of each branch and tag."""

    commits: dict[str, Path]
    heads: dict[str, str]
    private: bool = False
    gated: bool = False

    def commit_of(self, revision: str) -> str | None:
        return self.heads.get(revision, revision if revision in self.commits else None)

    def add(self, folder: Path, commit: str) -> None:
        """Add a commit to the main branch."""
        self.commits[commit] = folder
        self.heads["main"] = commit


@dataclass
class Trouble:
    """What goes wrong with the weights that are sent."""

    breaks: int = 0  # so many answers break off halfway
    spoilt: bool = False  # other bytes than the ETag says
    pause: float = 0.0  # seconds before every tenth of them
    names: list[str] = field(default_factory=list)  # more files that the tree lists


class Hub:
    """Serves some repositories; what is pushed lands in folders beneath ``root``."""

    def __init__(self, root: Path, repos: dict[str, Repo]) -> None:
        self.root, self.repos, self.trouble = root, repos, Trouble()
        self.asked: list[str] = []
        self.ranges: list[str] = []
        self.port = 0
        self.start()

    def start(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), _Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.port = self.server.server_address[1]
        how = {"poll_interval": 0.02}
        self.thread = Thread(target=self.server.serve_forever, kwargs=how, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse connections as long as the context lasts."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def gets(self) -> list[str]:
        """Files that were sent, in order."""
        return [line for line in self.asked if line.startswith("GET") and "/resolve/" in line]


def blob_id(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def etag(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else blob_id(data)


class _Handler(BaseHTTPRequestHandler):
    """Speaks HTTP/1.0: a connection ends with its answer, so that none outlives the server."""

    def do_HEAD(self) -> None:
        self._read()

    def do_GET(self) -> None:
        self._read()

    def do_POST(self) -> None:
        hub, path = self.server.hub, self._path()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            good = content.startswith("---\n") and "license:" in content
            self._json({"errors": [] if good else [{"message": "bad card"}], "warnings": []})
        elif not self._owner():
            self._error(401, message="Invalid credentials in Authorization header")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in hub.repos else 200
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            hub.repos.setdefault(name, Repo({}, {}, private=private))
            self._json({"url": f"{hub.url}/{name}", "name": name}, status)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._commit(match[1], match[2], body)
        else:
            self._error(404)

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        """Make a commit of the lines of NDJSON."""
        hub, repo = self.server.hub, self.server.hub.repos[name]
        commit = hashlib.sha1(body).hexdigest()
        folder = hub.root / "commits" / commit
        folder.mkdir(parents=True)
        if before := repo.heads.get(branch):
            for path in repo.commits[before].iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
        repo.commits[commit] = folder
        repo.heads[branch] = commit
        url = f"{hub.url}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url})

    def _read(self) -> None:
        hub, path = self.server.hub, self._path()
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(?:/(\w+)/([^/]+))?(?:/(.+))?", path)
        repo = hub.repos.get(match[1]) if match else None
        if match is None or repo is None or (repo.private and not self._owner()):
            self._error(401 if not self._owner() else 404, "RepoNotFound")
            return
        name, what, revision, file = match.groups()
        if repo.gated and not (path.startswith("/api/") and what != "tree"):
            self._error(403, "GatedRepo")
            return
        commit = repo.commit_of(unquote(revision or "main"))
        if commit is None and (revision or repo.commits):
            self._error(404, "RevisionNotFound")
        elif path.startswith("/api/") and what != "tree":
            self._json({"id": name, "sha": commit, "private": repo.private, "siblings": []})
        elif what == "tree":
            self._json(self._tree(repo.commits[commit]))
        elif what == "resolve" and (repo.commits[commit] / file).is_file():
            self._file(repo.commits[commit] / file, commit)
        else:
            self._error(404, "EntryNotFound", commit=commit)

    def _tree(self, folder: Path) -> list[dict]:
        entries = []
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            entry = {"type": "file", "path": path.name, "size": len(data), "oid": blob_id(data)}
            if path.name.endswith(LARGE):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        for name in self.server.hub.trouble.names:
            entries.append({"type": "file", "path": name, "size": 3, "oid": "0" * 40})
        return entries

    def _file(self, path: Path, commit: str) -> None:
        trouble, data = self.server.hub.trouble, path.read_bytes()
        total, tag, status, start = len(data), etag(path.name, data), 200, 0
        weights = path.name.endswith(LARGE) and self.command == "GET"
        if weights and trouble.spoilt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit}
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            self.server.hub.ranges.append(wanted[0])
            start, status = int(wanted[1]), 206
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        part = data[start:]
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(part))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if weights and trouble.breaks:
            trouble.breaks -= 1
            self.wfile.write(part[: len(part) // 2])
            return
        step = max(len(part) // 10, 1) if weights and trouble.pause else max(len(part), 1)
        for at in range(0, len(part), step):
            time.sleep(trouble.pause if weights else 0)
            self.wfile.write(part[at : at + step])

    def _path(self) -> str:
        path = self.path.partition("?")[0]
        self.server.hub.asked.append(f"{self.command} {path}")
        return path

    def _owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(
        self, status: int, code: str = "", *, message: str = "", commit: str | None = None
    ) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self._send(status, b"", {name: value for name, value in headers.items() if value})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(root: Path, repos: dict[str, Repo]) -> Iterator[Hub]:
    """Serve some repositories as long as the context lasts."""
    hub = Hub(root, repos)
    try:
        yield hub
    finally:
        hub.stop()
