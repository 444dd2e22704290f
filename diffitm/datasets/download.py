"""One file, streamed to its place: resumed where it broke off, checked, then renamed."""

from __future__ import annotations

import hashlib
import html.parser
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

from urllib3.response import BaseHTTPResponse

from diffitm.datasets.client import Client, Limits, body, check_status
from diffitm.datasets.network import BrokenError, Deadline, RefusedError

ATTEMPTS = 5  # in a row without PROGRESS bytes more
PROGRESS = 2**20
MAGIC = {".zip": b"PK", ".gz": b"\x1f\x8b"}


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
