"""The steps of pipelines/prepare.py: check, lock the folder, fetch what it lacks, report."""

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
from diffitm.prepare.client import Client, Limits, check_proxy, fetch_bytes
from diffitm.prepare.network import BrokenError, RefusedError



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
