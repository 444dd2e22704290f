"""What is there in the end, and what is missing."""

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



def _write_classes(folder: Path) -> bool:
    """Make pets/classes.txt from the file names, if the authors' could not be fetched."""
    names = {p.stem.rpartition("_")[0] for p in folder.glob("images/*.jpg")}
    if not names or (folder / "classes.txt").exists():
        return False
    lines = sorted(name.replace("_", " ").lower() for name in names)
    storage.write_text(str(folder / "classes.txt"), "\n".join(lines) + "\n")
    log.info("pets/classes.txt: made from the file names, %d classes", len(lines))
    return True


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
