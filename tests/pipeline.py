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

from diffitm.shapes.layouts import World, write_flickr30k

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 480


def command(*options: object, script: str = "gdbench") -> list[str]:
    file = ROOT / "pipelines" / f"{script}.py"
    return [sys.executable, str(file), *(str(option) for option in options)]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, "PYTHONUNBUFFERED": "1", **more}


def run(
    *options: object, code: int = 0, script: str = "gdbench", **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the pipeline to its end and check its exit code."""
    done = subprocess.run(
        command(*options, script=script),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment(**env),
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(*options: object, log: Path, script: str = "gdbench") -> subprocess.Popen[bytes]:
    """Start the pipeline in the background in a process group of its own."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command(*options, script=script),
            stdout=file,
            stderr=file,
            env=environment(),
            start_new_session=True,
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


def captioned_world(root: Path, scenes: int, broken: str) -> dict[str, list[str]]:
    """flickr30k/images of the world, the one named `broken` cut off, and captions.json by image."""
    write_flickr30k(World(str(root), scenes))
    lists = json.loads((root / "flickr30k" / "val_top10_RN50x64.json").read_text())
    by_image: dict[str, list[str]] = {}
    for caption, paths in lists.items():
        by_image.setdefault(paths[0].rpartition("/")[2], []).append(caption)
    (root / "captions.json").write_text(json.dumps(by_image))
    image = root / "flickr30k" / "images" / broken
    image.write_bytes(image.read_bytes()[:200])
    return by_image
