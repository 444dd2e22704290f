"""Helpers of the slow tests of training: processes, losses, sizes of weights."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Collection
from pathlib import Path

from torch import Tensor


def checkpoints(out: Path) -> set[Path]:
    return set(out.glob("train/*/checkpoint_*"))


def wait_for(out: Path, process: subprocess.Popen[bytes], known: Collection[Path] = ()) -> None:
    """Until there is a checkpoint that is not known."""
    end = time.monotonic() + 300
    while not checkpoints(out) - set(known):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.2)


def wait_until(words: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the log has them."""
    end = time.monotonic() + 300
    while words not in log.read_text():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.2)


def parents() -> dict[int, int]:
    """Process -> its parent."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return found


def training_worker(driver: int) -> int:
    """The process of Ray Train's worker below the driver."""
    known = parents()
    for process in known:
        above, name = process, ""
        while above in known and above != driver:
            above = known[above]
        try:
            name = Path(f"/proc/{process}/cmdline").read_text()
        except OSError:
            continue
        if above == driver and "RayTrainWorker" in name:
            return process
    raise AssertionError("no training worker was found")


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def norm(weights: dict[str, Tensor]) -> float:
    return sum(float(value.norm() ** 2) for value in weights.values()) ** 0.5
