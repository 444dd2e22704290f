"""prepare.py against a real server on loopback that breaks off, lies, drips and redirects."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import socket
import stat
import subprocess
import tarfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from pyarrow import parquet

from diffitm.distributed import prepare
from diffitm.distributed.prepare import Config, fetch_image, fetch_shard, shards
from diffitm.errors import InputError
from diffitm.prepare import http, sources
from diffitm.prepare.http import (
    BrokenError,
    Client,
    Limits,
    RefusedError,
    check_address,
    fetch_bytes,
    save,
)
from diffitm.prepare.sources import Download, Hub, ImageList, Named, Need, Rule, Source
from diffitm.prepare.unpack import UnsafeError, place, unpack, unpacked

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


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def client() -> Client:
    return Client(allow_private=True)


# Downloads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "requests"),
    [
        ("good", 1),
        ("breaks", 2),
        ("ignores-range", 2),
        ("changed", 2),
        ("changed-unnoticed", 3),
    ],
)
def test_whole_file_comes(
    server: Server, client: Client, tmp_path: Path, route: str, requests: int
) -> None:
    """Broken off, resumed, restarted or changed meanwhile: the content is right in the end."""
    note = save(client, f"{server.url}/{route}.bin", tmp_path / "file.bin", limits=QUICK)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert note["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert server.visits[f"/{route}.bin"] == requests
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_resume_asks_only_for_the_rest(server: Server, client: Client, tmp_path: Path) -> None:
    save(client, f"{server.url}/breaks.bin", tmp_path / "f", limits=QUICK)
    begin = int(server.headers[1]["Range"].removeprefix("bytes=").rstrip("-"))
    assert 0 < begin <= 40_000
    assert server.headers[1]["If-Range"] == '"one"'


def test_resume_in_the_next_run(
    server: Server, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that gave up leaves a part file; the next one goes on from it."""
    monkeypatch.setattr(http, "ATTEMPTS", 1)
    with pytest.raises(BrokenError, match="broke off"):
        save(client, f"{server.url}/breaks.bin", tmp_path / "f", limits=QUICK)
    assert not (tmp_path / "f").exists()
    assert (tmp_path / "f.part").stat().st_size == 40_000
    save(client, f"{server.url}/breaks.bin", tmp_path / "f", limits=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.headers[-1]["Range"] == "bytes=40000-"


def test_part_of_another_address_is_not_continued(
    server: Server, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "f.part").write_bytes(b"other")
    notes = {"url": "http://other", "validator": '"one"', "total": "100000"}
    (tmp_path / "f.part.json").write_text(json.dumps(notes))
    save(client, f"{server.url}/good.bin", tmp_path / "f", limits=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert "Range" not in server.headers[0]


def test_a_part_with_every_byte_is_checked_and_kept(
    server: Server, client: Client, tmp_path: Path
) -> None:
    url = f"{server.url}/good.bin"
    (tmp_path / "f.part").write_bytes(CONTENT)
    notes = {"url": url, "validator": '"one"', "total": str(len(CONTENT))}
    (tmp_path / "f.part.json").write_text(json.dumps(notes))
    save(client, url, tmp_path / "f", limits=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert not server.visits


def test_broken_off_for_good(server: Server, client: Client, tmp_path: Path) -> None:
    with pytest.raises(BrokenError, match="broke off after 40,000 of 100,000 bytes"):
        save(client, f"{server.url}/breaks-always", tmp_path / "f", limits=QUICK)
    assert server.visits["/breaks-always"] == http.ATTEMPTS
    assert not (tmp_path / "f").exists()


def test_checksums(server: Server, client: Client, tmp_path: Path) -> None:
    """md5, sha256 and git's blob id, the latter as git itself computes it."""
    url, to = f"{server.url}/good.bin", tmp_path / "f"
    save(client, url, to, checksum="md5:" + hashlib.md5(CONTENT).hexdigest(), limits=QUICK)
    asked = subprocess.run(["git", "hash-object", str(to)], capture_output=True, text=True)
    save(client, url, tmp_path / "g", checksum="git:" + asked.stdout.strip(), limits=QUICK)
    with pytest.raises(RefusedError, match=r"its sha256 is .* not 00"):
        save(client, url, tmp_path / "h", checksum="sha256:00", limits=QUICK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "g"]


def test_joined_versions_are_fetched_again(server: Server, client: Client, tmp_path: Path) -> None:
    """A part file that was damaged costs a second try, not the run."""
    url = f"{server.url}/good.bin"
    (tmp_path / "f.part").write_bytes(b"damaged")
    notes = {"url": url, "validator": '"one"', "total": str(len(CONTENT))}
    (tmp_path / "f.part.json").write_text(json.dumps(notes))
    wanted = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
    save(client, url, tmp_path / "f", checksum=wanted, limits=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_wrong_size_and_too_large(server: Server, client: Client, tmp_path: Path) -> None:
    with pytest.raises(BrokenError, match="got 100,000 bytes instead of 100,001"):
        save(client, f"{server.url}/good.bin", tmp_path / "f", size=100_001, limits=QUICK)
    with pytest.raises(RefusedError, match="100,000 bytes are more than the 99"):
        save(client, f"{server.url}/good.bin", tmp_path / "f", most=99, limits=QUICK)
    with pytest.raises(RefusedError, match="more than the 4,000 bytes allowed"):
        save(client, f"{server.url}/endless", tmp_path / "f", most=4000, limits=QUICK)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("name", ["page.zip", "archive-page.zip"])
def test_web_page_instead_of_archive(
    server: Server, client: Client, tmp_path: Path, name: str
) -> None:
    with pytest.raises(RefusedError, match="web page instead of the file: 'Sign in'"):
        save(client, f"{server.url}/{name}", tmp_path / "a.zip", limits=QUICK)


def test_something_else_instead_of_archive(server: Server, client: Client, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"is no \.gz file"):
        save(client, f"{server.url}/good.bin", tmp_path / "a.tar.gz", limits=QUICK)


def test_drive_form_is_followed_once(server: Server, client: Client, tmp_path: Path) -> None:
    save(client, f"{server.url}/drive?id=7", tmp_path / "f", limits=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.visits["/good?id=7&uuid=u%261"] == 1


def test_drive_form_to_elsewhere() -> None:
    page = b'<form id="download-form" action="https://evil.example/x"></form>'
    with pytest.raises(RefusedError, match=r"leads to evil\.example"):
        http.drive_form(page, "https://drive.usercontent.google.com/download?id=1")
    assert http.drive_form(PAGE, "https://drive.usercontent.google.com/download?id=1") is None


def test_retries(server: Server, client: Client) -> None:
    """500 then 200; a Retry-After of an hour is cut to the limit; 500 for ever is an error."""
    assert fetch_bytes(client, f"{server.url}/flaky", 10**6, QUICK) == picture()
    began = time.monotonic()
    assert fetch_bytes(client, f"{server.url}/busy", 10**6, QUICK) == picture()
    assert time.monotonic() - began < 3
    with pytest.raises(BrokenError, match="500"):
        fetch_bytes(client, f"{server.url}/500", 10**6, QUICK)
    assert server.visits["/500"] == 3


@pytest.mark.parametrize("route", ["drip", "drip-headers"])
def test_slow_drip_has_a_total_limit(server: Server, client: Client, route: str) -> None:
    limits = Limits(connect=2, read=2, total=0.4, retries=2, backoff=0.01)
    began = time.monotonic()
    with pytest.raises(BrokenError, match=r"took longer than 0\.4 s"):
        fetch_bytes(client, f"{server.url}/{route}", 10**6, limits)
    assert time.monotonic() - began < 2


def test_too_slow_download(
    server: Server, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "WINDOW", 0.3)
    monkeypatch.setattr(http, "ATTEMPTS", 1)
    with pytest.raises(BrokenError, match="slower than 1,024 bytes/s"):
        save(client, f"{server.url}/drip", tmp_path / "f", limits=QUICK)


def test_no_proxy_netrc_or_cookies(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment's proxy is not asked and nothing that identifies the user is sent."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch_bytes(client, f"{server.url}/picture", 10**6, QUICK) == picture()
    assert not {"Authorization", "Cookie", "Proxy-Authorization"} & set(server.headers[0])
    assert "hf_secret" not in str(server.headers)


# Addresses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 127.8.9.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0
    255.255.255.255 224.0.0.1 239.1.2.3 240.0.0.1 192.0.2.1 198.18.0.1 ::1 :: fe80::1 fe80::1%eth0
    fc00::1 fd12::1 ff02::1 fec0::1 2001:db8::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 2002:7f00:1::
    64:ff9b::7f00:1 64:ff9b::a9fe:a9fe""".split(),
)
def test_private_addresses_are_refused(address: str) -> None:
    with pytest.raises(RefusedError, match="not an address of the public internet"):
        check_address(address)


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"]
)
def test_public_addresses_pass(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]"])
def test_loopback_is_not_reached(server: Server, host: str) -> None:
    """However it is written: numbers that the system's resolver takes for 127.0.0.1 too."""
    with pytest.raises((RefusedError, BrokenError)):
        fetch_bytes(Client(), f"http://{host}:{server.server_port}/picture", 10**6, QUICK)
    assert not server.visits


def test_redirect_into_private_network(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first address is taken for a public one; the redirect is checked anew."""
    real = check_address
    monkeypatch.setattr(http, "check_address", lambda ip: None if ip == "127.0.0.1" else real(ip))
    target = f"http://127.0.0.2:{server.server_port}/picture"
    with pytest.raises(RefusedError, match=r"127\.0\.0\.2 is not an address of the public"):
        fetch_bytes(Client(), f"{server.url}/to?{target}", 10**6, QUICK)
    assert server.visits["/picture"] == 0


def resolver(*answers: list[str]) -> Callable[..., list]:
    """A getaddrinfo that gives these answers in turn, the last one for ever."""
    left = list(answers)

    def resolve(host: str, port: int, **_: Any) -> list:
        found = left.pop(0) if len(left) > 1 else left[0]
        kinds = [socket.AF_INET6 if ":" in ip else socket.AF_INET for ip in found]
        return [
            (k, socket.SOCK_STREAM, 6, "", (ip, port)) for k, ip in zip(kinds, found, strict=True)
        ]

    return resolve


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Where sockets were asked to connect to; nothing leaves the machine."""
    tried: list[tuple] = []

    class Fake:
        def __init__(self, *_: Any) -> None: ...
        def settimeout(self, *_: Any) -> None: ...
        def close(self) -> None: ...
        def connect(self, address: tuple) -> None:
            tried.append(address)
            raise OSError("no network in tests")

    monkeypatch.setattr(http.socket, "socket", Fake)
    return tried


def test_dns_rebinding(connected: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    """Public at first, loopback at the second look: the checked address is the one connected to."""
    monkeypatch.setattr(socket, "getaddrinfo", resolver(["93.184.216.34"], ["127.0.0.1"]))
    with pytest.raises(RefusedError, match=r"127\.0\.0\.1 is not an address of the public"):
        fetch_bytes(Client(), "http://rebind.example/x", 10**6, QUICK)
    assert connected == [("93.184.216.34", 80)]


def test_a_name_with_one_private_address_is_refused(
    connected: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolver(["93.184.216.34", "10.0.0.1"]))
    with pytest.raises(RefusedError, match=r"10\.0\.0\.1"):
        fetch_bytes(Client(), "https://mixed.example/x", 10**6, QUICK)
    assert connected == []


def test_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such name is dead; a resolver that fails for now is not."""

    def fail(code: int) -> Callable[..., list]:
        def resolve(*_: Any, **__: Any) -> list:
            raise socket.gaierror(code, "no")

        return resolve

    monkeypatch.setattr(socket, "getaddrinfo", fail(socket.EAI_NONAME))
    with pytest.raises(RefusedError, match=r"unknown host gone\.example") as caught:
        fetch_bytes(Client(), "http://gone.example/x", 10**6, QUICK)
    assert caught.value.dead
    monkeypatch.setattr(socket, "getaddrinfo", fail(socket.EAI_AGAIN))
    with pytest.raises(BrokenError):
        fetch_bytes(Client(), "http://gone.example/x", 10**6, QUICK)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("file:///etc/passwd", "not an http or https address"),
        ("ftp://example.org/x", "not an http or https address"),
        ("http://user:pw@example.org/x", "a user name"),
        ("http://[bad/x", "not an address"),
    ],
)
def test_redirect_to_what_is_not_followed(
    server: Server, client: Client, target: str, why: str
) -> None:
    with pytest.raises(RefusedError, match=why) as caught:
        fetch_bytes(client, f"{server.url}/to?{target}", 10**6, QUICK)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "no address", "http://", "http://a b/x", "http://x:99999/", "//x/y"]
)
def test_what_is_not_an_address_is_dead(client: Client, url: str) -> None:
    with pytest.raises(RefusedError) as caught:
        fetch_bytes(client, url, 10**6, QUICK)
    assert caught.value.dead


def test_redirect_loop(server: Server, client: Client) -> None:
    with pytest.raises(RefusedError, match="more than 5 redirects"):
        fetch_bytes(client, f"{server.url}/loop", 10**6, QUICK)
    assert server.visits["/loop"] == http.REDIRECTS + 1


def test_downgrade_is_refused_for_files() -> None:
    with pytest.raises(RefusedError, match="redirected from https"):
        Client()._check_url("http://example.org/x", "https")


# Images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "status", "reason"),
    [
        ("picture", "fetched", ""),
        ("flaky", "fetched", ""),
        ("404", "dead", "404 Not Found"),
        ("410", "dead", "410 Gone"),
        ("page", "dead", "not an image: a web page"),
        ("good", "dead", "not an image: the file is not"),
        ("cut", "dead", "not an image: "),
        ("huge", "dead", "bytes are more than"),
        ("loop", "dead", "redirects"),
        ("403", "failed", "403"),
        ("500", "failed", "500"),
        ("short", "failed", "broke off after"),
        ("bomb", "failed", "Content-Encoding 'gzip'"),
    ],
)
def test_images(
    server: Server, client: Client, tmp_path: Path, route: str, status: str, reason: str
) -> None:
    got = fetch_image(client, f"{server.url}/{route}", tmp_path / "1.jpg", QUICK)
    assert got[0] == status
    assert reason in got[1]
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert kept == ({"1.jpg": picture()} if status == "fetched" else {})


def test_a_shard(server: Server, client: Client, tmp_path: Path) -> None:
    rows = [("1", f"{server.url}/picture"), ("2", f"{server.url}/404"), ("3", "no address")]
    told = Counter[str]()
    lines = fetch_shard(
        rows, tmp_path, client, 2, lambda status, size: told.update([status]), QUICK
    )
    assert {line["id"]: line["status"] for line in lines} == {
        "1": "fetched",
        "2": "dead",
        "3": "dead",
    }
    assert told == {"fetched": 1, "dead": 2}
    assert pa.Table.from_pylist(lines, prepare.RESULT).num_rows == 3


def test_a_host_that_only_fails_is_left_alone(
    server: Server, client: Client, tmp_path: Path
) -> None:
    rows = [(str(i), f"{server.url}/500?{i}") for i in range(30)]
    lines = fetch_shard(rows, tmp_path, client, 1, limits=Limits(retries=0))
    assert {line["status"] for line in lines} == {"failed"}
    assert sum(server.visits.values()) == prepare.GIVE_UP


def test_connections_to_a_host_are_few(
    server: Server, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def fetch(*_: Any) -> tuple[str, str, int]:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1
        return "fetched", "", 1

    monkeypatch.setattr(prepare, "fetch_image", fetch)
    fetch_shard([(str(i), f"http://a.example/{i}") for i in range(20)], tmp_path, client, 3)
    assert most[0] == 3


def test_shards_keep_a_host_together() -> None:
    rows = [(f"{h}{i}", f"http://h{h}.example/{i}") for h in range(50) for i in range(1 + h % 7)]
    rows += [(f"x{i}", f"http://large.example/{i}") for i in range(100)]
    groups = shards(rows, 20)
    assert sorted(row for group in groups for row in group) == sorted(rows)
    homes = Counter(host for group in groups for host in {url.split("/")[2] for _, url in group})
    assert set(homes.values()) == {1}
    assert sorted(map(len, groups))[-2] <= 20


def results(folder: Path, *rows: tuple[str, str, str]) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"id": str(i), "url": url, "status": status, "reason": reason, "bytes": 0}
        for i, (url, status, reason) in enumerate(rows)
    ]
    parquet.write_table(pa.Table.from_pylist(lines, prepare.RESULT), folder / "a.parquet")
    return folder


def test_dead_links_are_recorded(tmp_path: Path) -> None:
    rows = [("u1", "dead", "404 Not Found"), ("u2", "fetched", ""), ("u3", "failed", "500 x: y")]
    found = results(tmp_path / "r", *rows, ("u4", "dead", "unknown host u4"))
    counts = prepare.merge_results(found, tmp_path / "svo" / "images")
    assert counts == {"fetched": 1, "dead": 2, "failed": 1}
    assert counts.most_common_reasons() == " (500 x: 1)"
    dead = prepare.read_dead(tmp_path / "svo" / "images")
    assert {url: row["reason"] for url, row in dead.items()} == {
        "u1": "404 Not Found",
        "u4": "unknown host u4",
    }
    again = results(tmp_path / "r2", ("u1", "fetched", ""))
    prepare.merge_results(again, tmp_path / "svo" / "images")
    assert list(prepare.read_dead(tmp_path / "svo" / "images")) == ["u4"]


def test_an_unplugged_machine_declares_no_link_dead(tmp_path: Path) -> None:
    rows = [
        ("u1", "dead", "unknown host"),
        ("u2", "dead", "not an image"),
        ("u3", "dead", "410 Gone"),
    ]
    counts = prepare.merge_results(results(tmp_path / "r", *rows), tmp_path / "svo" / "images")
    assert counts == {"failed": 2, "dead": 1}
    assert list(prepare.read_dead(tmp_path / "svo" / "images")) == ["u3"]


# Unpacking ---------------------------------------------------------------------------------------

ALL = (Rule(r"(?:.*/)?([^/]+\.jpg)", r"out/\1"),)


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


def test_unpack_maps_and_skips(tmp_path: Path) -> None:
    members = {"top/images/a.jpg": b"a", "top/b.mat": b"no", "__MACOSX/top/._a.jpg": b"no"}
    made = zipped(tmp_path / "a.zip", members)
    assert unpack(made, tmp_path, ALL, 100) == {"out/a.jpg": 1}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.jpg"]
    info = tarfile.TarInfo("images/b.jpg")
    assert unpack(tarred(tmp_path / "b.tar.gz", (info, b"bb")), tmp_path, ALL, 100) == {
        "out/b.jpg": 2
    }
    assert (tmp_path / "out" / "b.jpg").read_bytes() == b"bb"


def test_unpack_goes_on(tmp_path: Path) -> None:
    """A member that is whole is left alone, one of another size is written again."""
    made = zipped(tmp_path / "a.zip", {"a.jpg": b"aaaa", "b.jpg": b"bbbb"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.jpg").write_bytes(b"kept")
    (tmp_path / "out" / "b.jpg").write_bytes(b"b")
    unpack(made, tmp_path, ALL, 100)
    assert (tmp_path / "out" / "a.jpg").read_bytes() == b"kept"
    assert (tmp_path / "out" / "b.jpg").read_bytes() == b"bbbb"


@pytest.mark.parametrize(
    "name",
    ["../evil.jpg", "/evil.jpg", "a/../../evil.jpg", "..\\evil.jpg", "C:evil.jpg", "C:/evil.jpg"],
)
def test_unsafe_names(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(UnsafeError, match=r"a\.zip: member .*evil\.jpg' has an unsafe name"):
        unpack(zipped(tmp_path / "a.zip", {"good.jpg": b"1", name: b"2"}), root, ALL, 100)
    info = tarfile.TarInfo(name)
    with pytest.raises(UnsafeError, match=r"a\.tar\.gz: member .*evil\.jpg' has an unsafe name"):
        unpack(tarred(tmp_path / "a.tar.gz", (info, b"2")), root, ALL, 100)
    assert not list(tmp_path.rglob("evil.jpg"))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
@pytest.mark.parametrize("target", ["good.jpg", "/etc/passwd", "../../x"])
def test_links_and_devices_in_tar(tmp_path: Path, kind: bytes, target: str) -> None:
    info = tarfile.TarInfo("link.jpg")
    info.type, info.linkname = kind, target
    made = tarred(tmp_path / "a.tar.gz", (tarfile.TarInfo("good.jpg"), b"1"), (info, b""))
    with pytest.raises(UnsafeError, match=r"^a\.tar\.gz: .*link\.jpg"):
        unpack(made, tmp_path, ALL, 100)
    assert not (tmp_path / "out" / "link.jpg").exists()


def test_link_in_zip(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link.jpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, "/etc/passwd")
    with pytest.raises(UnsafeError, match=r"'link\.jpg' is a link"):
        unpack(tmp_path / "a.zip", tmp_path, ALL, 100)


def test_bombs(tmp_path: Path) -> None:
    """Declared sizes are checked before a byte is written, skipped members count too."""
    bomb = zipped(tmp_path / "a.zip", {"a.jpg": bytes(5_000_000)})
    with pytest.raises(UnsafeError, match="declares 5,000,000 bytes, more than 1,000,000"):
        unpack(bomb, tmp_path, ALL, 1_000_000)
    info = tarfile.TarInfo("skipped.bin")
    with pytest.raises(UnsafeError, match="unpacks to more than 1,000,000"):
        unpack(tarred(tmp_path / "a.tar.gz", (info, bytes(5_000_000))), tmp_path, ALL, 1_000_000)
    many = zipped(tmp_path / "b.zip", {f"{i}.jpg": b"1" for i in range(12)})
    with pytest.raises(UnsafeError, match="more than 10 members"):
        unpack(many, tmp_path, ALL, 1_000_000, members=10)
    assert len(list(tmp_path.rglob("*.jpg"))) == 10


def test_a_zip_that_lies_about_a_size(tmp_path: Path) -> None:
    """A member larger than it declares is cut off and refused."""
    made = zipped(tmp_path / "a.zip", {"a.jpg": bytes(100_000)})
    data = bytearray(made.read_bytes())
    where = data.index(b"PK\x01\x02") + 24
    data[where : where + 4] = (10).to_bytes(4, "little")
    made.write_bytes(data)
    with pytest.raises(UnsafeError, match=r"a\.zip"):
        unpack(made, tmp_path, ALL, 10**6)
    assert not list(tmp_path.rglob("*.jpg"))


def test_broken_archives_and_collisions(tmp_path: Path) -> None:
    made = tarred(tmp_path / "a.tar.gz", (tarfile.TarInfo("a.jpg"), CONTENT))
    made.write_bytes(made.read_bytes()[:50_000])
    with pytest.raises(UnsafeError, match=r"a\.tar\.gz: the archive is broken"):
        unpack(made, tmp_path, ALL, 10**6)
    (tmp_path / "b.zip").write_bytes(b"PK no")
    with pytest.raises(UnsafeError, match=r"b\.zip: the archive is broken"):
        unpack(tmp_path / "b.zip", tmp_path, ALL, 10**6)
    with pytest.raises(UnsafeError, match=r"two members would become out/a\.jpg"):
        unpack(zipped(tmp_path / "c.zip", {"x/a.jpg": b"1", "y/a.jpg": b"2"}), tmp_path, ALL, 10**6)
    with pytest.raises(UnsafeError, match=r"d\.zip: holds none of the files"):
        unpack(zipped(tmp_path / "d.zip", {"readme": b"1"}), tmp_path, ALL, 10**6)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "a.jpg"]


# Files in their places ---------------------------------------------------------------------------


def test_place_trusts_only_what_it_can_check(
    server: Server, client: Client, tmp_path: Path
) -> None:
    """Fetched once; damaged, it is fetched again; a user's own other file is not overwritten."""
    checksum = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
    step = Download("d/f.bin", (f"{server.url}/good.bin",), len(CONTENT), checksum)
    assert place(client, step, tmp_path) == "100,000 bytes fetched"
    assert place(client, step, tmp_path) == "there already"
    assert server.visits["/good.bin"] == 1
    (tmp_path / "d/f.bin").write_bytes(CONTENT[::-1])
    assert place(client, step, tmp_path) == "100,000 bytes fetched"
    assert (tmp_path / "d/f.bin").read_bytes() == CONTENT
    other = tmp_path / "other"
    (other / "d").mkdir(parents=True)
    (other / "d/f.bin").write_bytes(b"mine")
    with pytest.raises(RefusedError, match=r"f\.bin is not the published file .* move it away"):
        place(client, step, other)
    assert (other / "d/f.bin").read_bytes() == b"mine"
    (other / "d/f.bin").write_bytes(CONTENT)
    assert place(client, step, other) == "there already"


def test_place_tries_the_second_address(server: Server, client: Client, tmp_path: Path) -> None:
    urls = (f"{server.url}/404", f"{server.url}/good.bin")
    assert place(client, Download("f", urls), tmp_path) == "100,000 bytes fetched"
    with pytest.raises(RefusedError, match=r"/404: 404 Not Found; .*/410: 410 Gone"):
        place(client, Download("g", (f"{server.url}/404", f"{server.url}/410")), tmp_path)


def test_place_unpacks_once(
    server: Server, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = zipped(tmp_path / "made.zip", {"x/1.jpg": b"1", "x/2.jpg": b"22"}).read_bytes()
    monkeypatch.setattr(Handler, "on_zip", lambda self: self.answer(data), raising=False)
    root = tmp_path / "root"
    step = Download("d/a.zip", (f"{server.url}/zip",), rules=ALL, unpacked=1000)
    assert place(client, step, root).endswith("bytes fetched, 2 files unpacked")
    assert not (root / "d/a.zip").exists()
    assert place(client, step, root) == "there already, 2 files"
    (root / "out/2.jpg").unlink()
    assert unpacked("d/a.zip", root) == 0
    place(client, step, root, keep=True)
    assert (root / "out/2.jpg").read_bytes() == b"22"
    assert (root / "d/a.zip").exists()
    assert server.visits["/zip"] == 2


def test_an_archive_brought_by_hand_is_unpacked_and_kept(client: Client, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    zipped(tmp_path / "d/a.zip", {"1.jpg": b"1"})
    step = Download("d/a.zip", ("http://127.0.0.1:9/nowhere",), rules=ALL, unpacked=1000)
    assert place(client, step, tmp_path) == "there already, 1 files unpacked"
    assert (tmp_path / "d/a.zip").exists()


def test_data_brought_by_hand_is_not_fetched(tmp_path: Path) -> None:
    """But an archive that was begun is, though enough of its files seem to be there."""
    listed = Download("d/c.txt", ("http://127.0.0.1:9/c",))
    step = Download("d/a.zip", ("http://127.0.0.1:9/a",), rules=ALL, unpacked=1000)
    chosen = {"d": Source((listed, step), (Need("d/images"),), "-")}
    assert prepare._needed(chosen, tmp_path) == [listed, step]
    (tmp_path / "d/images").mkdir(parents=True)
    (tmp_path / "d/images/1.jpg").touch()
    assert prepare._needed(chosen, tmp_path) == [listed]
    (tmp_path / "d/a.zip.part").touch()
    assert prepare._needed(chosen, tmp_path) == [listed, step]


# The table and the pipeline ----------------------------------------------------------------------


def test_the_table_is_sane() -> None:
    """Every address is https but COCO's, every archive is bounded and its rules are patterns."""
    for name, source in sources.SOURCES.items():
        assert source.licence
        assert source.needs
        for step in source.steps:
            if not isinstance(step, Download):
                continue
            assert step.to.partition("/")[0] in (name, "coco_neg")
            for url in step.urls:
                assert url.startswith("https://") or step.to == "coco/val2014.zip"
            if step.urls[0].startswith("http://"):
                assert step.checksum
            assert bool(step.rules) == bool(step.unpacked) == step.to.endswith((".zip", ".gz"))


@pytest.mark.parametrize(
    ("task", "member", "place"),
    [
        ("pets", "images/Abyssinian_1.jpg", "pets/images/Abyssinian_1.jpg"),
        ("pets", "images/Abyssinian_100.mat", None),
        ("pets", "images/._Abyssinian_1.jpg", None),
        ("clevr", "images/CLEVR_val2_000138.png", "clevr/images/CLEVR_val2_000138.png"),
        ("imagecode", "image-sets/open-images-1_a/img7.jpg", "imagecode/image-sets/open-images-1_a/img7.jpg"),
        ("aro", "images/21.jpg", "aro/images/21.jpg"),
        ("coco", "val2014/COCO_val2014_000000000042.jpg", "coco/val2014/COCO_val2014_000000000042.jpg"),
        ("mmbias", "Religion/Jewish/3.jpg", "mmbias/data/Images/Religion/Jewish/3.jpg"),
        ("mmbias", "__MACOSX/Religion/Jewish/._3.jpg", None),
    ],
)  # fmt: skip
def test_members_go_to_their_places(task: str, member: str, place: str | None) -> None:
    from diffitm.prepare.unpack import target

    steps = [s for s in sources.SOURCES[task].steps if isinstance(s, Download) and s.rules]
    found = {target(member, step.rules) for step in steps}
    assert place in found


def test_tasks_stand_for_their_data() -> None:
    assert list(sources.find(["svo_verb", "svo", "vg_relation"])) == ["svo", "aro"]
    with pytest.raises(InputError, match="unknown task 'pest'; did you mean 'pets'"):
        sources.find(["pest"])


def test_every_task_of_gdbench_has_a_source() -> None:
    from diffitm import registry

    for task in registry.TASKS:
        assert sources.find([task])


def test_missing(tmp_path: Path) -> None:
    source = Source(
        steps=(),
        needs=(Need("a/images", 2), Named("a/list.json", "a/images", "image"), Need("a/c.txt")),
        licence="-",
    )
    assert [line.split(" is ")[1] for line in sources.missing(source, tmp_path)] == [
        "not there"
    ] * 3
    (tmp_path / "a/images").mkdir(parents=True)
    (tmp_path / "a/images/1.jpg").touch()
    (tmp_path / "a/c.txt").touch()
    (tmp_path / "a/list.json").write_text(json.dumps([{"image": "1.jpg"}, {"image": "2.jpg"}]))
    assert sources.missing(source, tmp_path) == [
        "a/images holds 1 of 2 images",
        "1 of 2 images that a/list.json names are not below a/images",
    ]
    (tmp_path / "a/images/2.jpg").touch()
    assert sources.missing(source, tmp_path) == []


def test_image_list(tmp_path: Path) -> None:
    listing = ImageList("l.csv", (("pos_url", "pos_id"), ("neg_url", "neg_id")), "images")
    text = "pos_url,neg_url,pos_id,neg_id\nhttp://a, http://b,1,2\nhttp://a,http://c,1,3\n"
    (tmp_path / "l.csv").write_text(text)
    found = dict(sources.image_addresses(listing, tmp_path))
    assert found == {"1": "http://a", "2": "http://b", "3": "http://c"}
    (tmp_path / "l.csv").write_text(text + "http://a,http://b,../../x,4\n")
    with pytest.raises(InputError, match=r"l\.csv, line 4: image id '\.\./\.\./x' must be"):
        list(sources.image_addresses(listing, tmp_path))
    (tmp_path / "l.csv").write_text("pos_url,pos_id\n")
    with pytest.raises(InputError, match="no column neg_id, neg_url"):
        list(sources.image_addresses(listing, tmp_path))


def test_command_line() -> None:
    assert prepare.with_tasks(["pets", "svo", "--data", "D"]) == [
        "--tasks",
        "pets",
        "svo",
        "--data",
        "D",
    ]
    assert prepare.with_tasks(["--data", "D"]) == ["--data", "D"]
    assert prepare.with_tasks([]) == []


def test_options_are_checked_together(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        prepare.run(
            Config(tasks=["pest"], data="s3://b/x", per_host=0, proxy="http://me:secret@proxy:1")
        )
    for word in ("did you mean 'pets'", "must be a folder", "--per-host 0", "--proxy"):
        assert word in str(caught.value)
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="name what to fetch: all, or some of winoground"):
        prepare.run(Config(data=str(tmp_path)))


HUB = Hub(
    "org/set",
    ("data/*",),
    (Rule(r"(data/(?:e\.jsonl|images\.zip))", r"hub/\1"),),
    archives=("hub/data/images.zip",),
    rules=(Rule(r"(?:.*/)?([^/]+\.png)", r"hub/images/\1"),),
    unpacked=1000,
    gated=True,
)
HUB_SOURCE = Source((HUB,), (Need("hub/data/e.jsonl"), Need("hub/images", 2)), "-")


def test_hub_files_are_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def snapshot(repo: str, *, local_dir: Path, **more: Any) -> None:
        calls.append((repo, more))
        (local_dir / "data").mkdir(parents=True)
        (local_dir / "data/e.jsonl").write_text("{}")
        (local_dir / "data/other").write_text("not wanted")
        zipped(local_dir / "data/images.zip", {"images/a.png": b"1", "images/b.png": b"2"})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(sources, "SOURCES", {"hub": HUB_SOURCE})
    for _ in range(2):
        prepare.run(Config(tasks=["hub"], data=str(tmp_path)))
    assert not (tmp_path / ".prepare/hub/org__set").exists()
    assert calls == [("org/set", {"repo_type": "dataset", "allow_patterns": ["data/*"]})]
    placed = [p for p in (tmp_path / "hub").rglob("*") if p.is_file()]
    assert sorted(p.name for p in placed) == ["a.png", "b.png", "e.jsonl"]
    assert "hub         complete" in capsys.readouterr().out


def test_gated_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message says what to accept and which variable to set; a token is in no output."""

    def refuse(*_: Any, **__: Any) -> None:
        raise GatedRepoError.__new__(GatedRepoError)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("connection with hf_secret failed")

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(sources, "SOURCES", {"hub": HUB_SOURCE})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match="not complete"):
        prepare.run(Config(tasks=["hub"], data=str(tmp_path)))
    shown = capsys.readouterr().out
    assert "accept its terms at https://huggingface.co/datasets/org/set" in shown
    assert "HF_TOKEN" in shown
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError) as caught:
        prepare.run(Config(tasks=["hub"], data=str(tmp_path)))
    shown = capsys.readouterr().out + str(caught.value)
    assert "connection with *** failed" in shown
    assert "hf_secret" not in shown


def test_a_second_run_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        prepare._locked(tmp_path),
        pytest.raises(InputError, match=r"another prepare\.py works"),
        prepare._locked(tmp_path),
    ):
        pass


def test_nodes_that_do_not_share_the_folder(tmp_path: Path) -> None:
    reach = prepare.Reach(str(tmp_path), str(tmp_path / "marker"), False, None)
    with pytest.raises(InputError, match="not every node of the cluster sees this folder"):
        reach.open()


def test_classes_from_file_names(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("Egyptian_Mau_1.jpg", "Egyptian_Mau_2.jpg", "american_bulldog_10.jpg"):
        (tmp_path / "images" / name).touch()
    assert prepare._write_classes(tmp_path)
    assert not prepare._write_classes(tmp_path)
    assert (tmp_path / "classes.txt").read_text() == "american bulldog\negyptian mau\n"
