"""A small server that answers as the Hugging Face hub does for the files of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


class Hub(ThreadingHTTPServer):
    """Serves the files of one folder as the repository ``repo`` at ``commit``."""

    daemon_threads = True

    def __init__(self, folder: Path, repo: str, commit: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.repo, self.commit = folder, repo, commit
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub = self.server
        path = self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        for revision in ("main", hub.commit):
            if path == f"/api/models/{hub.repo}/revision/{revision}":
                siblings = [{"rfilename": p.name} for p in hub.folder.iterdir()]
                facts = {"id": hub.repo, "sha": hub.commit, "siblings": siblings}
                self._send(200, json.dumps(facts).encode(), {}, body)
                return
            start = f"/{hub.repo}/resolve/{revision}/"
            if path.startswith(start) and (hub.folder / path[len(start) :]).is_file():
                data = (hub.folder / path[len(start) :]).read_bytes()
                etag = hashlib.sha256(data).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit}
                self._send(200, data, headers, body)
                return
        self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(folder: Path, repo: str, commit: str) -> Iterator[Hub]:
    """Serve a folder as long as the context lasts."""
    hub = Hub(folder, repo, commit)
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
