"""Score a work table with a pool of actors: Ray Data from Parquet to Parquet, with its checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from diffitm.core import storage
from diffitm.core.schema import BLOCK, RACES, SCORES, block_rows, read_block
from diffitm.distributed.actors import WorkerSpec
from diffitm.distributed.progress import REPORT_EVERY, Watch, clock
from diffitm.distributed.prometheus import Metrics, gpu_memory
from diffitm.distributed.session import ActorPool, standing, start_here
from diffitm.distributed.stages import Build, checkpoint, in_rounds, read_table, through_actors
from diffitm.store.blocks import Cost, Sizes, cut, read_blocks, read_index
from diffitm.store.pair_table import remaining
from diffitm.store.run_summary import SHOWN, Done

if TYPE_CHECKING:  # an actor imports this module, and its spec what else it needs
    from diffitm.scoring.batching import Batch, Stopwatch
    from diffitm.scoring.diffusion import DiffusionScorer
    from diffitm.scoring.racing import RacePlan
    from diffitm.scoring.specs import Spec
    from diffitm.store.pair_table import Left, WorkTable
    from diffitm.store.score_store import Store
    from diffitm.store.work_table import OpenWork

log = logging.getLogger("diffitm")
LOOKS = 0.2  # seconds between two looks whether an actor is up
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
        compiled = getattr(self.scorer, "compiled", None)
        if compiled:
            compiled.tell = lambda cause: counter.add.remote(Done(not_compiled=(cause,)))
        self.metrics = Metrics(name)
        others = ray.get(counter.read.remote())
        # One that compiles does so here, not in a block's time.
        known = others.actors and not compiled
        rate = others.rate / others.actors if known else self.scorer.measure_rate()
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
        (line,) = table.select(BLOCK.names).to_pylist()
        return self.scorer.score(block_rows(line))

    def _loading(self) -> float:
        """Seconds since the last call in which there was nothing to do but to wait for images."""
        return self.loading.spent() if self.loading else 0.0

    def _tell(self, lines: list[dict[str, Any]], start: float) -> None:
        """Count a block that was begun at `start`."""
        failed = sum(line["failure"] is not None for line in lines)
        strange = [line for line in lines if not is_finite(line)]
        end, loading = time.perf_counter(), self._loading()
        done = Done(
            pairs=len(lines),
            forwards=sum(forwards(line, self.scorer.cost) for line in lines),
            failures=failed,
            not_finite=len(strange),
            strange=tuple(f"{x['image']} with {x['text']!r:.60}" for x in strange[:SHOWN]),
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
    cost = Cost(spec.cost, spec.image_cost)
    build = Build(ScoringActor, (spec, store.model), counter)
    if plan:
        build = Build(RacingActor, (spec, store.model, plan), counter)
    lines = _Lines(store.model, work.left, cost, pool.min_actors, pool.max_actors)

    def execute(attempts: Any) -> None:
        if plan:
            found, path = storage.filesystem(work.table.uri)
            table = read_table(path, found)
        else:
            source = BlockSource(work.table, cost, pool.min_actors, counter, attempts)
            table = ray.data.read_datasource(source, override_num_blocks=1)
        table.context.checkpoint_config = checkpoint(work.checkpoint, "row")
        blocks = table.repartition(target_num_rows_per_block=1)
        worker = WorkerSpec(build, SCORES, "row", pool.gpus)
        scored = through_actors(blocks, worker, attempts, pool, 1)
        out, folder = storage.filesystem(store.uri)
        with Watch(counter, lines.tell, 0.5, lambda: standing(pool)):
            scored.write_parquet(folder, filesystem=out, try_create_dir=False)

    def left() -> int:
        return remaining(work.table, work.checkpoint).pairs

    in_rounds(store.model, execute, left, pool.min_actors)
    done = ray.get(counter.read.remote())
    lines.tell_troubles(done)
    return replace(done, seconds=time.monotonic() - start)


class BlockSource(Datasource):
    """The blocks of a work table, a row each. Who reads it first waits for an actor's rate and cuts them."""

    def __init__(
        self, table: WorkTable, cost: Cost, actors: int, counter: Any, attempts: Any
    ) -> None:
        super().__init__()
        self.table, self.cost, self.actors = table, cost, actors
        self.counter, self.attempts = counter, attempts

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One, as blocks lie behind each other."""
        about = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._read, about, BLOCK)]

    def _read(self) -> Iterator[pa.Table]:
        if read_index(self.table.uri) is None:
            total = self.cost.total(self.table.images, self.table.pairs, self.table.stored)
            cut(self.table.uri, self.cost, total, Sizes(self.actors, self._rate()).next)
        yield from read_blocks(self.table.uri)

    def _rate(self) -> float:
        """Forwards a second of an actor that is up, 0 where they cannot be known."""
        while True:
            done = ray.get(self.counter.read.remote())
            if done.actors:
                return done.rate / done.actors
            # Then a block is to come, which an actor can end the run with.
            if ray.get(self.attempts.has_trouble.remote()):
                return 0.0
            time.sleep(LOOKS)


class _Lines:
    """The estimate when the actors are up, then the rate and the time left."""

    def __init__(self, name: str, left: Left, cost: Cost, actors: int, most: int) -> None:
        self.name, self.total, self.cost, self.actors = name, left.pairs, cost.pair, actors
        self.most = most  # actors at a time: more are counted where some were lost
        self.forwards = cost.total(*left)
        # What a rate is told in: an actor measures forwards, whatever costs them.
        self.unit, self.each = ("images", cost.image) if cost.image else ("forwards", 1)
        self.waited, self.first, self.next_line = 0, 0.0, 0.0
        self.told = set[str]()

    def tell_troubles(self, done: Done) -> None:
        """Log batches that got smaller and models that were not compiled, each change and cause once,
        however many actors it was."""
        texts = [f"an actor ran out of GPU memory, {line}" for line in done.smaller]
        texts += [f"--compile failed, so it runs without: {cause}" for cause in done.not_compiled]
        for text in dict.fromkeys(texts):
            if text not in self.told:
                log.warning("%s: %s", self.name, text)
                self.told.add(text)

    def tell(self, done: Done) -> None:
        self.tell_troubles(done)
        now = time.monotonic()
        self.waited += done.actors > 0
        enough = done.actors >= self.actors or self.waited > PATIENCE
        if done.actors and not self.first and enough:
            self.first, self.next_line = now, now + REPORT_EVERY
            self._estimate(done)
        if self.first and done.pairs and now >= self.next_line:
            self.next_line = now + REPORT_EVERY
            # By the blocks that are done: those in work are long, and all of them may be the first.
            spent = done.busy + done.loading + done.waited
            rate = min(done.actors, self.most) * done.pairs / spent
            left = clock((self.total - done.pairs) / rate)
            share = 100 * done.pairs / self.total
            text = "%s: %s of %s pairs (%.0f%%), %.0f forwards/s, %s left"
            count, total = f"{done.pairs:,}", f"{self.total:,}"
            log.info(text, self.name, count, total, share, rate * self.cost, left)

    def _estimate(self, done: Done) -> None:
        if done.rate:
            rate = done.rate / done.actors
            text = "%s: %d of %d actors up, %.0f %s/s each: about %s"
            left = clock(self.forwards / (rate * self.actors))
            each = rate / self.each
            log.info(text, self.name, done.actors, self.actors, each, self.unit, left)
