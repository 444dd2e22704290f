"""Helpers of the slow tests: run the pipeline as a user does and read what it leaves."""

from __future__ import annotations

import io
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffitm.shapes.layouts import World, write_flickr30k

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 480


def command(*options: object, script: str = "gdbench") -> list[str]:
    file = ROOT / "pipelines" / f"{script}.py"
    return [sys.executable, str(file), *(str(option) for option in options)]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, "PYTHONUNBUFFERED": "1", **more}


Done = subprocess.CompletedProcess[str]


def run(*options: object, code: int = 0, script: str = "gdbench", **env: str) -> Done:
    """Run the pipeline to its end and check its exit code.

    It runs in this process, and in the Ray that the first one started, which saves half a minute; in one
    of its own where it is given settings of the environment or joins another cluster.
    """
    call = command(*options, script=script)
    if env or any(str(option).startswith(("--ray", "ray=")) for option in options):
        done = subprocess.run(
            call, capture_output=True, text=True, timeout=TIMEOUT, env=environment(**env)
        )
    else:
        done = _run_here(call)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def _run_here(call: list[str]) -> Done:
    """The script, as the interpreter would run it as the main program."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    logger, handler = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    kept = logger.handlers[:]
    logger.handlers[:] = []  # the script sets its own
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", call[1:])
        try:
            runpy.run_path(call[1], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            logger.handlers[:] = kept
            signal.signal(signal.SIGTERM, handler)
    return Done(call, code, out.getvalue(), err.getvalue())


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
    """Blocks that Ray Data's checkpoint holds."""
    found: set[int] = set()
    for path in out.glob("work/*/*/checkpoint/*.parquet"):
        if not path.name.endswith(".pending.parquet"):
            try:
                found |= set(pq.read_table(path)["row"].to_pylist())
            except (pa.ArrowInvalid, OSError):
                continue  # being written or renamed right now
    return found


def images_done(out: Path) -> int:
    """How many images the blocks in the checkpoint have."""
    done, count = committed(out), 0
    for path in out.glob("work/*/*/blocks.parquet"):
        table = pq.read_table(path)
        each = zip(table["row"].to_pylist(), table["images"].to_pylist(), strict=True)
        count += sum(images for row, images in each if row in done)
    return count


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
