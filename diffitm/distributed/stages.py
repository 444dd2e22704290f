"""Parquet through a pool of actors to Parquet, with Ray Data's checkpoint: what every pipeline shares."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import ray
import ray.data
from pyarrow.fs import FileSystem
from ray.data import ActorPoolStrategy
from ray.data.checkpoint import CheckpointConfig

from diffitm import storage
from diffitm.distributed.attempts import Attempts, Bounded
from diffitm.distributed.progress import Watch, clock
from diffitm.distributed.session import Pool, standing, start_here
from diffitm.errors import InputError
from diffitm.resume import mend

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


def read_rows(paths: str | list[str], found: FileSystem) -> ray.data.Dataset:
    """Parquet files for a repartition: Ray would cut them into blocks so small that it cannot join."""
    return ray.data.read_parquet(paths, filesystem=found, override_num_blocks=1)


def through_actors(
    blocks: ray.data.Dataset, actor: type, arguments: tuple[Any, ...], pool: Pool, column: str
) -> ray.data.Dataset:
    """The blocks as tables through a pool of actors; `column` has the id of a row.

    Actors that are lost with their node start again on another, however often.
    """
    return blocks.map_batches(
        Bounded,
        fn_constructor_args=(actor, arguments, start_here(Attempts), column),
        compute=ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )


class Counter:
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


def run_stage(stage: Stage, actor: type, arguments: tuple[Any, ...], pool: Pool) -> None:
    """Run a stage; one that was interrupted goes on, one that is complete is left as it is."""
    storage.make_folder(stage.out)
    before, total = len(_positions(stage)), f"{stage.total:,}"
    if before == stage.total:
        log.info("%s: all %s are done already", stage.what, total)
        return
    if before:
        log.info("%s: going on where it stopped, %s of %s", stage.what, f"{before:,}", total)
    found, folder = storage.filesystem(stage.out)
    counter = start_here(Counter)
    table = read_rows(stage.inputs, found)
    folder_of = storage.join(storage.parent(stage.out), "checkpoint")
    mend(folder_of)
    table.context.checkpoint_config = checkpoint(folder_of, stage.column)
    least = min(pool.min_actors, stage.blocks)
    most = max(least, min(pool.max_actors, stage.blocks))
    blocks = table.repartition(target_num_rows_per_block=stage.rows)
    pool = replace(pool, min_actors=least, max_actors=most)
    made = through_actors(blocks, actor, (*arguments, pool.device, counter), pool, stage.column)
    log.info("%s: %s to do", stage.what, f"{stage.total - before:,}")
    with Watch(counter, _lines(stage, before), standing=lambda: standing(pool)):
        form = {"use_dictionary": False, "compression": "NONE", "row_group_size": stage.together}
        made.write_parquet(folder, filesystem=found, try_create_dir=False, **form)
    positions = _positions(stage)
    if len(positions) != stage.total or len(np.unique(positions)) != stage.total:
        raise InputError(f"{stage.out} holds {len(positions)} of {total}: delete it, run again")


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
