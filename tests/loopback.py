"""A server on loopback that breaks off, lies, drips and redirects, and archives to serve."""

from __future__ import annotations

import contextlib
import gzip
import io
import tarfile
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image

from diffitm.datasets.client import Limits

CONTENT = np.random.default_rng(0).bytes(100_000)
QUICK = Limits(connect=2, read=2, retries=2, backoff=0.01, longest_wait=1)
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>no</body></html>"


def picture(color: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(stream, "JPEG")
    return stream.getvalue()


class Handler(BaseHTTPRequestHandler):
    """A route is the method named after the path's first part; `visits` counts per path."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        name = self.path.strip("/").replace("?", "/").split("/")[0].split(".")[0]
        with self.server.lock:
            self.server.visits[self.path] += 1
            self.server.headers.append(dict(self.headers))
        self.visit = self.server.visits[self.path]
        self.close_connection = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, f"on_{name.replace('-', '_')}", self.on_404)()

    def log_message(self, *_: Any) -> None:
        pass

    def answer(
        self, content: bytes, code: int = 200, sent: int | None = None, **headers: object
    ) -> None:
        self.send_response(code)
        named = {key.replace("_", "-"): str(value) for key, value in headers.items()}
        always = {"Content-Length": str(len(content)), "Connection": "close"}
        for key, value in (always | named).items():
            if value != "None":
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content[:sent])

    def partial(self, content: bytes, tag: str, obey_if_range: bool = True) -> None:
        """What was asked for by Range, as a server that knows it does."""
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if not begin or (obey_if_range and self.headers.get("If-Range", tag) != tag):
            return self.answer(content, ETag=tag)
        if begin >= len(content):
            return self.answer(b"", 416)
        place = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        return self.answer(content[begin:], 206, ETag=tag, Content_Range=place)

    def on_good(self) -> None:
        self.partial(CONTENT, '"one"')

    def on_breaks(self) -> None:
        if self.visit == 1:
            self.answer(CONTENT, sent=40_000, ETag='"one"')
        else:
            self.partial(CONTENT, '"one"')

    def on_breaks_always(self) -> None:
        self.answer(CONTENT, sent=40_000, ETag='"one"')

    def on_ignores_range(self) -> None:
        self.answer(CONTENT, sent=40_000 if self.visit == 1 else None, ETag='"one"')

    def on_changed(self) -> None:
        if self.visit == 1:
            self.answer(CONTENT[::-1], sent=40_000, ETag='"old"')
        else:
            self.partial(CONTENT, '"new"')

    def on_changed_unnoticed(self) -> None:
        """Sends a range of the new version, though asked for the old one."""
        if self.visit == 1:
            self.answer(CONTENT[::-1], sent=40_000, ETag='"old"')
        else:
            self.partial(CONTENT, '"new"', obey_if_range=False)

    def on_404(self) -> None:
        self.answer(b"gone", 404)

    def on_410(self) -> None:
        self.answer(b"gone", 410)

    def on_403(self) -> None:
        self.answer(b"no", 403)

    def on_flaky(self) -> None:
        self.answer(b"later" if self.visit == 1 else picture(), 500 if self.visit == 1 else 200)

    def on_busy(self) -> None:
        if self.visit == 1:
            self.answer(b"later", 429, Retry_After=3600)
        else:
            self.answer(picture())

    def on_500(self) -> None:
        self.answer(b"never", 500)

    def on_page(self) -> None:
        self.answer(PAGE, Content_Type="text/html")

    def on_archive_page(self) -> None:
        self.answer(PAGE, Content_Type="application/zip")

    def on_picture(self) -> None:
        self.answer(picture(), Content_Type="image/jpeg")

    def on_cut(self) -> None:
        self.answer(picture()[:-300], Content_Length=len(picture()) - 300)

    def on_short(self) -> None:
        self.answer(picture() + b"0" * 500, sent=-400)

    def on_drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def on_drip_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for i in range(100):
            self.wfile.write(b"X-%d: y\r\n" % i)
            self.wfile.flush()
            time.sleep(0.05)

    def on_loop(self) -> None:
        self.answer(b"", 302, Location="/loop")

    def on_to(self) -> None:
        """/to?<address> redirects there."""
        self.answer(b"", 302, Location=unquote(self.path.partition("?")[2]))

    def on_bomb(self) -> None:
        self.answer(gzip.compress(bytes(10_000_000)), Content_Encoding="gzip")

    def on_huge(self) -> None:
        self.answer(b"", Content_Length=60 * 2**20)

    def on_endless(self) -> None:
        self.answer(b"y" * 5000, Content_Length=None)

    def on_drive(self) -> None:
        hidden = '<input type="hidden" name="id" value="7"><input type="hidden" name="uuid" value="u&amp;1">'
        form = f'<form id="download-form" action="/good">{hidden}</form>'
        page = f"<html><title>Virus scan warning</title>{form}</html>"
        self.answer(page.encode(), Content_Type="text/html; charset=utf-8")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.visits, self.headers = threading.Lock(), Counter[str](), list[dict]()
        self.url = f"http://127.0.0.1:{self.server_port}"


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def tarred(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for info, content in members:
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path
