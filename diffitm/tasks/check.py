"""Which tasks a data root can run: files that are missing, images that are missing or unreadable."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from diffitm.core import images, storage
from diffitm.core.errors import InputError
from diffitm.core.schema import fault
from diffitm.tasks.base import Task

log = logging.getLogger("diffitm")
THREADS = 8
CHUNK = 256
Crop = tuple[int, int, int, int]
REPORT_EVERY = 10.0


@dataclass(frozen=True)
class TaskState:
    """What a data root has of a task. `problem` says which file is missing or wrong; `missing` and
    `unreadable` count images, `failed` the examples that their file itself spoils, `first` names one
    of all these with the reason. `published` is how many examples there should be, where that is known."""

    task: str
    state: Literal["ready", "incomplete", "absent"]
    source: str
    examples: int = 0
    images: int = 0
    missing: int = 0
    unreadable: int = 0
    failed: int = 0
    problem: str = ""
    first: str = ""
    published: int | None = None

    @property
    def can_run(self) -> bool:
        """What lacks its image fails alone; a task without any image or sound example cannot run."""
        return self.images > self.missing + self.unreadable and self.examples > self.failed


def check(task: Task, root: str) -> TaskState:
    """Read the task's files and decode every image that its examples name."""
    name, source = task.name, task.source
    try:
        examples = list(task.examples(root))
    except InputError as error:
        there = storage.files(storage.join(root, task.folder), recursive=True)
        state: Literal["incomplete", "absent"] = "incomplete" if there else "absent"
        return TaskState(name, state, source, problem=str(error))
    if not examples:
        folder = storage.join(root, task.folder)
        return TaskState(name, "absent", source, problem=f"{folder} holds no example")
    crops: dict[str, set[Crop]] = {}
    for path, crop in (images.split_crop(ref) for e in examples for ref in e.images):
        crops.setdefault(path, set()).update([crop] if crop else [])
    missing, unreadable = _look(name, root, crops)
    failures = [(e.id, why) for e in examples if (why := e.failure or fault(e))]
    bad = [*missing, *unreadable, *(f"example {number}: {why}" for number, why in failures)]
    return TaskState(
        task=name,
        state="incomplete" if bad else "ready",
        source=source,
        examples=len(examples),
        images=len(crops),
        missing=len(missing),
        unreadable=len(unreadable),
        failed=len(failures),
        first=bad[0] if bad else "",
        published=task.published,
    )


def _look(task: str, root: str, crops: dict[str, set[Crop]]) -> tuple[list[str], list[str]]:
    """Images that are missing and images that are unreadable, with reasons."""
    files = {path: images.holder(path) for path in sorted(crops)}
    there = set(_listed(root, {file.rpartition("/")[0] for file in files.values()}))
    missing = [f"{p}: there is no such file" for p, file in files.items() if file not in there]
    present = [path for path, file in files.items() if file in there]
    unreadable: list[str] = []
    told = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(present), CHUNK):
            chunk = present[start : start + CHUNK]
            reasons = pool.map(lambda path: images.problem(root, path, crops[path]), chunk)
            unreadable += [f"{p}: {r}" for p, r in zip(chunk, reasons, strict=True) if r]
            if time.monotonic() - told > REPORT_EVERY:
                told = time.monotonic()
                log.info("%s: %s of %s images read", task, f"{start:,}", f"{len(present):,}")
    return missing, unreadable


def _listed(root: str, folders: Iterable[str]) -> Iterable[str]:
    """Paths below the root of all files in the folders: a listing each, not a request an image."""
    for folder in folders:
        for path in storage.files(storage.join(root, folder) if folder else root):
            name = path.rsplit("/", 1)[-1]
            yield f"{folder}/{name}" if folder else name
