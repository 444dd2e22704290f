"""Single images of many hosts: fetched in threads, kept if they decode, dead links recorded."""

from __future__ import annotations

import csv
import io
import os
import shutil
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import parquet

from diffitm.core import images, storage
from diffitm.core.errors import InputError
from diffitm.datasets.client import Client, Limits, fetch_bytes
from diffitm.datasets.network import BrokenError, RefusedError

LARGEST_IMAGE = 50 * 2**20  # bytes
IMAGE_LIMITS = Limits(connect=10, read=15, total=60, retries=2, longest_wait=5, downgrade=True)
SHARD = 128  # images that a Ray task fetches, more only where one host has more
THREADS = 16
GIVE_UP = 5  # failures of a host in a row, after which the rest of it waits for the next run
RESULT = pa.schema(
    {"id": pa.string(), "url": pa.string(), "status": pa.string(), "reason": pa.string()}
    | {"bytes": pa.int64()}
)
DEAD_COLUMNS = ["url", "image_id", "reason", "when"]


def fetch_image(client: Client, url: str, to: Path, limits: Limits) -> tuple[str, str, int]:
    """Fetch one image, kept only if it decodes: 'fetched', 'dead' or 'failed', why, bytes."""
    try:
        data = fetch_bytes(client, url, LARGEST_IMAGE, limits)
    except RefusedError as error:
        return "dead" if error.dead else "failed", str(error), 0
    except BrokenError as error:
        return "failed", str(error), 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            images.decode(data)
    except Exception as error:  # whatever a decoder raises on foreign bytes
        page = data[:512].lstrip().lower().startswith((b"<!doctype", b"<html"))
        return "dead", "not an image: " + ("a web page" if page else str(error)[:100]), 0
    storage.write_bytes(str(to), data)
    return "fetched", "", len(data)


class _Host:
    """A host's places for connections, and how often in a row it failed."""

    def __init__(self, places: int) -> None:
        self.places, self.failures = threading.Semaphore(places), 0


def fetch_shard(
    rows: list[tuple[str, str]],
    folder: Path,
    client: Client,
    per_host: int,
    tell: Callable[[str, int], None] = lambda status, size: None,
    limits: Limits = IMAGE_LIMITS,
    threads: int = THREADS,
) -> list[dict[str, Any]]:
    """Fetch (id, address) rows in threads to folder/<id>.jpg; a RESULT row for each.

    A host that fails GIVE_UP times in a row is left alone; its other rows are 'failed'.
    """
    hosts = {host_of(url): _Host(per_host) for _, url in rows}

    def one(row: tuple[str, str]) -> dict[str, Any]:
        name, url = row
        host = hosts[host_of(url)]
        with host.places:
            if host.failures >= GIVE_UP:
                status, reason, size = "failed", f"its host failed {GIVE_UP} times in a row", 0
            else:
                status, reason, size = fetch_image(client, url, folder / f"{name}.jpg", limits)
            host.failures = host.failures + 1 if status == "failed" else 0
        tell(status, size)
        return {"id": name, "url": url, "status": status, "reason": reason, "bytes": size}

    with ThreadPoolExecutor(min(threads, per_host * len(hosts))) as pool:
        return list(pool.map(one, _mixed(rows)))


def host_of(url: str) -> str:
    """The host of an address, '' if it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _mixed(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The rows with hosts in turn, so that threads do not wait for the same one."""
    by_host = defaultdict[str, list[tuple[str, str]]](list)
    for row in rows:
        by_host[host_of(row[1])].append(row)
    return [row for turn in zip_longest(*by_host.values()) for row in turn if row is not None]


def shards(rows: Iterable[tuple[str, str]], size: int = SHARD) -> list[list[tuple[str, str]]]:
    """Rows in groups of about `size`, every host in one group only: there its limit can be kept."""
    by_host = defaultdict[str, list[tuple[str, str]]](list)
    for row in rows:
        by_host[host_of(row[1])].append(row)
    groups: list[list[tuple[str, str]]] = []
    for group in sorted(by_host.values(), key=len, reverse=True):
        if groups and len(groups[-1]) + len(group) <= size:
            groups[-1] += group
        else:
            groups.append(list(group))
    return groups


class Merged(Counter[str]):
    """Counts of a run's results by status, and of the reasons of those that failed."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: Counter[str] = Counter()

    def most_common_reasons(self) -> str:
        """' (why: count, ...)' of what failed, empty if nothing did."""
        found = ", ".join(f"{why}: {n:,}" for why, n in self.reasons.most_common(4))
        return f" ({found})" if found else ""


def merge_results(results: Path, folder: Path) -> Merged:
    """Move the results of a run into the list of dead links; counts by status.

    Where not one image came, a name that does not resolve or a page instead of an image says more of
    this machine's network than of the link: those then count as failed.
    """
    whole, _ = storage.readable_parquet(str(results))
    rows = [row for path in whole for row in parquet.read_table(path).to_pylist()]
    online = any(row["status"] == "fetched" for row in rows)
    dead, counts = read_dead(folder), Merged()
    for row in rows:
        status, reason = row["status"], row["reason"]
        if status == "dead" and not online and not reason.startswith(("404", "410")):
            status = "failed"
        counts[status] += 1
        if status == "failed":
            counts.reasons[reason.partition(":")[0][:60]] += 1
        elif status == "dead":
            when = datetime.now(UTC).isoformat(timespec="seconds")
            dead[row["url"]] = dict(
                zip(DEAD_COLUMNS, (row["url"], row["id"], reason, when), strict=True)
            )
        else:
            dead.pop(row["url"], None)
    if rows:
        _write_dead(folder, dead)
    shutil.rmtree(results, ignore_errors=True)
    return counts


def _dead_file(folder: Path) -> Path:
    return folder.parent / "dead_links.csv"


def read_dead(folder: Path) -> dict[str, dict[str, str]]:
    """The dead links beside an image folder, by address; empty if there are none."""
    try:
        with _dead_file(folder).open(newline="", encoding="utf-8") as file:
            return {row["url"]: row for row in csv.DictReader(file)}
    except FileNotFoundError:
        return {}
    except (KeyError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{_dead_file(folder)}: not the list of dead links: {error}") from error


def _write_dead(folder: Path, dead: dict[str, dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, DEAD_COLUMNS)
    writer.writeheader()
    writer.writerows(dead[url] for url in sorted(dead))
    storage.write_text(str(_dead_file(folder)), text.getvalue())


def fetched_ids(folder: Path) -> set[str]:
    """Ids of the images that are there: each was written whole, after it had been decoded."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {e.name[:-4] for e in entries if e.name.endswith(".jpg") and e.stat().st_size}
