"""Downloads from a real server on loopback that breaks off, lies and drips."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffitm.datasets import client as requests
from diffitm.datasets import download
from diffitm.datasets.client import Client, Limits, fetch_bytes
from diffitm.datasets.download import drive_form, save
from diffitm.datasets.network import BrokenError, RefusedError
from tests.loopback import (
    CONTENT,
    PAGE,
    QUICK,
    Handler,
    Server,
    picture,
)


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
    monkeypatch.setattr(download, "ATTEMPTS", 1)
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
    assert server.visits["/breaks-always"] == download.ATTEMPTS
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
        drive_form(page, "https://drive.usercontent.google.com/download?id=1")
    assert drive_form(PAGE, "https://drive.usercontent.google.com/download?id=1") is None


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
    monkeypatch.setattr(requests, "WINDOW", 0.3)
    monkeypatch.setattr(download, "ATTEMPTS", 1)
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


def begun(server: Server, to: Path, have: int, route: str = "good.bin") -> str:
    """A part file with the first bytes, of a strong tag; the address."""
    url = f"{server.url}/{route}"
    part = to.with_name(to.name + ".part")
    part.write_bytes(CONTENT[:have])
    notes = {"url": url, "validator": '"one"', "total": str(len(CONTENT))}
    part.with_name(part.name + ".json").write_text(json.dumps(notes))
    return url


def test_the_limit_holds_for_what_came_before_too(
    server: Server, client: Client, tmp_path: Path
) -> None:
    """60,000 bytes are there and 40,000 come: within a limit of 100,000, not of one less."""
    url = begun(server, tmp_path / "f", 60_000)
    with pytest.raises(RefusedError, match="40,000 bytes are more than the 39,999 allowed"):
        save(client, url, tmp_path / "f", most=99_999, limits=QUICK)
    save(client, url, tmp_path / "f", most=100_000, limits=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert [headers["Range"] for headers in server.headers] == ["bytes=60000-"] * 2
    with pytest.raises(RefusedError, match="more than the 99,999"):
        save(client, url, tmp_path / "g", size=99_999, most=10**9, limits=QUICK)
    save(client, url, tmp_path / "g", size=100_000, most=5, limits=QUICK)


@pytest.mark.parametrize(
    ("headers", "condition"),
    [
        ({"ETag": 'W/"one"'}, None),
        ({}, None),
        ({"ETag": 'W/"one"', "Last-Modified": "yesterday"}, "yesterday"),
        ({"ETag": '"one"', "Last-Modified": "yesterday"}, '"one"'),
    ],
)
def test_a_weak_tag_promises_nothing(
    server: Server,
    client: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    headers: dict[str, str],
    condition: str | None,
) -> None:
    """What broke off is gone on with under a strong tag or a date alone, else begun again."""

    def on_tagged(self: Handler) -> None:
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if self.visit == 1:
            self.answer(CONTENT, sent=40_000, **headers)
        elif begin:
            place = f"bytes {begin}-99999/100000"
            self.answer(CONTENT[begin:], 206, Content_Range=place, **headers)
        else:
            self.answer(CONTENT, **headers)

    monkeypatch.setattr(Handler, "on_tagged", on_tagged, raising=False)
    save(client, f"{server.url}/tagged", tmp_path / "f", limits=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT
    again = server.headers[1]
    assert again.get("If-Range") == condition
    assert again.get("Range") == (condition and "bytes=40000-")


@pytest.mark.parametrize(
    ("answer", "tries"),
    [
        (dict(Content_Range="bytes 40000-99999/100000", ETag='"one"'), 2),
        (dict(Content_Range="bytes 40000-99999/*"), 2),
        (dict(Content_Range="bytes 40000-99999/100001", ETag='"one"'), 3),
        (dict(Content_Range="bytes 4000-63999/100000", ETag='"one"'), 3),
        (dict(Content_Range="bytes 40000-99999/100000", ETag='"two"'), 3),
        (dict(ETag='"one"'), 3),
        (dict(code=416), 3),
    ],
)
def test_a_range_must_go_on_where_the_part_ends(
    server: Server,
    client: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: dict,
    tries: int,
) -> None:
    """Of the same version; else the file is fetched from its start."""

    def on_ranged(self: Handler) -> None:
        if self.visit == 1:
            self.answer(CONTENT, sent=40_000, ETag='"one"')
        elif "Range" in self.headers:
            self.answer(CONTENT[40_000:], **{"code": 206, **answer})
        else:
            self.answer(CONTENT, ETag='"one"')

    monkeypatch.setattr(Handler, "on_ranged", on_ranged, raising=False)
    save(client, f"{server.url}/ranged", tmp_path / "f", limits=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.visits["/ranged"] == tries


def test_tries_count_only_without_progress(
    server: Server, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten pieces of 10,000 bytes are many tries; they wait longer each time that nothing comes."""
    waits = list[float]()
    monkeypatch.setattr(download, "PROGRESS", 9_999)
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=waits.append))

    def on_pieces(self: Handler) -> None:
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        place = f"bytes {begin}-99999/100000" if begin else None
        code = 206 if begin else 200
        self.answer(CONTENT[begin:], code, 10_000, ETag='"one"', Content_Range=place)

    monkeypatch.setattr(Handler, "on_pieces", on_pieces, raising=False)
    save(client, f"{server.url}/pieces", tmp_path / "f", limits=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.visits["/pieces"] == 10
    assert waits == [0.02] * 9
    waits.clear()
    with pytest.raises(BrokenError):
        save(
            client,
            f"{server.url}/breaks-always",
            tmp_path / "g",
            limits=Limits(backoff=1, longest_wait=9),
        )
    assert waits == [2.0, 4.0, 8.0, 9.0]


def test_a_refusal_of_the_whole_file_is_final(
    server: Server, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """416 without a range asked for; what is no zip is none; folders are made for what is."""
    monkeypatch.setattr(Handler, "on_odd", lambda self: self.answer(b"", 416), raising=False)
    with pytest.raises(RefusedError, match="416"):
        save(client, f"{server.url}/odd", tmp_path / "f", limits=QUICK)
    assert server.visits["/odd"] == 1
    with pytest.raises(RefusedError, match=r"is no \.zip file"):
        save(client, f"{server.url}/good.bin", tmp_path / "a.zip", limits=QUICK)
    save(client, f"{server.url}/good.bin", tmp_path / "deep" / "er" / "f", limits=QUICK)
    assert (tmp_path / "deep" / "er" / "f").read_bytes() == CONTENT


def test_an_empty_file_is_none(
    server: Server, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "on_empty", lambda self: self.answer(b""), raising=False)
    with pytest.raises(RefusedError, match="the file is empty"):
        save(client, f"{server.url}/empty", tmp_path / "f", limits=QUICK)
    assert not (tmp_path / "f").exists()


def test_a_form_leads_on_with_its_hidden_fields_alone() -> None:
    url = "https://drive.google.com/uc?id=1"
    page = b"""<input type="hidden" name="before" value="0">
    <form id="download-form" action="https://drive.usercontent.google.com/download?x=1">
    <input type="hidden" name="id" value="1"><input type="submit" name="s" value="t"></form>"""
    assert drive_form(page, url) == "https://drive.usercontent.google.com/download?id=1"
    assert drive_form(page.replace(b"download-form", b"search"), url) is None
    assert drive_form(page.replace(b"https://drive.usercontent.google.com", b""), url) == (
        "https://drive.google.com/download?id=1"
    )


def test_a_page_is_told_by_its_type_or_its_beginning(
    server: Server, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {
        "/typed": (b"PK <title>No</title>", "text/html; charset=utf-8"),
        "/begun": (b"\xef\xbb\xbf \n<HTML><title>No</title>", "application/zip"),
    }
    for path, (content, kind) in pages.items():

        def answer(self: Handler, content: bytes = content, kind: str = kind) -> None:
            self.answer(content, Content_Type=kind)

        monkeypatch.setattr(Handler, f"on_{path[1:]}", answer, raising=False)
        with pytest.raises(RefusedError, match="web page instead of the file: 'No'"):
            save(client, server.url + path, tmp_path / "a.zip", limits=QUICK)
