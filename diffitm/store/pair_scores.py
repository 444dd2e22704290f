"""Scores of people's own pairs as one Parquet file, and what a report says of it; streamed, never held."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import parquet

from diffitm.core import storage
from diffitm.metrics.score import averaged, normalised_score, other_dtype
from diffitm.store.pair_table import batched, connect, examples_dataset
from diffitm.store.score_store import Store
from diffitm.store.stored_lines import LinesByTask, ScoredPairs, rows_at_once

BINS = 40
PAIRS = [
    ("row", pa.int64()),  # the pair's place in the input
    ("image", pa.string()),
    ("text", pa.string()),
    ("source", pa.string()),
    ("score", pa.float32()),  # higher is better: the normalised score, or the model's single one
]
ERRORS = [("conditional_error", pa.float32()), ("unconditional_error", pa.float32())]
MEASURED = [("measured", pa.int32())]
BY_TIMESTEP = [("conditional_errors", pa.list_(pa.float32())),
               ("unconditional_errors", pa.list_(pa.float32()))]  # fmt: skip


@dataclass(frozen=True)
class PairSummary:
    """What the scores of a run look like."""

    pairs: int
    failures: int
    compared: int  # pairs that all below is of: with a score, of raced ones at all timesteps
    quantiles: dict[str, float]  # '1%' .. '99%'
    edges: list[float]  # of the histogram's bins, one more than there are counts
    counts: list[int]
    best: list[dict[str, Any]]
    worst: list[dict[str, Any]]
    failed: list[dict[str, Any]]  # the first of them
    sources: list[dict[str, Any]]  # source, pairs, failures, mean, median, low and high quartile


def write_pairs(
    out: str,
    examples: str,
    store: Store,
    error: str,
    weights: np.ndarray | None = None,
    by_timestep: bool = False,
    raced: bool = False,
) -> str:
    """OUT/pairs.parquet: every pair of the input in its order, with its score or why it has none, and behind
    them the rows that could not be asked for; its path.

    `error` is averaged over the timesteps, by `weights` if there are any. Of a pair that was `raced` it is
    averaged over those that were scored; `measured` says how many they are.
    """
    fields = PAIRS + ([] if store.similarity else ERRORS + (BY_TIMESTEP if by_timestep else []))
    fields = fields + (MEASURED if raced else [])
    schema = pa.schema([*fields, ("failure", pa.string())])
    path = storage.join(out, "pairs.parquet")
    storage.make_folder(out)
    rows = max(1000, rows_at_once(store.steps) // 2)
    lines = LinesByTask(store, error).of(examples)
    with (
        storage.replacing(path) as sink,
        parquet.ParquetWriter(sink, schema, compression="zstd") as writer,
    ):
        for pairs in lines.pairs(examples, rows, names=True, partial=raced):
            columns = _columns(pairs, store, weights)
            writer.write_table(pa.table({name: columns[name] for name in schema.names}, schema))
        for batch in _lost(examples):
            absent = {
                name: pa.nulls(len(batch), schema.field(name).type)
                for name in schema.names
                if name not in batch.schema.names
            }
            given = {name: batch[name] for name in batch.schema.names}
            writer.write_table(pa.table({n: {**absent, **given}[n] for n in schema.names}, schema))
    return path


def _columns(pairs: ScoredPairs, store: Store, weights: np.ndarray | None) -> dict[str, Any]:
    failed = np.array(pairs.failure.is_valid())
    columns: dict[str, Any] = {
        "row": pairs.keys["position"],
        "image": pairs.keys["image"],
        "text": pairs.keys["text"],
        "source": pairs.keys["source"],
        "failure": pairs.failure,
    }
    if store.similarity:
        values = pairs.similarity
    else:
        found = {"conditional": pairs.conditional, "unconditional": pairs.unconditional}
        measured = ~np.isnan(found["conditional"]) & ~np.isnan(found["unconditional"])
        columns["measured"] = measured.sum(1)
        kinds = {name: _mean(errors, measured, weights) for name, errors in found.items()}
        for name, errors in found.items():
            columns[f"{name}_error"] = pa.array(kinds[name].astype(np.float32), mask=failed)
            flat = pa.array(errors.ravel().astype(np.float32), from_pandas=True)  # NaN is null
            offsets = np.arange(len(errors) + 1, dtype=np.int32) * errors.shape[1]
            lists = pa.ListArray.from_arrays(offsets, flat)
            columns[f"{name}_errors"] = pc.if_else(pairs.failure.is_null(), lists, None)
        values = normalised_score(kinds["conditional"], kinds["unconditional"])
    lost = failed | ~np.isfinite(values.astype(float))
    columns["score"] = pa.array(values.astype(np.float32), mask=lost)
    odd = pa.array(lost & ~failed)
    why = f"the score is not finite{other_dtype(store.config.get('dtype'))}"
    columns["failure"] = pc.if_else(odd, why, pairs.failure)
    return columns


def _mean(errors: np.ndarray, measured: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Means [pairs] over what was measured of errors [pairs, N], NaN where that is nothing."""
    if measured.all():
        return averaged(errors, weights)
    used = measured * (1.0 if weights is None else weights)
    with np.errstate(invalid="ignore"):
        return np.asarray((np.where(measured, errors, 0) * used).sum(1) / used.sum(1))


def _lost(examples: str) -> Any:
    """Rows of the input that could not be asked for: row, image, text, source, failure."""
    query = """
        SELECT position AS row, images[1] AS image, texts[1] AS text,
               list_extract(map_extract(groups, 'source'), 1) AS source, failure
        FROM examples WHERE failure IS NOT NULL ORDER BY position
    """
    connection = connect(examples=examples_dataset([examples]))
    return connection.sql(query).to_arrow_reader(50_000)


def summarise(path: str, shown: int) -> PairSummary:
    """What pairs.parquet holds: `shown` of the best, the worst and the failures."""
    found, name = storage.filesystem(path)
    connection = connect(pairs=ds.dataset(name, filesystem=found, format="parquet"))

    def ask(query: str) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = connection.sql(query).to_arrow_table().to_pylist()
        return lines

    # Of pairs that were raced, those that were scored at all timesteps can be compared.
    raced = "measured" in connection.table("pairs").columns
    compared = "score IS NOT NULL"
    if raced:
        compared += " AND measured = (SELECT max(measured) FROM pairs)"
    (whole,) = ask("SELECT count(*) AS pairs, count(failure) AS failures FROM pairs")
    (span,) = ask(
        f"SELECT count(*) AS pairs, min(score) AS low, max(score) AS high FROM pairs WHERE {compared}"
    )
    shares = [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99]
    quantiles: dict[str, float] = {}
    edges: list[float] = []
    counts = [0] * BINS
    if span["low"] is not None:
        (values,) = ask(f"SELECT quantile_cont(score, {shares}) AS q FROM pairs WHERE {compared}")
        quantiles = {f"{share:.0%}": float(q) for share, q in zip(shares, values["q"], strict=True)}
        low, high = span["low"], span["high"]
        width = (high - low) / BINS or 1.0
        edges = [low + width * i for i in range(BINS + 1)]
        for line in ask(f"""
            SELECT least(CAST(floor((score - {low}) / {width}) AS INTEGER), {BINS - 1}) AS bin,
                   count(*) AS count
            FROM pairs WHERE {compared} GROUP BY bin"""):
            counts[line["bin"]] = line["count"]
    some = f"SELECT row, image, text, source, score FROM pairs WHERE {compared} ORDER BY score"
    return PairSummary(
        pairs=whole["pairs"],
        failures=whole["failures"],
        quantiles=quantiles,
        edges=edges,
        counts=counts,
        best=ask(f"{some} DESC, row LIMIT {shown}"),
        worst=ask(f"{some}, row LIMIT {shown}"),
        failed=ask(f"""
            SELECT row, image, text, failure FROM pairs WHERE failure IS NOT NULL
            ORDER BY row LIMIT {shown}"""),
        compared=span["pairs"],
        sources=ask(f"""
            SELECT source, count(*) AS pairs, count(failure) AS failures,
                   avg(score) FILTER ({compared}) AS mean,
                   quantile_cont(score, 0.25) FILTER ({compared}) AS low,
                   median(score) FILTER ({compared}) AS median,
                   quantile_cont(score, 0.75) FILTER ({compared}) AS high
            FROM pairs WHERE source IS NOT NULL GROUP BY source ORDER BY mean DESC NULLS LAST"""),
    )


def write_raced_top(path: str, out: str, of: str, winners: Iterable[tuple[str, str]]) -> str:
    """OUT/top.parquet: the (image, text) that races found to be the best of each text or image, by score."""
    found, name = storage.filesystem(path)
    schema = pa.schema([("image", pa.string()), ("text", pa.string())])
    with tempfile.TemporaryDirectory(prefix="diffitm-") as folder:
        file = f"{folder}/top.parquet"
        with parquet.ParquetWriter(file, schema) as writer:
            for batch in batched(winners, 1000):
                columns = dict(zip(schema.names, zip(*batch, strict=True), strict=True))
                writer.write_table(pa.table(columns, schema))
        pairs = ds.dataset(name, filesystem=found, format="parquet")
        connection = connect(pairs=pairs, top=ds.dataset(file))
        other = "image" if of == "text" else "text"
        query = f"""
            SELECT {of}, row_number() OVER (PARTITION BY {of} ORDER BY score DESC, row) AS rank,
                   {other}, score, row, measured
            FROM (SELECT DISTINCT ON (image, text) image, text, score, row, measured FROM pairs
                  WHERE score IS NOT NULL ORDER BY image, text, row)
            SEMI JOIN top USING (image, text) ORDER BY {of}, rank
        """
        return _write_top(connection, query, out)


def write_top(path: str, out: str, k: int, of: str) -> str:
    """OUT/top.parquet: the `k` best images of each text (`of` 'text') or texts of each image ('image'); of
    equal scores the earlier ones."""
    found, name = storage.filesystem(path)
    connection = connect(pairs=ds.dataset(name, filesystem=found, format="parquet"))
    order = f"(PARTITION BY {of} ORDER BY score DESC, row)"
    query = f"""
        SELECT {of}, rank, {"image" if of == "text" else "text"}, score, row FROM (
            SELECT *, row_number() OVER {order} AS rank FROM pairs WHERE score IS NOT NULL)
        WHERE rank <= {k} ORDER BY {of}, rank
    """
    return _write_top(connection, query, out)


def _write_top(connection: duckdb.DuckDBPyConnection, query: str, out: str) -> str:
    top = storage.join(out, "top.parquet")
    reader = connection.sql(query).to_arrow_reader(50_000)
    with storage.replacing(top) as sink, parquet.ParquetWriter(sink, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
    return top
