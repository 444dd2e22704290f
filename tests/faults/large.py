"""A large run of actors that sleep 50 ms a pair: how long they wait, and the driver's memory.

`python -m tests.faults.large --actors 16 --pairs 20000 --nodes 1`; everything but the model is that
of a real run. Actors wait whenever their model does nothing. What counts is the time from when the last
actor has its model to the last pair; the end, where some actors have no block left, is in it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import ray

from diffitm.commands.stages.score import score
from diffitm.distributed import session
from diffitm.store import pair_table
from diffitm.store.score_store import Store, open_store
from diffitm.store.work_table import finish, open_pairs
from tests.faults.sleeping import Actor, SleepSpec, examples, read_trace, similarity

CPUS = 0.1  # of an actor; asleep, it needs next to none
SPARE = 2  # processors of a node that its actors do not take
FIRST = 10_000  # pairs from which on the driver's memory counts
POINTS = 20


@dataclass
class Figures:
    """What a run shows. `curve`: pairs done and the driver's resident memory in MiB."""

    actors: int
    pairs: int
    object_store: float  # of all nodes, in MiB
    seconds: float  # that count
    start_up: float  # before, until all actors are up
    waiting: float
    written: float  # after the last pair, until the run has ended
    driver: float  # processors that the driver used while actors scored
    curve: list[tuple[int, float]]

    @property
    def growth(self) -> float:
        """Of the memory since the first pairs, in MiB."""
        first = next(memory for done, memory in self.curve if done >= FIRST)
        return self.curve[-1][1] - first

    def show(self) -> str:
        step = max(1, len(self.curve) // POINTS)
        lines = [
            f"{self.actors} actors, {self.pairs:,} pairs, each once and with the right score",
            f"start-up {self.start_up:.0f} s, scoring {self.seconds:.0f} s "
            f"({self.pairs / self.seconds:.0f} pairs/s), then {self.written:.0f} s to the end",
            f"waiting: {100 * self.waiting:.1f}% of the actors' time",
            f"the driver used {self.driver:.2f} of a processor",
            f"driver's memory from {FIRST:,} pairs on: {self.growth:+.0f} MiB",
            *(f"{done:>12,} pairs {memory:6.0f} MiB" for done, memory in self.curve[::step]),
        ]
        return "\n".join(lines)


class Memory(threading.Thread):
    """The driver's resident memory every second, by pairs done."""

    def __init__(self, trace: Path) -> None:
        super().__init__(daemon=True)
        self.trace, self.curve = trace, list[tuple[int, float]]()
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(1):
            self.note()

    def note(self) -> None:
        done = sum(block.pairs for actor in read_trace(self.trace) for block in actor.blocks)
        self.curve.append((done, psutil.Process().memory_info().rss / 2**20))


def waiting(actors: list[Actor], start: float, end: float, seconds: float) -> float:
    """The share of the time between `start` and `end` in which the model, of so many seconds a pair, had
    nothing to do."""
    busy = 0.0
    for block in (block for actor in actors for block in actor.blocks):
        within = max(0.0, min(block.end, end) - max(block.start, start))
        busy += seconds * block.pairs * within / (block.end - block.start)
    return 1 - busy / (len(actors) * (end - start))


def check(store: Store, wanted: int) -> None:
    """Every pair once, with the score that it must have."""
    seen = set()
    for batch in store.dataset().to_batches(columns=["image", "text", "similarity", "l2"]):
        for line in batch.to_pylist():
            value = similarity(line["image"], line["text"])
            assert line["similarity"] == value or set(line["l2"]) == {value}, line
            seen.add((line["image"], line["text"]))
    assert len(seen) == wanted == store.dataset().count_rows()


def measure(out: str, spec: SleepSpec, given: argparse.Namespace, address: str) -> Figures:
    """Score the pairs on the cluster, from examples to the store, and check that."""
    trace = Path(spec.trace)
    trace.mkdir()
    store = open_store(out, "sleeping", spec.store_config())
    drawn = examples(given.pairs, given.texts)
    uri, _ = pair_table.write_examples("sleeping", drawn, f"{out}/examples", None)
    work = open_pairs(out, store, [uri], [uri])
    session.connect(address)
    pool = session.choose_pool(given.actors, None, CPUS, given.gpus)
    memory = Memory(trace)
    memory.start()
    begin, used = time.time(), time.process_time()
    finish(work, score(spec, work, store, pool))  # type: ignore[arg-type]
    end, used = time.time(), time.process_time() - used
    memory.stopped.set()
    memory.join()
    memory.note()
    found = read_trace(trace)
    up, last = max(a.up for a in found), max(b.end for a in found for b in a.blocks)
    share = waiting(found, up, last, spec.seconds)
    check(store, given.pairs)
    size = ray.cluster_resources()["object_store_memory"] / 2**20
    times = (last - up, up - begin, share, end - last, used / (end - up))
    return Figures(len(found), given.pairs, size, *times, memory.curve)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--actors", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--texts", type=int, default=5, help="pairs of an image")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.05, help="that a pair takes")
    parser.add_argument("--timesteps", type=int, default=0, help="errors of a pair")
    parser.add_argument("--read", type=float, default=0.06, help="seconds that an image takes")
    parser.add_argument("--gpus", type=float, default=0.0, help="of an actor, as numbers")
    parser.add_argument("--object-store", type=int, default=200, help="MiB a node")
    parser.add_argument("--out", type=Path, help="folder of the run, kept; figures.json lies in it")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "100")  # or Ray warns of more
    from ray.cluster_utils import Cluster

    each = int(CPUS * -(-given.actors // given.nodes)) + 1 + SPARE
    node = {"num_cpus": each, "object_store_memory": given.object_store * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder)
        out.mkdir(exist_ok=True)
        try:
            for _ in range(given.nodes - 1):
                cluster.add_node(**node)
            spec = SleepSpec(str(out / "trace"), given.seconds, given.timesteps, given.read)
            figures = measure(str(out), spec, given, cluster.address)
        finally:
            ray.shutdown()
            cluster.shutdown()
        (out / "figures.json").write_text(json.dumps(asdict(figures)))
        sys.stdout.write(figures.show() + "\n")


if __name__ == "__main__":
    main()
