"""One run after which every kind of fault has hit it many times, in a random order.

`python -m tests.faults.many --each 10`: three actors that sleep, on nodes with an object store of
80 MiB. A fault is survived when the run has written another block after it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from diffitm.store.score_store import read_store
from tests import pipeline
from tests.faults.disturb import Disturbed
from tests.faults.large import check
from tests.traced import read_trace

ACTORS = 3
PAIRS = 40_000
KINDS = ("actor killed", "node removed", "driver killed and resumed", "node added")


def hit(run: Disturbed, kind: str) -> str:
    """One fault; returns what it hit."""
    if kind == "actor killed":
        return f"process {run.kill_actor().process}"
    if kind == "node added":
        return f"node {run.add_node().node_id[:8]}"
    if kind == "node removed":
        if len(run.nodes) <= ACTORS:  # as a cluster does that keeps its size
            run.add_node()
        return f"node {run.remove_node().node[:8]}"
    process = run.kill_driver().process
    run.process = run.start()
    return f"with process {process}"


def disturb(run: Disturbed, each: int, seed: int) -> tuple[Counter[str], Counter[str]]:
    """Every kind `each` times; how many were tried and survived."""
    kinds = list(KINDS) * each
    random.Random(seed).shuffle(kinds)
    tried, survived, begin = Counter[str](), Counter[str](), time.monotonic()
    for kind in kinds:
        tried[kind] += 1
        what, done = hit(run, kind), pipeline.images_done(run.out)
        run.committed(done + 1)
        survived[kind] += 1
        seconds = time.monotonic() - begin
        sys.stdout.write(f"{seconds:5.0f} s  {done:6,} images  {kind}: {what}\n")
        sys.stdout.flush()
    return tried, survived


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=10, help="faults of a kind")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Disturbed(Path(folder), ACTORS, asleep=given.pairs, max_actors=ACTORS + 1)
        begin = time.monotonic()
        try:
            run.committed(1)
            tried, survived = disturb(run, given.each, given.seed)
            run.finish()
        finally:
            run.close()
        store = read_store(str(pipeline.store_folder(run.out)))
        check(store, given.pairs)
        computed = run.computed()
        again, lost = len(computed) - len(set(computed)), len(read_trace(run.trace, "busy"))
        for kind in KINDS:
            sys.stdout.write(f"{kind}: {survived[kind]} of {tried[kind]} survived\n")
        sys.stdout.write(
            f"{given.pairs:,} pairs in {time.monotonic() - begin:.0f} s, each once in the store and "
            f"with the right score; {len(set(computed)):,} pairs, {again:,} of them finished twice; "
            f"{lost} blocks of up to {run.block} pairs were cut off\n"
        )


if __name__ == "__main__":
    main()
