"""Exact k nearest neighbours in blocks, the same on every machine, for any blocks in any order.

Embeddings are rounded to multiples of 2^-26, so their dot product in float64 has no rounding at all:
every sum of products is a multiple of 2^-52 below 2, whatever the order. Equal scores are ordered by
gallery position. A float32 product, whose error has a bound, only picks which pairs are worth that
exact score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.errors import InputError

Block = tuple[np.ndarray, np.ndarray]
GRID = 2.0**26
NORM_SLACK = 1e-3
EXACT_AT_ONCE = 128  # pairs that are gathered for the exact score together: they fit the cache

# An item of a gallery. `truth`: positions of what it is true for in the other gallery, its gold
# first. `embedding` is little-endian float32; null, with the reason in `failure`, if unreadable.
EMBEDDINGS = pa.schema(
    [
        ("row", pa.int64()),
        ("position", pa.int64()),
        ("truth", pa.list_(pa.int64())),
        ("failure", pa.string()),
        ("embedding", pa.binary()),
    ]
)


def on_grid(embeddings: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
    """Unit embeddings [N, W] rounded to multiples of 2^-26, float32.

    Raises InputError with `name(i)` for one that is not finite or longer than 1.
    """
    values = np.asarray(embeddings, np.float32)
    lengths = np.linalg.norm(values, axis=1)
    bad = np.flatnonzero(~(lengths <= 1 + NORM_SLACK))  # NaN compares false
    if len(bad):
        length = f"{lengths[bad[0]]:g}"
        raise InputError(f"the embedding of {name(int(bad[0]))} has length {length}, must be 1")
    return (np.rint(values * np.float32(GRID)) / np.float32(GRID)).astype(np.float32)


def to_table(
    row: int,
    positions: Sequence[int],
    truth: list[list[int]],
    failures: list[str | None],
    embeddings: np.ndarray | None,
) -> pa.Table:
    """Items as lines of EMBEDDINGS; embeddings [N, W] of all items, None if all failed."""
    content = [
        None if failure is not None or embeddings is None else embeddings[i].astype("<f4").tobytes()
        for i, failure in enumerate(failures)
    ]
    columns = [[row] * len(positions), list(positions), truth, failures, content]
    return pa.table(dict(zip(EMBEDDINGS.names, columns, strict=True)), schema=EMBEDDINGS)


def read_embeddings(table: pa.Table | pa.RecordBatch) -> Block:
    """Positions [N] and embeddings [N, W] of the lines that have one."""
    kept = table.filter(table["embedding"].is_valid())
    values = np.frombuffer(b"".join(kept["embedding"].to_pylist()), "<f4")
    positions = kept["position"].to_numpy()
    return positions, values.reshape(len(positions), -1) if len(positions) else values.reshape(0, 0)


def gallery_blocks(folder: str, paths: Sequence[str], size: int) -> Iterator[Block]:
    """Stream the gallery from embedding shards: `paths` in the file system of `folder`."""
    found, _ = storage.filesystem(folder)
    for path in paths:
        with found.open_input_file(path) as stream, parquet.ParquetFile(stream) as shard:
            for batch in shard.iter_batches(size, columns=["position", "embedding"]):
                block = read_embeddings(batch)
                if len(block[0]):
                    yield block


def top_k(
    queries: np.ndarray,
    excluded: Sequence[Sequence[int]],
    blocks: Iterable[Block],
    k: int,
    device: str = "cpu",
) -> np.ndarray:
    """The k best gallery positions of each query [Q, k], best first, -1 where there are fewer.

    `queries` [Q, W] and the blocks' embeddings are those of `on_grid`; `excluded` are gallery
    positions that a query must not get. Memory: the queries, a block, and their product. The
    result does not depend on blocks, order, threads or device.
    """
    near = _Near(queries, excluded, k, device)
    scores = np.full((len(queries), k), -np.inf)
    best = np.full((len(queries), k), -1, np.int64)
    for positions, embeddings in blocks:
        rows, columns = near(positions, embeddings, scores[:, -1])
        new = _exact(queries, embeddings, rows, columns)
        held = best >= 0
        rows = np.concatenate([np.nonzero(held)[0], rows])
        values = np.concatenate([scores[held], new])
        places = np.concatenate([best[held], positions[columns]])
        order = np.lexsort((places, -values, rows))
        rows, values, places = rows[order], values[order], places[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, np.arange(len(queries)))[rows]
        first = rank < k
        scores[rows[first], rank[first]] = values[first]
        best[rows[first], rank[first]] = places[first]
    return best


def _exact(
    queries: np.ndarray, block: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Exact scores of the pairs (rows[i], columns[i])."""
    parts = []
    for s in range(0, len(rows), EXACT_AT_ONCE):
        some = slice(s, s + EXACT_AT_ONCE)
        left, right = queries[rows[some]], block[columns[some]]
        parts.append(np.einsum("ij,ij->i", left.astype(np.float64), right.astype(np.float64)))
    return np.concatenate(parts) if parts else np.empty(0)


class _Near:
    """Picks the pairs of a block that may be among a query's k best, by a float32 product.

    NumPy multiplies on the CPU: in blocks its BLAS was as fast as faiss and faster than torch's
    (benchmarks/candidates.py).
    """

    def __init__(
        self, queries: np.ndarray, excluded: Sequence[Sequence[int]], k: int, device: str
    ) -> None:
        self.k, self.queries = k, queries
        # A float32 dot product of unit vectors is off by at most W 2^-24 in any order; twice that.
        self.slack = queries.shape[1] * 2.0**-23
        torch.backends.cuda.matmul.allow_tf32 = False
        self.on_gpu = None if device == "cpu" else torch.from_numpy(queries).to(device)
        self.rows = np.repeat(np.arange(len(excluded)), [len(e) for e in excluded])
        self.places = np.fromiter(chain.from_iterable(excluded), np.int64, len(self.rows))

    def __call__(self, positions: np.ndarray, block: np.ndarray, kth: np.ndarray) -> Block:
        """Rows and columns of the pairs; `kth` [Q] is the k-th exact score so far."""
        if self.on_gpu is None:
            product = torch.from_numpy(self.queries @ block.T)
        else:
            product = self.on_gpu @ torch.from_numpy(block.copy()).to(self.on_gpu.device).T
        rows, columns = self._excluded(positions)
        product[torch.from_numpy(rows), torch.from_numpy(columns)] = -torch.inf
        bar = kth - self.slack
        if np.isneginf(kth).any() and product.shape[1] > self.k:
            # The block's own k-th is a bar too, lowered by the errors of both that it compares.
            own = product.topk(self.k).values[:, -1].double().cpu().numpy()
            bar = np.maximum(bar, own - 2 * self.slack)
        bar = np.maximum(bar, -2.0)  # an excluded pair never passes
        passed = product >= torch.from_numpy(bar).float().to(product.device)[:, None]
        found = passed.nonzero().cpu().numpy()
        return found[:, 0], found[:, 1]

    def _excluded(self, positions: np.ndarray) -> Block:
        """Rows and columns of the excluded pairs that the block holds."""
        order = np.argsort(positions)
        place = np.searchsorted(positions, self.places, sorter=order)
        place = order[np.minimum(place, len(positions) - 1)]
        hit = positions[place] == self.places
        return self.rows[hit], place[hit]
