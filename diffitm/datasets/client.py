"""Requests with bounded time and size; every redirect is checked anew.

Proxies of the environment are not used, since a proxy resolves names itself. No credentials, cookies
or netrc are ever sent.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.response import BaseHTTPResponse

from diffitm import __version__
from diffitm.core.errors import InputError
from diffitm.datasets.network import BrokenError, Deadline, RefusedError, check_address, guarded

CONNECT, READ = 15.0, 30.0  # seconds without an answer
REDIRECTS = 5
CHUNK = 2**18
SLOWEST, WINDOW = 1024, 60.0  # a download must bring so many bytes a second, over so many seconds
HEADERS = {"User-Agent": f"diffitm/{__version__} (prepare)", "Accept-Encoding": "identity"}
GONE = (404, 410)


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


class Client:
    """Requests that go to public addresses only. Safe to share between threads."""

    def __init__(self, allow_private: bool = False, proxy: str | None = None) -> None:
        self.allow_private, self.proxy = allow_private, proxy
        self.pools = urllib3.PoolManager(num_pools=32)
        if proxy:
            self.pools = urllib3.ProxyManager(proxy, num_pools=32)
            return

        plain = {"ConnectionCls": guarded(HTTPConnection, allow_private)}
        secure = {"ConnectionCls": guarded(HTTPSConnection, allow_private)}
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


def check_proxy(proxy: str | None) -> None:
    """Raises InputError unless it is an http or https address without a password."""
    if proxy is None:
        return
    parts = urlsplit(proxy)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise InputError(": must look like http://host:port, without a user name", "proxy")
