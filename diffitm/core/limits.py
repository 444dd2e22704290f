"""What of the machine this process may use: its memory and its processors, in a container those of it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


class Limits(NamedTuple):
    """Bytes of memory, and processors."""

    memory: int
    processors: int


def limits(groups: Path = GROUPS, own: Path = OWN) -> Limits:
    """What the machine has, less where a control group (version 1 or 2) or the affinity gives less."""
    memory = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    affinity = getattr(os, "sched_getaffinity", None)
    processors = [float(len(affinity(0)) if affinity else os.cpu_count() or 1)]
    for folder in _folders(groups, own):
        memory += _numbers(folder / "memory.max") + _numbers(folder / "memory.limit_in_bytes")
        share = _numbers(folder / "cpu.max") or [
            *_numbers(folder / "cpu.cfs_quota_us"),
            *_numbers(folder / "cpu.cfs_period_us"),
        ]
        if len(share) == 2 and min(share) > 0:  # a quota of -1 is none
            processors.append(share[0] / share[1])
    return Limits(int(min(memory)), max(1, math.ceil(min(processors))))


def _folders(groups: Path, own: Path) -> Iterator[Path]:
    """Folders of the process's control groups and of those that they lie in."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = groups / controllers
        # A container may see its own group as the top, under the path that it has outside.
        below = top / path.lstrip("/")
        yield from (folder for folder in (below, *below.parents) if folder.is_relative_to(top))


def _numbers(path: Path) -> list[float]:
    """The numbers of a control file; none where it is not there or says 'max'."""
    try:
        return [float(word) for word in path.read_text().split()] if path.is_file() else []
    except (OSError, ValueError):
        return []
