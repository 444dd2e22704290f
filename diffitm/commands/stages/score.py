"""Score a work table with a pool of actors: Ray Data from Parquet to Parquet, with its checkpoints."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import ray

from diffitm.core import storage
from diffitm.core.schema import RACES, SCORES, WORK, PairRow, read_block
from diffitm.distributed.actors import WorkerSpec
from diffitm.distributed.progress import REPORT_EVERY, Watch, clock
from diffitm.distributed.prometheus import Metrics, gpu_memory
from diffitm.distributed.session import ActorPool, standing, start_here
from diffitm.distributed.stages import Build, checkpoint, in_rounds, read_rows, through_actors
from diffitm.store.pair_table import remaining
from diffitm.store.run_summary import Done

if TYPE_CHECKING:  # an actor imports this module, and its spec what else it needs
    from diffitm.scoring.batching import Batch, Stopwatch
    from diffitm.scoring.diffusion import DiffusionScorer
    from diffitm.scoring.racing import RacePlan
    from diffitm.scoring.specs import Spec
    from diffitm.store.score_store import Store
    from diffitm.store.work_table import OpenWork

log = logging.getLogger("diffitm")
# A block is what a kill costs an actor, and what moves the progress on.
ROWS_PER_BLOCK = 32
FORWARDS_PER_BLOCK = 5000
BLOCKS_PER_ACTOR = 8
PATIENCE = 20  # half seconds that the estimate waits for the other actors


class ScoringCounter:
    """Adds up what the actors report, for the progress lines."""

    def __init__(self) -> None:
        self.done = Done()

    def add(self, part: Done) -> None:
        self.done += part

    def read(self) -> Done:
        return self.done


class ScoringActor:
    """Loads the model once and scores blocks of work rows; `name` is the model's in metrics."""

    def __init__(self, spec: Spec, name: str, device: str, counter: Any) -> None:
        self.device, self.counter = device, counter
        self.scorer = spec.build(device)
        self.batches: list[Batch] = getattr(self.scorer, "batches", [])
        self.loading: Stopwatch | None = getattr(self.scorer, "loading", None)
        for batch in self.batches:
            batch.tell = lambda line: counter.add.remote(Done(smaller=(line,)))
        rate = self.scorer.measure_rate()
        self.metrics = Metrics(name)
        counter.add.remote(Done(actors=1, rate=rate))
        self.free = time.perf_counter()

    def __call__(self, table: pa.Table) -> pa.Table:
        start = time.perf_counter()
        self._loading()  # that of a try which failed is none of this one's
        self.counter.add.remote(Done(begun=1))
        lines = self._score(table)
        self._tell(lines, start)
        return pa.Table.from_pylist(lines, SCORES)

    def _score(self, table: pa.Table) -> list[dict[str, Any]]:
        rows = [PairRow(**line) for line in table.select(WORK.names).to_pylist()]
        return self.scorer.score(rows)

    def _loading(self) -> float:
        """Seconds since the last call in which there was nothing to do but to wait for images."""
        return self.loading.spent() if self.loading else 0.0

    def _tell(self, lines: list[dict[str, Any]], start: float) -> None:
        """Count a block that was begun at `start`."""
        failed = sum(line["failure"] is not None for line in lines)
        end, loading = time.perf_counter(), self._loading()
        done = Done(
            pairs=len(lines),
            forwards=sum(forwards(line, self.scorer.cost) for line in lines),
            failures=failed,
            not_finite=sum(not is_finite(line) for line in lines),
            busy=end - start - loading,
            waited=start - self.free,
            inside=self.batches[0].spent() if self.batches else 0.0,
            finished=1,
            memory=gpu_memory(self.device),
            batch_size=self.batches[0].size if self.batches else 0,
            loading=loading,
        )
        self.free = end
        self.counter.add.remote(done)
        self.metrics.add(done)


class RacingActor(ScoringActor):
    """Holds the races of blocks of contests."""

    def __init__(self, spec: Spec, name: str, plan: RacePlan, device: str, counter: Any) -> None:
        self.plan = plan
        super().__init__(spec, name, device, counter)

    def _score(self, table: pa.Table) -> list[dict[str, Any]]:
        from diffitm.scoring.race_block import BlockRaces  # as the model, of this process alone

        scorer, lines = cast("DiffusionScorer", self.scorer), []
        for line in table.select(RACES.names).to_pylist():
            races = BlockRaces(scorer, read_block(line), self.plan)
            races.run()
            lines += races.lines()
        return lines


def forwards(line: dict[str, Any], cost: int) -> int:
    """Forwards of the model that a line took, where a whole pair takes `cost`."""
    if line["failure"] is not None:
        return 0
    return cost if line.get("positions") is None else len(line["positions"])


def is_finite(line: dict[str, Any]) -> bool:
    """Whether a line's errors or similarity are numbers; one that failed has none."""
    values = line["similarity"] if line["l2"] is None else line["l2"]
    return values is None or bool(np.isfinite(values).all())


def score(
    spec: Spec, work: OpenWork, store: Store, pool: ActorPool, plan: RacePlan | None = None
) -> Done:
    """Score the rows of the work table that the checkpoint does not hold yet; with a plan of races it is a
    table of them.

    Raises whatever ended the run; every block written before stays and is not done again.
    """
    start, counter = time.monotonic(), start_here(ScoringCounter)
    build = Build(ScoringActor, (spec, store.model), counter)
    if plan:
        build = Build(RacingActor, (spec, store.model, plan), counter)
    rows = 1 if plan else _block_rows(work, spec.cost, pool)
    lines = _Lines(store.model, work.left.pairs, spec.cost, pool.min_actors)

    def execute(attempts: Any) -> None:
        found, path = storage.filesystem(work.table.uri)
        table = read_rows(path, found)
        table.context.checkpoint_config = checkpoint(work.checkpoint, "row")
        blocks = table.repartition(target_num_rows_per_block=rows)
        worker = WorkerSpec(build, SCORES, "row", pool.gpus)
        scored = through_actors(blocks, worker, attempts, pool, rows)
        out, folder = storage.filesystem(store.uri)
        with Watch(counter, lines.tell, 0.5, lambda: standing(pool)):
            scored.write_parquet(folder, filesystem=out, try_create_dir=False)

    def left() -> int:
        return remaining(work.table.uri, work.checkpoint).rows

    in_rounds(store.model, execute, left, pool.min_actors)
    done = ray.get(counter.read.remote())
    lines.tell_smaller(done)
    return replace(done, seconds=time.monotonic() - start)


def _block_rows(work: OpenWork, cost: int, pool: ActorPool) -> int:
    """Rows of a block: enough blocks for every actor, none of them too long."""
    per_actor = -(-work.left.rows // (BLOCKS_PER_ACTOR * pool.min_actors))
    affordable = FORWARDS_PER_BLOCK * work.left.rows // (work.left.pairs * cost)
    return max(1, min(ROWS_PER_BLOCK, per_actor, affordable))


class _Lines:
    """The estimate when the actors are up, then the rate and the time left."""

    def __init__(self, name: str, pairs_left: int, cost: int, actors: int) -> None:
        self.name, self.total, self.cost, self.actors = name, pairs_left, cost, actors
        self.waited, self.first, self.next_line = 0, 0.0, 0.0
        self.told = set[str]()

    def tell_smaller(self, done: Done) -> None:
        """Log batches that got smaller, each change once, however many actors it was."""
        for line in dict.fromkeys(done.smaller):
            if line not in self.told:
                log.warning("%s: an actor ran out of GPU memory, %s", self.name, line)
                self.told.add(line)

    def tell(self, done: Done) -> None:
        self.tell_smaller(done)
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
