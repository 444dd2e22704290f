"""A list of names through a stage, some of them a row, below a work folder."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.provenance import fingerprint
from diffitm.distributed.session import ActorPool
from diffitm.distributed.stages import Stage, run_stage

BLOCKS_PER_ACTOR = 8
# A row: names, the first of which has the position `start`, and what is true for each.
WORK = pa.schema(
    [
        ("row", pa.int64()),
        ("start", pa.int64()),
        ("names", pa.list_(pa.string())),
        ("truth", pa.list_(pa.list_(pa.int64()))),
    ]
)


def work_folder(out: str, kind: str, settings: dict[str, Any]) -> str:
    """A folder beside `out`, named by everything that its content depends on."""
    return folder_below(storage.parent(out), kind, settings)


def folder_below(base: str, kind: str, settings: dict[str, Any]) -> str:
    """The same in `base`."""
    folder = storage.join(base, "work", f"{kind}-{fingerprint(settings)[:12]}")
    note = storage.join(folder, "_config.json")
    if not storage.exists(note):
        storage.write_text(note, json.dumps(settings, indent=1))
    return folder


class ItemStage(NamedTuple):
    """Names through a pool of actors, several of them a row of the work table.

    An actor's worker is made as worker(*arguments, device, counter). The results go to `folder` with
    `schema`, in row groups of `row_group` rows; the work table and the checkpoint lie beside it.
    """

    what: str
    folder: str
    schema: pa.Schema
    worker: type
    arguments: tuple[Any, ...]
    items_per_row: int = 1
    rows_per_block: int = 1
    row_group: int | None = None


def run_items(
    stage: ItemStage, names: list[str], pool: ActorPool, truth: list[list[int]] | None = None
) -> str:
    """Put all names through the actors, with what is true for each; the folder of the results.

    The items of a row are as many as in the first run.
    """
    table = storage.join(storage.parent(stage.folder), "work.parquet")
    if not storage.exists(table):
        _write_work(table, names, truth or [[] for _ in names], stage.items_per_row)
    rows = -(-len(names) // stage.items_per_row)
    block = min(stage.rows_per_block, -(-rows // (BLOCKS_PER_ACTOR * pool.min_actors)))
    data_stage = Stage(
        what=stage.what,
        out=stage.folder,
        schema=stage.schema,
        inputs=[storage.filesystem(table)[1]],
        column="row",
        rows=block,
        blocks=-(-rows // block),
        total=len(names),
        together=stage.row_group,
    )
    run_stage(data_stage, stage.worker, stage.arguments, pool)
    return stage.folder


def _write_work(uri: str, names: list[str], truth: list[list[int]], size: int) -> None:
    storage.make_folder(storage.parent(uri))
    found, path = storage.filesystem(uri)
    with found.open_output_stream(path + ".part") as sink, parquet.ParquetWriter(sink, WORK) as to:
        for row, s in enumerate(range(0, len(names), size)):
            columns = [[row], [s], [names[s : s + size]], [truth[s : s + size]]]
            to.write_table(pa.table(dict(zip(WORK.names, columns, strict=True)), schema=WORK))
    found.move(path + ".part", path)
