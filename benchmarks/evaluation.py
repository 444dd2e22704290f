"""What evaluating costs: time and memory by the number of examples.

python -m benchmarks.evaluation --examples 100000 1000000

Examples and stored errors are drawn: half of the examples ask for one of two texts, four in ten for one of
two images, one in ten is a Winoground pair. Pairs are stored in another order than that of the examples.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from diffitm.core.schema import EXAMPLES, SCORES

STEPS = 10
EACH = 10  # examples that share an image, or their images
ROWS = 100_000  # of a file or row group
# Task, its share of the examples, how many images and texts an example has, and what it compares.
PARTS = [
    ("clevr", 0.5, 1, 2, "text"),
    ("svo_verb", 0.4, 2, 1, "image"),
    ("winoground", 0.1, 2, 2, "both"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--timesteps", type=int, default=STEPS)
    parser.add_argument("--folder", help="keep what is drawn, and evaluate it alone")
    given = parser.parse_args()
    if given.folder:
        evaluate(Path(given.folder))
        return
    print(f"{'examples':>10} {'seconds':>8} {'processor s':>12} {'MiB':>7}  results")
    for count in given.examples:
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder), count, given.timesteps)
            start = time.monotonic()
            command = [sys.executable, "-m", "benchmarks.evaluation", "--folder", folder]
            process = subprocess.Popen(command)
            _, status, usage = os.wait4(process.pid, 0)
            if status != 0:
                raise SystemExit(f"exit code {os.waitstatus_to_exitcode(status)}")
            seconds, busy = time.monotonic() - start, usage.ru_utime + usage.ru_stime
            digest = Path(folder, "digest").read_text()
        print(
            f"{count:>10,} {seconds:>8.1f} {busy:>12.1f} {usage.ru_maxrss / 1024:>7,.0f}  {digest}"
        )


def draw(folder: Path, count: int, steps: int) -> None:
    """Write the examples of each task, and a store with all their pairs, of images in no order."""
    config = {"kind": "diffusion", "protocol": "diffusionitm", "timesteps": list(range(steps))}
    (folder / "store").mkdir(parents=True)
    (folder / "store" / "_config.json").write_text(json.dumps({"model": "drawn", **config}))
    numbers = np.random.default_rng(0)
    for task, share, images, texts, direction in PARTS:
        total = int(share * count)
        with (
            parquet.ParquetWriter(folder / f"{task}.parquet", EXAMPLES) as examples,
            parquet.ParquetWriter(folder / "store" / f"{task}.parquet", SCORES) as scores,
        ):
            for start in range(0, total, ROWS):
                rows = np.arange(start, min(start + ROWS, total))
                sets = [f"{task}/{row // EACH}" for row in rows]
                names = [[f"{name}-{i}.png" for i in range(images)] for name in sets]
                words = [
                    [f"text {j} of number {row} of {task}" for j in range(texts)] for row in rows
                ]
                lines = {
                    "task": [task] * len(rows),
                    "position": rows,
                    "id": [str(row) for row in rows],
                    "images": names,
                    "texts": words,
                    "direction": [direction] * len(rows),
                    "gold": rows % (1 if direction == "both" else images * texts),
                    "cluster": sets,
                    "groups": [[("kind", f"k{row % 5}")] for row in rows],
                    "unconditional": [direction != "text"] * len(rows),
                    "failure": pa.nulls(len(rows), pa.string()),
                }
                examples.write_table(pa.table(lines, EXAMPLES))
                pairs = [
                    (i, t)
                    for own, some in zip(names, words, strict=True)
                    for i in own
                    for t in some
                ]
                if direction != "text":
                    pairs += [(i, "") for own in dict.fromkeys(map(tuple, names)) for i in own]
                pairs = [pairs[place] for place in numbers.permutation(len(pairs))]
                errors = numbers.random((len(pairs), steps), np.float32).ravel() + 1
                lists = pa.ListArray.from_arrays(
                    np.arange(len(pairs) + 1, dtype=np.int32) * steps, pa.array(errors)
                )
                table = {
                    name: pa.nulls(len(pairs), SCORES.field(name).type) for name in SCORES.names
                }
                table |= {
                    "image": [pair[0] for pair in pairs],
                    "text": [pair[1] for pair in pairs],
                    "l2": lists,
                    "l1": lists,
                    "huber": lists,
                    "elements": np.full(len(pairs), 4096, np.int32),
                }
                scores.write_table(pa.table(table, SCORES))


def evaluate(folder: Path) -> None:
    """Evaluate what is drawn, and leave a digest of all figures."""
    from diffitm.evaluation.evaluate import evaluate as evaluation
    from diffitm.store.score_store import read_store

    files = {task: str(folder / f"{task}.parquet") for task, *_ in PARTS}
    found = evaluation(files, [read_store(str(folder / "store"))])
    figures = json.dumps(asdict(found), default=str, sort_keys=True)
    (folder / "digest").write_text(hashlib.sha256(figures.encode()).hexdigest()[:12])


if __name__ == "__main__":
    main()
