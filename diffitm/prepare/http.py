"""One safe streamed download: checked addresses, bounded time and size, resumed where it broke off.

A name is resolved once for a connection, every address that it stands for is checked, and the
connection goes to the checked address itself, on every redirect anew. Proxies of the environment are
not used, since a proxy resolves names itself. No credentials, cookies or netrc are ever sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import html.parser
import ipaddress
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, MaxRetryError, NameResolutionError, NewConnectionError
from urllib3.response import BaseHTTPResponse

from diffitm import __version__
from diffitm.errors import InputError

CONNECT, READ = 15.0, 30.0  # seconds without an answer
REDIRECTS = 5
CHUNK = 2**18
ATTEMPTS = 5  # in a row without PROGRESS bytes more
PROGRESS = 2**20
SLOWEST, WINDOW = 1024, 60.0  # a download must bring so many bytes a second, over so many seconds
HEADERS = {"User-Agent": f"diffitm/{__version__} (prepare)", "Accept-Encoding": "identity"}
NO_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
GONE = (404, 410)
MAGIC = {".zip": b"PK", ".gz": b"\x1f\x8b"}


class RefusedError(Exception):
    """The address, or what it answers, is not acceptable: another try would not help.

    `dead` says that the file is gone for good (404, 410, no such name, not what it should be).
    """

    def __init__(self, reason: str, dead: bool = False, unknown_host: bool = False) -> None:
        super().__init__(reason)
        self.dead, self.unknown_host = dead, unknown_host


class BrokenError(Exception):
    """The download failed on its way; another try may help."""


@dataclass(frozen=True)
class Limits:
    """How long and how often one request is tried. `total` bounds it all, in seconds."""

    connect: float = CONNECT
    read: float = READ
    total: float | None = None
    retries: int = 4
    backoff: float = 0.5  # seconds before the second retry, then doubled
    longest_wait: float = 60  # seconds, also for Retry-After
    downgrade: bool = False  # whether a redirect may lead from https to http


def check_address(text: str) -> None:
    """Raises RefusedError unless the IP address is one of the public internet."""
    address = ipaddress.ip_address(text.partition("%")[0])
    inner: Any = address
    if isinstance(address, ipaddress.IPv6Address):  # addresses that carry one of IPv4
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in ipaddress.ip_network("64:ff9b::/96"):  # NAT64, on networks without IPv4
            inner = ipaddress.ip_address(int(address) & 0xFFFFFFFF)
        inner = inner or address
    local = inner.is_multicast or inner.is_reserved or getattr(inner, "is_site_local", False)
    if local or not inner.is_global:
        raise RefusedError(
            f"{text} is not an address of the public internet (--allow-private allows it)"
        )


class Deadline:
    """Bounds everything that its thread does on connections, headers that drip in included."""

    current = threading.local()

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.end = None if seconds is None else time.monotonic() + seconds
        self.connections: list[Any] = []
        self.timer = threading.Timer(seconds or 0, self._cut)
        self.timer.daemon = True

    @staticmethod
    def register(connection: Any) -> None:
        """The connection is used by this thread now. Raises BrokenError when its time is over."""
        deadline: Deadline | None = getattr(Deadline.current, "value", None)
        if deadline is not None:
            deadline.check()
            deadline.connections.append(connection)

    def __enter__(self) -> Deadline:
        if self.seconds is not None:
            Deadline.current.value = self
            self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        Deadline.current.value = None
        self.timer.cancel()

    def _cut(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def check(self) -> None:
        """Raises BrokenError when the time is over."""
        if self.end is not None and time.monotonic() >= self.end:
            raise BrokenError(f"took longer than {self.seconds:g} s")


def _connect(connection: Any, allow_private: bool) -> socket.socket:
    """A socket to the first address of the host that answers, all of them checked before."""
    host = connection._dns_host
    try:
        found = socket.getaddrinfo(host.strip("[]"), connection.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in NO_NAME:
            raise RefusedError(f"unknown host {host}", dead=True, unknown_host=True) from error
        raise NameResolutionError(host, connection, error) from error
    except UnicodeError as error:
        raise RefusedError(f"unknown host {host!r}", dead=True) from error
    if not allow_private:
        for *_, address in found:
            check_address(str(address[0]))
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        made = socket.socket(family, kind, protocol)
        try:
            made.settimeout(connection.timeout)
            made.connect(address)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return made
        except OSError as error:
            made.close()
            failure = error
    raise NewConnectionError(connection, f"no connection: {failure}") from failure


def _guarded(base: Any, allow_private: bool) -> Any:
    """A connection class that checks addresses and is cut when its thread's time is over."""

    class Guarded(base):
        def _new_conn(self) -> socket.socket:
            Deadline.register(self)
            return _connect(self, allow_private)

        def request(self, *arguments: Any, **more: Any) -> Any:
            Deadline.register(self)  # also when a kept connection is used again
            return super().request(*arguments, **more)

    return Guarded


class Client:
    """Requests that go to public addresses only. Safe to share between threads."""

    def __init__(self, allow_private: bool = False, proxy: str | None = None) -> None:
        self.allow_private, self.proxy = allow_private, proxy
        self.pools = urllib3.PoolManager(num_pools=32)
        if proxy:
            self.pools = urllib3.ProxyManager(proxy, num_pools=32)
            return

        plain = {"ConnectionCls": _guarded(HTTPConnection, allow_private)}
        secure = {"ConnectionCls": _guarded(HTTPSConnection, allow_private)}
        self.pools.pool_classes_by_scheme = {
            "http": type("Pool", (urllib3.HTTPConnectionPool,), plain),
            "https": type("SecurePool", (urllib3.HTTPSConnectionPool,), secure),
        }

    @contextlib.contextmanager
    def get(
        self, url: str, headers: dict[str, str], limits: Limits
    ) -> Iterator[tuple[str, BaseHTTPResponse]]:
        """The last address and its answer, redirects followed. Raises RefusedError or BrokenError."""
        start = "" if limits.downgrade else urlsplit(url).scheme
        for _ in range(REDIRECTS + 1):
            self._check_url(url, start)
            response = self._request(url, headers, limits)
            try:
                target = response.headers.get("Location")
                if response.status not in (301, 302, 303, 307, 308) or target is None:
                    yield url, response
                    return
            finally:
                response.close()
            with _as_dead(target):
                url = urljoin(url, target)
        raise RefusedError(f"more than {REDIRECTS} redirects", dead=True)

    def _check_url(self, url: str, start: str) -> None:
        with _as_dead(url):
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        if parts.scheme not in ("http", "https") or not host:
            raise RefusedError(f"not an http or https address: {url!r}", dead=True)
        if parts.username is not None:
            raise RefusedError("an address with a user name is not followed", dead=True)
        if start == "https" and parts.scheme == "http":
            raise RefusedError(f"redirected from https to {url}")
        if self.proxy and not self.allow_private:
            with contextlib.suppress(ValueError):  # a name: the proxy resolves it
                check_address(host)

    def _request(self, url: str, headers: dict[str, str], limits: Limits) -> BaseHTTPResponse:
        retry = urllib3.Retry(
            total=limits.retries,
            redirect=False,
            backoff_factor=limits.backoff,
            backoff_max=limits.longest_wait,
            retry_after_max=int(limits.longest_wait),
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=("GET",),
            raise_on_status=False,
        )
        try:
            with _as_dead(url):
                return self.pools.request(
                    "GET",
                    url,
                    headers=HEADERS | headers,
                    redirect=False,
                    preload_content=False,
                    retries=retry,
                    timeout=urllib3.Timeout(connect=limits.connect, read=limits.read),
                )
        except (HTTPError, OSError) as error:
            cause = error.reason if isinstance(error, MaxRetryError) else error
            raise BrokenError(f"{type(cause).__name__}: {plain(cause)}") from error


@contextlib.contextmanager
def _as_dead(url: str) -> Iterator[None]:
    """Errors in the address itself as RefusedError."""
    try:
        yield
    except ValueError as error:  # urllib3's LocationParseError is one too
        raise RefusedError(f"not an address: {url[:200]!r} ({error})", dead=True) from error


def plain(error: object) -> str:
    """An exception's text without the objects that urllib3 prints."""
    text = str(error).rpartition("object at 0x")[2] if "object at 0x" in str(error) else str(error)
    return text.split(">: ", 1)[-1][:200]


def check_status(response: BaseHTTPResponse) -> None:
    """Raises RefusedError or BrokenError for whatever is neither 200 nor 206."""
    if response.status in (200, 206):
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding not in ("identity", ""):  # unasked for, and a way to hide a bomb
            raise RefusedError(f"answered with Content-Encoding {encoding[:20]!r}")
        return
    reason = f"{response.status} {response.reason or ''}".strip()
    if response.status == 429 or response.status >= 500:
        raise BrokenError(reason)
    raise RefusedError(reason, dead=response.status in GONE)


def body(response: BaseHTTPResponse, most: int, deadline: Deadline) -> Iterator[bytes]:
    """The body as it comes in.

    Raises BrokenError if it ends early or is too slow, RefusedError above `most` bytes.
    """
    length = response.headers.get("Content-Length", "")
    wanted = int(length) if length.isdigit() else None
    if wanted is not None and wanted > most:
        raise RefusedError(f"{wanted:,} bytes are more than the {most:,} allowed", dead=True)
    got, mark, since = 0, 0, time.monotonic()
    while True:
        deadline.check()
        try:
            chunk = response.read1(CHUNK, decode_content=False)
        except (HTTPError, OSError, ValueError) as error:
            deadline.check()
            raise BrokenError(_cut_off(got, wanted)) from error
        if not chunk:
            break
        got += len(chunk)
        if got > most:
            raise RefusedError(f"more than the {most:,} bytes allowed", dead=True)
        yield chunk
        now = time.monotonic()
        if now - since > WINDOW:
            if got - mark < SLOWEST * (now - since):
                raise BrokenError(f"slower than {SLOWEST:,} bytes/s")
            mark, since = got, now
    deadline.check()
    if wanted is not None and got < wanted:
        raise BrokenError(_cut_off(got, wanted))


def _cut_off(got: int, wanted: int | None) -> str:
    whole = "" if wanted is None else f" of {wanted:,}"
    return f"broke off after {got:,}{whole} bytes"


def fetch_bytes(client: Client, url: str, most: int, limits: Limits) -> bytes:
    """The content of a small file, within `limits.total` seconds. Raises RefusedError or BrokenError."""
    with Deadline(limits.total) as deadline:
        try:
            with client.get(url, {"Connection": "close"}, limits) as (_, response):
                check_status(response)
                return b"".join(body(response, most, deadline))
        except BrokenError:
            deadline.check()
            raise


def save(
    client: Client,
    url: str,
    to: Path,
    size: int | None = None,
    checksum: str | None = None,
    most: int = 2**40,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """Download to a file, whole or not at all; what broke off before goes on from its `.part` file.

    `size` and `most` are bytes, `checksum` as in sources.Download. Returns what a manifest records:
    url, size, sha256. Raises RefusedError, or BrokenError when several tries in a row bring nothing.
    """
    limits, most = limits or Limits(retries=1), most if size is None else size
    part, address = to.with_name(to.name + ".part"), url
    to.parent.mkdir(parents=True, exist_ok=True)
    tries, best = 0, 0
    while True:
        resumed = part.exists()
        try:
            page = _pour(client, address, url, part, most, limits)
            if page is None:
                sums = _check(part, size, checksum, resumed)
                break
            following = drive_form(page, address)
            if address != url or following is None:
                raise RefusedError(f"answered with a web page instead of the file: {title(page)}")
            address = following
        except BrokenError:
            have = part.stat().st_size if part.exists() else 0
            tries = 1 if have > best + PROGRESS else tries + 1
            best = max(best, have)
            if tries >= ATTEMPTS:
                raise
            time.sleep(min(limits.longest_wait, limits.backoff * 2**tries))
    os.replace(part, to)
    _notes(part).unlink(missing_ok=True)
    return {"url": url, "size": to.stat().st_size, "sha256": sums["sha256"]}


def _pour(
    client: Client, address: str, url: str, part: Path, most: int, limits: Limits
) -> bytes | None:
    """Append what is missing to the part file. None when it is whole, else the page that came."""
    notes = _read_notes(part, url)
    have = part.stat().st_size if notes and part.exists() else 0
    if have and str(have) == notes["total"]:
        return None
    headers = {"Range": f"bytes={have}-", "If-Range": notes["validator"]} if have else {}
    with Deadline(limits.total) as deadline, client.get(address, headers, limits) as (at, response):
        if have and response.status == 416:
            _drop(part)
            raise BrokenError("the server refused to go on from the part file")
        check_status(response)
        if have and response.status == 206:
            _check_range(response, have, notes, part)
        else:
            have = 0
        chunks = body(response, most - have, deadline)
        first = next(chunks, b"")
        if have == 0:
            if _is_page(first, response, part, at):
                return b"".join([first, *itertools.islice(chunks, 16)])
            _write_notes(part, url, response)
        with part.open("r+b" if have else "wb") as file:
            file.seek(have)
            for chunk in itertools.chain([first], chunks):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    return None


def _check_range(response: BaseHTTPResponse, have: int, notes: dict[str, Any], part: Path) -> None:
    """The answer must go on where the part file ends, in the same version of the file."""
    given = response.headers.get("Content-Range", "")
    tag, total = response.headers.get("ETag", ""), given.rpartition("/")[2]
    same = not tag or not notes["validator"].startswith('"') or tag == notes["validator"]
    whole = total == "*" or notes["total"] is None or total == notes["total"]
    if not (same and whole and given.startswith(f"bytes {have}-")):
        _drop(part)
        raise BrokenError("the file changed since its first part was fetched")


def _is_page(first: bytes, response: BaseHTTPResponse, part: Path, at: str) -> bool:
    """Whether a web page came. Raises RefusedError if it is no archive of the wanted kind either."""
    head = first[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = part.with_suffix("").suffix
    if head.startswith((b"<!doctype html", b"<html")):
        return True
    if "text/html" in response.headers.get("Content-Type", ""):
        return True
    if not first.startswith(MAGIC.get(kind, b"")):
        raise RefusedError(f"what {urlsplit(at).hostname} sent is no {kind} file")
    return False


def _drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    _notes(part).unlink(missing_ok=True)


def _notes(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_notes(part: Path, url: str) -> dict[str, Any]:
    """What is known of the part file; empty if it is of another address or cannot be resumed."""
    try:
        notes = json.loads(_notes(part).read_text())
    except (OSError, ValueError):
        return {}
    return notes if notes.get("url") == url and notes.get("validator") else {}


def _write_notes(part: Path, url: str, response: BaseHTTPResponse) -> None:
    tag = response.headers.get("ETag", "")
    strong = tag if tag.startswith('"') else ""  # a weak tag does not promise the same bytes
    validator = strong or response.headers.get("Last-Modified", "")
    _drop(part)
    length = response.headers.get("Content-Length")
    notes = {"url": url, "validator": validator, "total": length}
    _notes(part).write_text(json.dumps(notes))


def _check(part: Path, size: int | None, checksum: str | None, resumed: bool) -> dict[str, str]:
    """The part file's digests. It is deleted if it is not the file that is wanted."""
    found = part.stat().st_size
    if size is not None and found != size:
        _drop(part)
        raise BrokenError(f"got {found:,} bytes instead of {size:,}")
    kind, _, wanted = (checksum or "").partition(":")
    sums = digests(part, kind)
    if checksum and sums[kind] != wanted:
        _drop(part)
        reason = f"its {kind} is {sums[kind]}, not {wanted}"
        # Parts of two versions may have been joined: that deserves a try from the start.
        raise BrokenError(reason) if resumed else RefusedError(reason)
    if found == 0:
        raise RefusedError("the file is empty")
    return sums


def digests(path: Path, kind: str = "") -> dict[str, str]:
    """sha256 of a file and, if `kind` says so, its md5 or git's blob id, as hex numbers."""
    sums = {"sha256": hashlib.sha256()}
    if kind == "md5":
        sums[kind] = hashlib.md5(usedforsecurity=False)
    elif kind == "git":
        header = b"blob %d\0" % path.stat().st_size
        sums[kind] = hashlib.sha1(header, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            for each in sums.values():
                each.update(chunk)
    return {name: each.hexdigest() for name, each in sums.items()}


class _Form(html.parser.HTMLParser):
    """Google Drive's 'download anyway' form, and the page's title."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.action, self.fields, self.title, self.inside = "", dict[str, str](), "", ""
        self.feed(page[: 2**20].decode("utf-8", "replace"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.inside = tag
        if tag == "form" and values.get("id") == "download-form":
            self.action = values.get("action", "")
        elif tag == "input" and self.action and values.get("type") == "hidden":
            self.fields[values.get("name", "")] = values.get("value", "")

    def handle_data(self, data: str) -> None:
        if self.inside == "title" and not self.title:
            self.title = " ".join(data.split())[:120]


def drive_form(page: bytes, url: str) -> str | None:
    """Where Drive's page about files too large to scan leads on to; None for any other page."""
    form = _Form(page)
    if not form.action:
        return None
    action = urljoin(url, form.action)
    allowed = (urlsplit(url).hostname, "drive.usercontent.google.com")
    if urlsplit(action).hostname not in allowed:
        raise RefusedError(f"its form leads to {urlsplit(action).hostname}")
    return f"{action.partition('?')[0]}?{urlencode(form.fields)}"


def title(page: bytes) -> str:
    """A web page's title, for a message."""
    return repr(_Form(page).title or "no title")


def check_proxy(proxy: str | None) -> None:
    """Raises InputError unless it is an http or https address without a password."""
    if proxy is None:
        return
    parts = urlsplit(proxy)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise InputError("--proxy: must look like http://host:port, without a user name")
