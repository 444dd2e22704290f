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
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow import parquet

from diffitm.captions.row import CaptionRow
from diffitm.core import storage
from diffitm.core.schema import EXAMPLES, WORK, Example, encodable, fault
from diffitm.store.score_store import Store

T = TypeVar("T")
BATCH = 1000
# More texts of one image are split into several rows: a row is the smallest unit of a resume.
MAX_TEXTS = 64
_PAIRS = """
    SELECT position, task, i, j, image, text, unconditional, groups FROM (
        SELECT *, unnest(range(len(texts))) AS j, unnest(texts) AS text FROM (
            SELECT *, unnest(range(len(images))) AS i, unnest(images) AS image
            FROM examples WHERE failure IS NULL))
"""


@dataclass(frozen=True)
class WorkTable:
    """A written work table: how many rows and pairs it holds."""

    uri: str
    rows: int
    pairs: int


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
            for batch in map(list, _batched(lines, BATCH)):
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


def _batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
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
    """DuckDB over the given datasets, with bounded memory."""
    connection = duckdb.connect()
    spill = tempfile.gettempdir().replace("'", "''")
    connection.execute(f"SET temp_directory = '{spill}/diffitm-duckdb'; SET memory_limit = '1GB'")
    connection.execute("SET threads = 2; SET enable_progress_bar = false")
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


def write_work(examples: list[str], store: Store, uri: str) -> WorkTable:
    """Write the pairs that the examples need and the store lacks, one row an image, by image path.

    A pair that failed before is tried again. Where a pair has a single score, no unconditional pair is
    needed.
    """
    connection = connect(examples=examples_dataset(examples), scores=store.dataset())
    unconditional = (
        "" if store.similarity else "UNION ALL SELECT image, '' FROM p WHERE unconditional"
    )
    query = f"""
        WITH p AS ({_PAIRS}),
        needed AS (SELECT image, text FROM p {unconditional}),
        stored AS (SELECT image, text FROM scores WHERE failure IS NULL)
        SELECT DISTINCT image, text FROM needed ANTI JOIN stored USING (image, text)
        ORDER BY image, text
    """
    found, path = storage.filesystem(uri)
    storage.make_folder(storage.parent(uri))
    rows = pairs = 0
    with found.open_output_stream(path) as sink, parquet.ParquetWriter(sink, WORK) as writer:
        for batch in _batched(_rows(connection, query), BATCH):
            lines = [{"row": rows + i, "image": im, "texts": t} for i, (im, t) in enumerate(batch)]
            writer.write_table(pa.Table.from_pylist(lines, WORK))
            rows += len(lines)
            pairs += sum(len(texts) for _, texts in batch)
    return WorkTable(uri, rows, pairs)


def remaining(work: str, checkpoint: str) -> tuple[int, int]:
    """Rows and pairs of a work table that its checkpoint does not hold."""
    found, path = storage.filesystem(work)
    table = ds.dataset(path, schema=WORK, filesystem=found, format="parquet")
    ids = pa.schema([("row", pa.int64())])
    whole, _ = storage.readable_parquet(checkpoint)
    committed = [p for p in whole if not p.endswith(".pending.parquet")]
    where = storage.filesystem(checkpoint)[0]
    done = ds.dataset(committed, schema=ids, filesystem=where, format="parquet")
    query = "SELECT count(*), coalesce(sum(len(texts)), 0) FROM work ANTI JOIN done USING (row)"
    rows, pairs = connect(work=table, done=done).execute(query).fetchone() or (0, 0)
    return int(rows), int(pairs)


def _rows(connection: duckdb.DuckDBPyConnection, query: str) -> Iterator[tuple[str, list[str]]]:
    for image, group in itertools.groupby(_lines(connection, query), key=lambda line: line[0]):
        for texts in _batched((text for _, text in group), MAX_TEXTS):
            yield image, list(texts)


def _lines(connection: duckdb.DuckDBPyConnection, query: str) -> Iterator[tuple[str, str]]:
    for batch in connection.sql(query).to_arrow_reader(BATCH):
        yield from zip(batch["image"].to_pylist(), batch["text"].to_pylist(), strict=True)


def scored_pairs(
    examples: str, store: Store, error: str, rows: int = 100 * BATCH, names: bool = False
) -> Iterator[pa.RecordBatch]:
    """The pairs of one task's examples in order, with what the store holds of each.

    Columns: position, i (image), j (text), errors and unconditional (lists over timesteps),
    elements, similarity, failure; with `names` also image, text and groups. A pair scored twice is taken
    once. A batch holds up to `rows`.
    """
    named = "p.image, p.text, p.groups," if names else ""
    connection = connect(examples=examples_dataset([examples]), scores=store.dataset())
    column = "l2" if error == "mse" else error
    lacks_unconditional = "FALSE" if store.similarity else "p.unconditional AND u.image IS NULL"
    query = f"""
        WITH p AS ({_PAIRS}),
        s AS (SELECT DISTINCT ON (image, text) image, text, {column} AS errors, elements,
                     similarity, failure
              FROM scores ORDER BY image, text, failure IS NOT NULL)
        SELECT p.position, p.i, p.j, {named} s.errors, u.errors AS unconditional, s.elements, s.similarity,
               CASE WHEN s.image IS NULL OR ({lacks_unconditional}) THEN 'not scored yet'
                    ELSE coalesce(s.failure, CASE WHEN p.unconditional THEN u.failure END) END
               AS failure
        FROM p LEFT JOIN s USING (image, text)
        LEFT JOIN (SELECT * FROM s WHERE text = '') u ON u.image = p.image AND p.unconditional
        ORDER BY p.position, p.i, p.j
    """
    yield from connection.sql(query).to_arrow_reader(rows)
