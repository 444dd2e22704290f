"""Parquet through a pool of actors to Parquet, with Ray Data's checkpoint: what every pipeline shares."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import ray
import ray.data
from pyarrow.fs import FileSystem
from ray.data import ActorPoolStrategy
from ray.data.checkpoint import CheckpointConfig

from diffitm.core import storage
from diffitm.core.errors import InputError, Unavailable
from diffitm.distributed.actors import StageActor, WorkerSpec
from diffitm.distributed.attempts import RETRIES, Attempts, Trouble
from diffitm.distributed.progress import Watch, clock
from diffitm.distributed.session import ActorPool, standing, start_here
from diffitm.store.work_table import mend

log = logging.getLogger("diffitm")
FILTER_MEMORY = 128 * 2**20


def checkpoint(uri: str, column: str) -> CheckpointConfig:
    """Ray Data's checkpoint of finished rows, by their ids in `column`."""
    found, path = storage.filesystem(uri)
    config = CheckpointConfig(
        id_column=column,
        checkpoint_path=path,
        delete_checkpoint_on_success=False,
        override_filesystem=found,
    )
    # Ray's default of 1 GiB an actor keeps a resume from starting on a small machine.
    config.checkpoint_actor_memory_bytes = FILTER_MEMORY
    return config


def read_table(paths: str | list[str], found: FileSystem) -> ray.data.Dataset:
    """Parquet files for a repartition: Ray would cut them into blocks so small that it cannot join."""
    return ray.data.read_parquet(paths, filesystem=found, override_num_blocks=1)


@dataclass(frozen=True)
class Build:
    """Makes an actor's worker: of a class, its arguments, and the counter that it reports to."""

    worker: type
    arguments: tuple[Any, ...]
    counter: Any

    def __call__(self, device: str) -> Any:
        return self.worker(*self.arguments, device, self.counter)


def through_actors(
    blocks: ray.data.Dataset, spec: WorkerSpec, attempts: Any, pool: ActorPool, rows: int
) -> ray.data.Dataset:
    """The blocks, of `rows` rows each, as tables through a pool of actors.

    Actors that are lost with their node start again on another, however often. A batch is a block:
    where actors have GPUs, Ray Data wants a number, and another one would cut or join blocks.
    """
    return blocks.map_batches(
        StageActor,
        fn_constructor_args=(spec, attempts),
        compute=ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
        batch_size=rows,
        batch_format="pyarrow",
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )


def in_rounds(
    what: str, execute: Callable[[Any], None], left: Callable[[], int], actors: int
) -> None:
    """Call `execute` with a handle of Attempts until no row is `left`: a further round does what places
    that failed left to others. Says at the end which those were, and why they failed. `actors` are
    those of the pool.

    Raises Unavailable if round after round gets nothing done.
    """
    attempts, idle, before = start_here(Attempts, actors), 0, left()
    while True:
        try:
            execute(attempts)
        except Exception as error:
            if (cause := ray.get(attempts.read_error.remote())) is not None:
                raise cause from error
            raise
        finally:
            troubles = ray.get(attempts.read_troubles.remote())
            # Actors end, and give their GPUs back, when nothing refers to them; Ray Data leaves cycles.
            gc.collect()
        rows = left()
        if rows == 0:
            break
        idle = idle + 1 if rows == before else 0
        if idle > RETRIES:
            causes = "; ".join(describe(*trouble) for trouble in troubles.items())
            raise Unavailable(f"{what}: {rows:,} rows could not be done anywhere. {causes}")
        log.warning("%s: %s rows were left to others; another round does them", what, f"{rows:,}")
        before = rows
    for place, trouble in troubles.items():
        log.warning("%s: %s; others did its rows", what, describe(place, trouble))


def describe(place: str, trouble: Trouble) -> str:
    """A line about what went wrong at a place."""
    times = f"{trouble.times} failure{'s' * (trouble.times > 1)}"
    return f"{times} on {place}, the last: {trouble.cause}"


class ItemCounter:
    """Adds up finished items for the progress lines."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, count: int) -> None:
        self.count += count

    def read(self) -> int:
        return self.count


class Stage(NamedTuple):
    """Parquet through a pool of actors to Parquet.

    `inputs` are paths in the file system of `out`, `column` the id that a checkpoint keeps, `rows`
    those of a block, `blocks` how many there are, `total` the items that `out` holds at the end,
    `together` the rows of a row group of `out`.
    """

    what: str
    out: str
    schema: pa.Schema
    inputs: list[str]
    column: str
    rows: int
    blocks: int
    total: int
    together: int | None = None


def run_stage(stage: Stage, actor: type, arguments: tuple[Any, ...], pool: ActorPool) -> None:
    """Run a stage; one that was interrupted goes on, one that is complete is left as it is."""
    storage.make_folder(stage.out)
    before, total = len(_positions(stage)), f"{stage.total:,}"
    if before == stage.total:
        log.info("%s: all %s are done already", stage.what, total)
        return
    if before:
        log.info("%s: going on where it stopped, %s of %s", stage.what, f"{before:,}", total)
    least = min(pool.min_actors, stage.blocks)
    most = max(least, min(pool.max_actors, stage.blocks))
    pool = replace(pool, min_actors=least, max_actors=most)
    log.info("%s: %s to do", stage.what, f"{stage.total - before:,}")

    def execute(attempts: Any) -> None:
        _execute(stage, Build(actor, arguments, start_here(ItemCounter)), pool, attempts)

    def left() -> int:
        return stage.total - len(np.unique(_positions(stage)))

    in_rounds(stage.what, execute, left, least)
    positions = _positions(stage)
    if len(positions) != stage.total:
        raise InputError(f"{stage.out} holds {len(positions)} of {total}: delete it, run again")


def _execute(stage: Stage, build: Build, pool: ActorPool, attempts: Any) -> None:
    """Whatever of the stage is left, once through the actors."""
    before = len(_positions(stage))
    found, folder = storage.filesystem(stage.out)
    table = read_table(stage.inputs, found)
    checkpoints = storage.join(storage.parent(stage.out), "checkpoint")
    mend(checkpoints)
    table.context.checkpoint_config = checkpoint(checkpoints, stage.column)
    blocks = table.repartition(target_num_rows_per_block=stage.rows)
    spec = WorkerSpec(build, stage.schema, stage.column, pool.gpus)
    results = through_actors(blocks, spec, attempts, pool, stage.rows)
    with Watch(build.counter, _lines(stage, before), standing=lambda: standing(pool)):
        form = {"use_dictionary": False, "compression": "NONE", "row_group_size": stage.together}
        results.write_parquet(folder, filesystem=found, try_create_dir=False, **form)


def _lines(stage: Stage, before: int) -> Callable[[int], None]:
    """Logs how many items are done, the rate and the time left."""
    start = time.monotonic()

    def tell(done: int) -> None:
        if done:
            rate = done / (time.monotonic() - start)
            at = min(before + done, stage.total)
            share, left = 100 * at / stage.total, clock((stage.total - at) / rate)
            text, total = "%s: %s of %s (%.0f%%), %.0f/s, %s left", f"{stage.total:,}"
            log.info(text, stage.what, f"{at:,}", total, share, rate, left)

    return tell


def whole_files(folder: str, schema: pa.Schema) -> ds.Dataset:
    """The rows of a folder's files; those that a kill cut off are left out."""
    whole, _ = storage.readable_parquet(folder)
    return ds.dataset(
        whole, schema=schema, filesystem=storage.filesystem(folder)[0], format="parquet"
    )


def _positions(stage: Stage) -> np.ndarray:
    """Positions of the items that are in whole files."""
    table = whole_files(stage.out, stage.schema).to_table(columns=["position"])
    return table["position"].to_numpy()
