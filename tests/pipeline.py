"""Helpers of the slow tests: run the pipeline as a user does and read what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "pipelines" / "gdbench.py"
TIMEOUT = 480


def command(*options: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *(str(option) for option in options)]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, "PYTHONUNBUFFERED": "1", **more}


def run(*options: object, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the pipeline to its end and check its exit code."""
    done = subprocess.run(
        command(*options), capture_output=True, text=True, timeout=TIMEOUT, env=environment(**env)
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(*options: object, log: Path) -> subprocess.Popen[bytes]:
    """Start the pipeline in the background in a process group of its own."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command(*options), stdout=file, stderr=file, env=environment(), start_new_session=True
        )


def rows(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["rows"]


def store_folder(out: Path, model: str = "shapes") -> Path:
    (found,) = [
        p.parent
        for p in (out / "scores").glob("*/_config.json")
        if json.loads(p.read_text())["model"] == model
    ]
    return found


def scores(out: Path, model: str = "shapes") -> pa.Table:
    """The whole store of a model in a fixed order."""
    table = pq.read_table(store_folder(out, model))
    return table.sort_by([("image", "ascending"), ("text", "ascending")])


def committed(out: Path) -> set[int]:
    """Work rows that Ray Data's checkpoint holds."""
    found: set[int] = set()
    for path in out.glob("work/*/*/checkpoint/*.parquet"):
        if not path.name.endswith(".pending.parquet"):
            try:
                found |= set(pq.read_table(path)["row"].to_pylist())
            except (pa.ArrowInvalid, OSError):
                continue  # being written or renamed right now
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the driver, then wait until its Ray processes have followed it."""
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    for _ in range(100):
        left = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True)
        if not left.stdout.strip():
            return
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
