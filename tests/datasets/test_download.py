"""Downloads from a real server on loopback that breaks off, lies and drips."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from pathlib import Path

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
