"""What a store holds of pairs: DuckDB joins their names to numbers of lines, by which errors are looked up.

So no list of errors is joined, grouped or sorted, and a store is read once, whatever is joined to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from diffitm.core.errors import Unavailable
from diffitm.metrics.score import column, error_values
from diffitm.store.dense_errors import ErrorTable, dense
from diffitm.store.pair_table import PAIRS, connect, examples_dataset
from diffitm.store.score_store import Store, among

UNSCORED = "not scored yet"
HELD = 4_000_000  # values of errors that are held at once, whatever the number of timesteps
MOST_ROWS = 100_000
AT_ONCE = 1_000_000  # rows of a store that is read as a whole, for all tasks
WHOLE, PART, FAILED = 0, 1, 2  # what a line is
KEYS = pa.schema(
    [("image", pa.string()), ("text", pa.string()), ("line", pa.int64()), ("is", pa.int8())]
)
_NAMES = itertools.count()


def _key(image: str, text: str) -> str:
    """A pair's 128 bits in SQL: DuckDB holds them in place of names, which take several times as much."""
    return f"md5_number(concat(strlen({image}), ':', {image}, {text}))"


def rows_at_once(steps: int) -> int:
    """Pairs whose errors are held at once."""
    return max(1000, min(MOST_ROWS, HELD // steps))


class ScoredPairs(NamedTuple):
    """Pairs with what the store holds of each. `keys`: position, i (image) and j (text), with names also
    image, text and source. Errors are [pairs, timesteps], NaN where there are none; of a pair with a
    failure they may be there."""

    keys: pa.RecordBatch
    conditional: np.ndarray
    unconditional: np.ndarray
    similarity: np.ndarray
    failure: pa.StringArray

    def slice(self, start: int, stop: int) -> ScoredPairs:
        """Some of the pairs."""
        keys, failure = (
            part.slice(start, max(0, stop - start)) for part in (self.keys, self.failure)
        )
        conditional, unconditional, similarity = (part[start:stop] for part in self[1:4])
        return ScoredPairs(keys, conditional, unconditional, similarity, failure)


class StoredLines:
    """The lines of a store, read once. `error` is l2, mse, l1 or huber.

    A pair's line is its whole plan, else what races stored of it, else why it failed; of equal ones the
    first. With `images`, sorted, lines are of these alone.
    """

    def __init__(
        self,
        store: Store,
        error: str,
        connection: duckdb.DuckDBPyConnection | None = None,
        images: pa.LargeStringArray | None = None,
    ) -> None:
        self.store, self.error, self.images = store, error, images
        self.connection = connection or connect()
        self.name = f"lines{next(_NAMES)}"
        self.errors = ErrorTable(0 if store.similarity else store.steps)
        self._elements, self._similarity = [np.zeros(0)], [np.zeros(0)]
        self._failures: dict[int, str] = {}
        self._parts: list[pa.RecordBatch] = []
        self._gone = False
        self._read()
        self.elements = np.concatenate(self._elements)
        self.similarity = np.concatenate(self._similarity)
        self.failed = np.array(sorted(self._failures), int)
        self.partial = self._join_parts()

    def pairs(
        self, examples: str, rows: int | None = None, names: bool = False, partial: bool = False
    ) -> Iterator[ScoredPairs]:
        """The pairs of one task's examples in order, up to `rows` at a time. Unless `partial`, one without
        all its errors is a failure."""
        named = ""
        if names:
            named = "p.image, p.text, list_extract(map_extract(p.groups, 'source'), 1) AS source,"
        cursor = self.connection.cursor()
        cursor.register("examples", examples_dataset([examples]))
        query = f"""
            WITH p AS ({PAIRS})
            SELECT p.position, p.i, p.j, {named} coalesce(s.line, -1) AS line,
                   coalesce(u.line, -1) AS base, p.unconditional
            FROM p LEFT JOIN {self.name} s ON s.key = {_key("p.image", "p.text")}
            LEFT JOIN {self.name} u
                ON u.key = CASE WHEN p.unconditional THEN {_key("p.image", "''")} END
            ORDER BY p.position, p.i, p.j
        """
        reader = cursor.sql(query).to_arrow_reader(rows or rows_at_once(self.store.steps))
        for batch in reader:
            yield self._scored(batch, partial)

    def close(self) -> None:
        """Give back what DuckDB holds of them."""
        self.connection.execute(f"DROP TABLE IF EXISTS {self.name}")

    def _read(self) -> None:
        """Put the keys of all lines into DuckDB, and what they hold into arrays."""
        keys = self._keys(self.store.dataset(self.images))
        reader = pa.RecordBatchReader.from_batches(KEYS, keys)
        connection, source = self.connection.cursor(), f"{self.name}_read"
        connection.register(source, reader)
        lines = (f'min(line) FILTER (WHERE "is" = {kind})' for kind in (WHOLE, PART, FAILED))
        try:
            connection.execute(
                f"CREATE TABLE {self.name} AS SELECT {_key('image', 'text')} AS key, "
                f"coalesce({', '.join(lines)}) AS line FROM {source} GROUP BY key"
            )
        except duckdb.Error as error:
            if not self._gone:
                raise
            text = "another run compacted it while it was read; the same command reads it whole"
            raise Unavailable(f"{self.store.uri}: {text}") from error
        connection.unregister(source)

    def _keys(self, data: ds.Dataset) -> Iterator[pa.RecordBatch]:
        store, start = self.store, 0
        wanted = ["image", "text", "failure"]
        if store.similarity:
            wanted += ["similarity"]
        else:
            wanted += ["positions", "elements", column(self.error)]
        for whole in self._batches(data, wanted):
            batch = whole if self.images is None else _of(whole, self.images)
            count = len(batch)
            failed = _flags(batch["failure"].is_valid())
            part = np.zeros(count, bool)
            if store.similarity:
                self._similarity.append(_floats(batch["similarity"]))
            else:
                part = _flags(batch["positions"].is_valid())
                self._elements.append(_floats(batch["elements"]))
                lists = batch[column(self.error)]
                self.errors.append(dense(lists, batch["positions"], store.steps))
            for place in np.flatnonzero(failed):
                self._failures[start + int(place)] = batch["failure"][place].as_py()
            kinds = np.where(failed, FAILED, np.where(part, PART, WHOLE)).astype(np.int8)
            numbers = np.arange(start, start + count)
            start += count
            keys = [batch["image"], batch["text"], pa.array(numbers), pa.array(kinds)]
            found = pa.RecordBatch.from_arrays(keys, schema=KEYS)
            if part.any():
                found = found.filter(pa.array(~(part & failed)))
                self._parts.append(found.filter(pa.array(kinds[~(part & failed)] == PART)))
            yield found

    def _batches(self, data: ds.Dataset, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The store's rows. A file of it is deleted only where another one has its rows."""
        try:
            yield from data.to_batches(
                columns=columns,
                batch_size=rows_at_once(self.store.steps),
                batch_readahead=2,
                fragment_readahead=2,
            )
        except FileNotFoundError:
            self._gone = True
            raise

    def _join_parts(self) -> np.ndarray:
        """Put what races stored of each pair into its line; the numbers of such lines. Where races of two
        blocks scored the same place of a pair, alike up to rounding, the first one in the store stays."""
        if not self._parts:
            return np.zeros(0, int)
        connection = self.connection.cursor()
        connection.register("parts", pa.Table.from_batches(self._parts))
        found = connection.sql(f"""
            SELECT s.line, parts.line AS part,
                   row_number() OVER (PARTITION BY s.line ORDER BY parts.line) AS number
            FROM parts JOIN {self.name} s ON s.key = {_key("image", "text")}
            QUALIFY bool_or(s.line = parts.line) OVER (PARTITION BY s.line)
        """).fetchnumpy()
        for number in range(2, int(found["number"].max(initial=0)) + 1):
            chosen = found["number"] == number
            self.errors.fill(found["line"][chosen], found["part"][chosen])
        self._parts = []
        return np.unique(found["line"])

    def _scored(self, batch: pa.RecordBatch, partial: bool) -> ScoredPairs:
        line, base = batch["line"].to_numpy(), batch["base"].to_numpy()
        names = [n for n in batch.schema.names if n not in ("line", "base", "unconditional")]
        keys = batch.select(names)
        if self.store.similarity:
            nothing = np.zeros((len(batch), 0))
            similarity = _take(self.similarity, line)
            failure = self._failure(line, base, np.zeros(0, bool) if partial else line < 0)
            return ScoredPairs(keys, nothing, nothing, similarity, failure)
        elements = _take(self.elements, line)
        elements = np.where(np.isnan(elements), _take(self.elements, base), elements)[:, None]
        found: list[np.ndarray] = []
        lacking = np.zeros(len(batch), bool)
        for numbers, used in ((line, True), (base, _flags(batch["unconditional"]))):
            errors = self.errors.take(numbers)
            lacks = numbers < 0
            if len(self.partial) and not partial:
                lacks |= np.isin(numbers, self.partial) & np.isnan(errors).any(1)
            lacking |= lacks & used
            found.append(error_values(errors, self.error, elements))
        conditional, unconditional = found
        similarity = np.full(len(batch), np.nan)
        failure = self._failure(line, base, np.zeros(0, bool) if partial else lacking)
        return ScoredPairs(keys, conditional, unconditional, similarity, failure)

    def _failure(self, line: np.ndarray, base: np.ndarray, lacking: np.ndarray) -> pa.StringArray:
        """Why each pair has no score: its own reason before that of the empty text."""
        if not lacking.any() and not len(self.failed):
            return pa.nulls(len(line), pa.string())
        reasons = np.full(len(line), None, object)
        reasons[np.flatnonzero(lacking)] = UNSCORED
        for numbers in (base, line):
            for place in np.flatnonzero(np.isin(numbers, self.failed)):
                reasons[place] = self._failures[int(numbers[place])]
        return pa.array(reasons, pa.string())


class LinesByTask:
    """The lines of a store for one task after another. A store of up to AT_ONCE rows is read once, and of a
    larger one what the task's images have."""

    def __init__(
        self, store: Store, error: str, connection: duckdb.DuckDBPyConnection | None = None
    ) -> None:
        self.store, self.error = store, error
        self.connection = connection or connect()
        self.by_task = store.rows > AT_ONCE
        self._lines: StoredLines | None = None

    def of(self, examples: str) -> StoredLines:
        """The lines for a file of examples, until the next one is asked for."""
        if self._lines is not None and not self.by_task:
            return self._lines
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        images = _images(examples, self.connection) if self.by_task else None
        self._lines = StoredLines(self.store, self.error, self.connection, images)
        return self._lines


def _images(examples: str, connection: duckdb.DuckDBPyConnection) -> pa.LargeStringArray:
    """The images of the examples that can be scored, sorted."""
    cursor = connection.cursor()
    cursor.register("examples", examples_dataset([examples]))
    query = (
        "SELECT DISTINCT unnest(images) AS image FROM examples WHERE failure IS NULL ORDER BY image"
    )
    found = cursor.sql(query).to_arrow_table()["image"].cast(pa.large_string()).combine_chunks()
    return found.chunk(0) if isinstance(found, pa.ChunkedArray) else found


def _of(batch: pa.RecordBatch, images: pa.LargeStringArray) -> pa.RecordBatch:
    """The rows of some sorted images. Where rows are sorted, few of them have to be looked for."""
    if not len(batch):
        return batch
    ends = pc.min_max(batch["image"])
    wanted = among(images, ends["min"].as_py(), ends["max"].as_py())
    return batch.filter(pc.is_in(batch["image"], wanted.cast(pa.string())))


def _flags(values: pa.BooleanArray) -> np.ndarray:
    return np.asarray(values.to_numpy(zero_copy_only=False), bool)


def _floats(values: pa.Array) -> np.ndarray:
    return np.asarray(values.to_numpy(zero_copy_only=False).astype(float))


def _take(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The values of these numbers, NaN where one is negative."""
    if not len(values):
        return np.full(len(numbers), np.nan)
    return np.where(numbers < 0, np.nan, values[numbers])
