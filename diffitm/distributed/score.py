"""Score a work table with a pool of actors: Ray Data from Parquet to Parquet, with its checkpoints."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data

from diffitm import storage
from diffitm.distributed.progress import REPORT_EVERY, Watch, clock
from diffitm.distributed.session import Pool
from diffitm.distributed.stages import checkpoint, through_actors
from diffitm.errors import InputError
from diffitm.resume import Work
from diffitm.schema import SCORES
from diffitm.scorers import Spec
from diffitm.scoring import Work as WorkRow
from diffitm.store import Store

log = logging.getLogger("diffitm")
# A block is what a kill costs an actor, and what moves the progress on.
ROWS_PER_BLOCK = 32
FORWARDS_PER_BLOCK = 5000
BLOCKS_PER_ACTOR = 8
PATIENCE = 20  # half seconds that the estimate waits for the other actors


@dataclass(frozen=True)
class Done:
    """What a run did: pairs, forwards of the model, failed pairs, and how long actors computed."""

    pairs: int = 0
    forwards: int = 0
    failures: int = 0
    busy: float = 0.0
    actors: int = 0
    rate: float = 0.0


class Counter:
    """Adds up what the actors report, for the progress lines."""

    def __init__(self) -> None:
        self.done = Done()

    def ready(self, rate: float) -> None:
        """An actor is up; `rate` is its measured forwards a second."""
        d = self.done
        self.done = Done(d.pairs, d.forwards, d.failures, d.busy, d.actors + 1, d.rate + rate)

    def add(self, pairs_done: int, forwards: int, failures: int, busy: float) -> None:
        d = self.done
        self.done = Done(
            d.pairs + pairs_done,
            d.forwards + forwards,
            d.failures + failures,
            d.busy + busy,
            d.actors,
            d.rate,
        )

    def read(self) -> Done:
        return self.done


class ScoringActor:
    """Loads the model once and scores blocks of work rows."""

    def __init__(self, spec: Spec, device: str, counter: Any) -> None:
        self.counter = counter
        self.failure: InputError | None = None
        try:
            self.scorer = spec.build(device)
        except InputError as error:  # Ray would try a constructor again; a call fails at once
            self.failure = error
            return
        counter.ready.remote(self.scorer.measure_rate())

    def __call__(self, table: pa.Table) -> pa.Table:
        if self.failure is not None:
            raise self.failure
        start = time.perf_counter()
        rows = [WorkRow(**line) for line in table.select(["row", "image", "texts"]).to_pylist()]
        lines = self.scorer.score(rows)
        failed = sum(line["failure"] is not None for line in lines)
        forwards = (len(lines) - failed) * self.scorer.cost
        self.counter.add.remote(len(lines), forwards, failed, time.perf_counter() - start)
        return pa.Table.from_pylist(lines, SCORES)


def score(spec: Spec, work: Work, store: Store, pool: Pool) -> Done:
    """Score the rows of the work table that the checkpoint does not hold yet.

    Raises whatever ended the run; every block written before stays and is not done again.
    """
    found, path = storage.filesystem(work.table.uri)
    counter = ray.remote(num_cpus=0)(Counter).remote()
    table = ray.data.read_parquet(path, filesystem=found)
    table.context.enable_progress_bars = False
    table.context.checkpoint_config = checkpoint(work.checkpoint, "row")
    blocks = table.repartition(target_num_rows_per_block=_block_rows(work, spec.cost, pool))
    scored = through_actors(blocks, ScoringActor, (spec, pool.device, counter), pool)
    out, folder = storage.filesystem(store.uri)
    lines = _Lines(store.model, work.pairs_left, spec.cost, pool.min_actors)
    with Watch(counter, lines.tell, seconds=0.5):
        scored.write_parquet(folder, filesystem=out)
    return ray.get(counter.read.remote())


def _block_rows(work: Work, cost: int, pool: Pool) -> int:
    """Rows of a block: enough blocks for every actor, none of them too long."""
    per_actor = -(-work.rows_left // (BLOCKS_PER_ACTOR * pool.min_actors))
    affordable = FORWARDS_PER_BLOCK * work.rows_left // (work.pairs_left * cost)
    return max(1, min(ROWS_PER_BLOCK, per_actor, affordable))


class _Lines:
    """The estimate when the actors are up, then the rate and the time left."""

    def __init__(self, name: str, pairs_left: int, cost: int, actors: int) -> None:
        self.name, self.total, self.cost, self.actors = name, pairs_left, cost, actors
        self.waited, self.first, self.next_line = 0, 0.0, 0.0

    def tell(self, done: Done) -> None:
        now = time.monotonic()
        self.waited += done.actors > 0
        enough = done.actors >= self.actors or self.waited > PATIENCE
        if done.actors and not self.first and enough:
            self.first, self.next_line = now, now + REPORT_EVERY
            self._estimate(done)
        if self.first and done.pairs and now >= self.next_line:
            self.next_line = now + REPORT_EVERY
            rate = done.pairs / (now - self.first)
            left = clock((self.total - done.pairs) / rate)
            share = 100 * done.pairs / self.total
            text = "%s: %s of %s pairs (%.0f%%), %.0f forwards/s, %s left"
            count, total = f"{done.pairs:,}", f"{self.total:,}"
            log.info(text, self.name, count, total, share, rate * self.cost, left)

    def _estimate(self, done: Done) -> None:
        if done.rate:
            rate = done.rate / done.actors * self.actors
            text = "%s: %d of %d actors up, %.0f forwards/s each: about %s"
            left = clock(self.total * self.cost / rate)
            log.info(text, self.name, done.actors, self.actors, done.rate / done.actors, left)
