"""A Hub on loopback: the files of a folder as a repository, org/tiny, at one commit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + 34 * "0"
REPO = "org/tiny"
TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"


class Hub(ThreadingHTTPServer):
    """Serves `folder`; counts what was asked for, and which tokens came along."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: list[str] = []
        self.tokens = set[str | None]()
        self.refusals = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        body = self._answer()
        if body is not None:
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> bytes | None:
        hub = self.server
        hub.asked.append(f"{self.command} {self.path}")
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refusals:
            hub.refusals -= 1
            return self._send(503, b"")
        path = self.path.partition("?")[0]
        if re.fullmatch(rf"/api/models/{REPO}(/revision/(main|{COMMIT}))?", path):
            files = sorted(p for p in hub.folder.rglob("*") if p.is_file())
            names = [{"rfilename": p.relative_to(hub.folder).as_posix()} for p in files]
            info = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": names, "tags": []}
            return self._send(200, json.dumps(info).encode())
        if re.fullmatch(rf"/api/models/{REPO}/tree/(main|{COMMIT})", path):
            entries = [
                {"type": "file", "path": p.relative_to(hub.folder).as_posix(), "size": p.stat().st_size,
                 "oid": hashlib.sha1(p.read_bytes()).hexdigest()}
                for p in sorted(hub.folder.rglob("*")) if p.is_file()
            ]  # fmt: skip
            return self._send(200, json.dumps(entries).encode())
        found = re.fullmatch(rf"/{REPO}/resolve/(?:main|{COMMIT})/(.+)", path)
        file = hub.folder / found[1] if found else None
        if file is None or not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        return self._send(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> bytes | None:
        self.send_response(code)
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A Hub with the folder's files until the block ends."""
    hub = Hub(folder)
    threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
