"""Fetch the published data: archives as Ray tasks, single images through Ray Data."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import logging
import os
import shutil
import sys
import threading
import time
import uuid
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import parquet

from diffitm import images, storage
from diffitm.config import option
from diffitm.errors import InputError
from diffitm.prepare import sources
from diffitm.prepare.http import (
    BrokenError,
    Client,
    Limits,
    RefusedError,
    check_proxy,
    fetch_bytes,
)
from diffitm.prepare.sources import Download, Hub, ImageList, Source
from diffitm.prepare.unpack import (
    STATE,
    UnsafeError,
    brought,
    note_members,
    place,
    target,
    unpack,
    unpacked,
)

log = logging.getLogger("diffitm")
LARGEST_IMAGE = 50 * 2**20  # bytes
IMAGE_LIMITS = Limits(connect=10, read=15, total=60, retries=2, longest_wait=5, downgrade=True)
SHARD = 128  # images that a Ray task fetches, more only where one host has more
THREADS = 16
GIVE_UP = 5  # failures of a host in a row, after which the rest of it waits for the next run
REPORT_EVERY = 10.0
RETRIES = 3
RESULT = pa.schema([("id", pa.string()), ("url", pa.string()), ("status", pa.string())])
RESULT = RESULT.append(pa.field("reason", pa.string())).append(pa.field("bytes", pa.int64()))
DEAD_COLUMNS = ["url", "image_id", "reason", "when"]


@dataclass(frozen=True)
class Config:
    """Options of pipelines/prepare.py."""

    tasks: list[str] = option(
        [], "what to fetch; the bare names before the first option do the same"
    )
    data: str = option("", "data root: a folder of this machine, or one that all nodes share")
    connections: int = option(32, "most connections for svo's single images")
    per_host: int = option(4, "most connections to one host")
    retry_dead: bool = option(False, "try the links of svo/dead_links.csv again")
    keep_archives: bool = option(False, "do not delete an archive after unpacking it")
    allow_private: bool = option(
        False, "follow addresses into private networks (a mirror in your own network)"
    )
    proxy: str | None = option(
        None, "http://host:port of a proxy; it resolves names, so it must keep them public itself"
    )
    limit: int | None = option(None, "at most this many of svo's images in this run")
    ray: str | None = option(
        None, "address of a Ray cluster (default: RAY_ADDRESS, else this machine)"
    )


class Reach(NamedTuple):
    """How workers may connect, and the file by which they see that they share the data root."""

    root: str
    marker: str
    allow_private: bool
    proxy: str | None

    def open(self) -> tuple[Path, Client]:
        """The data root and a client. Raises InputError where the root is not shared."""
        if not Path(self.marker).exists():
            raise InputError(
                f"--data {self.root}: not every node of the cluster sees this folder; give a shared "
                "one, or run on one machine (--ray local)"
            )
        return Path(self.root), Client(self.allow_private, self.proxy)


class Outcome(NamedTuple):
    """What became of one step."""

    name: str
    good: bool
    text: str


def with_tasks(arguments: list[str]) -> list[str]:
    """The command line with its leading bare words as --tasks."""
    first = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    names, rest = arguments[:first], arguments[first:]
    if not names:
        return arguments
    return ["--tasks", *names, *rest]


def run(config: Config) -> None:
    """Fetch what the tasks lack and say what is there. Raises InputError for what is left to do."""
    chosen = _check(config)
    root = Path(config.data).expanduser().absolute()
    _warn_of_proxies(config)
    with _locked(root) as marker:
        reach = Reach(str(root), str(marker), config.allow_private, config.proxy)
        outcomes = _fetch(chosen, reach, config)
        if "pets" in chosen and _write_classes(root / "pets"):
            outcomes = [outcome for outcome in outcomes if outcome.name != "pets/classes.txt"]
        for outcome in outcomes:
            log.info("%s: %s", outcome.name, outcome.text)
        _report(chosen, outcomes, root)


def _check(config: Config) -> dict[str, Source]:
    """The chosen data sets; all problems of the options together."""
    problems, chosen = [], dict[str, Source]()
    try:
        names = list(sources.SOURCES) if config.tasks == ["all"] else config.tasks
        chosen = sources.find(names, sources.SOURCES)
    except InputError as error:
        problems.append(str(error))
    if not config.tasks:
        problems.append(f"name what to fetch: all, or some of {', '.join(sources.SOURCES)}")
    if not config.data:
        problems.append("--data: give the folder that the data goes to")
    elif "://" in config.data:
        problems.append(
            f"--data {config.data}: must be a folder, local or shared; fetch into one and copy it "
            "to the store with its own tool"
        )
    for key in ("connections", "per_host", "limit"):
        value = getattr(config, key)
        if value is not None and value < 1:
            problems.append(f"--{key.replace('_', '-')} {value}: must be at least 1")
    try:
        check_proxy(config.proxy)
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return chosen


def _warn_of_proxies(config: Config) -> None:
    found = [name for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") if _environment(name)]
    if found and not config.proxy:
        log.warning("%s is not used; --proxy names a proxy to go through", ", ".join(found))


def _environment(name: str) -> str | None:
    return os.environ.get(name) or os.environ.get(name.lower())


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[Path]:
    """Makes the data root, and keeps a second run out of it; yields a file that all nodes must see."""
    state = root / STATE
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = (state / "lock").open("w")
    except OSError as error:
        raise InputError(f"--data {root}: cannot be written to: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--data {root}: another prepare.py works on this folder") from None
        except OSError:
            log.warning("%s cannot be locked: start no second prepare.py on it", root)
        marker = state / f"marker-{uuid.uuid4().hex}"
        marker.touch()
        try:
            yield marker
        finally:
            marker.unlink(missing_ok=True)


def _fetch(chosen: dict[str, Source], reach: Reach, config: Config) -> list[Outcome]:
    """All steps: archives and the Hub side by side, then the images, whose list is an archive's."""
    root = Path(reach.root)
    steps = _needed(chosen, root)
    downloads = [step for step in steps if isinstance(step, Download)]
    if not all(isinstance(step, Hub) for step in steps):
        from diffitm.distributed.session import connect

        connect(config.ray)
    started = _start(downloads, reach, config.keep_archives)
    outcomes = [
        _hub(step, source, root, config.keep_archives)
        for source in chosen.values()
        for step in source.steps
        if isinstance(step, Hub)
    ]
    outcomes += _wait(started, root)
    for step in steps:
        if isinstance(step, ImageList) and (root / step.csv).is_file():
            outcomes.append(_fetch_images(step, reach, config))
    return outcomes


def _needed(chosen: dict[str, Source], root: Path) -> list[Download | Hub | ImageList]:
    """All steps, less the archives of data that the user brought and that lack nothing."""
    steps: list[Download | Hub | ImageList] = []
    for name, source in chosen.items():
        own = [s for s in source.steps if isinstance(s, Download) and brought(s, root)]
        if own and not sources.missing(source, root):
            log.info("%s: its files are there already, not fetched from here", name)
            steps += [step for step in source.steps if step not in own]
        else:
            steps += source.steps
    return steps


def _start(downloads: list[Download], reach: Reach, keep: bool) -> dict[Any, list[Download]]:
    """A Ray task for each host, so that one connection at a time goes to it."""
    import ray

    hosts = defaultdict[str | None, list[Download]](list)
    for step in downloads:
        hosts[urlsplit(step.urls[0]).hostname].append(step)
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(place_all) if hosts else None
    return {task.remote(group, reach, keep): group for group in hosts.values()} if task else {}


def place_all(steps: list[Download], reach: Reach, keep: bool) -> list[Outcome]:
    """Fetch and unpack one after the other; what fails does not keep the next from being tried."""
    root, client = reach.open()
    outcomes = []
    for step in steps:
        try:
            outcomes.append(Outcome(step.to, True, place(client, step, root, keep)))
        except (RefusedError, BrokenError, UnsafeError, OSError) as error:
            outcomes.append(Outcome(step.to, False, str(error)))
    return outcomes


def _wait(started: dict[Any, list[Download]], root: Path) -> list[Outcome]:
    """The tasks' outcomes; while they run, how far the downloads are."""
    import ray

    outcomes, left, before = list[Outcome](), list(started), dict[str, int]()
    while left:
        ready, left = ray.wait(left, timeout=REPORT_EVERY)
        for task in ready:
            try:
                outcomes += ray.get(task)
            except ray.exceptions.RayTaskError as error:  # its text is a traceback
                raise error.cause from None
        for step in (step for task in left for step in started[task]):
            part = root / f"{step.to}.part"
            have = part.stat().st_size if part.exists() else 0
            if have > before.get(step.to, 0):
                _tell(step, have, (have - before.get(step.to, 0)) / REPORT_EVERY)
                before[step.to] = have
    return outcomes


def _tell(step: Download, have: int, rate: float) -> None:
    from diffitm.distributed.score import clock

    text = f"{step.to}: {have / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
    if step.size:
        text += f", {100 * have / step.size:.0f}%, {clock((step.size - have) / max(rate, 1))} left"
    log.info(text)


def _hub(step: Hub, source: Source, root: Path, keep: bool) -> Outcome:
    """Files of the Hub, fetched by huggingface_hub with the user's token, moved to their places."""
    if (count := unpacked(step.repo, root)) and not sources.missing(source, root):
        return Outcome(step.repo, True, f"there already, {count:,} files")
    folder = root / STATE / "hub" / step.repo.replace("/", "__")
    try:
        members = _snapshot(step, folder, root, keep)
        note_members(step.repo, root, members)
    except (UnsafeError, OSError, InputError) as error:
        return Outcome(step.repo, False, _without_token(str(error)))
    shutil.rmtree(folder, ignore_errors=True)
    return Outcome(step.repo, True, f"{len(members):,} files fetched")


def _snapshot(step: Hub, folder: Path, root: Path, keep: bool) -> dict[str, int]:
    """The files placed, with their sizes in bytes. Raises InputError for what the Hub refuses."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    page = f"https://huggingface.co/datasets/{step.repo}"
    try:
        patterns = list(step.patterns)
        snapshot_download(step.repo, repo_type="dataset", local_dir=folder, allow_patterns=patterns)
    except (GatedRepoError, RepositoryNotFoundError):
        raise InputError(
            f"accept its terms at {page}, make a token at https://huggingface.co/settings/tokens "
            "and set HF_TOKEN to it"
        ) from None
    except Exception as error:  # its own kinds, those of its HTTP library, OSError
        first = _without_token(str(error)).strip().partition("\n")[0]
        raise InputError(f"the Hub did not send it: {first or type(error).__name__}") from None
    members = dict[str, int]()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        to = target(path.relative_to(folder).as_posix(), step.files)
        if to is None:
            continue
        (root / to).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, root / to)
        if to not in step.archives:
            members[to] = (root / to).stat().st_size
            continue
        members |= unpack(root / to, root, step.rules, step.unpacked)
        if not keep:
            (root / to).unlink()
    if not members:
        raise InputError(f"{page} holds none of the files that are wanted")
    return members


def _without_token(text: str) -> str:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return text


def _write_classes(folder: Path) -> bool:
    """Make pets/classes.txt from the file names, if the authors' could not be fetched."""
    names = {p.stem.rpartition("_")[0] for p in folder.glob("images/*.jpg")}
    if not names or (folder / "classes.txt").exists():
        return False
    lines = sorted(name.replace("_", " ").lower() for name in names)
    storage.write_text(str(folder / "classes.txt"), "\n".join(lines) + "\n")
    log.info("pets/classes.txt: made from the file names, %d classes", len(lines))
    return True


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

    with ThreadPoolExecutor(min(THREADS, per_host * len(hosts))) as pool:
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


def fetch_batch(
    table: pa.Table, reach: Reach, folder: str, per_host: int, counter: Any
) -> pa.Table:
    """What a Ray task does: rows of (ids, urls) to rows of RESULT."""
    root, client = reach.open()
    lines: list[dict[str, Any]] = []
    for shard in table.to_pylist():
        rows = list(zip(shard["ids"], shard["urls"], strict=True))
        lines += fetch_shard(rows, root / folder, client, per_host, counter.add.remote)
    return pa.Table.from_pylist(lines, RESULT)


class Tally:
    """An actor that adds up what the tasks report, for the progress lines."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, status: str, size: int) -> None:
        self.counts[status] += 1
        self.counts["bytes"] += size

    def read(self) -> Counter[str]:
        return self.counts


def _fetch_images(listing: ImageList, reach: Reach, config: Config) -> Outcome:
    """Fetch the images of a list that are neither there nor known to be dead."""
    root = Path(reach.root)
    results = root / STATE / "images" / "results"
    merge_results(results, root / listing.folder)  # of a run that was interrupted
    try:
        wanted = dict(sources.image_addresses(listing, root))
    except InputError as error:
        return Outcome(listing.csv, False, str(error))
    dead = {} if config.retry_dead else read_dead(root / listing.folder)
    there = _there(root / listing.folder)
    todo = [(n, url) for n, url in wanted.items() if n not in there and url not in dead]
    todo = todo[: config.limit]
    (root / listing.folder).mkdir(parents=True, exist_ok=True)
    if todo:
        log.info("%s: %s images to fetch", listing.folder, f"{len(todo):,}")
        _run_on_ray(todo, listing, reach, config, results)
    counts = merge_results(results, root / listing.folder)
    text = f"{counts['fetched']:,} fetched, {counts['dead']:,} dead, {counts['failed']:,} failed"
    why = counts.most_common_reasons()
    return Outcome(listing.folder, counts["failed"] == 0, text + why)


def _run_on_ray(
    todo: list[tuple[str, str]], listing: ImageList, reach: Reach, config: Config, results: Path
) -> None:
    """Ray Data from a Parquet table of shards to Parquet results."""
    import ray
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    from diffitm.distributed.session import SPARE_CPUS

    groups = shards(todo)
    table = {
        "ids": [[n for n, _ in g] for g in groups],
        "urls": [[u for _, u in g] for g in groups],
    }
    work = results.with_name("work.parquet")
    work.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(table), work)
    free = max(0.5, ray.cluster_resources().get("CPU", 0) - SPARE_CPUS)
    tasks = max(1, min(config.connections // THREADS, len(groups), int(free * 4)))
    tally = ray.remote(num_cpus=0)(Tally).remote()
    read = ray.data.read_parquet(str(work))
    read.context.enable_progress_bars = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        fetched = read.repartition(target_num_rows_per_block=1).map_batches(
            fetch_batch,
            fn_args=(reach, listing.folder, config.per_host, tally),
            compute=ray.data.TaskPoolStrategy(size=tasks),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=min(1.0, int(100 * free / tasks) / 100),
            max_retries=RETRIES,
        )
    with _Progress(tally, listing.folder, len(todo)):
        try:
            fetched.write_parquet(str(results))
        except Exception as error:
            if "No space left on device" in str(error):
                text = (
                    f"--data {reach.root}: no space left; free some and run the same command again"
                )
                raise InputError(text) from None
            raise


class _Progress(threading.Thread):
    """Logs counts, rate and the time left."""

    def __init__(self, tally: Any, name: str, total: int) -> None:
        super().__init__(daemon=True)
        self.tally, self.label, self.total = tally, name, total
        self.stopped = threading.Event()

    def __enter__(self) -> _Progress:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join()

    def run(self) -> None:
        import ray

        from diffitm.distributed.score import clock

        start = time.monotonic()
        while not self.stopped.wait(REPORT_EVERY):
            try:
                counts = ray.get(self.tally.read.remote(), timeout=30)
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError:
                return
            done = sum(counts[status] for status in ("fetched", "dead", "failed"))
            if done:
                rate = done / (time.monotonic() - start)
                log.info(
                    "%s: %s of %s (%.0f%%): %s fetched, %s dead, %s failed, %.1f/s, %s left",
                    *(self.label, f"{done:,}", f"{self.total:,}", 100 * done / self.total),
                    *(f"{counts[s]:,}" for s in ("fetched", "dead", "failed")),
                    *(rate, clock((self.total - done) / rate)),
                )


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


def _there(folder: Path) -> set[str]:
    """Ids of the images that are there: each was written whole, after it had been decoded."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {e.name[:-4] for e in entries if e.name.endswith(".jpg") and e.stat().st_size}


def _lacking_images(source: Source, root: Path) -> tuple[list[str], str]:
    """What the image lists of a data set lack, and a line about them."""
    for step in source.steps:
        if isinstance(step, ImageList) and (root / step.csv).is_file():
            wanted = dict(sources.image_addresses(step, root))
            there, dead = _there(root / step.folder), read_dead(root / step.folder)
            have = sum(name in there for name in wanted)
            gone = sum(name not in there and url in dead for name, url in wanted.items())
            left = len(wanted) - have - gone
            line = f"{have:,} of {len(wanted):,} images, {gone:,} dead links (svo/dead_links.csv)"
            lack = f"{left:,} images were not fetched yet: run the same command again"
            return [lack] if left else [], line
    return [], ""


def _report(chosen: dict[str, Source], outcomes: list[Outcome], root: Path) -> None:
    """Print what is there and what is missing. Raises InputError if anything is."""
    errors = []
    for name, source in chosen.items():
        try:
            lacking, line = _lacking_images(source, root)
        except InputError as error:
            lacking, line = [str(error)], ""
        lacking += sources.missing(source, root)
        names = [
            step.repo if isinstance(step, Hub) else getattr(step, "to", "") for step in source.steps
        ]
        failed = [o for o in outcomes if not o.good and o.name in names]
        size = sum(_size(root / folder) for folder in {name, *(n.partition("/")[0] for n in names)})
        state = "incomplete" if lacking or failed else "complete"
        _print(f"{name:<11} {state:<11} {size / 1e6:>10,.1f} MB  {line or source.licence}")
        problems = [f"{o.name}: {o.text}" for o in failed] + lacking
        if lacking and source.by_hand:
            problems.append(f"by hand: {source.by_hand}")
        for problem in problems:
            _print(f"    {problem}")
        if problems:
            errors.append(f"{name}: {problems[-1 if source.by_hand else 0]}")
    if errors:
        raise InputError("not complete\n" + "\n".join(f"  {error}" for error in errors))


def _size(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(
        os.lstat(os.path.join(where, name)).st_size
        for where, _, names in os.walk(folder)
        for name in names
    )


def _print(line: str) -> None:
    sys.stdout.write(line.rstrip() + "\n")
