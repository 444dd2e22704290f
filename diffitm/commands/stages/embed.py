"""Embed images and captions with a CLIP in a Ray Data stage, and search each among the others.

Embeddings are made in groups of a fixed size, each always in one forward of one shape, so that they
do not depend on actors or restarts; the same kind of processor and threads give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import torch

from diffitm.core import images, storage
from diffitm.core.errors import InputError
from diffitm.core.schema import PairRow
from diffitm.distributed.item_stage import BLOCKS_PER_ACTOR, ItemStage, run_items
from diffitm.distributed.session import ActorPool
from diffitm.distributed.stages import Stage, run_stage, whole_files
from diffitm.retrieval import exact_knn
from diffitm.retrieval.candidate_lists import FOUND
from diffitm.retrieval.exact_knn import EMBEDDINGS
from diffitm.scoring.image_reader import load_images
from diffitm.store import pair_table

if TYPE_CHECKING:
    from diffitm.models.clip import ClipSource

GROUP = {"image": 32, "text": 256}  # items of a forward; a part of what an embedding depends on
ROWS_PER_BLOCK = 16
QUERIES = {"cpu": 4096, "cuda": 16384}
GALLERY = {"cpu": 1024, "cuda": 8192}  # items of a step of the search
LOOKED_AT = 20


@dataclass(frozen=True)
class Gallery:
    """Embedded items on disk: the folder, its whole shards (in the file system's own form)."""

    folder: str
    shards: list[str]
    size: int


class EmbedActor:
    """Loads the CLIP once; embeds groups of images or captions."""

    def __init__(self, kind: str, source: ClipSource, root: str, device: str, counter: Any) -> None:
        from diffitm.scoring.clip import ClipScorer

        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        self.kind, self.root, self.counter = kind, root, counter
        self.clip = ClipScorer(source, root, device)

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.concat_tables(self._group(**line) for line in table.to_pylist())

    def _group(self, row: int, start: int, names: list[str], truth: list[list[int]]) -> pa.Table:
        failures, values = self._images(names) if self.kind == "image" else self._texts(names)
        if values is not None:
            what = "image" if self.kind == "image" else "caption"
            values = exact_knn.on_grid(values[: len(names)], lambda i: f"{what} {names[i]!r}")
        self.counter.add.remote(len(names))
        positions = range(start, start + len(names))
        return exact_knn.to_table(row, positions, truth, failures, values)

    def _images(self, names: list[str]) -> tuple[list[str | None], np.ndarray | None]:
        rows = [PairRow(i, name, []) for i, name in enumerate(names)]
        loaded = load_images(rows, self.root, self.clip.preprocess)
        good = [item.value for item in loaded if item.failure is None]
        failures = [item.failure for item in loaded]
        if not good:
            return failures, None
        pixels = torch.zeros(GROUP["image"], *good[0].shape)
        for i, item in enumerate(loaded):
            if item.failure is None:
                pixels[i] = item.value
        return failures, self.clip.encode_images(pixels).cpu().numpy()

    def _texts(self, names: list[str]) -> tuple[list[str | None], np.ndarray]:
        padded = names + [""] * (GROUP["text"] - len(names))
        values = self.clip.encode_texts(padded)["embedding"].cpu().numpy()
        return [None] * len(names), values


class SearchActor:
    """Searches blocks of queries, streaming the gallery past each."""

    def __init__(
        self, gallery: Gallery, k: int, keep: int | None, device: str, counter: Any
    ) -> None:
        self.gallery, self.k, self.keep, self.device = gallery, k, keep, device
        self.counter = counter

    def __call__(self, table: pa.Table) -> pa.Table:
        positions, queries = exact_knn.read_embeddings(table)
        truth = dict(zip(table["position"].to_pylist(), table["truth"].to_pylist(), strict=True))
        keep = self.keep
        excluded = [[] if keep is None else truth[p][keep:] for p in positions.tolist()]
        best: dict[int, list[int]] = {p: [] for p in truth}  # unreadable queries stay empty
        if len(positions):
            blocks = exact_knn.gallery_blocks(
                self.gallery.folder, self.gallery.shards, GALLERY[self.device]
            )
            found = exact_knn.top_k(queries, excluded, blocks, self.k, self.device)
            best |= {p: [c for c in line if c >= 0] for p, line in _lines(positions, found)}
        self.counter.add.remote(len(truth))
        columns = {"position": list(best), "candidates": list(best.values())}
        return pa.table(columns, schema=FOUND)


def _lines(positions: np.ndarray, found: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    return zip(positions.tolist(), found.tolist(), strict=True)


def embed(
    work: str, kind: str, names: list[str], truth: list[list[int]],
    source: ClipSource, root: str, pool: ActorPool,
) -> Gallery:  # fmt: skip
    """Embed all images or texts (`kind`) that are not embedded yet, below the folder `work`."""
    what = f"embedding {'images' if kind == 'image' else 'captions'}"
    stage = ItemStage(
        what,
        storage.join(work, f"{kind}s", "embeddings"),
        EMBEDDINGS,
        EmbedActor,
        (kind, source, root),
        GROUP[kind],
        ROWS_PER_BLOCK,
    )
    folder = run_items(stage, names, pool, truth)
    return Gallery(folder, storage.readable_parquet(folder)[0], len(names))


def search(
    what: str, name: str, queries: Gallery, gallery: Gallery, k: int, keep: int | None,
    pool: ActorPool, block_size: int | None = None,
) -> str:  # fmt: skip
    """Search the k nearest of all queries that are not searched yet; the folder of what was found.

    It is called `name` and lies beside the queries. A query gets none of its own `truth` from the
    place `keep` on, or all of them if that is None.
    """
    folder = storage.join(storage.parent(queries.folder), name, "found")
    most = block_size or QUERIES[pool.device]
    rows = min(most, -(-queries.size // (BLOCKS_PER_ACTOR * pool.min_actors)))
    blocks = -(-queries.size // rows)
    stage = Stage(what, folder, FOUND, queries.shards, "position", rows, blocks, queries.size)
    run_stage(stage, SearchActor, (gallery, k, keep), pool)
    return folder


def failures(gallery: Gallery) -> dict[int, str]:
    """Unreadable items by position, and why."""
    table = whole_files(gallery.folder, EMBEDDINGS).to_table(
        columns=["position", "failure"], filter=ds.field("failure").is_valid()
    )
    return dict(sorted(zip(*(column.to_pylist() for column in table.columns), strict=True)))


def in_order(found: ds.Dataset) -> Iterator[tuple[int, list[int]]]:
    """What was found by query position; DuckDB sorts on disk where it must."""
    connection = pair_table.connect(found=found)
    query = "SELECT position, candidates FROM found ORDER BY position"
    for batch in connection.sql(query).to_arrow_reader(pair_table.BATCH):
        yield from zip(batch["position"].to_pylist(), batch["candidates"].to_pylist(), strict=True)


def located(root: str, paths: list[str]) -> list[str]:
    """Image paths that lie below the root: as they are, or their last part (the Karpathy files name
    a folder of their own).

    Raises InputError if none of the first lies there, before anything is embedded.
    """
    for bare in (False, True):
        found = [path.rpartition("/")[2] if bare else path for path in paths]
        looked = [storage.join(root, images.holder(path)) for path in found[:LOOKED_AT]]
        if any(map(storage.exists, looked)):
            if len(set(found)) < len(found):
                raise InputError(f"--images {root}: two images have the same name without folder")
            return found
    raise InputError(f"--images {root} lacks the captions file's images, such as {paths[0]}")
