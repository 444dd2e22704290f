"""Named items in groups of a fixed size through a stage, below a work folder."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.provenance import fingerprint
from diffitm.distributed.session import ActorPool
from diffitm.distributed.stages import Stage, run_stage

BLOCKS_PER_ACTOR = 8
# A group: names of its items, the first of which has the position `start`, and what is true for each.
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
    folder = storage.join(storage.parent(out), "work", f"{kind}-{fingerprint(settings)[:12]}")
    note = storage.join(folder, "_config.json")
    if not storage.exists(note):
        storage.write_text(note, json.dumps(settings, indent=1))
    return folder


def run_groups(
    what: str, folder: str, names: list[str], truth: list[list[int]], size: int,
    schema: pa.Schema, actor: type, arguments: tuple[Any, ...], pool: ActorPool, groups_per_block: int,
    rows_together: int | None = None,
) -> str:  # fmt: skip
    """Put all items through the actors, `size` of them a group; the folder of the results.

    A group's size is that of the first run, `rows_together` that of a row group of the results.
    Work and checkpoint lie beside the folder.
    """
    table = storage.join(storage.parent(folder), "work.parquet")
    if not storage.exists(table):
        _write_groups(table, names, truth, size)
    groups = -(-len(names) // size)
    rows = min(groups_per_block, -(-groups // (BLOCKS_PER_ACTOR * pool.min_actors)))
    inputs = [storage.filesystem(table)[1]]
    stage = Stage(
        what, folder, schema, inputs, "row", rows, -(-groups // rows), len(names), rows_together
    )
    run_stage(stage, actor, arguments, pool)
    return folder


def _write_groups(uri: str, names: list[str], truth: list[list[int]], size: int) -> None:
    storage.make_folder(storage.parent(uri))
    found, path = storage.filesystem(uri)
    with found.open_output_stream(path + ".part") as sink, parquet.ParquetWriter(sink, WORK) as to:
        for row, s in enumerate(range(0, len(names), size)):
            columns = [[row], [s], [names[s : s + size]], [truth[s : s + size]]]
            to.write_table(pa.table(dict(zip(WORK.names, columns, strict=True)), schema=WORK))
    found.move(path + ".part", path)
