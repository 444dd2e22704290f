"""Blocks of a work table's pairs, of about equal cost: cut when it is known how fast an actor is, and then
kept, as they are what a checkpoint names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.schema import BLOCK, WORK

READ = 2**16  # pairs
SECONDS = 60.0  # that an actor is to work on a block: what a kill costs it
LEAST_SECONDS = 1.0
SHARE = 1 / 3  # of an actor's part of what is left, so that the last blocks are short
MOST = 2**14  # pairs: an actor holds a line of each, and a rate knows nothing of reading images
UNMEASURED = 500  # forwards at most, where the rate is not known
# One row a block, in the order of the pairs: how many pairs, images and stored errors it has.
INDEX = pa.schema([(name, pa.int64()) for name in ("row", "pairs", "images", "stored")])


class Cost(NamedTuple):
    """What a pair and an image cost, in forwards of the model; an error that is stored is one less."""

    pair: int
    image: int = 0

    def total(self, images: int, pairs: int, stored: int = 0) -> int:
        """That of so many."""
        return images * self.image + pairs * self.pair - stored


@dataclass(frozen=True)
class Sizes:
    """How many forwards the next block is to have, with so many actors of so many forwards a second."""

    actors: int
    rate: float

    def next(self, left: float) -> float:
        """For so many forwards that are left."""
        part = SHARE * left / self.actors
        if not self.rate:
            return min(part, UNMEASURED)
        return min(SECONDS * self.rate, max(part, LEAST_SECONDS * self.rate))


def index_of(work: str) -> str:
    """Where the index of a work table's blocks lies."""
    return storage.join(storage.parent(work), "blocks.parquet")


def cut(work: str, cost: Cost, total: float, size: Callable[[float], float]) -> None:
    """Write the index of blocks. `size` says how many forwards the next one is to have where so many of
    `total` are left; it has no more than MOST pairs. A block ends between two images, unless that halves
    it."""
    write_index(work, _cuts(work, cost, total, size))


def write_index(work: str, blocks: Iterable[tuple[int, int, int]]) -> None:
    """Write the index of blocks of so many pairs, images and stored errors."""
    rows = [
        dict(zip(INDEX.names, (row, *counts), strict=True)) for row, counts in enumerate(blocks)
    ]
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows, INDEX), sink)
    storage.write_bytes(index_of(work), sink.getvalue().to_pybytes())


def _cuts(
    work: str, cost: Cost, left: float, size: Callable[[float], float]
) -> Iterator[tuple[int, int, int]]:
    """Pairs, images and stored errors of each block."""
    last: str | None = None
    begins, stored = np.empty(0, bool), np.empty(0, np.int64)
    for batch in _batches(work):
        images = pa.concat_arrays([pa.array([last], pa.string()), batch["image"]])
        last = images[-1].as_py()
        new = pc.fill_null(pc.not_equal(images[1:], images[:-1]), True)
        begins = np.concatenate([begins, new.to_numpy(zero_copy_only=False)])
        places = pc.fill_null(pc.list_value_length(batch["stored"]), 0)
        stored = np.concatenate([stored, places.to_numpy()])
        spent = np.cumsum(cost.pair - stored + cost.image * begins)
        done = at = 0
        while spent[-1] - done > (wanted := max(size(left), 1.0)) or len(spent) - at > MOST:
            fitting = int(np.searchsorted(spent, done + wanted, "right"))
            end = max(at + 1, min(fitting, at + MOST))
            others = at + 1 + np.flatnonzero(begins[at + 1 : end + 1])
            if len(others) and spent[others[-1] - 1] - done >= (spent[end - 1] - done) / 2:
                end = int(others[-1])
            yield _counts(begins[at:end], stored[at:end])
            left -= spent[end - 1] - done
            at, done = end, spent[end - 1]
        begins, stored = begins[at:], stored[at:]
    if len(begins):
        yield _counts(begins, stored)


def _counts(begins: np.ndarray, stored: np.ndarray) -> tuple[int, int, int]:
    return len(begins), int(begins.sum()), int(stored.sum())


def _batches(work: str) -> Iterator[pa.RecordBatch]:
    found, path = storage.filesystem(work)
    with found.open_input_file(path) as source:
        yield from parquet.ParquetFile(source).iter_batches(READ)


def read_index(work: str) -> pa.Table | None:
    """The index of a work table's blocks, none before they are cut."""
    uri = index_of(work)
    if not storage.exists(uri):
        return None
    found, path = storage.filesystem(uri)
    return parquet.read_table(path, schema=INDEX, filesystem=found)


def read_blocks(work: str) -> Iterator[pa.Table]:
    """A table of one row a block, in order."""
    index, batches = read_index(work), _batches(work)
    assert index is not None
    left = WORK.empty_table()
    for row, pairs in zip(index["row"].to_pylist(), index["pairs"].to_pylist(), strict=True):
        while len(left) < pairs:
            left = pa.concat_tables([left, pa.Table.from_batches([next(batches)], WORK)])
        yield block(row, left[:pairs])
        left = left[pairs:]


def block(row: int, pairs: pa.Table) -> pa.Table:
    """The block of these pairs, a table of one row."""
    images, texts, stored = list[str](), list[list[str]](), list[list[list[int]]]()
    for image, text, places in zip(*(pairs[name].to_pylist() for name in WORK.names), strict=True):
        if not images or images[-1] != image:
            images.append(image)
            texts.append([])
            stored.append([])
        texts[-1].append(text)
        stored[-1].append(places or [])
    is_new = pairs["stored"].null_count == len(pairs)
    line = {"row": row, "images": images, "texts": texts, "stored": None if is_new else stored}
    return pa.Table.from_pylist([line], BLOCK)
