"""The pair table: examples of all tasks become the (image, texts) rows that still need a score.

Everything is streamed through Parquet and DuckDB, which spills to disk, so that memory does not
grow with the number of pairs.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import parquet

from diffitm.captions.row import CaptionRow
from diffitm.core import storage
from diffitm.core.limits import limits
from diffitm.core.schema import EXAMPLES, RACES, WORK, Example, encodable, fault
from diffitm.store.blocks import read_index, write_index
from diffitm.store.score_store import Store

T = TypeVar("T")
BATCH = 1000
ROW_GROUP = 2**16
# DuckDB's part of the memory that this process may use; actors on this machine need most of it.
SHARE = 0.15
LEAST_MEMORY = 512 * 2**20
PAIRS = """
    SELECT position, task, i, j, image, text, unconditional, groups FROM (
        SELECT *, unnest(range(len(texts))) AS j, unnest(texts) AS text FROM (
            SELECT *, unnest(range(len(images))) AS i, unnest(images) AS image
            FROM examples WHERE failure IS NULL))
"""


@dataclass(frozen=True)
class WorkTable:
    """A written work table: how many images and pairs it holds."""

    uri: str
    images: int
    pairs: int
    stored: int = 0  # errors that these pairs have already


class Left(NamedTuple):
    """What of a work table is still to do: images, their pairs, and errors that these have already."""

    images: int
    pairs: int
    stored: int


def write_examples(
    task: str, examples: Iterable[Example], folder: str, limit: int | None
) -> tuple[str, int]:
    """Stream a task's examples to one Parquet file; `limit` keeps that many, evenly spread.

    An example that decides nothing is written as a failure. Returns the file, which is named by
    its content, and how many examples it holds.
    """
    kept = _spread(list(examples), limit) if limit is not None else examples
    lines = (_line(task, position, example) for position, example in enumerate(kept))
    uri, total, _ = _write_lines(lines, folder, task)
    return uri, total


def write_own(rows: Iterable[CaptionRow], folder: str) -> tuple[str, int, int]:
    """Stream people's own rows to one Parquet file of examples, each scored with and without its text.

    A row's bad text costs itself alone. Returns the file, which is named by its content, how many
    examples it holds and how many of them are failures.
    """
    lines = (line for position, row in enumerate(rows) for line in _own_lines(position, row))
    return _write_lines(lines, folder, "own")


def _write_lines(lines: Iterable[dict[str, Any]], folder: str, name: str) -> tuple[str, int, int]:
    """The file, named by its content, how many lines it holds and how many are failures."""
    storage.make_folder(folder)
    found, path = storage.filesystem(storage.join(folder, f".{name}.part"))
    total, failed, digest = 0, 0, hashlib.sha256()
    try:
        with (
            found.open_output_stream(path) as sink,
            parquet.ParquetWriter(sink, EXAMPLES) as writer,
        ):
            for batch in map(list, batched(lines, BATCH)):
                writer.write_table(pa.Table.from_pylist(batch, EXAMPLES))
                digest.update(json.dumps(batch).encode())
                total += len(batch)
                failed += sum(line["failure"] is not None for line in batch)
    except BaseException:  # what was begun is of no use
        with contextlib.suppress(OSError):
            found.delete_file(path)
        raise
    uri = storage.join(folder, f"{name}-{digest.hexdigest()[:12]}.parquet")
    found.move(path, storage.filesystem(uri)[1])
    return uri, total, failed


def _own_lines(position: int, row: CaptionRow) -> Iterator[dict[str, Any]]:
    """An example of the row's good texts, and one, a failure, of each other."""
    parts = list(row.each_text())
    texts = [text for part in parts if part.failure is None for text in part.texts]
    if texts:
        yield _own_line(position, row._replace(texts=tuple(texts), failure=None))
    yield from (_own_line(position, part) for part in parts if part.failure is not None)


def _own_line(position: int, row: CaptionRow) -> dict[str, Any]:
    return {
        "task": "own",
        "position": position,
        "id": str(position),
        "images": [row.image],
        "texts": list(row.texts),
        "direction": "text",
        "gold": 0,
        "cluster": str(position),
        "groups": [] if row.source is None else [("source", row.source)],
        "unconditional": True,
        "failure": None if row.failure is None else f"{row.place}: {row.failure}",
    }


def batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """The items, so many at a time."""
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch


def _spread(examples: list[Example], limit: int) -> list[Example]:
    if limit >= len(examples):
        return examples
    return [examples[i * len(examples) // limit] for i in range(limit)]


def _line(task: str, position: int, example: Example) -> dict[str, Any]:
    return {
        "task": task,
        "position": position,
        "id": example.id,
        "images": list(example.images),
        "texts": list(map(encodable, example.texts)),
        "direction": example.direction,
        "gold": example.gold,
        "cluster": example.cluster or example.id,
        "groups": list(example.groups.items()),
        "unconditional": example.needs_unconditional,
        "failure": example.failure or fault(example),
    }


def connect(**tables: ds.Dataset) -> duckdb.DuckDBPyConnection:
    """DuckDB over the given datasets; what is more than its share of the memory spills to disk."""
    connection = duckdb.connect()
    spill = tempfile.gettempdir().replace("'", "''")
    most = limits()
    memory = max(LEAST_MEMORY, int(most.memory * SHARE))
    connection.execute(
        f"SET temp_directory = '{spill}/diffitm-duckdb'; SET memory_limit = '{memory}B'"
    )
    connection.execute(f"SET threads = {most.processors}; SET enable_progress_bar = false")
    for name, table in tables.items():
        connection.register(name, table)
    return connection


def examples_dataset(uris: list[str]) -> ds.Dataset:
    """The examples of several tasks as one dataset."""
    found = storage.filesystem(uris[0])[0]
    paths = [storage.filesystem(uri)[1] for uri in uris]
    return ds.dataset(paths, schema=EXAMPLES, filesystem=found, format="parquet")


def distinct_texts(uris: list[str]) -> Iterator[str]:
    """Each text of the examples that are to be scored, once."""
    connection = connect(examples=examples_dataset(uris))
    query = (
        "SELECT DISTINCT unnest(texts) AS text FROM examples WHERE failure IS NULL ORDER BY text"
    )
    for batch in connection.sql(query).to_arrow_reader(BATCH):
        yield from batch["text"].to_pylist()


def work_texts(table: WorkTable) -> Iterator[str]:
    """Each text of a work table's pairs, or of its races, once."""
    found, path = storage.filesystem(table.uri)
    rows = ds.dataset(path, filesystem=found, format="parquet")
    column = "text" if "text" in rows.schema.names else "unnest(texts)"
    query = f"SELECT DISTINCT {column} AS text FROM rows ORDER BY text"
    for batch in connect(rows=rows).sql(query).to_arrow_reader(BATCH):
        yield from batch["text"].to_pylist()


def write_work(examples: list[str], store: Store, uri: str) -> WorkTable:
    """Write the pairs that the examples need and the store lacks, by image path and text.

    A pair that failed before is tried again; of one that was raced the rest is scored. Where a pair has a
    single score, no unconditional pair is needed.
    """
    connection = connect(examples=examples_dataset(examples), scores=store.dataset())
    unconditional = (
        "" if store.similarity else "UNION ALL SELECT image, '' FROM p WHERE unconditional"
    )
    raced = ""
    places = "NULL::SMALLINT[] AS places"
    if store.has_parts:
        places = "places"
        raced = """LEFT JOIN (
            SELECT image, text, list_distinct(flatten(list(positions))) AS places FROM scores
            WHERE failure IS NULL AND positions IS NOT NULL GROUP BY image, text) USING (image, text)"""
    query = f"""
        WITH p AS ({PAIRS}),
        needed AS (SELECT DISTINCT image, text FROM (SELECT image, text FROM p {unconditional})),
        stored AS (SELECT image, text FROM scores WHERE failure IS NULL AND positions IS NULL)
        SELECT image, text, {places}
        FROM needed ANTI JOIN stored USING (image, text) {raced}
        WHERE places IS NULL OR len(places) < {store.steps}
        ORDER BY image, text
    """
    found, path = storage.filesystem(uri)
    storage.make_folder(storage.parent(uri))
    images, pairs, stored, last = 0, 0, 0, None
    with found.open_output_stream(path) as sink, parquet.ParquetWriter(sink, WORK) as writer:
        for batch in connection.sql(query).to_arrow_reader(ROW_GROUP):
            table = pa.Table.from_batches([batch]).rename_columns(WORK.names).cast(WORK)
            writer.write_table(table)
            names = table["image"].combine_chunks()
            images += pc.count_distinct(names).as_py() - (names[0].as_py() == last)
            pairs, last = pairs + len(table), names[-1].as_py()
            stored += pc.sum(pc.list_value_length(table["stored"])).as_py() or 0
    return WorkTable(uri, images, pairs, stored)


def write_race_blocks(lines: Iterable[dict[str, Any]], uri: str) -> WorkTable:
    """Write the rows of a table of races."""
    found, path = storage.filesystem(uri)
    storage.make_folder(storage.parent(uri))
    counts = list[tuple[int, int, int]]()
    with found.open_output_stream(path) as sink, parquet.ParquetWriter(sink, RACES) as writer:
        for batch in map(list, batched(lines, BATCH)):
            writer.write_table(pa.Table.from_pylist(batch, RACES))
            counts += [
                (len(line["image_of"]), len(line["images"]), sum(map(len, line["stored"])))
                for line in batch
            ]
    write_index(uri, counts)
    pairs, images, stored = map(sum, zip(*counts, strict=True)) if counts else (0, 0, 0)
    return WorkTable(uri, images, pairs, stored)


def remaining(table: WorkTable, checkpoint: str) -> Left:
    """What of a work table its checkpoint does not hold."""
    blocks = read_index(table.uri)
    if blocks is None:
        return Left(table.images, table.pairs, table.stored)
    ids = pa.schema([("row", pa.int64())])
    whole, _ = storage.readable_parquet(checkpoint)
    committed = [p for p in whole if not p.endswith(".pending.parquet")]
    where = storage.filesystem(checkpoint)[0]
    done = ds.dataset(committed, schema=ids, filesystem=where, format="parquet")
    query = """
        SELECT coalesce(sum(images), 0), coalesce(sum(pairs), 0), coalesce(sum(stored), 0)
        FROM blocks ANTI JOIN done USING (row)"""
    left = connect(blocks=blocks, done=done).execute(query).fetchone() or (0, 0, 0)
    return Left(*map(int, left))
