"""Fetching on Ray: archives as tasks, single images through Ray Data."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import parquet

from diffitm.core.errors import InputError
from diffitm.datasets import recipe
from diffitm.datasets.client import Client
from diffitm.datasets.image_fetch import (
    RESULT,
    THREADS,
    fetch_shard,
    fetched_ids,
    merge_results,
    read_dead,
    shards,
)
from diffitm.datasets.network import BrokenError, RefusedError
from diffitm.datasets.options import DataConfig
from diffitm.datasets.recipe import Download, ImageList
from diffitm.datasets.status import Outcome
from diffitm.datasets.unpack import STATE, UnsafeError, place
from diffitm.distributed.progress import REPORT_EVERY, Watch, clock

log = logging.getLogger("diffitm")
RETRIES = 3


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


def start_archives(
    downloads: list[Download], reach: Reach, keep: bool
) -> dict[Any, list[Download]]:
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


def wait_archives(started: dict[Any, list[Download]], root: Path) -> list[Outcome]:
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
    text = f"{step.to}: {have / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
    if step.size:
        text += f", {100 * have / step.size:.0f}%, {clock((step.size - have) / max(rate, 1))} left"
    log.info(text)


def fetch_batch(
    table: pa.Table, reach: Reach, folder: str, per_host: int, threads: int, counter: Any
) -> pa.Table:
    """What a Ray task does: rows of (ids, urls) to rows of RESULT."""
    root, client = reach.open()
    lines: list[dict[str, Any]] = []
    for shard in table.to_pylist():
        rows = list(zip(shard["ids"], shard["urls"], strict=True))
        lines += fetch_shard(
            rows, root / folder, client, per_host, counter.add.remote, threads=threads
        )
    return pa.Table.from_pylist(lines, RESULT)


class FetchCounter:
    """An actor that adds up what the tasks report, for the progress lines."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, status: str, size: int) -> None:
        self.counts[status] += 1
        self.counts["bytes"] += size

    def read(self) -> Counter[str]:
        return self.counts


def fetch_images(listing: ImageList, reach: Reach, config: DataConfig) -> Outcome:
    """Fetch the images of a list that are neither there nor known to be dead."""
    root = Path(reach.root)
    results = root / STATE / "images" / "results"
    merge_results(results, root / listing.folder)  # of a run that was interrupted
    try:
        wanted = dict(recipe.image_addresses(listing, root))
    except InputError as error:
        return Outcome(listing.csv, False, str(error))
    dead = {} if config.retry_dead else read_dead(root / listing.folder)
    there = fetched_ids(root / listing.folder)
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
    todo: list[tuple[str, str]], listing: ImageList, reach: Reach, config: DataConfig, results: Path
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
    threads = min(THREADS, max(1, config.connections // tasks))
    tally = ray.remote(num_cpus=0)(FetchCounter).remote()
    read = ray.data.read_parquet(str(work), override_num_blocks=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        fetched = read.repartition(target_num_rows_per_block=1).map_batches(
            fetch_batch,
            fn_args=(reach, listing.folder, config.per_host, threads, tally),
            compute=ray.data.TaskPoolStrategy(size=tasks),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=min(1.0, int(100 * free / tasks) / 100),
            max_retries=RETRIES,
        )
    with Watch(tally, _lines(listing.folder, len(todo))):
        try:
            fetched.write_parquet(str(results))
        except Exception as error:
            if "No space left on device" in str(error):
                text = (
                    f"--data {reach.root}: no space left; free some and run the same command again"
                )
                raise InputError(text) from None
            raise


def _lines(name: str, total: int) -> Callable[[Counter[str]], None]:
    """Logs counts, rate and the time left."""
    start = time.monotonic()

    def tell(counts: Counter[str]) -> None:
        done = sum(counts[status] for status in ("fetched", "dead", "failed"))
        if done:
            rate = done / (time.monotonic() - start)
            log.info(
                "%s: %s of %s (%.0f%%): %s fetched, %s dead, %s failed, %.1f/s, %s left",
                *(name, f"{done:,}", f"{total:,}", 100 * done / total),
                *(f"{counts[s]:,}" for s in ("fetched", "dead", "failed")),
                *(rate, clock((total - done) / rate)),
            )

    return tell
