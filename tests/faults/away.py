"""A run whose data and results lie in an object store that goes away for a while.

`python -m tests.faults.away --seconds 60`: gdbench on the drawn world in a bucket on loopback, whose server
ends every connection without an answer for that long, from the first committed rows on.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

from diffitm.core import storage
from diffitm.shapes.layouts import write_world
from tests import pipeline
from tests.objects import Objects, reachable, serve

TASKS = ("winoground", "clevr", "flickr30k")


def wait_for_rows(objects: Objects, rows: int, process: object, log: Path) -> None:
    """Until so many files of the checkpoint are there."""
    end = time.monotonic() + 300
    while len(list(objects.folder.glob("out/work/*/*/checkpoint/*.parquet"))) < rows:
        assert process.poll() is None, log.read_text()  # type: ignore[attr-defined]
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def run(seconds: float, scenes: int) -> str:
    """What came of it, in a line; asserts that nothing was lost."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Path(folder, "served")) as objects,
        reachable(objects),
    ):
        write_world(f"{folder}/data", scenes)
        objects.upload(Path(folder, "data"), "data")
        log, begin = Path(folder, "log"), time.monotonic()
        options = ["--model", "shapes", "--data", objects.uri("data"), "--timesteps", 10]
        options += ["--tasks", *TASKS, "--out", objects.uri("out"), "--actors", 2]
        process = pipeline.start(*options, log=log)
        wait_for_rows(objects, 2, process, log)
        objects.server.away = True
        away = time.monotonic()
        time.sleep(seconds)
        objects.server.away = False
        code = process.wait(600)
        text = log.read_text()
        assert code == 0, text
        results = json.loads(storage.read_text(objects.uri("out/results.json")))
        assert not [row for row in results["rows"] if row["failures"]]
        made = re.search(r"([\d,]+) pairs, [\d,]+ forwards done, 0 pairs failed", text)
        assert made, text
        return (
            f"{made[1]} pairs, none failed; the store was away for {seconds:.0f} s, "
            f"{away - begin:.0f} s after the start; {time.monotonic() - begin:.0f} s in all"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--scenes", type=int, default=60)
    given = parser.parse_args()
    sys.stdout.write(run(given.seconds, given.scenes) + "\n")


if __name__ == "__main__":
    main()
