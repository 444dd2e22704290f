"""What a large store costs before and after its compaction: files, bytes, time and memory.

python -m benchmarks.store --pairs 1000000 3000000

Pairs and errors are drawn: an image in eleven (ten texts and the empty one), all in the files of blocks that
a run leaves, a few whole images each, in no order of images. 'list' looks at the store, 'resume' writes the
work table of all images, of whose pairs none is left to do. A task asks for the images of one of the store's
TASKS folders, for as many all over it ('spread'), or for all. Each line is a process of its own: seconds and
processor seconds ('busy') without the imports, and its most memory, in which they are ('nothing').
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from diffitm.core.schema import EXAMPLES, SCORES

STEPS = 10
TEXTS = 10
BLOCK = 2200  # pairs of a file: a minute of a GPU that does 400 forwards a second
TASKS = 20
ASKS = ("nothing", "list", "resume", "folder", "spread", "all")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--block", type=int, default=BLOCK, help="pairs of a file")
    parser.add_argument("--ask", nargs=2, help="what to do (compact or one of ASKS) in a folder")
    given = parser.parse_args()
    if given.ask:
        ask(given.ask[0], Path(given.ask[1]))
        return
    print(
        f"{'pairs':>11} {'what':>9} {'files':>7} {'MB':>7} {'seconds':>8} {'busy':>6} {'MiB':>6}  result"
    )
    for pairs in given.pairs:
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder), pairs, given.block)
            for what in (*ASKS, "compact", *ASKS[1:]):
                tell(pairs, what, Path(folder))


def tell(pairs: int, what: str, folder: Path) -> None:
    """Do it in a process of its own and print what it took."""
    command = [sys.executable, "-m", "benchmarks.store", "--ask", what, str(folder)]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{what}: exit code {os.waitstatus_to_exitcode(status)}")
    found = json.loads((folder / "answer.json").read_text())
    files = [path.stat().st_size for path in (folder / "store").glob("*.parquet")]
    took = f"{found['seconds']:>8.1f} {found['busy']:>6.1f}"
    print(
        f"{pairs:>11,} {what:>9} {len(files):>7,} {sum(files) / 1e6:>7,.0f} {took} "
        f"{usage.ru_maxrss / 1024:>6,.0f}  {found['result']}",
        flush=True,
    )


def ask(what: str, folder: Path) -> None:
    """Do it and leave the seconds that it took, without imports, and the result."""
    from diffitm.evaluation.evaluate import evaluate
    from diffitm.store.compaction import compact
    from diffitm.store.pair_table import write_work
    from diffitm.store.score_store import read_store

    store = read_store(str(folder / "store"))
    start, busy, result = time.perf_counter(), time.process_time(), ""
    if what == "compact":
        compact(store)
    elif what == "list":
        result = f"{store.rows:,} rows"
    elif what == "resume":
        table = write_work([str(folder / "all.parquet")], store, str(folder / "work.parquet"))
        result = f"{table.pairs:,} pairs to do"
    elif what != "nothing":
        rows = evaluate({"flickr30k_text": str(folder / f"{what}.parquet")}, [store]).rows
        result = ", ".join(f"{row.metric} {row.value:.6f}" for row in rows[:2])
    found = {"seconds": time.perf_counter() - start, "busy": time.process_time() - busy}
    (folder / "answer.json").write_text(json.dumps({**found, "result": result}))


def draw(folder: Path, pairs: int, block: int) -> None:
    """Write the store, and the examples of every image, of one folder's and of as many all over."""
    config = {
        "kind": "diffusion",
        "protocol": "diffusionitm",
        "timesteps": list(range(0, 1000, 1000 // STEPS)),
    }
    (folder / "store").mkdir(parents=True)
    (folder / "store" / "_config.json").write_text(json.dumps({"model": "drawn", **config}))
    images = pairs // (TEXTS + 1)
    for name, chosen in (
        ("all", np.arange(images)),
        ("folder", np.arange(images // TASKS)),
        ("spread", np.arange(0, images, TASKS)),
    ):
        with parquet.ParquetWriter(folder / f"{name}.parquet", EXAMPLES) as writer:
            for start in range(0, len(chosen), 50_000):
                writer.write_table(_examples(chosen[start : start + 50_000], start, images))
    numbers = np.random.default_rng(0)
    order = numbers.permutation(-(-images // (each := max(1, block // (TEXTS + 1)))))
    for number, place in enumerate(order):
        some = np.arange(place * each, min(images, (place + 1) * each))
        table = _scores(some, images, numbers)
        parquet.write_table(table, folder / "store" / f"drawn-{number:07d}.parquet")


def _name(image: int, images: int) -> str:
    return f"task{image * TASKS // images:02d}/images/{image:012d}.jpg"


def _texts(image: int) -> list[str]:
    return [f"a drawn text, the {j}th of {TEXTS} that image {image} has" for j in range(TEXTS)]


def _examples(some: np.ndarray, first: int, images: int) -> pa.Table:
    count = len(some)
    names = [_name(int(image), images) for image in some]
    columns = {
        "task": ["flickr30k_text"] * count,
        "position": np.arange(first, first + count),
        "id": [str(image) for image in some],
        "images": [[name] for name in names],
        "texts": [_texts(int(image)) for image in some],
        "direction": ["text"] * count,
        "gold": np.zeros(count, np.int32),
        "cluster": names,
        "groups": [[] for _ in names],
        "unconditional": [True] * count,
        "failure": pa.nulls(count, pa.string()),
    }
    return pa.table(columns, EXAMPLES)


def _scores(some: np.ndarray, images: int, numbers: np.random.Generator) -> pa.Table:
    count = len(some) * (TEXTS + 1)
    starts = np.arange(count + 1, dtype=np.int32) * STEPS
    size = numbers.random((count, STEPS), np.float32)
    lists = {
        name: pa.ListArray.from_arrays(starts, pa.array((low + size * high).ravel()))
        for name, low, high in (("l2", 60, 60), ("l1", 0.4, 0.4), ("huber", 0.1, 0.3))
    }
    steps = np.tile(np.arange(0, 1000, 1000 // STEPS, dtype=np.int32), count)
    columns = {name: pa.nulls(count, SCORES.field(name).type) for name in SCORES.names}
    columns |= {
        "row": np.repeat(some, TEXTS + 1),
        "image": np.repeat([_name(int(image), images) for image in some], TEXTS + 1),
        "text": [text for image in some for text in ["", *_texts(int(image))]],
        "timesteps": pa.ListArray.from_arrays(starts, pa.array(steps)),
        "elements": np.full(count, 16384, np.int32),
        "digest": np.repeat([f"{int(image) * 7919:064x}" for image in some], TEXTS + 1),
        **lists,
    }
    return pa.table(columns, SCORES)


if __name__ == "__main__":
    main()
